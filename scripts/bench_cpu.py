"""Compares our speed with transformers on a CPU: `python scripts/bench_cpu.py` (about two minutes; --help).

Both sides use one small model (text 4 x 256, tower 2 x 128, vocabulary 8,192; fp32) with the same random weights and
inputs: 2 questions with an image each, and 4 answers of 64 tokens per question.

    rollout     ours against HF generate on the 8 rows, T = 1.2, end of text ignored
    training    reference, policy and its gradient, StepGRPO loss, AdamW; ours computes the prompt once per question,
                torch runs 8 rows of prompt and answer, with logits of answer tokens only

The script first compares log-probabilities, loss and gradient norm of the two sides. Torch runs with eager and with
sdpa attention, and the faster of the two counts. The sides run in turn; figures are medians of --repeats calls after
one warm-up call. --check: exit code 1 if a target is missed. Run nothing else on the machine: torch's threads wait for
each other, and slow down tenfold if they have to share cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402 (it reads the environment when it is imported)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_common import (  # noqa: E402
    SIZES,
    Size,
    collate,
    interleaved,
    random_advantages,
    random_params,
    random_questions,
    single_device,
    table,
    timed,
)
from bench_programs import answer, micro_batches, step_programs, update, with_advantages, with_reference  # noqa: E402
from torch_baseline import TorchTraining, generate, hf_inputs, logprobs  # noqa: E402
from transformers import Qwen2VLForConditionalGeneration  # noqa: E402

from r1vl_jax.checkpoint.hf import save_hf  # noqa: E402
from r1vl_jax.common.arguments import positive_int  # noqa: E402

TARGETS = {"rollout": 2.0, "training": 1.3}
GROUPS, TOLERANCE = 2, 1e-4
ATTENTIONS = ("eager", "sdpa")
PAUSE = 0.3  # seconds between calls, because each side's threads keep spinning on the shared cores after a call


def export(params: Any, size: Size, folder: Path) -> Path:
    """Writes the weights as a Hugging Face folder. Returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(size.raw))
    save_hf(params, size.cfg, folder / "model", source=folder)
    return folder / "model"


@jax.jit
def near(params: Any, other: Any) -> Any:
    """Returns parameters moved a tenth of the way to `other`: the reference of a policy after some training."""
    return jax.tree.map(lambda a, b: a + 0.1 * (b - a), params, other)


def load(folder: Path, attention: str):
    return Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()


