"""Resumable training state: orbax checkpoints of a stage, each a TrainState and a small JSON of host state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from r1vl_jax.types import TrainState


class StageCheckpoints:
    """The checkpoints of one stage in one folder, newest last.

    Args:
      folder: where they lie; made when the first one is written.
      keep: older ones than this many are removed.
    """

    def __init__(self, folder: str | Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Writes in the background; a checkpoint that was cut off is never the latest."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        self._manager.save(step, args=args)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state in the layout of `like` (ShapeDtypeStructs with shardings), and the host state."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), host=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["host"]

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
