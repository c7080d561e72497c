"""Checkpoints: reading and writing the Hugging Face layout, orbax and back, and what is said about broken ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from helpers import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from r1vl_jax import convert
from r1vl_jax.checkpoint import folder as folders
from r1vl_jax.checkpoint import orbax_files
from r1vl_jax.checkpoint.folder import SUMS
from r1vl_jax.checkpoint.hf import INDEX, WEIGHTS, load_hf, save_hf
from r1vl_jax.checkpoint.orbax_files import OrbaxArray
from r1vl_jax.checkpoint.state import StageCheckpoints
from r1vl_jax.checkpoint.store import find_model, load_model, load_params, save_params
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import load_config
from r1vl_jax.model.spec import param_spec
from r1vl_jax.parallel.sharding import make_mesh, param_shardings
from r1vl_jax.types import TrainState

torch = pytest.importorskip("torch")

COMPANIONS = ("tokenizer.json", "chat_template.jinja", "merges.txt", "generation_config.json")
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}


@pytest.fixture(scope="module")
def models():
    return {tied: tiny.tiny_hf(tied=tied) for tied in (True, False)}


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """An untied fp32 checkpoint in one file; tests copy what they change."""
    return tiny.save_tiny(models[False], tmp_path_factory.mktemp("hf") / "model")


def tensors_of(folder: Path) -> dict:
    """Every tensor of a checkpoint: name -> (dtype, shape, bytes)."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as handle:
            assert handle.metadata() == {"format": "pt"}
            for name in handle.keys():  # noqa: SIM118
                value = handle.get_tensor(name)
                found[name] = (str(value.dtype), value.shape, value.tobytes())
    return found


def broken(folder: Path, destination: Path, change) -> Path:
    """A copy of a checkpoint whose table of tensors `change` has edited."""
    destination.mkdir()
    folders.copy_companions(folder, destination)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, destination / WEIGHTS)
    return destination


def logits(model):
    rng = np.random.default_rng(0)
    rows = [tiny.Row.of(rng, 3, ("image", (1, 4, 6)), 4), tiny.Row.of(rng, 6)]
    with torch.no_grad():
        return model.float()(**tiny.hf_inputs(rows), use_cache=False).logits.numpy()


