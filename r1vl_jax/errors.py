"""Defines the errors that commands print in one line. Any other exception is a fault of the program."""

from __future__ import annotations


class ConfigError(ValueError):
    """The configuration is wrong. The message names the key, its value and what was expected."""


class CheckpointError(ValueError):
    """A checkpoint folder cannot be used. The message names the file and the key or tensor."""


class RowError(ValueError):
    """One row of the input cannot be used. The message names the file, row and field, and the expected value."""


class RewardError(ValueError):
    """A user's reward function cannot be loaded, raised an error, or did not return one number per row."""


class WorkerError(RuntimeError):
    """A process that reads rows or scores answers cannot be started, or ended."""


class GuardError(RuntimeError):
    """A guard stopped a run: its numbers are not finite, or sampler and trainer compute different probabilities."""


class DeviceMemoryError(RuntimeError):
    """A device has too little memory. The message says for what, and what needs less."""


# What commands print in one line.
EXPECTED = (ConfigError, CheckpointError, RowError, RewardError, WorkerError, GuardError, DeviceMemoryError, OSError)
