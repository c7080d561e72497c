"""Describes machines to plan for, which need not be there: `h100:4`, `h100:8x4` (four hosts of eight), `FILE:8`.

A device is a file of facts in devices/, or the user's own:

    platform    cuda, tpu or cpu
    memory      bytes of a device; JAX is given 92% of a GPU's
    flops       bfloat16 matmuls, FLOP/s: peak, and achieved if it was measured
    bandwidth   of the device's memory, bytes/s: peak, and achieved
    link        bytes/s each way to the devices of the same host, or of the same slice of a TPU
    network     bytes/s each way and device to other hosts
    per_host    devices of a host
    gpu         what XLA compiles for: fields of its GpuDeviceInfoProto
    topologies  the shapes of a TPU's slices, smallest first; the file's name is then libtpu's for the TPU

A GPU's file may also be XLA's own description of it, a GpuTargetConfigProto in text form.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

from r1vl_jax.common.text import one_line
from r1vl_jax.errors import ConfigError
from r1vl_jax.parallel.devices import MEMORY_FRACTION

DEVICES = Path(__file__).parent / "devices"
_BACKEND = {"cuda": "gpu", "tpu": "tpu", "cpu": "cpu"}  # platform -> its name in model.backend
_PACKAGES = {"cuda": "plan-gpu", "tpu": "plan-tpu"}  # the extra of this package that compiles for a platform
_RATE = {"peak": math.inf}


@dataclasses.dataclass(frozen=True)
class Device:
    """The facts of one kind of device; see the module. `flops` and `bandwidth` are tables: peak, achieved."""

    name: str
    platform: str
    per_host: int
    memory: float = math.inf
    flops: dict[str, float] = dataclasses.field(default_factory=lambda: dict(_RATE))
    bandwidth: dict[str, float] = dataclasses.field(default_factory=lambda: dict(_RATE))
    link: float = math.inf
    network: float = math.inf
    gpu: dict[str, Any] | str | None = None
    topologies: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """The platform as model.backend names it."""
        return _BACKEND[self.platform]

    @property
    def usable(self) -> float:
        """Bytes that JAX may use."""
        return self.memory * float(MEMORY_FRACTION) if self.platform == "cuda" else self.memory

    def rate(self, kind: str) -> float:
        """Returns what was achieved in `flops` or `bandwidth`, or else the peak."""
        table = getattr(self, kind)
        return table.get("achieved", table["peak"])


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of devices: `hosts` times `per_host`."""

    device: Device
    per_host: int
    hosts: int

    def __str__(self) -> str:
        hosts = f"x{self.hosts}" if self.hosts > 1 else ""
        return f"{self.device.name}:{self.per_host}{hosts}"

    @property
    def count(self) -> int:
        return self.per_host * self.hosts

    def devices(self) -> list[Any]:
        """Returns devices to compile for, of which none needs to be there.

        Raises: ConfigError if the package that compiles for them is not installed, or no such slice exists.
        """
        import jax  # after `prepare`
        from jax.experimental import topologies

        platform, facts = self.device.platform, self.device
        if platform == "cpu":
            return jax.devices("cpu")[: self.count]
        try:
            if platform == "cuda":
                topology = topologies.get_topology_desc(
                    platform="cuda", target_config=_gpu_text(facts), topology=f"1x{self.hosts}x{self.per_host}"
                )
            else:
                shape = next(s for s in facts.topologies if math.prod(map(int, s.split("x"))) >= self.count)
                topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{facts.name}:{shape}")
        except StopIteration:
            raise ConfigError(f"{self}: the largest slice is {facts.topologies[-1]}") from None
        except (RuntimeError, ValueError, KeyError, NotImplementedError, ImportError) as error:
            raise ConfigError(
                f"{self}: nothing here compiles for {platform} ({one_line(error)}); "
                f"pip install -e '.[{_PACKAGES[platform]}]'"
            ) from error
        return list(topology.devices)[: self.count]