# Round trips.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied, nested, sharded", [(True, False, False), (False, True, True), (True, True, True)])
def test_there_and_back_bit_for_bit(models, tied, nested, sharded, dtype, tmp_path, capsys):
    source = tiny.save_tiny(
        models[tied], tmp_path / "hf", nested=nested, dtype=dtype, max_shard_size="50KB" if sharded else "5GB"
    )
    assert (source / INDEX).is_file() == sharded
    assert convert.main(["from-hf", str(source), str(tmp_path / "orbax")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    assert {kind for kind, _, _ in tensors_of(source).values()} == {dtype}
    for name in COMPANIONS:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    config = "config.json"
    if not nested:  # a flat file that says it all comes back byte for byte
        assert (tmp_path / "back" / config).read_bytes() == (source / config).read_bytes()
    assert load_config(tmp_path / "back") == load_config(source)
    out = capsys.readouterr()
    assert out.out.count(f"parameters, {dtype}, ") == 2
    tensors = len(tensors_of(source))
    assert out.err.count("converting: 100%") >= 2 and f" {tensors}/{tensors} " in out.err
    assert not list(tmp_path.glob(".*")), "temporary folders are left"


@pytest.mark.parametrize("nested", [False, True])
def test_export_loads_in_transformers(models, nested, tmp_path):
    """Sharded export under the published names, loaded without a complaint, with the same logits."""
    from transformers import Qwen2VLForConditionalGeneration

    for tied, model in models.items():
        source = tiny.save_tiny(model, tmp_path / f"hf{tied}", nested=nested)
        params, cfg, files = load_model(source)
        out = tmp_path / f"out{tied}"
        save_hf(params, cfg, out, source=files, max_shard_bytes=160_000)
        shards = sorted(path.name for path in out.glob("*.safetensors"))
        assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        assert all((out / shard).stat().st_size < 170_000 for shard in shards)
        assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "files that others may not read"
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors_of(out).values())
        assert set(index["weight_map"]) == set(tensors_of(out)) == set(tensors_of(source))
        loaded, info = Qwen2VLForConditionalGeneration.from_pretrained(
            out, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(info.values()), info
        np.testing.assert_array_equal(logits(loaded), logits(model))


def test_nested_config_becomes_the_published_one(models, tmp_path):
    source = tiny.save_tiny(models[True], tmp_path / "hf", nested=True)
    params, cfg, _ = load_model(source)
    save_hf(params, cfg, tmp_path / "out", source=source, dtype=jnp.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"text_config", "rope_parameters", "dtype", "layer_types"} & written.keys()
    published = tiny.config_dict(tied=True) | {"torch_dtype": "bfloat16"}
    for key in ("transformers_version", "vision_config", "sliding_window", "bos_token_id", "eos_token_id"):
        published.pop(key)
    assert {key: written[key] for key in published} == published
    assert "model_type" not in written["vision_config"] and "rope_parameters" not in written["vision_config"]
    assert {kind for kind, _, _ in tensors_of(tmp_path / "out").values()} == {"bfloat16"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_option(folder, dtype, tmp_path, capsys):
    """Either direction converts; the values are those of a plain cast."""
    assert convert.main(["from-hf", str(folder), str(tmp_path / "orbax"), "--dtype", dtype]) == 0
    assert convert.main(["to-hf", str(folder), str(tmp_path / "hf"), "--dtype", dtype]) == 0
    assert convert.main(["from-hf", str(tmp_path / "orbax"), str(tmp_path / "again")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "again"), str(tmp_path / "back")]) == 0
    got, back = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    expected = {name: value.astype(DTYPES[dtype]).tobytes() for name, value in load_file(folder / WEIGHTS).items()}
    assert {name: data for name, (_, _, data) in got.items()} == expected
    assert back == got
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == dtype
    assert f"{sum(p.size for p in load_file(folder / WEIGHTS).values()):,} parameters" in capsys.readouterr().out


def test_names_of_transformers_5_in_memory(folder, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            if name.startswith("model."):
                tensors["model.language_model." + name.removeprefix("model.")] = tensors.pop(name)
            elif name.startswith("visual."):
                tensors["model." + name] = tensors.pop(name)

    renamed = broken(folder, tmp_path / "renamed", rename)
    params, cfg, _ = load_model(renamed)
    save_hf(params, cfg, tmp_path / "out", source=renamed)
    assert tensors_of(tmp_path / "out") == tensors_of(folder)


@pytest.mark.parametrize("dtype, by_layer", [(None, False), ("bfloat16", True)])
def test_restores_onto_a_mesh(folder, dtype, by_layer, tmp_path, monkeypatch):
    """Both layouts give the same sharded arrays; a sharded tree is written as a host one is."""
    if by_layer:  # as large parameters are
        monkeypatch.setattr("r1vl_jax.checkpoint.arrays.BLOCK_BYTES", 0)
    wanted = dtype and DTYPES[dtype]
    cfg = load_config(folder)
    shardings = param_shardings(param_spec(cfg), make_mesh(data=2, fsdp=2, tensor=2))
    host = load_hf(folder, cfg, dtype=wanted)
    save_params(tmp_path / "orbax", load_hf(folder, cfg), folder)
    for source in (folder, tmp_path / "orbax"):
        params, _, _ = load_model(source, dtype=wanted, shardings=lambda cfg: shardings)
        for leaf, expected, sharding in zip(*map(jax.tree.leaves, (params, host, shardings)), strict=True):
            assert isinstance(leaf, jax.Array) and leaf.sharding == sharding and leaf.dtype == expected.dtype
            assert np.asarray(leaf).tobytes() == expected.tobytes()
    if dtype is not None:
        return
    save_params(tmp_path / "again", params, folder)
    save_hf(params, cfg, tmp_path / "hf", source=folder)
    again = load_params(tmp_path / "again", cfg)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(host), strict=True))
    assert tensors_of(tmp_path / "hf") == tensors_of(folder)


def test_orbax_alone_reads_and_writes_the_same(folder, tmp_path, monkeypatch):
    """What is written is an orbax checkpoint like any other. One with a chunk for all layers is read at once."""
    params, cfg, _ = load_model(folder)
    save_params(tmp_path / "ours", params, folder)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        theirs = checkpointer.restore(tmp_path / "ours" / "params")
        checkpointer.save(tmp_path / "theirs" / "params", args=ocp.args.PyTreeSave(params))
    monkeypatch.setattr(orbax_files, "CHUNK_BYTES", 1000)
    opened = orbax_files.open_orbax(tmp_path / "theirs" / "params", cfg)
    assert {type(leaf) for leaf in jax.tree.leaves(opened)} == {np.ndarray, OrbaxArray}
    for found in (theirs, load_params(tmp_path / "ours", cfg), load_params(tmp_path / "theirs", cfg)):
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), found, params)
        assert all(jax.tree.leaves(same))


