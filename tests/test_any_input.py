"""Whatever the bytes of an input are: it is read, or refused by the documented error in one line.

Each property runs on a few inputs here, and on 10,000 with `-m slow`.
"""

from __future__ import annotations

import json
import struct

import jax
import numpy as np
import pytest
from helpers.tiny_jax import random_params, tiny_config
from helpers.tiny_tokenizer import QWEN2_VL_TEMPLATE, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from r1vl_jax.checkpoint.hf import load_hf
from r1vl_jax.common.files import read_json_lines
from r1vl_jax.config import Config, describe, dump, load
from r1vl_jax.data.sources import JsonSource
from r1vl_jax.errors import CheckpointError, ConfigError, RowError
from r1vl_jax.keysteps import rows as keystep_rows
from r1vl_jax.model.spec import param_spec
from r1vl_jax.processing.chat import find_chat_template, render_chat, renders_turns
from r1vl_jax.processing.processor import Processor
from r1vl_jax.reward_lab import rows as lab_rows
from r1vl_jax.reward_lab.rescoring import groups_of
from r1vl_jax.types import Example, is_spec

CASES = pytest.mark.parametrize("cases", [40, pytest.param(10_000, marks=pytest.mark.slow)])
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

NUMBERS = st.one_of(
    st.integers(), st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30]), st.floats(allow_nan=True, allow_infinity=True)
)
TEXTS = st.one_of(
    st.text(st.characters(), max_size=20),  # lone surrogates, NUL and line ends are among them
    st.sampled_from(["", " ", "1e5", "nan", "<image>", "<video>", "<|im_end|>", "/etc/passwd", "../a.png", "a\0b"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
DEEP = st.sampled_from([b"[" * 5000, b"[" * 990 + b"]" * 990, b'{"a":' * 5000, b"[" * 5000 + b"]" * 5000])


def check(body, strategy, cases):
    """Runs `body` on inputs of a strategy: always the same few, or many that differ from run to run."""
    few = cases < 1000
    limits = settings(max_examples=cases, deadline=None, database=None, derandomize=few, suppress_health_check=CHECKS)
    limits(given(strategy)(body))()


def mutations(data: bytes, pieces: list[bytes], most: int = 4):
    """`data` with a few stretches of it replaced by `pieces` or by other bytes, or cut off."""
    edit = st.tuples(
        st.integers(0, len(data)), st.integers(0, 40), st.one_of(st.sampled_from(pieces), st.binary(max_size=8))
    )

    def apply(edits):
        out = data
        for start, length, new in edits:
            out = out[:start] + new + out[start + length :]
        return out

    cut = st.integers(0, len(data)).map(lambda end: data[:end])
    return st.one_of(st.lists(edit, min_size=1, max_size=most).map(apply), cut, st.binary(max_size=60), DEEP)


def is_one_line(error: Exception) -> bool:
    return bool(str(error)) and "\n" not in str(error) and len(str(error)) < 5000


# --- the configuration ------------------------------------------------------------------------------------------------

CONFIG = b"""seed: 3
model: {path: m}
data: {sft: {path: a.json}, rl: {path: b.json, drop_matching: [x]}}
sft: {optimizer: &slow {learning_rate: 1e-5}}
rl: {rewards: [step_accuracy], reward_weights: [1.0], rule_options: {match_tokens: true}, optimizer: *slow}
"""
YAML_PIECES = [
    b"*slow", b"&a ", b"<<: ", b"!!int ", b"!!binary ", b"!!timestamp ", b"? ", b"- ", b": ", b"{", b"[", b"'", b'"',
    b".nan", b"1e999", b"2001-99-99", b"9" * 5000, b"0x" + b"f" * 5000, b"null", b"\0", b"\xff", b"\n",
    b"%YAML 9\n", b"---\n",
]  # fmt: skip
KEYS = [key for key, *_ in describe()]
OVERRIDES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KEYS), VALUES).map(lambda pair: f"--{pair[0]}={json.dumps(pair[1])}"),
        st.tuples(st.sampled_from(KEYS), st.one_of(NUMBERS, TEXTS)).map(lambda pair: f"--{pair[0]}={pair[1]}"),
        TEXTS,
        st.sampled_from(["--", "-- 1", "--rl", "--rl.beta", "--=", "--.=1", "--seed=[[[[", "--model.path.x=1"]),
    ),
    max_size=3,
)


