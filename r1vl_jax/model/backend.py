"""Chooses how a model is computed on this machine: attention, kernels, and the number of logit rows held at once.

`auto` chooses for NVIDIA GPUs from Ampere on, TPUs and CPUs; on other GPUs set xla and reference. If a backend named in
the config cannot run, an error is raised; no backend is replaced silently. Commands print the choice.

                 attention            kernels      rows of logits at once
    gpu, bf16    cudnn                pallas       4,096: with fewer rows the matmuls are too small
    gpu, fp32    xla (cuDNN has none) pallas       4,096
    tpu          splash               pallas       4,096
    cpu          xla                  reference    256: more rows do not fit the CPU's caches
"""

from __future__ import annotations

import jax

from r1vl_jax.model.config import LOGIT_ROWS

CPU_LOGIT_ROWS = 256


def choose(attention: str, kernels: str, *, dtype: str, platform: str | None = None) -> tuple[str, str, int]:
    """Returns (attention, kernels, logit_rows) for ModelConfig.with_backend, with `auto` resolved.

    Args:
      attention, kernels: as in section `model` of the configuration.
      dtype: the dtype of the computation.
      platform: gpu, tpu or cpu; None: the platform of this machine's devices.
    Raises:
      ValueError: a named backend does not run on the platform or in the dtype.
    """
    platform = platform or jax.devices()[0].platform
    fused = {"gpu": "cudnn" if dtype == "bfloat16" else "xla", "tpu": "splash"}
    attention = fused.get(platform, "xla") if attention == "auto" else attention
    kernels = ("pallas" if platform in fused else "reference") if kernels == "auto" else kernels
    wants = {"cudnn": "gpu", "splash": "tpu"}.get(attention)
    if wants and platform != wants:
        raise ValueError(f"model.attention {attention} needs a {wants}, not a {platform}; xla runs anywhere")
    if attention == "cudnn" and dtype != "bfloat16":
        raise ValueError(f"model.attention cudnn needs model.dtype bfloat16, it is {dtype}; xla takes any")
    if kernels == "pallas" and platform not in fused:
        raise ValueError(f"model.kernels pallas needs a gpu or a tpu, not a {platform}: use reference")
    return attention, kernels, LOGIT_ROWS if platform in fused else CPU_LOGIT_ROWS