def test_run_folder(folder, tmp_path):
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="expected a Hugging Face folder"):
        find_model(run)
    folder_copy = broken(folder, run / "export", lambda tensors: None)
    assert find_model(run).files == folder_copy
    assert convert.main(["to-hf", str(run), str(tmp_path / "out")]) == 0


def unfinished_run(folder: Path, run: Path, stages: dict[str, tuple[int, ...]]) -> dict:
    """A run folder cut off after these steps. Returns the weights of each state: those of `folder` plus the step."""
    params, _, _ = load_model(folder)
    saved = {}
    for stage, steps in stages.items():
        checkpoints = StageCheckpoints(run / "checkpoints" / stage, keep=5)
        for step in steps:
            moved = jax.tree.map(lambda leaf, step=step: jnp.asarray(leaf) + step, params)
            moments = jax.tree.map(jnp.zeros_like, moved)
            checkpoints.save(step, TrainState(jnp.int32(step), moved, (moments,)), {"position": 0})
            saved[stage, step] = jax.tree.map(np.asarray, moved)
        checkpoints.close()
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(folder)}}))
    return saved


@pytest.mark.parametrize(
    "stages, newest",
    [({"sft": (2, 10)}, ("sft", 10)), ({"sft": (30,), "step_grpo": (9, 11)}, ("step_grpo", 11))],
)
def test_run_that_has_not_finished(folder, stages, newest, tmp_path, capsys, monkeypatch):
    """The last stage's newest parameters, without the optimizer's moments, on a mesh or not; and it is said."""
    read, of_store = set(), OrbaxArray.__array__

    def seen(self, *args, **kwargs):
        read.add(self.name)
        return of_store(self, *args, **kwargs)

    saved = unfinished_run(folder, tmp_path / "run", stages)[newest]
    monkeypatch.setattr(OrbaxArray, "__array__", seen)
    (tmp_path / "run" / "checkpoints" / newest[0] / "99.orbax-checkpoint-tmp").mkdir()  # one that was cut off
    found = find_model(tmp_path / "run")
    assert found.files == folder and found.note.endswith(f"the parameters are those of {newest[0]} step {newest[1]}")
    shardings = param_shardings(param_spec(load_config(folder)), make_mesh(data=2, fsdp=2, tensor=2))
    for places in (None, shardings):
        params, cfg, files = load_model(
            tmp_path / "run", dtype=jnp.bfloat16, shardings=None if places is None else lambda _: shardings
        )
        assert files == folder and cfg == load_config(folder)
        for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(saved), strict=True):
            np.testing.assert_array_equal(np.asarray(leaf), expected.astype(jnp.bfloat16))
            assert places is None or isinstance(leaf, jax.Array)
    assert len(read) == len(jax.tree.leaves(saved)) and all("/state: params." in name for name in read)
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert f"{newest[0]} step {newest[1]}" in capsys.readouterr().err
    back, _, _ = load_model(tmp_path / "out")
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(saved)))


def test_run_that_has_not_finished_and_is_damaged(folder, tmp_path):
    run = tmp_path / "run"
    unfinished_run(folder, run, {"sft": (1,)})
    for text, said in [
        ("model: {path: nowhere}", r"run/config.yaml: model\.path, where the run started: .*nowhere: no such folder"),
        ("[]", "config.yaml: has no model.path"),
        ("model: null", "config.yaml: has no model.path"),
        ("a: [", "config.yaml: has no model.path"),
    ]:
        (run / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            find_model(run)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(folder)}}))
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="sft/1/state"):
        load_model(run)


# Faults.


