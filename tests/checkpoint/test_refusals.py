"""What a checkpoint may say or hold that the port does not compute: each is refused in one line that says the word."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.tiny_jax import random_params, tiny_config
from safetensors.numpy import load_file, save_file

from r1vl_jax import convert
from r1vl_jax.checkpoint.folder import SUMS
from r1vl_jax.checkpoint.hf import WEIGHTS, save_hf
from r1vl_jax.checkpoint.store import find_model, load_model
from r1vl_jax.errors import CheckpointError
from r1vl_jax.model.config import load_config, parse_config

LINEAR = "model.layers.0.mlp.up_proj"
FLAT = tiny.config_dict(layers=1)
FLAT["vision_config"]["depth"] = 1
TEXT_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
TOKENS = dict(zip(IDS, ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"), strict=True))


def nested(config=FLAT):
    """The same file as transformers 5 lays it out."""
    own = {key: config[key] for key in (*IDS, "model_type", "vision_config", "tie_word_embeddings")}
    text = {key: value for key, value in config.items() if key not in own and key not in ("rope_scaling", "rope_theta")}
    rope = {"rope_type": "default", "type": "mrope", "rope_theta": config["rope_theta"], **config["rope_scaling"]}
    return {**own, "text_config": text | {"rope_parameters": rope}}


def changed(config, path, value):
    """The file with one field replaced; `path` as in messages: "vision_config.depth"."""
    config = json.loads(json.dumps(config))
    *objects, key = path.split(".")
    table = config
    for name in objects:
        table = table[name]
    table[key] = value
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint; tests copy what they change."""
    source = tmp_path_factory.mktemp("source")
    (source / "config.json").write_text(json.dumps(FLAT))
    (source / "tokenizer.json").write_text("{}")
    cfg = tiny_config()
    save_hf(random_params(cfg), cfg, source / "model", source=source)
    return source / "model"


@pytest.fixture
def copy(folder, tmp_path):
    """Without sums, as a folder from elsewhere."""
    return shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(SUMS))


def refused(capsys, folder, *said, command="from-hf"):
    """One line on standard error that has the texts, exit code 2, and nothing is written."""
    out = folder.parent / "refused"
    assert convert.main([command, str(folder), str(out)]) == 2
    line = capsys.readouterr().err.strip().rpartition("\r")[2].splitlines()[-1]
    assert line.startswith("convert: ") and str(folder) in line and len(line) < 900
    assert [text for text in said if text not in line] == [], line
    assert not out.exists()


def test_the_layouts_are_the_same_model():
    assert parse_config(FLAT) == parse_config(nested()) == tiny_config()


# Ropes.

ROPES = ("yarn", "linear", "dynamic", "longrope", "llama3", "ntk", "YARN", 3, ["mrope"])


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("word", ROPES)
def test_other_ropes(word, key):
    """The published form, that of transformers 5, and a file with both keys of which only one says it."""
    rope = {"factor": 4.0, "mrope_section": [2, 3, 3], "original_max_position_embeddings": 32768, key: word}
    said = rf"{key} is {json.dumps(word)}, expected 'mrope' or 'default'".replace('"', "'").replace("[", r"\[")
    with pytest.raises(CheckpointError, match=rf"^c.json: rope_scaling\.{said}"):
        parse_config(FLAT | {"rope_scaling": rope}, "c.json")
    with pytest.raises(CheckpointError, match=rf"^c.json: text_config\.rope_parameters\.{said}"):
        parse_config(changed(nested(), "text_config.rope_parameters", rope), "c.json")
    both = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3], key: word}
    with pytest.raises(CheckpointError, match=said):
        parse_config(FLAT | {"rope_scaling": both})


def test_rope_of_a_command(copy, capsys):
    scaling = {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3], "original_max_position_embeddings": 32768}
    (copy / "config.json").write_text(json.dumps(FLAT | {"rope_scaling": scaling}))
    refused(capsys, copy, "config.json: rope_scaling.type is 'yarn', expected 'mrope' or 'default'")
    vision = changed(nested(), "vision_config.rope_parameters", {"rope_type": "yarn"})
    with pytest.raises(CheckpointError, match=r"vision_config\.rope_parameters\.rope_type is 'yarn'"):
        parse_config(vision)