@CASES
def test_configurations(tmp_path, cases):
    """A configuration that is taken can be written and read back."""
    path, written = tmp_path / "config.yaml", tmp_path / "written.yaml"

    def body(given):
        data, overrides = given
        path.write_bytes(data)
        try:
            config = load(path, overrides)
        except ConfigError as error:
            assert is_one_line(error)
            return
        assert isinstance(config, Config)
        written.write_text(dump(config), encoding="utf-8")
        assert load(written) == config

    check(body, st.tuples(st.one_of(st.just(CONFIG), mutations(CONFIG, YAML_PIECES)), OVERRIDES), cases)


# --- rows -------------------------------------------------------------------------------------------------------------

QUESTION = {"image_path": "a.png", "problem": "Find x.", "solution": "3", "key_steps": {"Steps": [["a", "b"], "c"]}}
TALK = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "3"}], "images": "a.png"}
ANSWERS = {"stage": "step_grpo", "step": 1, "row": 0, "solution": "3", "answers": [{"text": "3"}], "completion": "x"}
FIELDS = st.sampled_from(
    [
        *QUESTION,
        *TALK,
        *ANSWERS,
        "conversations",
        "videos",
        "video",
        "image",
        "system",
        "audio",
        "answer",
        "question",
        "x",
    ]
)
PARTS = st.one_of(
    VALUES, st.sampled_from([{"type": "image"}, {"type": "text", "text": "x"}, {"type": "video", "video": 3}])
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.one_of(VALUES, st.sampled_from(["user", "assistant"]))}, optional={"content": PARTS}
    ),
    max_size=3,
)
ROWS = st.tuples(
    st.sampled_from([QUESTION, TALK, ANSWERS, {}]),
    st.dictionaries(FIELDS, st.one_of(VALUES, TURNS, st.lists(PARTS, max_size=3)), max_size=3),
).map(lambda pair: pair[0] | pair[1])
TABLES = st.lists(st.one_of(ROWS, VALUES), max_size=4).flatmap(
    lambda rows: st.sampled_from(
        [json.dumps(rows), "\n".join(map(json.dumps, rows)), json.dumps({"train": rows}), json.dumps(rows, indent=1)]
    )
)
GOOD_TABLE = json.dumps([QUESTION, TALK]).encode()
JSON_PIECES = [
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b'"',
    b"null",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"\\ud800",
    b"\xff",
    b"\n",
]
FILES = st.one_of(TABLES.map(str.encode), mutations(GOOD_TABLE, JSON_PIECES))


@CASES
def test_rows(tmp_path, cases):
    """By training, by keysteps and by the reward lab."""
    path = tmp_path / "rows.json"

    def body(data):
        path.write_bytes(data)
        try:
            source = JsonSource(path)
        except RowError as error:
            assert is_one_line(error)
        else:
            assert all(map(is_one_line, source.errors))
            for index in range(len(source)):
                try:
                    assert isinstance(source[index], Example)
                except RowError as error:
                    assert is_one_line(error)
        try:
            keystep_rows.read_rows(path)
        except keystep_rows.InputError as error:
            assert is_one_line(error)
        for problems in (False, True):
            rows, faults = lab_rows.read_rows(str(path), problems)
            assert all(isinstance(fault, str) and "\n" not in fault for fault in faults)
            if not problems:
                groups_of(lab_rows.select(rows, "rows", None, None, None))

    check(body, FILES, cases)


RUN_ROWS = "".join(json.dumps(ANSWERS | {"step": step, "loss": 0.5}) + "\n" for step in range(3)).encode()


@CASES
def test_metrics_and_rollouts_of_a_run(tmp_path, cases):
    path = tmp_path / "metrics.jsonl"

    def body(data):
        path.write_bytes(data)
        try:
            for _ in read_json_lines(path):
                pass
        except ValueError as error:
            assert is_one_line(error) and str(path) in str(error)

    check(body, mutations(RUN_ROWS, JSON_PIECES), cases)


# --- chat -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_folder(write_checkpoint(tmp_path_factory.mktemp("model"), chat_template=QWEN2_VL_TEMPLATE))


@CASES
def test_chats(processor, cases):
    """Any texts of a question, a system turn and earlier turns."""

    def body(given):
        question, system, history, suffix = given
        try:
            ready = processor.with_texts(system or "", suffix)
            prompt = ready.encode_question(question, system=system, history=history, max_tokens=200)
        except (RowError, ConfigError) as error:
            assert is_one_line(error)
        else:
            assert len(prompt.tokens_T) and prompt.positions_3T.shape == (3, len(prompt.tokens_T))

    turns = st.lists(st.tuples(TEXTS, TEXTS), max_size=2)
    check(body, st.tuples(TEXTS, st.one_of(st.none(), TEXTS), turns, TEXTS), cases)