class Bench:
    """Our model and torch's with the same weights, questions, answers and advantages."""

    def __init__(self, size: Size, folder: Path):
        self.size, self.cfg = size, size.on_this_machine()
        self.policy, other = (random_params(self.cfg, "float32", seed) for seed in (0, 1))
        reference = near(self.policy, other)
        folders = export(self.policy, size, folder / "policy"), export(reference, size, folder / "reference")
        self.models = {attention: [load(path, attention) for path in folders] for attention in ATTENTIONS}
        questions = random_questions(size, GROUPS, pixels=False)
        self.prompts = collate(questions, multiple=1)
        self.inputs = hf_inputs([q for q in questions for _ in range(size.group)], self.cfg.image_token_id)
        self.programs = step_programs(size, self.cfg, remat="matmuls")
        self.reference, self.weights = reference, self.programs.rollout_weights(self.policy)
        self.first = {"rollout": timed(self.ours_rollout)}
        self.sampled = self.ours_rollout()
        self.tokens = torch.from_numpy(self.sampled.tokens_BGT.reshape(-1, size.new).astype(np.int64))
        advantages = random_advantages(GROUPS, size.group)
        self.advantages = torch.from_numpy(advantages.reshape(-1, 1))
        masters = jax.tree.map(lambda a: a.copy(), self.policy)  # copied, because the update donates them
        self.state = self.programs.init(masters)
        batches = micro_batches(questions, self.sampled.tokens_BGT, GROUPS, multiple=1)
        self.batches = with_advantages(batches, advantages)
        self.torch = {
            attention: TorchTraining(policy, ref, self.cfg.vision_ids)
            for attention, (policy, ref) in self.models.items()
        }

    def ours_rollout(self) -> Any:
        return answer(self.weights, self.cfg, self.prompts, self.size.group, self.size.new)

    def ours_step(self) -> dict[str, float]:
        """Runs reference, gradient and update. Returns the metrics."""
        batches = with_reference(self.programs, self.reference, self.batches)
        self.state, metrics = update(self.programs, self.state, batches)
        return metrics

    def differences(self) -> dict[str, float]:
        """Returns the largest differences between ours and torch in the results of a first training step."""
        policy, reference = self.models["eager"]
        score = partial(logprobs, inputs=self.inputs, tokens=self.tokens, forbidden=self.cfg.vision_ids)
        with torch.inference_mode():
            theirs = [score(model).numpy() for model in (policy, reference)]
        start = time.perf_counter()
        (batch,) = with_reference(self.programs, self.reference, self.batches)
        ours = self.programs.token_logprobs(self.policy, batch.prompts, batch.tokens_BGT)
        self.state, got = update(self.programs, self.state, [batch])
        self.first["training"] = time.perf_counter() - start
        expected = self.torch["eager"].step(self.inputs, self.tokens, self.advantages)
        found = {
            "rollout log-probabilities": np.abs(self.sampled.logprobs_BGT.reshape(theirs[0].shape) - theirs[0]).max(),
            "policy log-probabilities": np.abs(np.asarray(ours).reshape(theirs[0].shape) - theirs[0]).max(),
            "reference log-probabilities": np.abs(
                np.asarray(batch.ref_logprobs_BGT).reshape(theirs[1].shape) - theirs[1]
            ).max(),
            **{
                f"{name}, relative": abs(got[key] / expected[key] - 1)
                for name, key in (("loss", "loss"), ("gradient norm", "grad_norm"))
            },
        }
        return {name: float(value) for name, value in found.items()}

    def measure(self, repeats: int) -> dict[str, dict]:
        """Returns the seconds of each implementation on each workload, and the ratio to the faster torch."""
        calls = {
            "rollout": {"ours": self.ours_rollout}
            | {a: partial(generate, models[0], self.inputs, self.size.new) for a, models in self.models.items()},
            "training": {"ours": self.ours_step}
            | {a: partial(t.step, self.inputs, self.tokens, self.advantages) for a, t in self.torch.items()},
        }
        found = {}
        for name, contestants in calls.items():
            timings = interleaved(contestants, repeats, PAUSE)
            fastest = min(ATTENTIONS, key=lambda attention: timings[attention].median)
            found[name] = {who: timing.as_json() for who, timing in timings.items()}
            found[name] |= {"fastest": fastest, "target": TARGETS[name]}
            found[name]["ratio"] = timings[fastest].median / timings["ours"].median
            found[name]["compile_s"] = max(0.0, self.first[name] - timings["ours"].median)
        return found


def bench(size: Size, repeats: int, threads: int) -> dict:
    """Returns all figures, as the JSON that --json writes."""
    load = os.getloadavg()[0]
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(single_device()):
        contest = Bench(size, Path(folder))
        differences = contest.differences()
        workloads = contest.measure(repeats)
    versions = {name: metadata.version(name) for name in ("jax", "torch", "transformers")}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}",
        "load": load,
        "threads": threads,
        "versions": versions,
        "repeats": repeats,
        "differences": differences,
        "workloads": workloads,
    }


def report(found: dict) -> str:
    """Returns the figures as text for a terminal."""
    rows = [["ms, median (min to max)", "ours", *(f"torch {a}" for a in ATTENTIONS), "ratio", "target", "compile, s"]]
    for name, row in found["workloads"].items():
        cells = (
            f"{1e3 * t['seconds']:.1f} ({1e3 * t['min']:.1f} to {1e3 * t['max']:.1f})"
            for t in (row[who] for who in ("ours", *ATTENTIONS))
        )
        rows.append([name, *cells, f"{row['ratio']:.2f}", f"{row['target']:.1f}", f"{row['compile_s']:.1f}"])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    agreement = ", ".join(f"{name} {value:.1e}" for name, value in found["differences"].items())
    return (
        f"{found['machine']} (load {found['load']:.1f} before); {versions}; torch with {found['threads']} threads; "
        f"{found['date']}; medians of {found['repeats']}\n"
        f"differences between the two (at most {TOLERANCE:.0e}): {agreement}\n\n{table(rows)}"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 3 if the two sides disagree, 1 with --check if a target is missed."""
    args = _arguments(argv)
    found = bench(SIZES[args.size], args.repeats, args.threads)
    print(report(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if not max(found["differences"].values()) <= TOLERANCE:
        print("ours and torch do not agree: the times say nothing", file=sys.stderr)
        return 3
    missed = [name for name, row in found["workloads"].items() if row["ratio"] < row["target"]]
    if missed:
        print(f"below target: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed and args.check else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    parser.add_argument("--size", choices=["cpu", "tiny"], default="cpu", help="tiny: for the test (default: cpu)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="the median is taken of these (default: 5)")
    parser.add_argument("--threads", type=positive_int, default=cores, help=f"torch's (default: {cores}, the cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a target is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
