"""python -m r1vl_jax.generate: answers of a Qwen2-VL checkpoint to one question, with their log-probabilities.

    load -> encode -> answer

What a user can get wrong shows in the first two, as CheckpointError, RowError or ValueError.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import secrets
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from r1vl_jax.checkpoint.store import find_model, load_model
from r1vl_jax.config import ATTENTION, KERNELS
from r1vl_jax.data.batching import collate_prompts
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.errors import CheckpointError, RowError
from r1vl_jax.model.backend import choose
from r1vl_jax.model.config import ModelConfig
from r1vl_jax.model.fused import fuse
from r1vl_jax.model.spec import num_params, param_spec
from r1vl_jax.parallel.sharding import ROLLOUT_RULES, make_mesh, param_shardings
from r1vl_jax.processing.images import smart_resize
from r1vl_jax.processing.processor import Processor
from r1vl_jax.processing.videos import VideoSpec
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.rollout.sampling import check_sampling
from r1vl_jax.types import EncodedPrompt, Sampling

# Published checkpoints allow 12,845,056 pixels, 16,384 image tokens: attention over those takes hundreds of GB.
MAX_PIXELS = 1280 * 28 * 28


def say(message: str) -> None:
    """One line for people; stdout is for the answers."""
    print(message, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to answer: fused parameters on one device, and what turns questions into prompts."""

    params: Any
    cfg: ModelConfig
    processor: Processor
    mesh: Any


def load(model: str | Path, *, dtype: str = "bfloat16", attention: str = "auto", kernels: str = "auto") -> Loaded:
    """Reads a checkpoint folder (Hugging Face, converted, or a run). Raises CheckpointError or ValueError."""
    started = time.perf_counter()
    mesh = make_mesh(devices=jax.devices()[:1])
    found = find_model(model)
    processor = Processor.from_folder(found.files)
    if found.note:
        say(found.note)
    params, cfg, _ = load_model(
        found,
        dtype=dtype,
        shardings=lambda cfg: param_shardings(param_spec(cfg), mesh, ROLLOUT_RULES["replicated"]),
    )
    cfg = cfg.with_pixels(processor.image_spec.mean, processor.image_spec.std)
    cfg = cfg.with_backend(*choose(attention, kernels, dtype=dtype))
    params = jax.jit(partial(fuse, cfg=cfg))(params)
    say(f"{model}: {num_params(cfg) / 1e6:.1f}M parameters loaded in {time.perf_counter() - started:.1f} s")
    return Loaded(params, cfg, processor, mesh)


def encode(
    processor: Processor,
    prompt: str,
    images: list[str],
    videos: Sequence[str] = (),
    *,
    max_pixels: int | None = None,
    video: VideoSpec | None = None,
) -> EncodedPrompt:
    """One question as a prompt; says which images are shrunk below what the checkpoint allows.

    Args:
      prompt: the question; "<image>" and "<video>" mark where those stand, else all stand in front.
      images, videos: paths; a video may be the folder of its frames, which are taken in the order of their names.
      max_pixels: larger images are shrunk to this; None: the checkpoint's limit, but at most MAX_PIXELS.
      video: which frames of videos are taken; None: the default.
    Raises: RowError or ValueError.
    """
    own = processor.image_spec
    limit = min(own.max_pixels, max(MAX_PIXELS, own.min_pixels)) if max_pixels is None else max_pixels
    spec = dataclasses.replace(own, max_pixels=limit)
    ready = dataclasses.replace(processor, image_spec=spec, video_spec=video or VideoSpec())
    clips = [sorted(map(str, Path(path).iterdir())) if Path(path).is_dir() else path for path in videos]
    encoded = ready.encode_question(prompt, images, videos=clips, name="--prompt")
    order = re.findall("<image>|<video>", prompt) or ["<image>"] * len(images) + ["<video>"] * len(videos)
    stills = [grid for grid, kind in zip(encoded.grids, order, strict=True) if kind == "<image>"]
    for path, (_, h, w) in zip(images, stills, strict=True):
        with Image.open(path) as picture:
            width, height = picture.size
        size = {"factor": own.factor, "min_pixels": own.min_pixels, "max_pixels": own.max_pixels}
        full, pixels = smart_resize(height, width, **size), h * w * own.patch_size**2
        if full[0] * full[1] > pixels:
            say(
                f"{path}: {width} x {height}, shrunk to {pixels:,} pixels by --max-pixels {limit} (the checkpoint "
                f"itself allows {own.max_pixels:,})"
            )
    return encoded


