"""python -m r1vl_jax.generate: one JSON object on stdout, everything else on stderr, one line for wrong input."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from unittest.mock import Mock

import av
import jax
import numpy as np
import pytest
from helpers.tiny_jax import write_run_inputs
from PIL import Image

import r1vl_jax.inference.generate as generate_module
from r1vl_jax.checkpoint.folder import SUMS
from r1vl_jax.generate import main
from r1vl_jax.inference.generate import encode
from r1vl_jax.processing.processor import Processor


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def command(inputs, capsys):
    """Runs the command on the tiny model: (exit code, stdout, stderr)."""

    def run(*arguments, model=inputs / "model", dtype="float32"):
        code = main(["--model", str(model), "--dtype", dtype, *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """56 x 84: a grid of 1 x 4 x 6 patches, 6 image tokens."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8)).save(path)
    return path


def test_json(command, picture, inputs):
    code, out, err = command("--json", "--prompt", "How many?", "--image", picture, "--max-new-tokens", 8)
    assert code == 0
    assert len(out.splitlines()) == 1
    result = json.loads(out)
    assert set(result) == {"prompt_tokens", "image_tokens", "samples"}
    assert result["image_tokens"] == 6
    processor = Processor.from_folder(inputs / "model")
    encoded = processor.encode_question("How many?", [str(picture)])
    assert result["prompt_tokens"] == len(encoded.tokens_T)
    (sample,) = result["samples"]
    assert set(sample) == {"text", "tokens", "logprobs"}
    assert 1 <= len(sample["tokens"]) == len(sample["logprobs"]) <= 8
    assert all(logprob < 0 and math.isfinite(logprob) for logprob in sample["logprobs"])
    assert sample["text"] == processor.decode(sample["tokens"])
    # Progress goes to stderr, and says no seed where nothing is drawn.
    assert "parameters loaded in" in err and "tokens in" in err and "seed" not in err
    # Greedy: the same again, and the plain output is the text alone.
    code, out, _ = command("--prompt", "<image>How many?", "--image", picture, "--max-new-tokens", 8)
    assert (code, out) == (0, sample["text"] + "\n")


def sampled(command, *arguments):
    code, out, err = command(
        "--json", "--prompt", "How many?", "--samples", 16, "--temperature", 5, "--max-new-tokens", 24, *arguments
    )
    assert code == 0
    return json.loads(out)["samples"], err


def test_samples_and_their_stop_token(command, inputs):
    """Sixteen answers at a high temperature: a shorter one ends with a stop token, its log-probability with it."""
    samples, _ = sampled(command, "--seed", 1)
    assert len(samples) == 16 and len({tuple(sample["tokens"]) for sample in samples}) == 16
    stops = Processor.from_folder(inputs / "model").stop_ids
    short = [sample for sample in samples if len(sample["tokens"]) < 24]
    assert short
    for sample in samples:
        assert len(sample["logprobs"]) == len(sample["tokens"])
        assert not set(sample["tokens"][:-1]) & set(stops)
        assert "<|" not in sample["text"]
    assert all(sample["tokens"][-1] in stops for sample in short)


def test_seeds(command):
    """A seed fixes the answers; without one they are new each time, and stderr says what gives them again."""
    first, err = sampled(command)
    seed = next(line.split()[1] for line in err.splitlines() if line.startswith("seed "))
    again, err = sampled(command, "--seed", seed)
    assert first == again and "seed" not in err
    other, _ = sampled(command, "--seed", int(seed) ^ 1)
    assert other != first


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--prompt", "see <|image_pad|>"], "<|image_pad|>"),
        (["--prompt", "<image> and <image>"], "2 <image>"),
        (["--prompt", "see <image>"], "1 <image>"),
    ],
)
def test_wrong_input(command, arguments, named):
    """Exit code 2, one line that says what is wrong, nothing on stdout."""
    code, out, err = command("--json", "--prompt", "How many?", *arguments)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if "parameters loaded in" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]


@pytest.mark.parametrize(
    "option, value",
    [
        *(("--temperature", value) for value in ("-1", "nan", "inf")),
        *(("--top-p", value) for value in ("0", "nan", "1.1")),
        *(("--samples", value) for value in ("0", str(10**9))),
        *(("--max-new-tokens", value) for value in ("0", str(10**12))),
        *(("--max-pixels", value) for value in ("-1", "0", str(10**12))),
        *(("--seed", value) for value in ("-1", str(2**32), str(2**63), "9" * 5000)),
        ("--max-frames", str(10**12)),
        ("--fps", "1e300"),
    ],
)
def test_numbers_out_of_range(option, value, capsys):
    """One line, before the checkpoint is opened."""
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "nowhere", "--prompt", "How many?", option, value])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"argument {option}: expected a" in err and len(err) < 250


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 3.6 TiB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out\nof memory")],
)
def test_too_little_memory(command, monkeypatch, error):
    """As NumPy and XLA raise it."""
    monkeypatch.setattr("r1vl_jax.generate.generate", Mock(side_effect=error))
    code, out, err = command("--prompt", "How many?")
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("error: answers: too little memory (")
    assert err.endswith("; lower --max-new-tokens, --samples or --max-pixels\n")


