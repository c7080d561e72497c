"""Plans: targets, the command on devices that this machine can compile for, what fits and what would help."""

import dataclasses
import json
import math
import re

import pytest
import yaml
from helpers.paths import ROOT, SHARED
from helpers.tiny_jax import run_config, write_run_inputs

from r1vl_jax import plan
from r1vl_jax.config import load
from r1vl_jax.errors import ConfigError
from r1vl_jax.planning import targets
from r1vl_jax.planning.planner import Planner, flags, replaced
from r1vl_jax.planning.targets import parse_target

GRPO = ["rollout_weights", "prefill", "decode", "compact", "advantages", "reference", "gradient", "update"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """`prepare` sets the environment of a process of its own; here it must not outlive the test."""
    for name in (
        "JAX_PLATFORMS",
        "TF_CPP_MIN_LOG_LEVEL",
        "TPU_SKIP_MDS_QUERY",
        "ALLOW_MULTIPLE_LIBTPU_LOAD",
        "XLA_FLAGS",
    ):
        monkeypatch.setenv(name, targets.os.environ.get(name, ""))


@pytest.mark.parametrize(
    ("text", "size"),
    [("h100:4", (4, 1)), ("h100:8x4", (8, 4)), ("h100:32", (8, 4)), ("v5p:32", (32, 1)), ("cpu:2", (2, 1))],
)
def test_targets(text, size):
    target = parse_target(text)
    assert (target.per_host, target.hosts, target.count) == (*size, math.prod(size))
    assert parse_target(str(target)) == target


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("h100", "expected NAME:COUNT"),
        ("h100:0", "expected NAME:COUNT"),
        ("h100:x4", "expected NAME:COUNT"),
        ("h100:12", "a host has 8"),
        ("h100:16x2", "a host has 8"),
        ("cpu:00", "expected NAME:COUNT"),
        ("h100:8x00", "expected NAME:COUNT"),
        ("h100:\u0664", "expected NAME:COUNT"),
        ("h900:4", "expected one of cpu, h100"),
        ("v5e:4096", "the largest slice is 16x16"),
    ],
)
def test_targets_that_are_none(text, problem):
    with pytest.raises(ConfigError, match=problem):
        parse_target(text).devices()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "platform: qpu\nper_host: 1\n",
        "platform: cuda\n",
        "a: [\n",
        "memory: x\n",
        "platform: cpu\nper_host: 0\n",
        "platform: cpu\nper_host: 1\nmemory: -1\n",
        "platform: cpu\nper_host: 1\nflops: {peak: 0}\n",
        "platform: cpu\nper_host: 1\nflops: {achieved: 1}\n",
        "platform: tpu\nper_host: 4\n",
        "platform: tpu\nper_host: 4\ntopologies: [4]\n",
    ],
)
def test_a_file_that_holds_no_device(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml: not the facts of a device"):
        parse_target(f"{tmp_path / 'mine.yaml'}:1")


def test_every_device_has_its_facts():
    for file in targets.DEVICES.glob("*.yaml"):
        device = parse_target(f"{file.stem}:1").device
        if device.platform != "cpu":
            assert 1e10 < device.usable <= device.memory < 1e12
            assert 1e14 < device.rate("flops") < 1e15 and 5e11 < device.rate("bandwidth") < 1e13
    assert parse_target("h100:1").device.usable == pytest.approx(0.92 * 84.93e9)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_xla_is_told_the_facts_of_an_h100():
    """As in XLA's own description, where we say something."""
    ours = targets._gpu_text(parse_target("h100:1").device).replace(" minor: 0", "")
    theirs = (SHARED / "targets" / "h100_80gb.textproto").read_text()
    fields = [dict(re.findall(r"(\w+): ([\d.]+)", text.partition("platform_name")[0])) for text in (ours, theirs)]
    assert fields[0] == fields[1]
    device = parse_target(f"{SHARED / 'targets' / 'h100_80gb.textproto'}:4").device
    assert (device.memory, device.rate("bandwidth"), targets._gpu_text(device)) == (84929347584, 3352320000000, theirs)


def test_the_command_plans_both_stages(inputs, tmp_path, capsys):
    run_config(inputs, tmp_path / "run")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--target", "cpu:1", "--images", "0", "--prompt", "64"]
    assert plan.main([*arguments, "--json", str(tmp_path / "plan.json")]) == 0
    sft, grpo = json.loads((tmp_path / "plan.json").read_text())
    assert [program["name"] for program in sft["programs"]] == ["gradient", "update"]
    assert [program["name"] for program in grpo["programs"]] == GRPO
    for stage in (sft, grpo):
        assert stage["fits"] and stage["usable"] is None
        assert stage["peak"] == max(p["arguments"] + p["temporaries"] + p["beside"] for p in stage["programs"])
    by_name = {program["name"]: program for program in grpo["programs"]}
    assert by_name["gradient"]["times"] == 2 and by_name["decode"]["moved"] > by_name["compact"]["moved"]
    out = capsys.readouterr().out
    assert "sft on mesh" in out and "prompt 64 tokens" in out and "peak 0.0" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "9000"], "a prompt of 9000 tokens with 1 image(s) of 4 tokens; expected more than its images"),
        (["--prompt", "8", "--images", "3"], "a prompt of 8 tokens with 3 image(s) of 4 tokens"),
        (["--images", "64"], "a prompt of 256 tokens with 64 image(s) of 4 tokens"),
        (["--json", "nowhere/plan.json"], "--json nowhere/plan.json: its folder does not exist"),
        (["--mesh.fsdp", "2"], "2 devices"),
        (["--mesh.data", "-1", "--target", "cpu:8"], "micro_batch_size is 2; expected a multiple of data*fsdp = 8"),
    ],
)
def test_what_cannot_be_planned_is_one_line(inputs, tmp_path, capsys, arguments, said):
    run_config(inputs, tmp_path / "run")
    assert plan.main(["--config", str(tmp_path / "run.yaml"), "--target", "cpu:1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_model_that_is_not_there(inputs, tmp_path, capsys):
    run_config(inputs, tmp_path / "run", model={"path": "nowhere"})
    assert plan.main(["--config", str(tmp_path / "run.yaml"), "--target", "cpu:1"]) == 2
    assert capsys.readouterr().err == (
        "error: model.path nowhere: no config.json there; --size 2b, 7b, 72b plans for a published model\n"
    )


def small_device(folder, memory):
    file = folder / "small.yaml"
    rates = {"flops": {"peak": 1e12}, "bandwidth": {"peak": 1e10}, "link": 1e9, "network": 1e8}
    file.write_text(yaml.safe_dump({"platform": "cpu", "per_host": 4, "memory": memory, **rates}))
    return f"{file}"


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_would_help(inputs, tmp_path, capsys):
    """On a device between the needs of the largest and the smallest micro-batch."""
    config = run_config(inputs, tmp_path / "run", stages=["step_grpo"], rl={"micro_batch_size": 4})
    free = Planner(config, parse_target(f"{small_device(tmp_path, 1e12)}:1"), say=lambda line: None)
    peaks = {n: free.alone("step_grpo", {"rl.micro_batch_size": n}).peak for n in (1, 4)}
    device = small_device(tmp_path, sum(peaks.values()) / 2)
    capsys.readouterr()
    assert plan.main(["--config", str(tmp_path / "run.yaml"), "--target", f"{device}:1"]) == 1
    out = capsys.readouterr().out
    assert "in gradient: does not fit in" in out
    count = int(re.search(r"largest micro-batch whose gradient fits: (\d)", out).group(1))
    assert count in (1, 2) and f"--rl.micro_batch_size {count}" in out
    half = re.search(r"--rl.micro_batch_size 2: (-[\d.]+) GB", out)
    assert half and "--rl.optimizer.freeze_vision true: " in out and "--rl.reference host: " in out
    assert plan.main(["--config", str(tmp_path / "run.yaml"), "--target", f"{small_device(tmp_path, 1)}:1"]) == 1
    assert "no micro-batch fits" in capsys.readouterr().out


@pytest.mark.parametrize("limit", range(0, 130, 7))
def test_the_largest_micro_batch_is_found_with_few_compilations(inputs, tmp_path, monkeypatch, limit):
    """Memory that grows in proportion, and not quite."""
    planner = Planner(run_config(inputs, tmp_path / "run"), parse_target("cpu:1"), say=lambda line: None)
    planner.target = dataclasses.replace(
        planner.target, device=dataclasses.replace(planner.target.device, memory=float(limit))
    )
    tried = []

    def alone(stage, overrides):
        tried.append(overrides["count"])
        return dataclasses.make_dataclass("P", ["peak"])(20 + 5 * overrides["count"] + overrides["count"] ** 1.2)

    monkeypatch.setattr(planner, "alone", alone)
    counts = [1, 2, 4, 8, 16]
    expected = max((n for n in counts if 20 + 5 * n + n**1.2 <= limit), default=None)
    found = planner.largest("sft", {}, "count", counts, {})
    assert (found and found[0]) == expected
    assert len(tried) == len(set(tried)) <= 3


def test_overrides():
    config = load_quick()
    other = replaced(config, {"rl.optimizer.freeze_vision": True, "mesh.fsdp": 4, "seed": 3})
    assert other.rl.optimizer.freeze_vision and other.mesh.fsdp == 4 and other.seed == 3
    assert dataclasses.replace(other, rl=config.rl, mesh=config.mesh, seed=config.seed) == config
    assert flags({"mesh.fsdp": 4, "rl.optimizer.freeze_vision": True}) == (
        "--mesh.fsdp 4 --rl.optimizer.freeze_vision true"
    )


def load_quick():
    return load(ROOT / "configs" / "quickstart.yaml")


@pytest.mark.slow
def test_the_search_finds_what_is_fastest(inputs, tmp_path, capsys):
    run_config(inputs, tmp_path / "run", stages=["step_grpo"], mesh={"data": -1})
    arguments = ["--config", str(tmp_path / "run.yaml"), "--target", f"{small_device(tmp_path, 1e9)}:4", "--search"]
    assert plan.main([*arguments, "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    best = re.findall(r"^  ([\d.]+) s, [\d.]+ GB: (--mesh.*)$", out, re.MULTILINE)
    assert len(best) == 3 and [float(s) for s, _ in best] == sorted(float(s) for s, _ in best)
    assert "--model.remat none" in best[0][1]  # memory is enough, so nothing is recomputed
