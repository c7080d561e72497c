"""Samples a checkpoint's answers to one question, with their log-probabilities: load -> encode -> generate.

`load` and `encode` check everything that a user can get wrong. They raise CheckpointError, RowError or ValueError.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from r1vl_jax.data.batching import collate_prompts
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.inference.open_model import OpenModel, open_model
from r1vl_jax.model.fused import fuse
from r1vl_jax.model.spec import num_params
from r1vl_jax.parallel.sharding import ROLLOUT_RULES
from r1vl_jax.processing.images import smart_resize
from r1vl_jax.processing.processor import Processor
from r1vl_jax.processing.videos import VideoSpec
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.types import EncodedPrompt, Sampling

# Published checkpoints allow 12,845,056 pixels (16,384 image tokens); attention over so many takes hundreds of GB.
MAX_PIXELS = 1280 * 28 * 28


def say(message: str) -> None:
    """Prints one line for people on stderr; stdout is for the answers."""
    print(message, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to answer on one device. `weights` are fused: see model.fused."""

    model: OpenModel
    weights: Any

    @property
    def processor(self) -> Processor:
        return self.model.processor


def load(model: str | Path, *, dtype: str = "bfloat16", attention: str = "auto", kernels: str = "auto") -> Loaded:
    """Reads a checkpoint folder of any kind. Raises CheckpointError or ValueError."""
    started = time.perf_counter()
    rules = ROLLOUT_RULES["replicated"]
    opened = open_model(model, rules=rules, dtype=dtype, attention=attention, kernels=kernels)
    for note in opened.notes:
        say(note)
    weights = jax.jit(partial(fuse, cfg=opened.config))(opened.load_weights(dtype))
    say(f"{model}: {num_params(opened.config) / 1e6:.1f}M parameters loaded in {time.perf_counter() - started:.1f} s")
    return Loaded(opened, weights)


def encode(
    processor: Processor,
    prompt: str,
    images: list[str],
    videos: Sequence[str] = (),
    *,
    max_pixels: int | None = None,
    video: VideoSpec | None = None,
) -> EncodedPrompt:
    """Encodes one question as a prompt; prints which images are shrunk below the checkpoint's own pixel limit.

    Args:
      prompt: the question; "<image>" and "<video>" mark the places of images and videos. Without marks, all images and
        videos come before the text.
      images, videos: paths; a video may be a folder of frames, which are read in the order of their names.
      max_pixels: larger images are shrunk to this; None: the checkpoint's limit, but at most MAX_PIXELS.
      video: how frames are chosen from a video; None: the default.
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


def generate(
    loaded: Loaded, encoded: EncodedPrompt, *, samples: int = 1, sampling: Sampling, seed: int = 0
) -> dict[str, Any]:
    """Samples answers to one question.

    Returns:
      {"prompt_tokens", "image_tokens", "samples": [{"text", "tokens", "logprobs"}]}; tokens include the stop token;
      log-probabilities are log softmax(z / T) of each token, with T = 1 if the temperature is 0.
    """
    started = time.perf_counter()
    with jax.set_mesh(loaded.model.mesh):
        answers = rollout(
            loaded.weights, loaded.model.config, collate_prompts([encoded], Buckets(32)), np.zeros(1, np.uint32),
            group=samples, sampling=sampling, stop_ids=loaded.processor.stop_ids, seed=seed, step=0,
        )  # fmt: skip
        answers = jax.tree.map(lambda a: a[0], answers)
    rows = []
    for tokens, logprobs, mask in zip(answers.tokens_BGT, answers.logprobs_BGT, answers.mask_BGT, strict=True):
        text = loaded.processor.decode(tokens[mask])
        rows.append({"text": text, "tokens": tokens[mask].tolist(), "logprobs": logprobs[mask].tolist()})
    say(f"{int(answers.mask_BGT.sum())} tokens in {time.perf_counter() - started:.1f} s, compilation included")
    return {"prompt_tokens": len(encoded.tokens_T), "image_tokens": encoded.num_image_tokens, "samples": rows}