def test_larger_images_are_shrunk_and_it_is_said(command, inputs, tmp_path):
    """To 1,003,520 pixels unless --max-pixels says otherwise; never above the checkpoint's own limit."""
    processor = Processor.from_folder(inputs / "model")
    large = dataclasses.replace(processor.image_spec, max_pixels=12_845_056)
    published = dataclasses.replace(processor, image_spec=large)
    path = str(tmp_path / "large.png")
    Image.new("RGB", (1400, 1120), "red").save(path)
    tokens = {None: 1280, 5_000_000: 2000, 28 * 28 * 10: 6}
    for limit, count in tokens.items():
        assert encode(published, "How many?", [path], max_pixels=limit).num_image_tokens == count
    for limit, says in ((None, "1003520"), (28 * 28 * 10, "7840")):
        with pytest.MonkeyPatch.context() as patch:
            said = []
            patch.setattr(generate_module, "say", said.append)
            encode(published, "How many?", [path], max_pixels=limit)
            encode(published, "How many?", [path], max_pixels=5_000_000)
        assert len(said) == 1 and path in said[0] and "1400 x 1120" in said[0]
        assert f"--max-pixels {says} (the checkpoint itself allows 12,845,056)" in said[0]
    lower = dataclasses.replace(processor, image_spec=dataclasses.replace(large, max_pixels=50_000))
    assert encode(lower, "How many?", [path]).num_image_tokens <= 50_000 // 784
    code, _, err = command("--prompt", "How many?", "--max-pixels", 1)
    assert code == 2 and "max_pixels is" in err.splitlines()[-1]


def test_greedy_samples_are_the_same(command):
    code, out, err = command("--json", "--prompt", "How many?", "--samples", 2, "--max-new-tokens", 4)
    assert code == 0 and "--temperature 0 is greedy: all 2 answers will be the same" in err
    first, second = json.loads(out)["samples"]
    assert first == second


def test_a_bug_shows_its_traceback(command, monkeypatch):
    """Only what the user can put right is one line."""

    def broken(*_, **__):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(generate_module, "rollout", broken)
    with pytest.raises(ValueError, match="shapes do not match"):
        command("--prompt", "How many?")


def test_base_model(command, inputs, tmp_path):
    """Its chat template renders no turns: the built-in one is used, as in the other model, and it is said."""
    base = shutil.copytree(inputs / "model", tmp_path / "base", ignore=shutil.ignore_patterns(SUMS))
    (base / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['text'] }}"}))
    question = ("--prompt", "How many?", "--max-new-tokens", 8)
    code, out, err = command(*question, model=base)
    assert f"{base}: its chat template renders no chat turns" in err.splitlines()[0]
    assert (code, out) == command(*question)[:2]


@pytest.mark.parametrize(
    "file, content, named",
    [
        ("config.json", {"rope_scaling": {"type": "yarn", "mrope_section": [1, 1, 2]}}, "'yarn'"),
        ("config.json", {"rope_scaling": {"type": "linear", "mrope_section": [1, 1, 2]}}, "'linear'"),
        ("config.json", {"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ("config.json", {"text_config": []}, "text_config"),
        ("adapter_config.json", {"base_model_name_or_path": "base"}, "adapter"),
    ],
)
def test_models_that_are_not_computed(command, inputs, tmp_path, file, content, named):
    model = shutil.copytree(inputs / "model", tmp_path / "model", ignore=shutil.ignore_patterns(SUMS))
    path = model / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | content))
    if named == "adapter":
        (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    code, out, err = command("--prompt", "How many?", model=model)
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and str(path) in err and named in err


def test_no_such_model(command, tmp_path):
    for model, named in [(tmp_path / "nothing", "no such folder"), (tmp_path, "not a checkpoint")]:
        code, out, err = command("--prompt", "How many?", model=model)
        assert code == 2 and out == ""
        assert len(err.splitlines()) == 1 and str(model) in err and named in err


def test_video(command, picture, tmp_path, inputs):
    """A folder of frames and a file, beside an image; what is shrunk is said of the image alone."""
    frames = tmp_path / "frames"
    frames.mkdir()
    pictures = [np.full((56, 84, 3), 20 * k, np.uint8) for k in range(5)]
    for k, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(frames / f"{k}.png")
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        for pixels in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    common = ("--json", "--prompt", "<video> then <image>?", "--image", picture, "--max-new-tokens", 2)
    code, out, err = command(*common, "--video", frames, "--max-pixels", 3136)
    # 5 frames are 3 pairs of 2 tokens each (28 x 56), the image is 2 tokens.
    assert code == 0 and json.loads(out)["image_tokens"] == 3 * 2 + 2
    assert f"{picture}: 84 x 56, shrunk" in err and "frames" not in err
    code, out, _ = command(*common, "--video", tmp_path / "clip.mp4", "--fps", 2)
    assert code == 0 and json.loads(out)["image_tokens"] == 2 * 6 + 6  # 1.25 s: 3 frames and one more
    code, _, err = command("--prompt", "x", "--video", tmp_path / "none.mp4")
    assert code == 2 and err.splitlines()[-1].startswith("error: --prompt, videos[0]") and "no such video file" in err
    code, _, err = command("--prompt", "x", "--max-frames", 3)
    assert code == 2 and "max_frames is 3; expected an even number" in err
