"""Configuration: every error names the key, its value and what was expected; files and overrides read as written."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path

import pytest

from r1vl_jax.config import Config, describe, dump, load
from r1vl_jax.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SMALL = """
model: {path: some/model}
data:
  sft: {path: sft.json}
  rl: {path: rl.json}
"""


@pytest.fixture
def read(tmp_path):
    def read(text: str = "", *overrides: str, base: str = SMALL) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(base + text)
        return load(path, list(overrides))

    return read


def test_defaults_are_the_papers(read):
    """SPEC section 4, the 7B columns where sizes differ."""
    config = read()
    assert config.stages == ("sft", "step_grpo")
    assert (config.rl.group_size, config.rl.alpha, config.rl.beta, config.rl.temperature) == (4, 0.1, 0.04, 1.2)
    assert (config.rl.top_p, config.rl.top_k, config.rl.max_new_tokens) == (1.0, 0, 1024)
    assert (config.rl.steps, config.rl.questions_per_step, config.rl.max_pixels) == (13_125, 16, 400_000)
    assert (config.sft.batch_size, config.sft.epochs, config.sft.max_pixels) == (128, 2.0, 589_824)
    assert (config.rl.min_pixels, config.rl.rules) == (3136, "paper")
    assert (config.model.dtype, config.sft.optimizer.schedule, config.sft.optimizer.warmup_ratio) == (
        "bfloat16", "cosine", 0.03,
    )  # fmt: skip


@pytest.mark.parametrize(
    "key, near",
    [
        ("rl.betta", "rl.beta"),
        ("sft.optimizer.learning_rat", "sft.optimizer.learning_rate"),
        ("outputdir", "output_dir"),
        ("modl.path", "model"),
        ("rl.learning_rate", "rl.optimizer.learning_rate"),
        ("model.compilation_cache", "compilation_cache"),
        ("learning_rate", "optimizer.learning_rate"),  # a key of another section
    ],
)
def test_unknown_keys_name_the_nearest(read, key, near):
    with pytest.raises(ConfigError) as error:
        read("", f"--{key}", "1")
    unknown = key.split(".")[0] if key.startswith("modl") else key
    assert f"{unknown} is not a known key; did you mean" in str(error.value)
    assert near in str(error.value)


def test_an_unknown_key_like_nothing_lists_what_is_known(read):
    with pytest.raises(ConfigError, match="checkpoint.zzz is not a known key; known: every, minutes, keep"):
        read("", "--checkpoint.zzz", "1")


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("rl.steps", "many", "int"),
        ("rl.steps", "1.5", "int"),
        ("rl.steps", "true", "int"),
        ("rl.beta", "small", "float"),
        ("rl.beta", "true", "float"),
        ("rl.beta", "null", "float"),
        ("model.shared_prefix", "1", "bool"),
        ("model.path", "7", "str"),
        ("stages", "sft", "a list"),
        ("rl", "3", "a section with keys"),
    ],
)
def test_wrong_types(read, key, value, expected):
    with pytest.raises(ConfigError) as error:
        read("", f"--{key}={value}")
    assert str(error.value).startswith(f"{key} is ") and expected in str(error.value)


def test_lists_and_options_of_the_rewards(read):
    config = read(
        "rl: {rewards: [step_accuracy, 'mine:short'], reward_weights: [1, 5e-1]}",
        "--rl.rule_options.match_tokens=true",
        "--rl.rule_options.require_answer=false",
    ).rl
    assert (config.rewards, config.reward_weights) == (("step_accuracy", "mine:short"), (1.0, 0.5))
    assert config.rule_options == {"match_tokens": True, "require_answer": False}
    with pytest.raises(ConfigError, match=r"rl.rule_options.*'match_token'.*did you mean 'match_tokens'"):
        read("", "--rl.rule_options.match_token=true")
    with pytest.raises(ConfigError, match=r"rl.rewards\[1\] is 1, expected str"):
        read("", "--rl.rewards=[step_accuracy, 1]")
    with pytest.raises(ConfigError, match=r"rl.reward_weights\[0\] is 'x', expected float"):
        read("", "--rl.reward_weights=[x, 1]")


@pytest.mark.parametrize(
    "key, value",
    [
        ("rl.temperature", "0"),
        ("rl.top_p", "0"),
        ("rl.top_p", "1.01"),
        ("rl.top_k", "-1"),
        ("rl.group_size", "1"),
        ("rl.beta", "-0.1"),
        ("rl.max_new_tokens", "0"),
        ("rl.rules", "papers"),
        ("rl.rule_options", "{match_tokens: 1}"),
        ("rl.rewards", "[]"),
        ("rl.rewards", "[step_accuracy, step_accuracy]"),
        ("rl.reward_weights", "[1.0]"),
        ("rl.gate", "all"),
        ("rl.advantage", "token"),
        ("rl.scale", "max"),
        ("rl.std_floor", "0"),
        ("rl.zero_variance", "drop"),
        ("rl.max_resamples", "-1"),
        ("rl.questions_per_step", "6"),  # micro-batches of 4
        ("sft.batch_size", "130"),  # micro-batches of 8
        ("sft.epochs", "0"),
        ("sft.steps", "0"),
        ("sft.optimizer.schedule", "cosin"),
        ("sft.optimizer.warmup_ratio", "1.5"),
        ("rl.optimizer.max_grad_norm", "0"),
        ("rl.optimizer.learning_rate", "-1e-5"),
        ("rl.optimizer.learning_rate", "1e30"),
        ("rl.optimizer.max_grad_norm", "1e30"),
        ("rl.optimizer.weight_decay", "1e30"),
        ("sft.optimizer.b2", "1"),
        ("rl.truncated", "drop"),
        ("rl.overlong_window", "0"),
        ("rl.overlong_window", "1025"),
        ("guards.max_skipped", "0"),
        ("guards.mismatch", "-1"),
        ("guards.kl", "-1"),
        ("guards.length", "-0.1"),
        ("data.pad_multiple", "0"),
        ("data.max_prompt_tokens", "0"),
        ("checkpoint.every", "0"),
        ("scoring.timeout", "0"),
        ("model.dtype", "float16"),
        ("mesh.rollout_weights", "fsdp"),
        ("stages", "[step_grpo, sft]"),
        ("stages", "[]"),
        ("model.path", "''"),
        ("data.rl.path", "''"),
        ("eval.batch_size", "0"),
        ("eval.max_new_tokens", "0"),
        ("rl.max_new_tokens", "1"),
        ("sft.max_pixels", "100"),
        ("seed", "-1"),
        ("mesh.data", "0"),
        ("mesh.fsdp", "-2"),
        ("eval.rows", "8"),  # and no held-out file
    ],
)
def test_values_out_of_range(read, key, value):
    """The message names the key (or the one that the value asks for), and what was expected."""
    with pytest.raises(ConfigError) as error:
        read("", f"--{key}={value}")
    assert {"eval.rows": "data.heldout.path"}.get(key, key) in str(error.value)
    assert "expected" in str(error.value)


def float_keys(cls, prefix=""):
    """The dotted keys of all numbers that need not be whole, read from the dataclasses."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from float_keys(hint, f"{prefix}{name}.")
        elif hint in (float, float | None):
            yield prefix + name


