"""Saves and restores the train states of a stage with orbax, proved by checksums.

    FOLDER/STEP/state    the TrainState, written by orbax: each device writes and reads its own part
    FOLDER/STEP/host     JSON: layout, position of the loader, a checksum of each array, and a digest of the JSON itself

A state is written in the background, to a temporary folder that orbax renames when it is complete. Then it is synced to
disk, and only then older states are deleted. Restoring takes the newest state whose checksums hold. Damaged states that
are newer are moved to a folder of their own, so that they do not count among those that are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from r1vl_jax.checkpoint.checksums import checksums
from r1vl_jax.checkpoint.orbax_files import chunked
from r1vl_jax.common.files import sync
from r1vl_jax.common.text import first_few, one_line
from r1vl_jax.errors import CheckpointError
from r1vl_jax.types import TrainState

LAYOUT = 2  # of the host state; layout 1 was the loader's position alone, without checksums
_LAYOUT_1 = {"rows", "dropped", "fingerprint"}


class Restored(NamedTuple):
    """A train state that was read: its step, the state, and the loader's position as JSON values."""

    step: int
    state: TrainState
    position: dict[str, Any]


class StageCheckpoints:
    """The checkpoints of one stage, in one folder.

    Args:
      folder: created when the first checkpoint is written.
      keep: number of checkpoints to keep; older ones are removed.
      say: prints a line for people.
    """

    def __init__(self, folder: str | Path, keep: int, say: Callable[[str], None] = print) -> None:
        self.folder, self._keep, self._say = Path(folder).absolute(), keep, say
        self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(create=True))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._settling: tuple[int, Future[None]] | None = None

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint that is complete or being written; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Writes a checkpoint in the background; the arrays of `state` may be reused when this returns.

        Args:
          position: the position of the loader, as JSON values.
        Raises: CheckpointError if this or the last checkpoint cannot be written.
        """
        self.wait()
        host = sealed({"layout": LAYOUT, "position": position, "checksums": checksums(state)})
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state, save_args=jax.tree.map(chunked, state)), host=ocp.args.JsonSave(host)
        )
        with _writing(self.folder / str(step)):
            self._manager.save(step, args=args, force=True)
        self._settling = step, self._thread.submit(self._settle, step)

    def _settle(self, step: int) -> None:
        """Waits until a checkpoint is complete, syncs it to disk, and deletes the oldest ones beyond `keep`."""
        self._manager.wait_until_finished()
        sync(self.folder / str(step))
        for old in sorted(self._manager.all_steps())[: -self._keep]:
            self._manager.delete(old)

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk. Raises CheckpointError if it could not be written."""
        if self._settling is not None:
            (step, future), self._settling = self._settling, None
            with _writing(self.folder / str(step)):
                future.result()

    def restore(self, like: TrainState) -> Restored | None:
        """Returns the newest train state whose checksums hold; None if there is no checkpoint.

        Args:
          like: a TrainState of ShapeDtypeStructs with shardings.
        Raises: CheckpointError that names all checkpoints if none of them can be used.
        """
        faults: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read(step, like)
            except Exception as error:  # of orbax, tensorstore, json, ours: damaged files raise errors of all kinds
                faults[step] = one_line(error)
                continue
            for damaged, why in faults.items():
                self._set_aside(damaged, why)
            return found
        if faults:
            texts = [f"{self.folder / str(step)} ({why})" for step, why in faults.items()]
            raise CheckpointError(f"no train state can be used: {first_few(texts)}")
        return None

    def _read(self, step: int, like: TrainState) -> Restored:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), host=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        state, host = restored["state"], restored["host"]
        if host.keys() == _LAYOUT_1:
            self._say(f"{self.folder / str(step)}: written by an earlier version, without checksums to verify")
            return Restored(step, state, host)
        host = unsealed(host)
        verify(state, host["checksums"])
        return Restored(step, state, host["position"])

    def _set_aside(self, step: int, why: str) -> None:
        """Moves a damaged checkpoint out of the way."""
        folder = self.folder.parent / "damaged"
        folder.mkdir(exist_ok=True)
        target, number = folder / f"{self.folder.name}-{step}", 1
        while target.exists():
            number += 1
            target = folder / f"{self.folder.name}-{step}-{number}"
        os.rename(self.folder / str(step), target)
        self._manager.reload()
        self._say(f"{self.folder / str(step)}: damaged, not used, moved to {target}: {why}")

    def close(self) -> None:
        """Waits until all checkpoints have been written. Raises CheckpointError if one could not be."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns every error of the block into a CheckpointError that names the folder which is being written."""
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise errors of many kinds
        raise CheckpointError(f"{folder}: cannot be written ({one_line(error)})") from error


def sealed(host: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON object with a digest of the rest of it."""
    return host | {"digest": _digest(host)}


def unsealed(host: Any) -> dict[str, Any]:
    """Returns the JSON object without its digest. Raises CheckpointError if it is not what was written."""
    if not isinstance(host, dict) or "digest" not in host:
        raise CheckpointError("the host state is not that of a checkpoint")
    rest = {key: value for key, value in host.items() if key != "digest"}
    if host["digest"] != _digest(rest):
        raise CheckpointError("the host state differs from what was written")
    if rest.get("layout") != LAYOUT:
        raise CheckpointError(f"the host state has layout {rest.get('layout')}; this version reads 1 to {LAYOUT}")
    return rest


def verify_part(tree: Any, part: str, file: Path) -> None:
    """Verifies a part of a TrainState, such as ".params", by the host state in a file. Raises CheckpointError."""
    try:
        host = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({one_line(error)})") from error
    if host.keys() != _LAYOUT_1:
        expected = unsealed(host)["checksums"].items()
        verify(tree, {path.removeprefix(part): value for path, value in expected if path.startswith(part)})


def _digest(host: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(host, sort_keys=True).encode()).hexdigest()


def verify(tree: Any, expected: dict[str, str]) -> None:
    """Raises CheckpointError if the checksums of the tree's arrays are not the expected ones."""
    actual = checksums(tree)
    wrong = [path for path in actual if actual[path] != expected.get(path)]
    if wrong or actual.keys() != expected.keys():
        paths = wrong or sorted(expected.keys() ^ actual.keys())
        raise CheckpointError(f"arrays differ from what was written: {first_few(paths)}")
