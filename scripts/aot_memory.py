"""What a StepGRPO step takes on a GPU that this machine does not have: every program is compiled ahead of time for it.

    python scripts/aot_memory.py --target h100_80gb.textproto --size 2b --questions 16 --micro 4

Needs `pip install -e '.[gpu]'`, no GPU, and a description of one in XLA's text form (GpuTargetConfigProto, as XLA
tests have them). Prints for each program what it takes beside what else lies on the device meanwhile: fp32 masters and
both moments, the reference, the rollout's weights, gradients. Nothing is run, so nothing is said about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # all that is not compiled for the target

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from workloads import OBJECTIVE, OPTIMIZER, SIZES, TEMPERATURE, random_questions

from r1vl_jax.config import REMAT
from r1vl_jax.data.batching import collate_prompts
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.model.answers import answer_logprobs
from r1vl_jax.model.fused import fuse, fused_shardings
from r1vl_jax.model.qwen2_vl import cast
from r1vl_jax.model.spec import abstract_params, param_spec
from r1vl_jax.parallel.sharding import ROLLOUT_RULES, RULES, batch_shards, make_mesh, param_shardings, partition_spec
from r1vl_jax.rollout import generate
from r1vl_jax.step_grpo.loss import step_grpo_loss
from r1vl_jax.training.optimizer import abstract_state, accumulate, make_optimizer, make_update, trained_parts
from r1vl_jax.types import Sampling, TrainBatch

GIB = 2**30


def size_of(tree) -> int:
    """Bytes of all arrays on one device."""
    return sum(
        a.dtype.itemsize * int(jnp.prod(jnp.array(a.sharding.shard_shape(a.shape), jnp.float32)))
        for a in jax.tree.leaves(tree)
    )


def placed(tree, mesh, *axes):
    """Abstract arrays, their first axis split over the mesh's batch axes; `axes` puts others in front of it."""

    def one(a):
        spec = partition_spec((*axes, "batch")[: a.ndim], RULES)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


