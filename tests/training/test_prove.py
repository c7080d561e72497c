"""The proof of resuming: it kills processes for real, and it finds every difference that it looks for."""

from __future__ import annotations

import json
import random
import shutil
import sys

import pytest
from helpers.tiny_jax import run_config, write_run_inputs

from r1vl_jax import prove_resume
from r1vl_jax.training import prove as proving
from r1vl_jax.training.prove import MOMENTS, Proof, differences, prove

# A program that behaves as a run does, without a model: eight rows, a state every second one, a warm-up, an export.
RUN = """
import json, os, pathlib, sys, time

folder, fault = pathlib.Path(sys.argv[1]), sys.argv[2]
states = folder / "checkpoints" / "sft"
done = max([int(path.name) for path in states.glob("*") if path.name.isdecimal()], default=0)
rows = (folder / "metrics.jsonl").read_text().splitlines()[:done] if done else []
folder.mkdir(parents=True, exist_ok=True)
(folder / "metrics.jsonl").write_text("".join(row + "\\n" for row in rows))
(folder / "rollouts.jsonl").write_text("")
for step in range(done + 1, 9):
    time.sleep(0.05)
    with open(folder / "metrics.jsonl", "a") as file:
        loss = step + (fault == "forgets" and done > 0)
        file.write(json.dumps({"stage": "sft", "step": step, "loss": loss, "seconds/train": time.time()}) + "\\n")
    if step % 2 == 0:
        draft = states / f"{step}.orbax-checkpoint-tmp"
        (draft / "host").mkdir(parents=True, exist_ok=True)
        (draft / "host" / "metadata").write_text(json.dumps({"checksums": {"a": str(step)}}))
        time.sleep(0.05)
        os.rename(draft, states / str(step))
for name in ("warmup", "export"):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "config.json").write_text("{}")
    time.sleep(0.05)
sys.exit(fault == "fails")
"""


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Replaces the run by RUN; the argument is its fault."""
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(
        proving,
        "_command",
        lambda arguments, folder: [sys.executable, str(tmp_path / "run.py"), str(folder), *arguments],
    )
    monkeypatch.setitem(MOMENTS, "at the start", (MOMENTS["at the start"][0], 0.3))


def test_a_run_that_resumes_well(arguments, tmp_path):
    said = []
    proof = prove(["none"], tmp_path / "a", tmp_path / "b", kills=6, seed=1, say=said.append)
    assert proof.differences == [] and 1 <= proof.killed <= 6 and proof.starts >= proof.killed
    assert set(proof.kills) <= set(MOMENTS) and len(said) == 1 + proof.killed
    again = prove(
        ["none"], tmp_path / "a", tmp_path / "c", kills=1, seed=2, say=said.append
    )  # the straight run is kept
    assert again.differences == [] and len(said) == 1 + proof.killed + again.killed


def test_a_run_that_forgets_is_found_out(arguments, tmp_path):
    moments = {"after some steps": (lambda rng: proving._steps(3), 0.0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proving, "MOMENTS", moments)
        proof = prove(["forgets"], tmp_path / "a", tmp_path / "b", kills=1, seed=0, say=lambda text: None)
    assert proof.killed == 1 and proof.differences == ["metrics.jsonl: sft step 3: loss"]


def test_a_run_that_fails_by_itself(arguments, tmp_path):
    with pytest.raises(RuntimeError, match=r"a: exit code 1"):
        prove(["fails"], tmp_path / "a", tmp_path / "b", kills=1, seed=0, say=lambda text: None)


def test_every_kind_of_difference(arguments, tmp_path):
    prove(["none"], tmp_path / "a", tmp_path / "b", kills=1, seed=0, say=lambda text: None)
    a, b = tmp_path / "a", shutil.copytree(tmp_path / "b", tmp_path / "other")
    assert list(differences(a, b)) == []
    (b / "export" / "config.json").write_text("[]")
    (b / "warmup" / "more").write_text("")
    (b / "checkpoints" / "sft" / "8" / "host" / "metadata").write_text("{}")
    (b / "rollouts.jsonl").write_text(json.dumps({"stage": "sft", "step": 1}) + "\n")
    assert list(differences(a, b)) == [
        "warmup/more", "export/config.json", "checkpoints/sft: the last train state", "rollouts.jsonl: 0 and 1 rows",
    ]  # fmt: skip


def test_moments_are_seen(tmp_path):
    rng = random.Random(0)
    moments = {name: make(rng) for name, (make, _) in MOMENTS.items()}
    assert [name for name, moment in moments.items() if moment(tmp_path)] == ["at the start"]
    (tmp_path / "checkpoints" / "sft" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / ".warmup.partial").mkdir()
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "config.json").write_text("")
    (tmp_path / "metrics.jsonl").write_text("{}\n" * 9)
    assert [name for name, moment in moments.items() if moment(tmp_path)] == list(MOMENTS)


def test_the_command_refuses_a_wrong_configuration(tmp_path, capsys):
    assert prove_resume.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("found", [[], ["export/config.json"]])
def test_runs_that_differ_are_kept(tmp_path, monkeypatch, capsys, found):
    """A temporary folder is removed only if there is nothing to look at in it."""
    monkeypatch.setattr(prove_resume, "prove", lambda *args, **options: Proof({"at the start": 2}, 3, found))
    monkeypatch.setattr(prove_resume.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {sft: {path: s}, rl: {path: r}}\n")
    assert prove_resume.main(["--config", str(tmp_path / "run.yaml")]) == len(found)
    assert (tmp_path / "runs").exists() == bool(found)
    said = capsys.readouterr().out
    assert said.startswith("2 kills (2 at the start), 3 starts\n")
    assert said.endswith(
        f"differs: export/config.json\nboth runs are in {tmp_path / 'runs'}\n" if found else "every bit is the same\n"
    )


@pytest.mark.slow
def test_the_command_on_a_real_run(tmp_path, capsys):
    inputs = write_run_inputs(tmp_path / "inputs")
    run_config(inputs, tmp_path / "run")
    command = ["--config", str(tmp_path / "run.yaml"), "--folder", str(tmp_path / "proof"), "--kills", "4"]
    assert prove_resume.main(command) == 0
    assert "every bit is the same" in capsys.readouterr().out
    assert prove_resume.main(command) == 2
    assert "exists; name another folder" in capsys.readouterr().err
