"""Compiles every program of a StepGRPO step and of an SFT step for TPUs that are not there.

    python compile_for_tpu.py v5e:2x2 1 2 2        (JAX's name of the slice, and the sizes of the mesh)

It prints one line of JSON per program: its name and the number of its kernels. It is a process of its own because the
tests' XLA flags and matmul precision are not those of training. It needs libtpu, which the extra `tpu` installs.
"""

import dataclasses
import json
import math
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # for everything that is not compiled for the target
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not look for a cloud machine's metadata

import jax  # noqa: E402 (it reads the environment when it is imported)
from bench_common import SIZES  # noqa: E402
from bench_programs import sft_calls, step_calls  # noqa: E402
from hlo_report import lower  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from r1vl_jax.parallel.sharding import make_mesh  # noqa: E402

QUESTIONS = 2


def small():
    """The 2B with its widths of heads, 128 and 80, but fewer heads and layers: a program compiles in seconds."""
    raw = SIZES["2b"].raw
    raw = raw | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    raw["vision_config"] = raw["vision_config"] | {"hidden_size": 512, "embed_dim": 160, "num_heads": 2, "depth": 2}
    return dataclasses.replace(SIZES["2b"], raw=raw, prompt=128, grid=(1, 8, 8), new=512)


def main(topology, *sizes):
    sizes = [int(size) for size in sizes]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(*sizes, devices=devices[: math.prod(sizes)])
    size = small()
    cfg = size.cfg.with_backend("splash", "pallas")
    calls = list(step_calls(cfg, size, mesh, questions=QUESTIONS, micro=QUESTIONS, remat="full"))
    warm_up = sft_calls(cfg, size, mesh, micro=QUESTIONS, remat="full")
    calls += [dataclasses.replace(call, name=f"sft {call.name}") for call in warm_up]
    for call in calls:
        lowered = lower(call, mesh, "tpu")
        lowered.compile()
        print(json.dumps({"program": call.name, "kernels": lowered.as_text().count("tpu_custom_call")}), flush=True)


if __name__ == "__main__":
    assert not jax.config.jax_default_matmul_precision
    main(*sys.argv[1:])