def test_tied_head(models, tmp_path):
    """A tied checkpoint may repeat the embedding as lm_head, and must repeat it exactly."""
    source = tiny.save_tiny(models[True], tmp_path / "hf")
    embed = "model.embed_tokens.weight"
    assert "lm_head.weight" not in tensors_of(source)
    same = broken(source, tmp_path / "same", lambda t: t.update({"lm_head.weight": t[embed].copy()}))
    assert "head" not in load_model(same)[0]["text"]
    other = broken(source, tmp_path / "other", lambda t: t.update({"lm_head.weight": t[embed] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(other)
    untied = broken(source, tmp_path / "untied", lambda t: None)
    (untied / "config.json").write_text(json.dumps(tiny.config_dict(tied=False)))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight$"):
        load_model(untied)


def test_all_faults_in_one_message(folder, tmp_path):
    q = "model.layers.1.self_attn.q_proj.weight"

    def change(tensors):
        del tensors["visual.merger.ln_q.bias"], tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.2.input_layernorm.weight"] = np.ones(64, np.float32)
        tensors["visual.merger.mlp.1.weight"] = np.ones(3, np.float32)
        tensors[q] = tensors[q][:, :-1].copy()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
        tensors["model.visual.merger.ln_q.weight"] = tensors["visual.merger.ln_q.weight"].copy()

    bad = broken(folder, tmp_path / "bad", change)
    with pytest.raises(CheckpointError) as caught:
        load_model(bad)
    message = str(caught.value)
    for part in (
        str(bad),
        "missing: model.layers.0.mlp.up_proj.weight, visual.merger.ln_q.bias",
        "unknown: model.layers.2.input_layernorm.weight, visual.merger.mlp.1.weight",
        f"misshaped: {q} is [64, 63], expected [64, 64]",
        "model.norm.weight is F64, expected one of",
        "given twice: ",
        "model.visual.merger.ln_q.weight",
    ):
        assert part in message or _sorted_part(part, message), part
    assert convert.main(["from-hf", str(bad), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def _sorted_part(part: str, message: str) -> bool:
    """Whether a list of names stands in the message in any order."""
    kind, _, names = part.partition(": ")
    for clause in message.split("; "):
        if clause.startswith(kind + ": "):
            return set(names.split(", ")) == set(clause.partition(": ")[2].split(", "))
    return False


def test_layers_of_different_dtype(folder, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    bad = broken(folder, tmp_path / "bad", lambda t: t.update({name: t[name].astype(np.float16)}))
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight is F16 and F32 in different layers"):
        load_model(bad)


def test_float16_overflow(folder, tmp_path):
    name = "model.norm.weight"
    large = broken(folder, tmp_path / "large", lambda t: t.update({name: t[name] * 1e6}))
    for command in ("from-hf", "to-hf"):
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight: has values beyond float16"):
            convert.convert(command, large, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def _remove_shard(folder):
    (folder / "model-00001-of-00003.safetensors").unlink()


def _truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 10)


def _empty_file(folder):
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"")


def _no_weights(folder):
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()


def _bad_index(folder):
    (folder / INDEX).write_text("{")


def _index_says_more(folder):
    index = json.loads((folder / INDEX).read_text())
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    assert index["weight_map"]["model.embed_tokens.weight"] == file.name


def _index_names(name):
    """One tensor is in a file of this name, as the index says."""

    def change(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.embed_tokens.weight"] = name
        path.write_text(json.dumps(index))

    return change


def _other_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def _config(text):
    return lambda folder: (folder / "config.json").write_bytes(text)


def _config_value(key, value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return change


def _no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    "damage, said",
    [
        (
            _remove_shard,
            "model.safetensors.index.json: names files that are not there: model-00001-of-00003.safetensors",
        ),
        (_index_names("../other.safetensors"), "expected names of files in its folder, found '../other.safetensors'"),
        (_index_names("a" * 300), "expected names of files in its folder, found 'aaaa"),
        (_index_names("a\0.safetensors"), "expected names of files in its folder, found 'a\\x00.safetensors'"),
        (_index_names("\ud800"), "expected names of files in its folder, found '\\ud800'"),
        (_truncate, "model-00001-of-00003.safetensors: truncated or not a safetensors file"),
        (_empty_file, "model-00001-of-00003.safetensors: truncated or not a safetensors file"),
        (_no_weights, "holds neither model.safetensors nor model.safetensors.index.json"),
        (_bad_index, "model.safetensors.index.json: not JSON"),
        (_index_says_more, "missing: model.embed_tokens.weight (the index places it in model-00001-of-00003"),
        (_other_model, "config.json: model_type is 'llama', expected 'qwen2_vl'"),
        (_no_config, "not a checkpoint; expected a Hugging Face folder"),
        (_config(b"[]"), "config.json: holds a list; expected an object"),
        (_config(b"{"), "config.json: not JSON"),
        (_config(b'{"a": "\xff"}'), "config.json: not UTF-8"),
        (_config(b"[" * 100_000), "config.json: not JSON"),
        (_config_value("text_config", []), "config.json: text_config is []; expected an object"),
        (_config_value("vision_config", 3), "config.json: vision_config is 3; expected an object"),
        (_config_value("vision_config", None), "config.json: vision_config is missing"),
        (_config_value("rope_scaling", "mrope"), "config.json: rope_scaling is 'mrope'; expected an object"),
        (_config_value("rope_scaling", {"mrope_section": 3}), "config.json: rope_scaling.mrope_section is 3, expected"),
        (_config_value("vocab_size", "many"), "config.json: vocab_size is 'many', expected a whole number"),
    ],
)
def test_damaged_folder(folder, damage, said, tmp_path, capsys):
    """One clear line on stderr and exit code 2; nothing is written."""
    params, cfg, _ = load_model(folder)
    bad = tmp_path / "bad"
    save_hf(params, cfg, bad, source=folder, max_shard_bytes=sum(p.nbytes for p in jax.tree.leaves(params)) / 2.5)
    assert len(list(bad.glob("*.safetensors"))) == 3
    (bad / SUMS).unlink()  # a folder from elsewhere has none
    damage(bad)
    assert convert.main(["from-hf", str(bad), str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("convert: ") and said in line and str(bad) in line
    assert not (tmp_path / "out").exists()


def test_text_config_of_null_is_none(folder, tmp_path):
    copy = broken(folder, tmp_path / "copy", lambda tensors: None)
    _config_value("text_config", None)(copy)
    assert load_config(copy) == load_config(folder)
    assert convert.main(["to-hf", str(copy), str(tmp_path / "out")]) == 0


def test_damaged_orbax(folder, tmp_path):
    params, cfg, _ = load_model(folder)
    save_params(tmp_path / "orbax", params, folder)
    (tmp_path / "orbax" / SUMS).unlink()
    (tmp_path / "orbax" / "hf" / "config.json").write_text(json.dumps(tiny.config_dict(tied=True, heads=2)))
    with pytest.raises(CheckpointError, match=r"unknown: \['text'\]\['head'\]; misshaped: \['text'\]\['embed'\] is"):
        load_model(tmp_path / "orbax")
    folders.copy_companions(folder, tmp_path / "orbax" / "hf")
    for file in (tmp_path / "orbax" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="params"):
        load_model(tmp_path / "orbax")


def test_wrong_parameters(folder, tmp_path):
    params, cfg, _ = load_model(folder)
    del params["text"]["norm"]
    with pytest.raises(CheckpointError, match="norm"):
        save_hf(params, cfg, tmp_path / "out", source=folder)
    params["text"]["norm"] = np.ones(7, np.float32)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[7\], expected \[64\]"):
        save_hf(params, cfg, tmp_path / "out", source=folder)
    params, _, _ = load_model(folder)
    other = broken(folder, tmp_path / "other", lambda t: None)
    (other / "config.json").write_text(json.dumps(tiny.config_dict(tied=False, heads=2)))
    with pytest.raises(CheckpointError, match="describes another model"):
        save_hf(params, cfg, tmp_path / "out", source=other)
    assert not (tmp_path / "out").exists()


# Destinations.


def test_destination(folder, tmp_path):
    """New and empty folders are written, checkpoints only on request, other folders and files never."""
    empty, used, file = tmp_path / "empty", tmp_path / "used", tmp_path / "file"
    empty.mkdir()
    used.mkdir()
    (used / "thesis.txt").write_text("years of work")
    file.write_text("")
    convert.convert("to-hf", folder, empty)
    with pytest.raises(CheckpointError, match="is not empty"):
        convert.convert("to-hf", folder, empty)
    (empty / "left from before").write_text("")
    convert.convert("from-hf", folder, empty, overwrite=True)
    assert sorted(path.name for path in empty.iterdir()) == ["hf", "params", SUMS]
    with pytest.raises(CheckpointError, match="holds no checkpoint, so it is not overwritten"):
        convert.convert("to-hf", folder, used, overwrite=True)
    assert (used / "thesis.txt").read_text() == "years of work"
    with pytest.raises(CheckpointError, match="is a file"):
        convert.convert("to-hf", folder, file)
    for near in (folder, folder / "inside", folder.parent):
        with pytest.raises(CheckpointError, match="must be separate folders"):
            convert.convert("to-hf", folder, near, overwrite=True)


def test_a_failed_write_leaves_the_old_checkpoint(folder, tmp_path, monkeypatch):
    convert.convert("to-hf", folder, tmp_path / "out")
    before = tensors_of(tmp_path / "out")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("r1vl_jax.checkpoint.hf._write_file", fail)
    assert convert.main(["to-hf", str(folder), str(tmp_path / "out"), "--overwrite"]) == 2
    assert tensors_of(tmp_path / "out") == before
    assert not list(tmp_path.glob(".*"))


def test_command_line(folder, tmp_path):
    """As a user runs it: torch is not imported, and a wrong folder gives one line and exit code 2."""
    code = (
        "import sys; from r1vl_jax.convert import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "from-hf", str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "float32" in done.stdout
    command = [sys.executable, "-m", "r1vl_jax.convert", "to-hf", str(tmp_path / "none"), str(tmp_path / "out2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"convert: {tmp_path / 'none'}: no such folder")
    assert "Traceback" not in done.stderr
