"""Writes the run folder (resolved configuration, metrics.jsonl, rollouts.jsonl) and the terminal's progress line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import yaml
from tqdm import tqdm

from r1vl_jax import config as configs
from r1vl_jax.common import config_tree
from r1vl_jax.common.files import atomic_write, read_json_lines, sync
from r1vl_jax.config import Config
from r1vl_jax.errors import ConfigError

# These keys change how a run computes: changing them changes results by rounding alone.
BACKEND_KEYS = (
    "model.remat", "model.attention", "model.kernels", "model.shared_prefix", "compilation_cache", "rehearsal",
    "rl.reference",
)  # fmt: skip
LOCK = "run.lock"
ROWS = ("metrics.jsonl", "rollouts.jsonl", "nonfinite.jsonl")


class RunLog:
    """The writer of all files of a run except checkpoints and exports.

    Args:
      config: is written to config.yaml.
      resume: continue in an existing run folder. Without `resume`, an existing run folder raises an error, or is
        removed if `overwrite` is set.
    Raises: ConfigError if the folder cannot be used, also because another process is using it.

    The folder is locked until `close`, or until the process ends.
    """

    def __init__(self, config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
        self.folder = Path(config.output_dir)
        self._bar: tqdm | None = None
        self._config_file = self.folder / "config.yaml"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._config_file.exists() and {path.name for path in self.folder.iterdir()} - {LOCK}:
            raise ConfigError(f"output_dir: {self.folder} is not empty and not a run folder; choose another")
        self._lock = self._locked()
        trained = any((self.folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))
        if self._config_file.exists() and trained:
            if overwrite:
                for path in self.folder.iterdir():
                    if path.name != LOCK:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            elif not resume:
                raise ConfigError(
                    f"output_dir: {self.folder} holds a run; add --resume, or --overwrite to start it anew"
                )
            else:
                self._check_changes(config)
        elif resume:
            self.say(f"{self.folder} holds no run to resume: starting one")
        with atomic_write(self._config_file) as file:
            file.write(configs.dump(config))

    def _locked(self) -> TextIO:
        """Locks the run folder and returns the file that holds the lock. Raises ConfigError if it is locked."""
        file = open(self.folder / LOCK, "a+")  # noqa: SIM115 (it stays open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ConfigError(f"output_dir: {self.folder} is in use by {owner}; choose another, or wait") from None
        except OSError as error:  # a file system without locks
            self.say(f"{self.folder}: cannot be locked ({error.strerror}); a second run in it would not be noticed")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file

    def close(self) -> None:
        """Gives up the lock of the folder."""
        self._lock.close()

    def sync(self) -> None:
        """Writes the metrics and rollouts to disk now, so that a checkpoint is never newer than its rows."""
        for name in ROWS:
            if (self.folder / name).exists():
                sync(self.folder / name)

    def _check_changes(self, config: Config) -> None:
        """Raises ConfigError if a resumed run changes a setting, except settings that change no result so far."""
        old, new = yaml.safe_load(self._config_file.read_text()), yaml.safe_load(configs.dump(config))
        free = [f"data.{name}.{key}" for name in ("sft", "rl", "heldout") for key in ("allow_outside", "image_digests")]
        free += ["checkpoint.", "guards.", "scoring.", "eval.", "mesh.", "output_dir", "rl.steps", "data.workers"]
        free += BACKEND_KEYS
        if not (self.folder / "checkpoints" / "step_grpo").exists():
            free += ["sft.steps", "sft.epochs"]
        for key, default, _ in configs.describe():
            # A config.yaml of an earlier version lacks newer keys; the defaults are used for them.
            before = config_tree.get(old, key, list(default) if isinstance(default, tuple) else default)
            after = config_tree.get(new, key)
            if before != after and not key.startswith(tuple(free)):
                raise ConfigError(f"{key} was {before!r} in this run and is now {after!r}; expected no change")
            if before != after:
                self.say(f"{key} was {before!r} in this run and is now {after!r}")

    def say(self, message: str) -> None:
        """Prints one line for people on stderr, above the progress line."""
        tqdm.write(message, file=sys.stderr)

    def truncate_after(self, stage: str, step: int) -> None:
        """Removes the rows that a stage logged after a step, so that a resumed run logs each step once.

        Lines that are no rows are moved to a file of their own, FILE.damaged.
        """
        has_heldout = self.has_heldout(stage, step)

        def keep(row: dict[str, Any]) -> bool:
            if row["stage"] != stage:
                return True
            # Held-out rows are scored after the checkpoint. If that was interrupted, they are removed and scored again.
            return row["step"] < step or (row["step"] == step and (has_heldout or row.get("event") != "heldout"))

        for name in ROWS:
            path = self.folder / name
            if path.exists():
                with atomic_write(path) as file:
                    rows = read_json_lines(path, partial(self._set_aside, path))
                    file.writelines(json.dumps(row) + "\n" for row in rows if keep(row))

    def _set_aside(self, path: Path, number: int, line: bytes) -> None:
        with open(f"{path}.damaged", "ab") as file:
            file.write(line)
        self.say(f"{path}, line {number}: not a row; moved to {path.name}.damaged")

    def has_heldout(self, stage: str, step: int) -> bool:
        """Returns whether metrics.jsonl has the held-out means of a step."""
        wanted = ("heldout", stage, step)
        rows = read_json_lines(self.folder / "metrics.jsonl", lambda number, line: None)
        return any((row.get("event"), row["stage"], row["step"]) == wanted for row in rows)

    def metrics(self, stage: str, step: int, values: dict[str, Any]) -> None:
        self._append("metrics.jsonl", {"stage": stage, "step": step, **{k: _plain(v) for k, v in values.items()}})

    def rollouts(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._append("rollouts.jsonl", row)

    def nonfinite(self, row: dict[str, Any]) -> None:
        """Writes down a step whose update was skipped, see training.guards."""
        self._append("nonfinite.jsonl", row)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(row) + "\n")

    def steps(self, name: str, start: int, total: int) -> Iterator[int]:
        """Yields steps start+1 to total, with a progress line: bar, rate, time left, and the values given to `show`."""
        self._bar = tqdm(total=total, initial=start, desc=name, unit="step", file=sys.stderr, dynamic_ncols=True)
        with self._bar:
            for step in range(start + 1, total + 1):
                yield step
                self._bar.update()
        self._bar = None

    def show(self, **values: float) -> None:
        """Shows values beside the progress bar."""
        if self._bar is not None:
            self._bar.set_postfix({key: f"{value:.3g}" for key, value in values.items()})


class Phases:
    """A timer that sums the seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def metrics(self) -> dict[str, float]:
        return {f"seconds/{name}": value for name, value in self.seconds.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    return float(value) if math.isfinite(value) else None  # JSON has no NaN
