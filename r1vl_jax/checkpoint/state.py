"""Saves and restores training state with orbax. Each checkpoint has a TrainState and a small JSON of host state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from r1vl_jax.types import TrainState


class StageCheckpoints:
    """The checkpoints of one stage, in one folder.

    Args:
      folder: created when the first checkpoint is written.
      keep: number of checkpoints to keep; older ones are removed.
    """

    def __init__(self, folder: str | Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Writes a checkpoint in the background. `latest` ignores the checkpoint until it is complete.

        Args:
          host: the positions of the loaders, as JSON values.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        self._manager.save(step, args=args)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the TrainState and the host state of a step.

        Args:
          like: a TrainState of ShapeDtypeStructs with shardings.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), host=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["host"]

    def close(self) -> None:
        """Waits until all checkpoints have been written."""
        self._manager.wait_until_finished()
        self._manager.close()