FLOATS = list(float_keys(Config))


def test_there_are_float_keys():
    assert {"rl.beta", "sft.optimizer.b2", "rl.optimizer.b2", "guards.mismatch", "data.video.fps"} < set(FLOATS)


@pytest.mark.parametrize("key", FLOATS)
def test_every_number_is_finite(read, key):
    for value in (".nan", ".inf", "-.inf", "nan", "-inf", "1e400"):
        with pytest.raises(ConfigError) as error:
            read("", f"--{key}={value}")
        assert str(error.value).startswith(f"{key} is ") and str(error.value).endswith("expected a finite number")
        assert len(str(error.value)) < 100


def test_every_number_of_a_list_is_finite(read):
    with pytest.raises(ConfigError, match=r"^rl.reward_weights\[1\] is nan, expected a finite number$"):
        read("", "--rl.reward_weights=[1, .nan]")


def test_overrides(read):
    for arguments in (["--rl.beta", "0.02"], ["--rl.beta=0.02"]):
        assert read("", *arguments).rl.beta == 0.02
    config = read(
        "rl: {beta: 0.5, alpha: 0.3}", "--rl.beta", "1e-2", "--stages", "[sft]", "--sft.steps=null",
        "--data.sft.image_root=null", "--rl.optimizer.learning_rate", "3", "--output_dir", "a=b",
    )  # fmt: skip
    assert (config.rl.beta, config.rl.alpha) == (0.01, 0.3)
    assert config.stages == ("sft",) and config.sft.steps is None and config.data.sft.image_root is None
    assert config.rl.optimizer.learning_rate == 3.0 and isinstance(config.rl.optimizer.learning_rate, float)
    assert config.output_dir == "a=b"
    assert read("", "--rl.beta", "0.1", "--rl.beta", "0.2").rl.beta == 0.2
    assert read("", "--rl.top_k", "5", "--rl.top_p", ".5").rl.top_k == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["rl.beta", "0.02"], "argument 'rl.beta': expected an override"),
        (["--rl.beta"], "--rl.beta: a value is missing"),
        (["--model.path.x", "1"], "model.path|path is a value, not a section"),
        (["--stages", "[sft"], "--stages"),
        (["--", "1"], "argument '--': expected an override"),
        (["-- 1"], "argument '-- 1': expected an override"),
        (["--=1"], "argument '--=1': expected an override"),
        (["--rl..beta=1"], "argument '--rl..beta=1': expected an override"),
        (["--seed", "[" * 5000], "--seed is .*more than 300 brackets"),
        (["--seed", "9" * 5000], "--seed is .*digits"),
        (["--seed", "0x" + "f" * 5000], "seed is a int that is too large to print, expected at most 4,294,967,295"),
        (["--seed", "2001-99-99"], "--seed is '2001-99-99', expected a value as YAML writes it"),
        (["--output_dir", r'"a\0b"'], "output_dir is 'a.x00b', expected text"),
        (["--output_dir", r'"\ud800"'], "output_dir is '.ud800', expected text"),
    ],
)
def test_overrides_that_cannot_be_read(read, arguments, message):
    with pytest.raises(ConfigError, match=message):
        read("", *arguments)


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a\n- b", "a mapping"),
        ("a: [", "not YAML"),
        ("rl: 3", "a section"),
        ("false", "holds False; expected a mapping"),
        (bytes(range(256)), "not UTF-8 text"),
        ("# café".encode("latin-1"), "not UTF-8 text"),
        ("seed: 1".encode("utf-16"), "not UTF-8 text"),
        ("[" * 5000, "more than 300 brackets"),
        ("- " * 5000, "nested too deeply"),
        ("a: " * 5000, "not YAML"),
        (BOMB, "more than 10,000 values, with aliases written out"),
        ("rl: &a [*a]", "more than 10,000 values"),
        ("seed: 1\nseed: 2", "seed is given twice"),
        ("rl: {beta: 1, beta: 2}", "beta is given twice"),
        ("seed: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("seed: !!int x", "not YAML: invalid literal"),
        ("seed: !!bool x", "not YAML"),
        ("seed: !!timestamp x", "not YAML"),
        ("seed: !!int ''", "not YAML"),
        ("seed: 2001-99-99", "not YAML: month must be"),
        ("seed: \0", "not YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
        ("x" * 70_000, "more than 65,536 bytes"),
        ("? [1]\n: 2", "not YAML: .*unhashable key"),
        ("7: 1", "7 is not a known key"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_folders_and_devices_are_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, message in ((tmp_path, "a folder"), (tmp_path / "fifo", "no such file"), ("/dev/zero", "no such file")):
        with pytest.raises(ConfigError, match=f"^{path}: {message}; expected a YAML file"):
            load(path)


def test_anchors_and_merged_keys_are_read(read):
    """Plain uses of YAML's aliases stay; a key beside << replaces the merged one, and is not given twice."""
    text = "sft: {optimizer: &slow {learning_rate: 1e-6}}\nrl: {optimizer: {<<: *slow, learning_rate: 2e-6}}"
    config = read(text)
    assert (config.sft.optimizer.learning_rate, config.rl.optimizer.learning_rate) == (1e-6, 2e-6)


def test_every_number_has_its_bounds(tmp_path):
    """Infinite, not a number, or beyond any use: refused by name for every key, whatever its section checks."""
    file = tmp_path / "config.yaml"
    file.write_text(SMALL)
    for key, default, _ in describe():
        if isinstance(default, float):
            for value in (".nan", ".inf", "-.inf", "nan", "1e999"):
                with pytest.raises(ConfigError, match=f"^{key} is "):
                    load(file, [f"--{key}", value])
        if type(default) in (int, float):
            for value in (10**30, -(10**30), 2**63):
                with pytest.raises(ConfigError, match=f"^{key} is "):
                    load(file, [f"--{key}", str(value)])


@pytest.mark.parametrize(
    "key, value",
    [
        *((f"{section}.max_new_tokens", 10**9) for section in ("rl", "eval")),
        *((f"{section}.max_pixels", 10**9) for section in ("rl", "sft", "data.video")),
        ("sft.batch_size", 10**9),
        ("sft.max_answer_tokens", 10**9),
        ("rl.group_size", 10**9),
        ("rl.questions_per_step", 10**9),
        ("eval.batch_size", 10**9),
        ("data.max_prompt_tokens", 10**9),
        ("data.workers", 10**6),
        ("data.video.fps", "1e300"),
        ("data.video.max_frames", 10**9),
        ("scoring.workers", 10**6),
        ("scoring.timeout", "1e300"),
        ("shapes.sft_rows", 10**9),
        ("shapes.sft_rows", -1),
        ("shapes.careless_share", 7),
        ("seed", 2**32),
        ("rl.alpha", -1),
    ],
)
def test_numbers_beyond_any_use(read, key, value):
    with pytest.raises(ConfigError, match=f"^{key} is .*, expected "):
        read("", f"--{key}={value}")


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="nothing.yaml: no such file"):
        load(tmp_path / "nothing.yaml")


def test_dump_and_load(read, tmp_path):
    config = read("", "--rl.optimizer.learning_rate", "1e-6", "--sft.steps", "12", "--stages", "[step_grpo]")
    path = tmp_path / "dumped.yaml"
    path.write_text(dump(config))
    assert load(path) == config
    assert load(path, ["--sft.steps", "13"]) != config


def test_configurations_are_frozen(read):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().rl.beta = 1.0


def test_every_key_has_its_line_of_help():
    rows = describe()
    assert len({key for key, *_ in rows}) == len(rows) > 50
    assert not [key for key, _, text in rows if len(text) < 8]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations(path):
    config = load(path)
    assert config.output_dir and not Path(config.output_dir).is_absolute()
    assert path.read_text().startswith("#") and f"--config configs/{path.name}" in path.read_text()


def test_there_are_shipped_configurations():
    assert "quickstart.yaml" in {path.name for path in CONFIGS}


def test_paths_default_to_the_shapes_folder(read):
    """The built-in task fills what is not set; what is set stays."""
    empty = ["--model.path", "''", "--data.sft.path", "''", "--data.rl.path", "mine.json"]
    config = read("", "--shapes.dir", "made", *empty)
    folder = "made/seed0-rows6000-1800-200-careless0.6-r1vl"
    assert (config.model.path, config.data.sft.path) == (f"{folder}/model", f"{folder}/task/sft.json")
    assert (config.data.rl.path, config.data.heldout.path) == ("mine.json", f"{folder}/task/heldout.json")
    other = read("", "--shapes.dir", "made", *empty, "--shapes.rl_rows", "5", "--rl.format", "boxed")
    assert other.model.path == "made/seed0-rows6000-5-200-careless0.6-boxed/model"
    other = read("", "--shapes.dir", "made", *empty, "--shapes.format", "think")
    assert other.model.path == "made/seed0-rows6000-1800-200-careless0.6-think/model"


def test_a_data_set_on_the_command_line_replaces_the_other_kind(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("stages: [sft]\nmodel: {path: m}\ndata: {sft: {path: a.json}}\n")
    section = load(file, ["--data.sft.tfds", "mulberry_sft"]).data.sft
    assert (section.path, section.tfds, section.name) == ("", "mulberry_sft", "tfds:mulberry_sft/train")
    file.write_text("stages: [sft]\nmodel: {path: m}\ndata: {sft: {tfds: mulberry_sft}}\n")
    section = load(file, ["--data.sft.path=b.json"]).data.sft
    assert (section.path, section.tfds, section.name) == ("b.json", "", "b.json")
    file.write_text("stages: [sft]\nmodel: {path: m}\ndata: {sft: {tfds: mulberry_sft, path: a.json}}\n")
    with pytest.raises(
        ConfigError, match=r"^data.sft.tfds is 'mulberry_sft', expected data.sft.path \('a.json'\) or this"
    ):
        load(file)


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.sft.drop_matching", "['']"), ("data.video.fps", ".inf"), ("data.video.max_frames", "3"),
        ("data.video.max_pixels", "100"), ("data.buckets", "0"), ("data.workers", "-1"),
    ],
)  # fmt: skip
def test_data_settings_are_checked(tmp_path, key, value):
    file = tmp_path / "config.yaml"
    file.write_text("stages: [sft]\nmodel: {path: m}\ndata: {sft: {path: a.json}}\n")
    with pytest.raises(ConfigError, match=f"^{key} is "):
        load(file, [f"--{key}", value])


@pytest.mark.parametrize("text, expected", [("off", "off"), ("no", "off"), ("'off'", "off"), ("auto", "auto")])
def test_off_is_a_text(tmp_path, text, expected):
    """YAML 1.1 reads `off` as false."""
    file = tmp_path / "config.yaml"
    file.write_text(f"stages: [sft]\nmodel: {{path: m}}\ndata: {{sft: {{path: a.json}}}}\ncompilation_cache: {text}\n")
    assert load(file).compilation_cache == load(file, ["--compilation_cache", text]).compilation_cache == expected
