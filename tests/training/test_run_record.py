"""run.json says with what each start of a run ran, and no file of a run has a secret of the environment."""

from __future__ import annotations

import json
import subprocess

import jax
import pytest
from helpers.tiny_jax import run_config, write_run_inputs

from r1vl_jax.config import load
from r1vl_jax.data.sources import open_source
from r1vl_jax.training import run_record
from r1vl_jax.training.run import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


def test_every_start_is_recorded(inputs, tmp_path, monkeypatch):
    secrets = {
        name: f"private-{name}" for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    config = run_config(inputs, run, sft={"steps": 1}, rl={"steps": 1})
    train(config)
    (first,) = json.loads((run / "run.json").read_text())["starts"]
    assert first["versions"]["jax"] == jax.__version__ and first["versions"]["python"].startswith("3.")
    assert set(first["versions"]) == {"python", *run_record.PACKAGES}
    assert first["devices"] == {"platform": "cpu", "kind": "cpu", "count": jax.device_count()}
    assert first["config"] == json.loads(json.dumps(first["config"])) and first["config"]["sft"]["steps"] == 1
    sections = (config.data.sft, config.data.rl)
    assert first["data"] == {section.name: open_source(section).fingerprint for section in sections}
    longer = load(tmp_path / "run.yaml", ["--rl.steps", "2"])
    train(longer, resume=True)
    one, two = json.loads((run / "run.json").read_text())["starts"]
    assert one == first and two["config"]["rl"]["steps"] == 2 and two["time"] >= one["time"]
    assert two["data"] and two["data"].items() <= first["data"].items()
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if b"private-" in path.read_bytes()]


def test_a_damaged_record_stops_no_run(inputs, tmp_path):
    config = run_config(inputs, tmp_path / "run")
    for text in ("{", "[]", '{"starts": 3}', '{"starts": [3]}', "\xff"):
        (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
        run_record.record_start(tmp_path, config)
        assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1
        assert (tmp_path / "run.json.damaged").read_bytes() == text.encode("latin-1")


def test_the_commit_and_whether_it_is_dirty(tmp_path):
    def git(*arguments):
        names = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *names, *arguments], check=True, capture_output=True, text=True
        )

    file = tmp_path / "a.py"
    file.write_text("1")
    assert run_record._commit(file) is None  # no checkout
    git("init", "-q")
    assert run_record._commit(file) is None  # a checkout that has not this file
    git("add", "a.py")
    git("commit", "-qm", "m")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert run_record._commit(file) == {"commit": commit, "dirty": False}
    file.write_text("2")
    assert run_record._commit(file) == {"commit": commit, "dirty": True}