@pytest.mark.parametrize("types", [{}, {"type": "default"}, {"rope_type": "default"}, {"type": None}])
def test_ropes_that_are_computed(types):
    config = FLAT | {"rope_scaling": {"mrope_section": [2, 3, 3], **types}}
    assert parse_config(config) == parse_config(FLAT)


# Numbers.

WHOLE = (*TEXT_FIELDS, "vocab_size", "vision_config.depth", "vision_config.embed_dim", "vision_config.num_heads",
         "vision_config.patch_size", "vision_config.temporal_patch_size", "vision_config.in_chans",
         "vision_config.spatial_merge_size", "vision_config.hidden_size")  # fmt: skip
POSITIVE = ("rms_norm_eps", "rope_theta", "vision_config.mlp_ratio")


@pytest.mark.parametrize("value", [0, -1, 2.0, 2.5, math.nan, math.inf, "2", True, [2], {}])
@pytest.mark.parametrize("field", WHOLE)
def test_numbers_that_must_be_whole(field, value):
    with pytest.raises(CheckpointError) as caught:
        parse_config(changed(FLAT, field, value), "c.json")
    assert str(caught.value) == f"c.json: {field} is {value!r}, expected a whole number from 1"
    if "." not in field:
        with pytest.raises(CheckpointError, match=rf"^c.json: text_config\.{field} is "):
            parse_config(changed(nested(), f"text_config.{field}", value), "c.json")


@pytest.mark.parametrize("value", [0, -1e-6, math.nan, math.inf, -math.inf, 10**400, "1e-6", True, [1e-6]])
@pytest.mark.parametrize("field", POSITIVE)
def test_numbers_that_must_be_positive_and_finite(field, value):
    with pytest.raises(CheckpointError, match=rf"^c.json: {field} is .*, expected a positive, finite number$"):
        parse_config(changed(FLAT, field, value), "c.json")


@pytest.mark.parametrize("value", [1e-300, 1e308])
def test_an_mlp_without_width(value):
    with pytest.raises(CheckpointError, match=r"vision_config\.mlp_ratio is .*, expected an MLP of some width"):
        parse_config(changed(FLAT, "vision_config.mlp_ratio", value))


@pytest.mark.parametrize(
    "value",
    [[4, 4], [2, 3, 4], [2, 3, 3, 0], [8, 0, 0], [-2, 5, 5], [2.0, 3.0, 3.0], [2, 3, True], "233", {"a": 2}, []],
)
def test_mrope_section(value):
    with pytest.raises(CheckpointError, match=r"rope_scaling\.mrope_section is .*half the head width 16"):
        parse_config(changed(FLAT, "rope_scaling.mrope_section", value))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_size": 66}, "hidden_size is 66, expected a multiple of num_attention_heads 4"),
        ({"num_attention_heads": 3}, "hidden_size is 64, expected a multiple of num_attention_heads 3"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 64, "num_key_value_heads": 1}, "half the head width 1 "),
        (
            {"vision_config": FLAT["vision_config"] | {"num_heads": 3}},
            "embed_dim is 32, expected a multiple of 4 times",
        ),
        (
            {"vision_config": FLAT["vision_config"] | {"num_heads": 16}},
            "embed_dim is 32, expected a multiple of 4 times",
        ),
        ({"vision_config": FLAT["vision_config"] | {"hidden_size": 32}}, "hidden_size is 32, the text width is 64"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"rope_scaling": None}, "mrope_section is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"image_token_id": 96}, "image_token_id is 96, expected less than vocab_size 96"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        (
            {"vision_config": FLAT["vision_config"] | {"hidden_act": "gelu"}},
            "hidden_act is 'gelu', expected 'quick_gelu'",
        ),
    ],
)
def test_values_that_do_not_fit_each_other(changes, said):
    with pytest.raises(CheckpointError) as caught:
        parse_config(FLAT | changes, "c.json")
    assert str(caught.value).startswith("c.json: ") and said in str(caught.value)