class Programs:
    """The programs of a step as train.py runs them, compiled for the target; `rows` collects what they take."""

    def __init__(self, mesh, cfg, size, *, remat: str):
        self.mesh, self.cfg, self.size, self.remat, self.rows = mesh, cfg, size, remat, []
        spec = param_spec(cfg)
        self.shardings = param_shardings(spec, mesh)
        self.optimizer = make_optimizer(OPTIMIZER, 1000, spec)
        self.parts = trained_parts(OPTIMIZER)
        self.state = abstract_state(self.optimizer, self.parts, spec, self.shardings, mesh)
        self.grads = {part: self.state.params[part] for part in self.parts}
        self.reference = self._typed(abstract_params(cfg, size.dtype), self.shardings)
        self.fused = fused_shardings(cfg, mesh, ROLLOUT_RULES["replicated"])
        self.weights = self._typed(jax.eval_shape(partial(fuse, cfg=cfg), abstract_params(cfg, size.dtype)), self.fused)

    def _typed(self, tree, shardings):
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)

    def add(self, name: str, jitted, *args, beside, **kwargs) -> None:
        """Compiles a program; `beside`: trees on the device meanwhile that are not among its arguments."""
        started = time.perf_counter()
        with jax.set_mesh(self.mesh):
            lowered = jitted.trace(*args, **kwargs).lower(lowering_platforms=("cuda",))
            memory = lowered.compile().memory_analysis()
        own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        own += memory.temp_size_in_bytes
        other = sum(map(size_of, beside))
        self.rows.append(
            {
                "program": name, "arguments_gib": memory.argument_size_in_bytes / GIB,
                "temporaries_gib": memory.temp_size_in_bytes / GIB, "beside_gib": other / GIB,
                "peak_gib": (own + other) / GIB, "compile_s": time.perf_counter() - started,
            }
        )  # fmt: skip
        print("{program:<24}{arguments_gib:>11.1f}{temporaries_gib:>13.1f}{beside_gib:>9.1f}{peak_gib:>8.1f}"
              "{compile_s:>11.0f}".format(**self.rows[-1]), flush=True)  # fmt: skip

    def prompts(self, questions: int):
        batch = collate_prompts(random_questions(self.size, questions), Buckets(128, shards=batch_shards(self.mesh)))
        positions = batch.positions_3BT
        return placed(batch, self.mesh).replace(positions_3BT=placed(positions, self.mesh, None))

    def floats(self, *shape, dtype=jnp.float32):
        return placed(jax.ShapeDtypeStruct(shape, dtype), self.mesh)

    def rollout(self, questions: int) -> None:
        cfg, size, prompts = self.cfg, self.size, self.prompts(questions)
        beside = (self.state, self.reference)
        B, G, T = questions, size.group, size.new
        to_weights = jax.jit(lambda p: fuse(cast(p, size.dtype), cfg), out_shardings=self.fused)
        self.add("rollout_weights", to_weights, self.state.params, beside=(self.state.opt_state, self.reference))
        self.add("prefill", generate.prefill, self.weights, cfg, prompts, beside=beside)
        last_BD, prefix, length_B = placed(jax.eval_shape(generate.prefill, self.weights, cfg, prompts), self.mesh)
        asked = generate.Questions(
            prefix, length_B, prompts.next_position_B, self.floats(B, G, T), self.floats(B, G, dtype=jnp.int32)
        )
        begin = partial(generate.start, cfg, samples=G, tokens=T, length=min(generate.SEGMENT, T), stop=0)
        answers = placed(jax.eval_shape(begin, last_BD), self.mesh)
        whole = placed(jax.eval_shape(partial(generate.enlarge, length=T), answers), self.mesh)
        if T > generate.SEGMENT:
            half = placed(jax.eval_shape(partial(generate.enlarge, length=T // 2), answers), self.mesh)
            self.add("enlarge, the last time", generate.enlarge, half, T, beside=(*beside, self.weights, asked))
        sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=T)
        self.add("decode, longest cache", generate.decode, self.weights, cfg, asked, whole, 0, T, sampling, (0,),
                 beside=beside)  # fmt: skip

    def training(self, micro: int) -> None:
        cfg, size, prompts = self.cfg, self.size, self.prompts(micro)
        shape = (micro, size.group, size.new)
        tokens = self.floats(*shape, dtype=jnp.int32)
        scored = {"temperature": TEMPERATURE, "forbidden": cfg.vision_ids}
        score = jax.jit(lambda params, prompts, tokens: answer_logprobs(params, cfg, prompts, tokens, **scored)[0])
        self.add("reference", score, self.reference, prompts, tokens, beside=(self.state,))
        batch = TrainBatch(prompts, tokens, *[self.floats(*shape)] * 3)
        loss = partial(step_grpo_loss, cfg=cfg, objective=OBJECTIVE, remat=self.remat)
        more = {"loss_fn": loss, "parts": self.parts, "dtype": size.dtype}
        self.add("gradient", accumulate, self.grads, self.state.params, batch,
                 beside=(self.state.opt_state, self.reference), **more)  # fmt: skip
        self.add("update", make_update(self.optimizer, self.state), self.state, self.grads, beside=(self.reference,))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = partial(parser.add_argument, help="")
    add("--target", required=True, type=Path, help="XLA's description of the GPU, a text file")
    add("--devices", type=int, default=1, help="GPUs (default 1); the train state is split over them (fsdp)")
    add("--size", choices=sorted(SIZES), default="2b", help="model (default 2b)")
    add("--questions", type=int, default=16, help="questions in a rollout (default 16: workload S)")
    add("--micro", type=int, default=4, help="questions in a gradient computation (default 4)")
    add("--attention", default="cudnn", help="default cudnn")
    add("--kernels", default="pallas", help="default pallas")
    add("--remat", choices=REMAT, default="full", help="what the gradient keeps of the layers (default full)")
    add("--limit", type=float, default=80, help="GB that the device has; exit code 1 above it (default 80)")
    add("--json", type=Path, help="write the figures here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 1 where a program does not fit."""
    args = _parser().parse_args(argv)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=args.target.read_text(), topology=f"1x{args.devices}x1"
    )
    mesh = make_mesh(1, args.devices, 1, devices=topology.devices)
    size = SIZES[args.size]
    programs = Programs(mesh, size.cfg.with_backend(args.attention, args.kernels), size, remat=args.remat)
    print(f"{args.size}, {args.questions} questions x {size.group}, prompt {size.prompt}, {size.new} new tokens, "
          f"micro-batches of {args.micro} questions, attention {args.attention}, kernels {args.kernels}\n")  # fmt: skip
    print(f"{'GiB':<24}{'arguments':>11}{'temporaries':>13}{'beside':>9}{'peak':>8}{'compile, s':>11}")
    programs.rollout(args.questions)
    programs.training(args.micro)
    peak = max(programs.rows, key=lambda row: row["peak_gib"])
    fits = peak["peak_gib"] * GIB <= args.limit * 1e9
    print(f"\npeak {peak['peak_gib']:.1f} GiB ({peak['peak_gib'] * GIB / 1e9:.1f} GB), in {peak['program']}: "
          f"{'fits' if fits else 'does not fit'} in {args.limit:.0f} GB")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), "programs": programs.rows}, default=str, indent=1))
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