def prepare(target: Target) -> None:
    """Sets the environment of a process that compiles for a target. Call it before a device is used."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA says at length that a compilation is slow
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks Google's cloud about this machine otherwise
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it uses no TPU, so several processes may load it
    if target.device.platform == "cpu" and target.count > 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={target.count}".strip()


def parse_target(text: str) -> Target:
    """Returns the target that NAME:COUNT, NAME:COUNTxHOSTS or FILE:COUNT names. Raises ConfigError."""
    name, _, count = text.rpartition(":")
    numbers = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,3}))?", count)
    if not name or not numbers:
        raise ConfigError(f"--target {text}: expected NAME:COUNT or NAME:COUNTxHOSTS, such as h100:8 or h100:8x4")
    device = _read_device(name)
    per_host, hosts = int(numbers.group(1)), int(numbers.group(2) or 1)
    if per_host > device.per_host and device.platform == "cuda":
        if per_host % device.per_host or numbers.group(2):
            raise ConfigError(f"--target {text}: a host has {device.per_host} devices; expected as {name}:8x4 says it")
        per_host, hosts = device.per_host, per_host // device.per_host
    return Target(device, per_host, hosts)


def _read_device(name: str) -> Device:
    """Reads the facts of a device: of a name in devices/, or of a file."""
    known = sorted(path.stem for path in DEVICES.glob("*.yaml"))
    path = DEVICES / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise ConfigError(f"--target {name}: expected one of {', '.join(known)}, or a file like those in {DEVICES}")
    try:
        text = path.read_text()
        if "gpu_device_info" in text:
            return _from_xla(path.stem, text)
        facts = yaml.safe_load(text)
        numbers = {key: float(facts[key]) for key in ("memory", "link", "network") if key in facts}
        rates = {
            key: {kind: float(value) for kind, value in facts[key].items()}
            for key in ("flops", "bandwidth")
            if key in facts
        }
        others = {key: facts[key] for key in facts.keys() - numbers.keys() - rates.keys()}
        others |= {"topologies": tuple(others.get("topologies", ())), "per_host": int(others["per_host"])}
        fields: dict[str, Any] = {**others, **numbers, **rates}
        device = Device(path.stem, **fields)
        _check(device, [*numbers.values(), *(value for table in rates.values() for value in table.values())])
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not the facts of a device ({one_line(error)})") from error
    return device


def _check(device: Device, numbers: list[float]) -> None:
    """Raises ValueError if the facts of a device cannot be."""
    if device.platform not in _BACKEND:
        raise ValueError(f"platform {device.platform}, expected {', '.join(_BACKEND)}")
    if any("peak" not in table for table in (device.flops, device.bandwidth)):
        raise ValueError("flops and bandwidth have a peak")
    if device.per_host < 1 or not all(number > 0 for number in numbers):
        raise ValueError("expected numbers above 0")
    shapes = device.topologies
    if device.platform == "tpu" and not (shapes and all(re.fullmatch(r"\d+(x\d+)+", str(shape)) for shape in shapes)):
        raise ValueError("topologies of a TPU are shapes such as 2x4")


def _from_xla(name: str, text: str) -> Device:
    """Returns a device that XLA describes; its FLOP/s and links are not known."""
    memory, bandwidth = (
        float(re.findall(rf"\b{key}: (\d+)", text)[0]) for key in ("device_memory_size", "memory_bandwidth")
    )
    return Device(name, "cuda", 8, memory=memory, bandwidth={"peak": bandwidth}, gpu=text)


def _gpu_text(device: Device) -> str:
    """Returns the text of XLA's GpuTargetConfigProto."""
    if isinstance(device.gpu, str):
        return device.gpu
    facts = dict(device.gpu or {})
    if not facts:
        raise ValueError(f"{device.name}: no `gpu` among its facts")
    major, _, minor = str(facts.pop("compute_capability")).partition(".")
    name = facts.pop("device_description_str")
    fixed = {"threads_per_warp": 32, "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535}
    fields = "\n".join(f"  {key}: {value}" for key, value in {**fixed, "block_dim_limit_z": 65535, **facts}.items())
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor or 0} }}"
    return (
        f"gpu_device_info {{\n{fields}\n{capability}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 }\nruntime_version { major: 13 }\n'
        f'device_description_str: "{name}"\n'
    )
