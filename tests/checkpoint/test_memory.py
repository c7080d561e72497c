"""Host memory: converting and loading a checkpoint takes no more than two of its files, besides what devices hold."""

import json
import os
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_common import raw_config
from helpers.paths import SCRIPTS

from r1vl_jax import convert
from r1vl_jax.checkpoint import arrays
from r1vl_jax.checkpoint.hf import save_hf
from r1vl_jax.checkpoint.store import load_model
from r1vl_jax.model.config import parse_config
from r1vl_jax.model.spec import num_params, param_spec, tree_map_spec
from r1vl_jax.parallel.sharding import make_mesh, param_shardings


def test_what_numpy_holds(tmp_path, monkeypatch):
    """28 narrow layers in files of a tenth of the model. XLA and tensorstore hold more; the next test counts all."""
    raw = raw_config(128, 768, 28, 4, 2, 2048, False, (4, 64, 4))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    cfg = parse_config(raw)
    params = tree_map_spec(lambda spec: np.full(spec.shape, 0.5, jnp.bfloat16), param_spec(cfg))
    hf, orbax, size = tmp_path / "hf", tmp_path / "orbax", 2 * num_params(cfg)
    save_hf(params, cfg, hf, source=tmp_path, max_shard_bytes=size / 10)
    monkeypatch.setattr(arrays, "BLOCK_BYTES", size / 100)  # as the parts of a large model are to its files
    shardings = param_shardings(param_spec(cfg), make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4]))
    steps = {
        "from-hf": lambda: convert.convert("from-hf", hf, orbax, overwrite=True),
        "to-hf": lambda: convert.convert("to-hf", orbax, tmp_path / "back", overwrite=True),
        "hf": lambda: load_model(hf, dtype="float32", shardings=lambda _: shardings),
        "orbax": lambda: load_model(orbax, dtype="float32", shardings=lambda _: shardings),
    }
    for name, step in steps.items():
        step()  # what libraries keep is there the second time
        tracemalloc.start()
        step()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * size / 10 + (2 * size if name in ("hf", "orbax") else 0), name


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no reset of the peak")
def test_peak_of_resident_memory(tmp_path):
    """The layers of the 7B with a seventh of its width, in files of an eighth of the model or less."""
    options = [str(tmp_path), "--size", "small", "--shard-bytes", "4e7", "--json"]
    command = [sys.executable, str(SCRIPTS / "bench_memory.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["step"] for row in rows] == ["from-hf", "to-hf", "load hf", "load orbax"]
    for row in rows:
        assert 0 < row["peak"] < row["bound"], rows
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 8