JINJA_PIECES = [
    b"{{ 1 / 0 }}", b"{% for a in range(99999) %}", b"{% endfor %}", b"{% endif %}", b"{{ messages[9].x.y }}", b"{{",
    b"%}", b"{{ 10 ** 9 }}", b"{% set image_count = 3 %}", b"| list", b"{{ raise_exception('x') }}", b"{# ",
]  # fmt: skip


@CASES
def test_chat_templates(processor, cases, monkeypatch, tmp_path):
    """A template is used, gives way to the built-in one, or is refused."""
    monkeypatch.setattr("r1vl_jax.processing.chat.MAX_SECONDS", 1.0)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find x."}]}]

    def body(data):
        (tmp_path / "chat_template.jinja").write_bytes(data)
        try:
            template = find_chat_template(tmp_path, processor.tokenizer)
            if renders_turns(processor.tokenizer, template):
                assert isinstance(render_chat(processor.tokenizer, turns, vision={}, template=template), str)
        except ValueError as error:
            assert is_one_line(error)

    check(body, mutations(QWEN2_VL_TEMPLATE.encode(), JINJA_PIECES), cases)


# --- weights ----------------------------------------------------------------------------------------------------------

HEADER_VALUES = st.one_of(VALUES, st.lists(NUMBERS, max_size=3), st.sampled_from(["F32", "F64", "F8_E4M3", [0, 2**64]]))


@pytest.fixture(scope="module")
def weights():
    """The bytes of a safetensors file of a tiny model, and the model's config."""
    cfg = tiny_config()
    leaves = zip(
        jax.tree.leaves(param_spec(cfg), is_leaf=is_spec), jax.tree.leaves(random_params(cfg)), strict=True
    )  # shapes as stored: values do not matter here
    tensors = {}
    for spec, leaf in leaves:
        names = [spec.hf_name.format(0)] if spec.stacked else [spec.hf_name]
        tensors |= {name: np.zeros(spec.hf_shape, np.float32) for name in names}
        assert leaf.size >= tensors[names[0]].size
    return save(tensors), cfg


@CASES
def test_headers_of_safetensors(tmp_path, weights, cases):
    """The length, the JSON and the fields of each tensor may be anything; so may the index of shards."""
    data, cfg = weights
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert len(load_whole(tmp_path, data, cfg)) > 10

    def body(given):
        kind, value = given
        if kind == "bytes":
            changed = value + data[8 + length :]
        else:
            text = json.dumps(edited(header, value)).encode()
            changed = struct.pack("<Q", len(text)) + text + data[8 + length :]
        try:
            load_whole(tmp_path, changed, cfg)
        except CheckpointError as error:
            assert is_one_line(error) and str(tmp_path) in str(error)

    names = st.sampled_from(sorted(header))
    field = st.sampled_from(["dtype", "shape", "data_offsets", "x", ""])
    edits = st.tuples(st.just("fields"), st.lists(st.tuples(names, field, HEADER_VALUES), min_size=1, max_size=3))
    raw = mutations(data[: 8 + length], JSON_PIECES).map(lambda head: ("bytes", head))
    check(body, st.one_of(edits, raw), cases)


def edited(header, edits):
    """The header with a field of some tensors, or with field "" the tensor's whole entry, replaced."""
    header = {name: dict(entry) for name, entry in header.items()}
    for name, field, value in edits:
        if field and isinstance(header[name], dict):
            header[name][field] = value
        else:
            header[name] = value
    return header


def load_whole(folder, data, cfg):
    (folder / "model.safetensors").write_bytes(data)
    return jax.tree.leaves(load_hf(folder, cfg))


@CASES
def test_indexes_of_safetensors(tmp_path, weights, cases):
    data, cfg = weights
    (length,) = struct.unpack("<Q", data[:8])
    index = {"metadata": {}, "weight_map": dict.fromkeys(json.loads(data[8 : 8 + length]), "a.safetensors")}
    (tmp_path / "a.safetensors").write_bytes(data)

    def body(text):
        (tmp_path / "model.safetensors.index.json").write_bytes(text)
        try:
            load_hf(tmp_path, cfg)
        except CheckpointError as error:
            assert is_one_line(error) and str(tmp_path) in str(error)

    values = st.dictionaries(st.sampled_from([*index["weight_map"], "x"]), VALUES, max_size=3)
    tables = values.map(lambda more: json.dumps(index | {"weight_map": index["weight_map"] | more}).encode())
    check(body, st.one_of(tables, mutations(json.dumps(index).encode(), JSON_PIECES)), cases)
