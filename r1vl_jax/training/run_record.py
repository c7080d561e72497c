"""Writes run.json: for each start of a run, with what it ran. No environment variable and no argument is recorded.

{"starts": [{"time", "versions", "git", "platform", "devices", "config", "data"}, ...]}

    versions   of Python and of the packages that compute
    git        commit of this package's checkout, and whether files differ from it; null if it is no checkout
    devices    platform, kind and number
    data       name of each data set that was opened -> its fingerprint
"""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import yaml

from r1vl_jax import config as configs
from r1vl_jax.common.files import read_object, write_json
from r1vl_jax.config import Config
from r1vl_jax.data.sources import Source

NAME = "run.json"
PACKAGES = ("r1vl-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def record_start(folder: Path, config: Config) -> None:
    """Adds a start of the run to run.json. A file that is damaged is kept under another name."""
    path = folder / NAME
    device = jax.devices()[0]
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": _commit(Path(__file__)),
        "platform": platform.platform(),
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "config": yaml.safe_load(configs.dump(config)),
        "data": {},
    }
    write_json(path, {"starts": [*_starts(path), start]})


def record_data(folder: Path, source: Source) -> None:
    """Adds the fingerprint of a data set to the newest start in run.json."""
    path = folder / NAME
    if starts := _starts(path):
        starts[-1]["data"][source.name] = source.fingerprint
        write_json(path, {"starts": starts})


def _starts(path: Path) -> list[dict[str, Any]]:
    """Returns the starts in run.json."""
    if not path.exists():
        return []
    try:
        starts = read_object(path).get("starts")
    except ValueError:
        starts = None
    if isinstance(starts, list) and all(isinstance(start, dict) and "data" in start for start in starts):
        return starts
    path.replace(path.with_name(f"{NAME}.damaged"))
    return []


def _version(package: str) -> str | None:
    """Returns the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(file: Path) -> dict[str, Any] | None:
    """Returns the commit of the checkout that has `file`, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # the package may be installed inside of another checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one of another user
        return None
