"""Prints answers of a Qwen2-VL checkpoint to one question, with log-probabilities: `python -m r1vl_jax.generate`."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from functools import partial

import jax

from r1vl_jax.common.arguments import Parser, non_negative_float, non_negative_int, number, whole
from r1vl_jax.common.limits import MAX_BATCH, MAX_TOKENS
from r1vl_jax.common.limits import MAX_PIXELS as MOST_PIXELS
from r1vl_jax.config import ATTENTION, KERNELS
from r1vl_jax.errors import CheckpointError, DeviceMemoryError, RowError
from r1vl_jax.inference.generate import MAX_PIXELS, encode, generate, load, say
from r1vl_jax.parallel.devices import matmul_precision, prepare_devices
from r1vl_jax.parallel.memory import out_of_memory
from r1vl_jax.processing.videos import VideoSpec
from r1vl_jax.types import Sampling


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m r1vl_jax.generate",
        description="Answers of a Qwen2-VL checkpoint to one question, with their log-probabilities.",
    )
    add = partial(parser.add_argument, help="")
    defaults = Sampling()
    add("--model", required=True, help="checkpoint folder: Hugging Face layout, converted, or a run's")
    add("--image", action="append", default=[], help="an image; repeat it for several, in order")
    add("--video", action="append", default=[], help="a video file, or the folder of its frames; repeat it for several")
    add(
        "--prompt",
        required=True,
        help='the question; "<image>" and "<video>" mark places (default: in front)',
    )
    add("--system-prompt", default="", help="text of the system turn (default: the checkpoint's)")
    add("--question-suffix", default="", help="text appended to the question, as data.question_suffix in training")
    add("--samples", type=whole(1, MAX_BATCH), default=1, help="number of answers (default 1)")
    add("--temperature", type=non_negative_float, default=0.0, help="0 is greedy (default)")
    add("--top-p", type=number(0, 1, above=True), default=defaults.top_p, help="nucleus sampling; 1 is off (default)")
    add("--top-k", type=non_negative_int, default=defaults.top_k, help="0 is off (default)")
    add("--max-new-tokens", type=whole(1, MAX_TOKENS), default=defaults.max_new_tokens, help="default %(default)s")
    add(
        "--max-pixels",
        type=whole(1, MOST_PIXELS),
        help=f"larger images are shrunk to this; default: {MAX_PIXELS}, or the checkpoint's own limit if that is less "
        "(published ones allow 12845056, which takes hundreds of GB)",
    )
    video = VideoSpec()
    add(
        "--fps",
        type=number(0, 1000, above=True),
        default=video.fps,
        help="frames taken from a second of video (default %(default)s)",
    )
    add(
        "--max-frames",
        type=whole(2, 10_000),
        default=video.max_frames,
        help="frames of a video at most (default %(default)s)",
    )
    add(
        "--video-pixels",
        type=whole(1, MOST_PIXELS),
        default=video.max_pixels,
        help="frames are shrunk to this (default %(default)s)",
    )
    add(
        "--seed",
        type=non_negative_int,
        default=None,
        help="fixes what is sampled; default: a new one each time, printed",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default %(default)s")
    add("--attention", choices=ATTENTION, default="auto", help="default: the platform's")
    add("--kernels", choices=KERNELS, default="auto", help="default: pallas, on CPUs reference")
    add("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 2 if the input is wrong."""
    args = _parser().parse_args(argv)
    seed = args.seed
    if seed is None:
        seed = secrets.randbelow(2**31)
        if args.temperature > 0:
            say(f"seed {seed}")
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.max_new_tokens)
    prepare_devices()
    try:
        loaded = load(args.model, dtype=args.dtype, attention=args.attention, kernels=args.kernels)
        video = VideoSpec(args.fps, args.max_frames, args.video_pixels)
        processor = loaded.processor.with_texts(args.system_prompt, args.question_suffix, section="--")
        encoded = encode(processor, args.prompt, args.image, args.video, max_pixels=args.max_pixels, video=video)
    except (CheckpointError, RowError, ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    if args.samples > 1 and args.temperature == 0:
        say(f"--temperature 0 is greedy: all {args.samples} answers will be the same")
    try:
        with (
            out_of_memory("answers", "lower --max-new-tokens, --samples or --max-pixels"),
            jax.default_matmul_precision(matmul_precision("auto", args.dtype)),
        ):
            result = generate(loaded, encoded, samples=args.samples, sampling=sampling, seed=seed)
    except DeviceMemoryError as error:
        say(f"error: {error}")
        return 2
    if args.json:
        print(json.dumps(result))
    else:
        print("\n\n---\n\n".join(sample["text"] for sample in result["samples"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