def test_null_in_text_config_is_no_value():
    """transformers 4.5x writes text_config as well as the fields at the top level, many of them null."""
    assert parse_config(FLAT | {"text_config": dict.fromkeys([*FLAT, "rope_parameters"])}) == parse_config(FLAT)


# Vision ids.


@pytest.mark.parametrize("place", ["text_config", "vision_config"])
@pytest.mark.parametrize("key", IDS)
def test_ids_in_either_place(key, place):
    for config in (FLAT, nested()):
        config = changed(config, key, None)
        config.setdefault(place, {})[key] = IDS[key]
        assert parse_config(config) == parse_config(FLAT)


def test_the_top_level_comes_first():
    config = changed(nested(), "text_config.image_token_id", 5)
    assert parse_config(config).image_token_id == 90


@pytest.mark.parametrize("key", IDS)
def test_ids_of_the_tokenizer(copy, key):
    for with_config in (True, False):
        (copy / "config.json").write_text(json.dumps(changed(FLAT, key, None)))
        added = {str(IDS[name]): {"content": token} for name, token in TOKENS.items()}
        if with_config:
            (copy / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        else:
            (copy / "tokenizer_config.json").unlink()
            tokens = [{"id": IDS[name], "content": token} for name, token in TOKENS.items()]
            (copy / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
        assert load_config(copy) == parse_config(FLAT)
    convert.convert("to-hf", copy, copy.parent / "out")  # an export says all ids itself
    assert json.loads((copy.parent / "out" / "config.json").read_text())[key] == IDS[key]


@pytest.mark.parametrize("value", [1.5, -1, "90", True])
def test_ids_that_are_none(copy, value):
    with pytest.raises(CheckpointError, match=r"c.json: vision_config\.image_token_id is .*a whole number from 0"):
        parse_config(changed(changed(FLAT, "image_token_id", None), "vision_config.image_token_id", value), "c.json")


def test_an_id_that_is_nowhere(copy, capsys):
    (copy / "config.json").write_text(json.dumps(changed(FLAT, "video_token_id", None)))
    refused(capsys, copy, "config.json: video_token_id is missing")


# Quantized weights.

METHODS = ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "hqq")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["", "text_config."])
def test_quantization_in_the_config(copy, capsys, method, where):
    settings = {"quant_method": method, "bits": 4}
    (copy / "config.json").write_text(json.dumps(changed(nested(), f"{where}quantization_config", settings)))
    refused(capsys, copy, f"config.json: {where}quantization_config.quant_method is {method!r}; quantized weights")


def test_quantization_without_a_method():
    with pytest.raises(CheckpointError, match="quantization_config is there; quantized weights are not read"):
        parse_config(FLAT | {"quantization_config": {"load_in_4bit": True}})
    with pytest.raises(CheckpointError, match="quantization_config is 'gptq'; expected an object"):
        parse_config(FLAT | {"quantization_config": "gptq"})
    assert parse_config(FLAT | {"quantization_config": None}) == parse_config(FLAT)


