"""Tests run on eight forced CPU devices, in fp32 at the highest matmul precision, without implicit dtype promotion.

They compile many tiny programs and run each once or twice, so what counts is the time to compile: LLVM's optimisations
are left out, kernels are emitted the plain way (XLA's fusion emitters build an MLIR context for each), in one piece.
The machine's cores belong to pytest's workers, so that libraries get one thread each.
"""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
    # jax 0.11 no longer has this flag, and a flag that XLA does not know ends the process.
    "--xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else "",
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
])  # fmt: skip
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import jax  # noqa: E402 (jax and numpy read the environment when they are imported)

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")  # no dtype is chosen by accident

# Programs that several tests compile are kept on disk, for all workers of this session: the children of one process.
SESSION = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
PROGRAMS = Path(tempfile.gettempdir()) / f"r1vl-programs-{SESSION}"
jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
os.environ["XDG_CACHE_HOME"] = str(PROGRAMS / "cache")  # tests leave nothing in the user's


def pytest_sessionfinish():
    """The process that began the session ends last."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


def pytest_collection_finish():
    """What was imported by now stays; looking through it at every collection is a tenth of the time."""
    gc.collect()
    gc.freeze()
