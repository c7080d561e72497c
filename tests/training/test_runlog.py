"""Logs of a run: read row by row, cut where a resumed run starts; the curves drawn from them."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers.tiny_jax import read_lines, run_config
from PIL import Image

from r1vl_jax import config as configs
from r1vl_jax.common.files import read_json_lines
from r1vl_jax.errors import ConfigError
from r1vl_jax.reporting.curves import PANELS, heldout_table, plot_metrics, read_metrics
from r1vl_jax.training import run_folder as runlog
from r1vl_jax.training.run_folder import RunLog

ROWS = [{"stage": stage, "step": step} for stage in ("sft", "step_grpo") for step in (1, 2, 3)]
HELDOUT = {"stage": "step_grpo", "step": 2, "event": "heldout"}


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


@pytest.mark.parametrize("tail", ["", '{"stage": "sf', "{", '{"a": "\\'])
def test_a_half_written_last_row_is_left_out(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    assert list(read_json_lines(path)) == read_metrics(tmp_path) == []
    write(path, ROWS, tail)
    assert list(read_json_lines(path)) == read_metrics(tmp_path) == ROWS


def test_any_other_broken_row_is_an_error(tmp_path):
    write(tmp_path / "metrics.jsonl", ROWS[:1], "{half\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a row"):
        read_metrics(tmp_path)


@pytest.fixture
def log(tmp_path):
    return RunLog(run_config(tmp_path, tmp_path / "run"))


def test_forget_after(log):
    """Rows of later steps of that stage go; an unfinished held-out judgement goes, a finished one stays."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        write(log.folder / name, [*ROWS[:5], HELDOUT, ROWS[5]], '{"stage": "step_')
    log.truncate_after("step_grpo", 2)
    kept = [*ROWS[:5], HELDOUT]
    assert read_lines(log.folder / "metrics.jsonl") == read_lines(log.folder / "rollouts.jsonl") == kept
    write(log.folder / "metrics.jsonl", ROWS)  # the judgement's own row is missing: its rollouts are made again
    log.truncate_after("step_grpo", 2)
    assert read_lines(log.folder / "rollouts.jsonl") == ROWS[:5]
    assert not list(log.folder.glob("*.tmp"))


def test_a_log_is_replaced_whole_or_not_at_all(log, monkeypatch):
    """The old file stays as it is where the new one cannot be finished; rows are read one by one."""
    path = log.folder / "rollouts.jsonl"
    write(path, ROWS)
    before, seen = path.read_bytes(), []

    def rows(path, on_damage):
        for row in ROWS if path.name == "rollouts.jsonl" else ():
            if seen and row["step"] == 3:
                raise OSError("disk full")
            seen.append(row)
            yield row

    monkeypatch.setattr(runlog, "read_json_lines", rows)
    with pytest.raises(OSError, match="disk full"):
        log.truncate_after("sft", 1)
    assert path.read_bytes() == before and len(seen) == 2


def curve(stage, steps, **values):
    return [{"stage": stage, "step": step, **{k: v / step for k, v in values.items()}} for step in range(1, steps + 1)]


def test_curves(tmp_path):
    """Two stages of different length, one smoothed; one stage; none. Every metric that a panel names is drawn."""
    names = {name: 1.0 for panel in PANELS for name in panel.names}
    heldout = {"event": "heldout", "reward": 1.5, "correct": 0.5, "validity": 1.0, "key_steps": 0.25}
    first = [{"stage": "sft", "step": 0, **heldout}]
    sft, rl = curve("sft", 100, loss=2.0, entropy=1.0), curve("step_grpo", 5, **names)
    for rows in (first + sft + rl, sft, rl, first, []):
        write(tmp_path / "metrics.jsonl", rows)
        with Image.open(plot_metrics(tmp_path)) as picture:
            assert picture.size == (1430, 990)
            colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
        assert any(len(set(colour)) > 1 for colour in colours) == bool(rows)  # an empty plot is gray
    write(tmp_path / "metrics.jsonl", first + sft)
    assert heldout_table(tmp_path).splitlines()[1].split() == [
        "before",
        "training",
        "1.500",
        "50.0%",
        "100.0%",
        "25.0%",
    ]


def test_resume_refuses_settings_that_change_what_was_trained(tmp_path):
    """The model, the data and the rates stay; how often to save, and how long to go on, may change."""

    def config(**changes):
        sections = {"model": {"path": "m"}, "data": {"sft": {"path": "s"}, "rl": {"path": "r"}}, **changes}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), **sections}))
        return configs.load(path)

    RunLog(config()).metrics("sft", 1, {})
    RunLog(config(checkpoint={"every": 7}, sft={"steps": 9}, rl={"steps": 9}), resume=True)
    for key, change in {
        "rl.beta": {"rl": {"beta": 0.5, "steps": 9}},
        "model.path": {"model": {"path": "other"}},
    }.items():
        with pytest.raises(ConfigError, match=f"{key} was .* is now"):
            RunLog(config(**{"sft": {"steps": 9}, **change}), resume=True)
    (tmp_path / "run" / "checkpoints" / "step_grpo").mkdir(parents=True)
    with pytest.raises(ConfigError, match="sft.steps was 9"):
        RunLog(config(sft={"steps": 10}, rl={"steps": 9}), resume=True)


def test_resume_takes_other_means_and_runs_of_earlier_versions(tmp_path):
    """How it is computed may change; a key that a run did not have yet counts as its default."""
    path = tmp_path / "config.yaml"

    def config(**model):
        sections = {"model": {"path": "m", **model}, "data": {"sft": {"path": "s"}, "rl": {"path": "r"}}}
        sections |= {"rl": {"reference": "host"}, "rehearsal": "always"} if model else {}
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), **sections}))
        return configs.load(path)

    RunLog(config()).metrics("sft", 1, {})
    RunLog(config(remat="matmuls", attention="xla", kernels="reference", shared_prefix=False), resume=True)
    written = tmp_path / "run" / "config.yaml"
    tree = yaml.safe_load(written.read_text())
    del tree["rl"]["average"], tree["rl"]["rewards"], tree["compilation_cache"]
    written.write_text(yaml.safe_dump(tree))
    RunLog(config(), resume=True)
    tree["rl"]["average"] = "token"
    written.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="rl.average was 'token' in this run and is now 'sequence'"):
        RunLog(config(), resume=True)