INT = np.zeros((4, 4), np.int32)
QUANTIZED = {
    "GPTQ or AWQ": {"qweight": INT, "qzeros": INT, "scales": np.ones((4, 4), np.float16), "g_idx": INT[0]},
    "bitsandbytes": {
        "weight": np.zeros((8, 1), np.uint8),
        "weight.absmax": np.zeros(8, np.uint8),
        "weight.quant_map": np.ones(16, np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.zeros(80, np.uint8),
    },
    "int8": {"weight": np.zeros((40, 64), np.int8), "weight_scale": np.ones((40, 1), np.float32)},
    "compressed-tensors": {"weight_packed": INT, "weight_shape": INT[0]},
    "fp8": {
        "weight": np.zeros((40, 64), jnp.float8_e4m3fn),
        "weight_scale_inv": np.ones((1, 1), np.float32),
        "input_scale": np.ones(1, np.float32),
    },
    "(F8_E4M3)": {"weight": np.zeros((40, 64), jnp.float8_e4m3fn)},
    "(I8)": {"weight": np.zeros((40, 64), np.int8)},
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_tensors(copy, capsys, kind):
    tensors = load_file(copy / WEIGHTS)
    del tensors[f"{LINEAR}.weight"]
    added = {f"{LINEAR}.{name}": value for name, value in QUANTIZED[kind].items()}
    save_file(tensors | added, copy / WEIGHTS)
    refused(capsys, copy, "quantized weights", kind, LINEAR, "expected a whole model in bfloat16, float16 or float32")


# Adapters.


def only_adapter(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2-VL-2B"}))


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_an_adapter_alone(copy, capsys, with_config, command):
    only_adapter(copy)
    if not with_config:
        (copy / "config.json").unlink()
    refused(capsys, copy, "adapter_config.json: an adapter of 'Qwen/Qwen2-VL-2B' without", "merge", command=command)
    (copy / "adapter_config.json").write_text("[")
    refused(capsys, copy, "adapter_config.json: an adapter without the weights of its base model", command=command)


def test_an_adapter_as_the_export_of_a_run(copy, tmp_path, capsys):
    only_adapter(copy)
    (tmp_path / "run").mkdir()
    copy.rename(tmp_path / "run" / "export")
    refused(capsys, tmp_path / "run", "export/adapter_config.json: an adapter of")


@pytest.mark.parametrize(
    "name",
    [f"base_model.model.{LINEAR}.lora_A.weight", f"{LINEAR}.lora_B.default.weight", f"{LINEAR}.base_layer.weight",
     f"{LINEAR}.lora_magnitude_vector", "lm_head.modules_to_save.default.weight"],
)  # fmt: skip
def test_tensors_of_an_adapter(copy, capsys, name):
    save_file(load_file(copy / WEIGHTS) | {name: np.ones((4, 4), np.float32)}, copy / WEIGHTS)
    refused(capsys, copy, f"holds an adapter: 1 tensors, the first {name}; expected a whole model")


def test_weights_in_other_files_are_named(copy, capsys):
    (copy / WEIGHTS).unlink()
    for name in ("pytorch_model.bin", "model-q4.gguf"):
        (copy / name).write_bytes(b"x")
    refused(capsys, copy, "only safetensors are read, found model-q4.gguf, pytorch_model.bin")


STALE = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "quantize_config.json",
    "quant_config.json",
    "pytorch_model.bin.index.json", "model.safetensors.index.fp32.json", "trainer_state.json", "train_results.json",
    "all_results.json", "training_args.bin", "optimizer.pt", "README.md", "consolidated.safetensors", "weights.model",
)  # fmt: skip
KEPT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "generation_config.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.model",
)  # fmt: skip


def test_stale_files_are_not_copied(copy, tmp_path, capsys):
    """A merged model in the folder of its adapter, with what its training left."""
    for name in (*STALE, *KEPT):
        (copy / name).write_text("{}")
    assert find_model(copy).note == f"{copy}: adapter_config.json is not read, only the weights beside it"
    assert convert.main(["to-hf", str(copy), str(tmp_path / "hf")]) == 0
    assert "adapter_config.json is not read" in capsys.readouterr().err
    assert convert.main(["from-hf", str(copy), str(tmp_path / "orbax")]) == 0
    for out, more in ((tmp_path / "hf", {WEIGHTS, SUMS}), (tmp_path / "orbax" / "hf", set())):
        assert {path.name for path in out.iterdir()} == {"config.json", *KEPT} | more
    leaves = [jax.tree.leaves(load_model(place)[0]) for place in (copy, tmp_path / "hf", tmp_path / "orbax")]
    for other in leaves[1:]:
        assert all(map(np.array_equal, leaves[0], other))


# Long lists.


@pytest.mark.parametrize("kind", ["missing", "unknown", "misshaped"])
def test_lists_are_cut_to_five_and_a_count(copy, capsys, kind):
    tensors = load_file(copy / WEIGHTS)
    names = sorted(name for name in tensors if name.startswith("visual.blocks."))[:9]
    for name in names:
        value = tensors.pop(name)
        if kind == "unknown":
            tensors |= {name: value, f"{name}.more": value}
        elif kind == "misshaped":
            tensors[name] = np.ones(3, np.float32)
    save_file(tensors, copy / WEIGHTS)
    assert convert.main(["from-hf", str(copy), str(copy.parent / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{kind}: " in line and line.endswith(" and 4 more") and line.count("visual.blocks.") == 5