def generate(loaded: Loaded, encoded: EncodedPrompt, *, samples: int = 1, sampling: Sampling, seed: int = 0) -> dict:
    """Samples answers to one question.

    Args:
      samples: number of answers; the weights are replicated, so any number goes.
    Returns:
      {"prompt_tokens", "image_tokens", "samples": [{"text", "tokens", "logprobs"}]}; tokens include the stop token,
      log-probabilities are those of log softmax(z / T), at T = 1 where the temperature is 0.
    """
    started = time.perf_counter()
    with jax.set_mesh(loaded.mesh):
        answers = rollout(
            loaded.params, loaded.cfg, collate_prompts([encoded], Buckets(32)), np.zeros(1, np.uint32),
            group=samples, sampling=sampling, stop_ids=loaded.processor.stop_ids, seed=seed, step=0,
        )  # fmt: skip
        answers = jax.tree.map(lambda a: a[0], answers)
    found = []
    for tokens, logprobs, mask in zip(answers.tokens_BGT, answers.logprobs_BGT, answers.mask_BGT, strict=True):
        text = loaded.processor.decode(tokens[mask])
        found.append({"text": text, "tokens": tokens[mask].tolist(), "logprobs": logprobs[mask].tolist()})
    say(f"{int(answers.mask_BGT.sum())} tokens in {time.perf_counter() - started:.1f} s, compilation included")
    return {"prompt_tokens": len(encoded.tokens_T), "image_tokens": encoded.num_image_tokens, "samples": found}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r1vl_jax.generate", description=__doc__.partition("\n")[0].split(": ", 1)[1]
    )
    add = partial(parser.add_argument, help="")
    defaults = Sampling()
    add("--model", required=True, help="checkpoint folder: Hugging Face layout, converted, or a run's")
    add("--image", action="append", default=[], help="an image; repeat it for several, in order")
    add("--video", action="append", default=[], help="a video file, or the folder of its frames; repeat it for several")
    add("--prompt", required=True, help='the question; "<image>", "<video>" mark where those stand (default: in front)')
    add("--samples", type=int, default=1, help="number of answers (default 1)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-p", type=float, default=defaults.top_p, help="nucleus sampling; 1 is off (default)")
    add("--top-k", type=int, default=defaults.top_k, help="0 is off (default)")
    add("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="default %(default)s")
    add(
        "--max-pixels",
        type=int,
        help=f"larger images are shrunk to this; default: {MAX_PIXELS}, or the checkpoint's own limit if that is less "
        "(published ones allow 12845056, which takes hundreds of GB)",
    )
    video = VideoSpec()
    add("--fps", type=float, default=video.fps, help="frames taken from a second of video (default %(default)s)")
    add("--max-frames", type=int, default=video.max_frames, help="frames of a video at most (default %(default)s)")
    add("--video-pixels", type=int, default=video.max_pixels, help="frames are shrunk to this (default %(default)s)")
    add("--seed", type=int, default=None, help="fixes what is sampled; default: another one each time, said on stderr")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default %(default)s")
    add("--attention", choices=ATTENTION, default="auto", help="default: the platform's")
    add("--kernels", choices=KERNELS, default="auto", help="default: pallas, on CPUs reference")
    add("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit code: 2 where the input is wrong."""
    args = _parser().parse_args(argv)
    seed = args.seed
    if seed is None:
        seed = secrets.randbelow(2**31)
        if args.temperature > 0:
            say(f"seed {seed}")
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.max_new_tokens)
    try:
        check_sampling(sampling)
        if args.samples < 1:
            raise ValueError(f"samples is {args.samples}, expected at least 1")
        loaded = load(args.model, dtype=args.dtype, attention=args.attention, kernels=args.kernels)
        video = VideoSpec(args.fps, args.max_frames, args.video_pixels)
        encoded = encode(loaded.processor, args.prompt, args.image, args.video, max_pixels=args.max_pixels, video=video)
    except (CheckpointError, RowError, ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    if args.samples > 1 and args.temperature == 0:
        say(f"--temperature 0 is greedy: all {args.samples} answers will be the same")
    result = generate(loaded, encoded, samples=args.samples, sampling=sampling, seed=seed)
    if args.json:
        print(json.dumps(result))
    else:
        print("\n\n---\n\n".join(sample["text"] for sample in result["samples"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
