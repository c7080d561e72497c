"""Training state to resume from: orbax checkpoints of a stage, each a TrainState and a small JSON of host state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from r1vl_jax.types import TrainState


class StageCheckpoints:
    """The checkpoints of one stage in one folder, newest last.

    Args:
      folder: made when the first checkpoint is written.
      keep: how many checkpoints are kept; older ones are removed.
    """

    def __init__(self, folder: str | Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Writes a checkpoint in the background. One that was not completed is never `latest`.

        Args:
          host: JSON values: the positions of the loaders.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        self._manager.save(step, args=args)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and the host state of a step. `like`: a TrainState of ShapeDtypeStructs with shardings."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), host=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["host"]

    def close(self) -> None:
        """Waits until everything has been written."""
        self._manager.wait_until_finished()
        self._manager.close()
