"""python -m r1vl_jax.generate: answers of a Qwen2-VL checkpoint to one question, with their log-probabilities."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from r1vl_jax.checkpoint.store import load_model
from r1vl_jax.data.batching import collate_prompts
from r1vl_jax.model.config import CheckpointError
from r1vl_jax.model.spec import num_params, param_spec
from r1vl_jax.parallel.sharding import ROLLOUT_RULES, make_mesh, param_shardings
from r1vl_jax.processing.processor import Processor
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.rollout.sampling import check_sampling
from r1vl_jax.types import RowError, Sampling


def say(message: str) -> None:
    """One line for people; stdout is for the answers."""
    print(message, file=sys.stderr, flush=True)


def generate(
    model: str | Path,
    prompt: str,
    images: list[str],
    *,
    samples: int = 1,
    sampling: Sampling,
    seed: int = 0,
    dtype: str = "bfloat16",
    max_pixels: int | None = None,
) -> dict:
    """Samples answers to one question.

    Args:
      model: a checkpoint folder (Hugging Face, converted, or a run).
      prompt: the question; "<image>" marks where an image stands, else all stand in front.
      images: paths.
      samples: number of answers; the weights are replicated, so any number goes.
    Returns:
      {"prompt_tokens", "image_tokens", "samples": [{"text", "tokens", "logprobs"}]}; tokens include the stop token,
      log-probabilities are those of log softmax(z / T), at T = 1 where the temperature is 0.
    Raises:
      CheckpointError, RowError, or ValueError for a sampling value out of range.
    """
    check_sampling(sampling)
    if samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1")
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        started = time.perf_counter()
        params, cfg, files = load_model(
            model,
            dtype=dtype,
            shardings=lambda cfg: param_shardings(param_spec(cfg), mesh, ROLLOUT_RULES["replicated"]),
        )
        say(f"{model}: {num_params(cfg) / 1e6:.1f}M parameters loaded in {time.perf_counter() - started:.1f} s")
        processor = Processor.from_folder(files, max_pixels=max_pixels)
        encoded = processor.encode_question(prompt, images, name="--prompt")
        started = time.perf_counter()
        answers = rollout(
            params, cfg, collate_prompts([encoded], pad_multiple=32), np.zeros(1, np.uint32),
            group=samples, sampling=sampling, stop_ids=processor.stop_ids, seed=seed, step=0,
        )  # fmt: skip
        answers = jax.tree.map(lambda a: a[0], jax.device_get(answers))
    found = []
    for tokens, logprobs, mask in zip(answers.tokens_BGT, answers.logprobs_BGT, answers.mask_BGT, strict=True):
        text = processor.decode(tokens[mask])
        found.append({"text": text, "tokens": tokens[mask].tolist(), "logprobs": logprobs[mask].tolist()})
    count, seconds = int(answers.mask_BGT.sum()), time.perf_counter() - started
    say(f"{count} tokens in {seconds:.1f} s, compilation included")
    return {"prompt_tokens": len(encoded.tokens_T), "image_tokens": encoded.num_image_tokens, "samples": found}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m r1vl_jax.generate", description=__doc__.split(": ", 1)[1])
    add = partial(parser.add_argument, help="")
    defaults = Sampling()
    add("--model", required=True, help="checkpoint folder: Hugging Face layout, converted, or a run folder")
    add("--image", action="append", default=[], help="an image; repeat it for several, in order")
    add("--prompt", required=True, help='the question; "<image>" marks where an image stands (default: in front)')
    add("--samples", type=int, default=1, help="number of answers (default 1)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-p", type=float, default=defaults.top_p, help="nucleus sampling; 1 is off (default)")
    add("--top-k", type=int, default=defaults.top_k, help="0 is off (default)")
    add("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="default %(default)s")
    add("--max-pixels", type=int, help="larger images are shrunk to this; default: the checkpoint's own limit")
    add("--seed", type=int, default=None, help="fixes what is sampled; default: another one each time, said on stderr")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default %(default)s")
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
        result = generate(
            args.model, args.prompt, args.image,
            samples=args.samples, sampling=sampling, seed=seed, dtype=args.dtype, max_pixels=args.max_pixels,
        )  # fmt: skip
    except (CheckpointError, RowError, ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    if args.json:
        print(json.dumps(result))
    else:
        print("\n\n---\n\n".join(sample["text"] for sample in result["samples"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
