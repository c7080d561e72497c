"""Loads reward functions that users write, calls them once per batch, and checks their results.

A reward function takes the completions and the examples that they answer, and returns one number per completion:

    def short(completions, examples):
        return [float(len(text) < 1000) for text in completions]

The function runs in the training process, in addition to StepRAR and StepRVR, on text that a model wrote. If it fails,
the error names the function and the row. No result is repaired or replaced by 0: NaN and infinity are returned as they
are, and training skips the update.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from r1vl_jax.common.text import did_you_mean, shorten
from r1vl_jax.errors import RewardError

MAX_MESSAGE_CHARS = 500


@dataclasses.dataclass(frozen=True)
class UserReward:
    """A user's reward function, and the "module:name" from which it was loaded."""

    name: str
    function: Callable[[list[str], list[Any]], Any]


def load_reward(text: str) -> UserReward:
    """Imports the module of "module:name" from Python's usual search path, and returns the function `name`.

    Raises:
      RewardError: the text is not "module:name", the module cannot be imported, or it has no such function.
    """
    module_name, _, name = text.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise RewardError(f"reward {text!r}: expected 'module:name', as in 'my_module:my_reward'")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit when it is imported
        raise RewardError(f"reward {text!r}: module {module_name!r} cannot be imported: {_describe(error)}") from error
    if not hasattr(module, name):
        hint = did_you_mean(name, vars(module))
        raise RewardError(f"reward {text!r}: module {module_name!r} has no {name!r}{hint}")
    function = getattr(module, name)
    if not callable(function):
        raise RewardError(f"reward {text!r}: expected a function, {name!r} is of type {type(function).__name__}")
    return UserReward(text, function)


def user_reward(reward: UserReward, completions: Sequence[str], examples: Sequence[Any]) -> np.ndarray:
    """Returns the rewards of N completions, float64 of shape (N,), from one call of the user's function.

    Args:
      reward: from `load_reward`.
      completions: N answers.
      examples: the N examples that they answer. If an example has a `name`, error messages include it.

    Raises:
      RewardError: the function raised an exception, or did not return N numbers. After an exception, the
        function is called again with single rows, so that the message can name the first row that fails alone.
      ValueError: the lengths differ.
    """
    if len(completions) != len(examples):
        raise ValueError(f"expected one example for each completion, got {len(completions)} and {len(examples)}")
    if not completions:
        return np.zeros(0, np.float64)
    try:
        result = reward.function(list(completions), list(examples))
    except (Exception, SystemExit) as error:
        row = _first_failing_row(reward, completions, examples)
        where = "on the batch but on no row alone" if row is None else f"on {_row(row, examples)}"
        raise RewardError(
            f"reward {reward.name!r} raised {where}: {_describe(error)}{_place(reward, error)}"
        ) from error
    return _checked(reward, result, examples)


def _checked(reward: UserReward, result: Any, examples: Sequence[Any]) -> np.ndarray:
    """Checks the result of a user's function and copies it to float64 of shape (N,). Raises RewardError."""

    def refused(what: str) -> RewardError:
        expected = f"expected {len(examples)} numbers, one for each completion"
        return RewardError(f"reward {reward.name!r} returned {what}; {expected}")

    if isinstance(result, list | tuple):
        values = result
        if len(values) != len(examples):
            raise refused(f"{len(values)} entries")
    elif hasattr(result, "__array__"):  # arrays of NumPy, and of JAX without importing it
        try:
            values = np.asarray(result)
        except Exception as error:  # the array's library refuses, for example because the array was donated
            raise refused(f"an array that cannot be read ({_describe(error)})") from error
        if isinstance(result, np.ma.MaskedArray) and np.ma.is_masked(result):
            raise refused("an array with masked entries")
        if values.shape != (len(examples),):
            raise refused(f"an array of shape {values.shape}")
    else:
        raise refused(_kind(result))
    bad = next((row for row, value in enumerate(values) if not _is_number(value)), None)
    if bad is not None:
        raise refused(f"{_kind(values[bad])} for {_row(bad, examples)}")
    if isinstance(values, np.ndarray) and not _is_real(values.dtype):
        raise refused(f"an array of {values.dtype}")
    return np.array(values, np.float64)


def _is_number(value: Any) -> bool:
    try:
        number = np.asarray(value)
    except Exception:  # NumPy, or the library that the value belongs to, refuses it: it is not a number
        return False
    return number.shape == () and _is_real(number.dtype)


def _is_real(dtype: np.dtype) -> bool:
    return np.can_cast(dtype, np.float64, "same_kind")  # dtype.kind does not work: JAX's bfloat16 is no NumPy kind


def _kind(value: Any) -> str:
    """Returns a value, shortened, and the name of its type."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or a class whose __repr__ fails
        text = "a value"
    return f"{shorten(text, 60)} ({type(value).__name__})"


def _row(row: int, examples: Sequence[Any]) -> str:
    name = getattr(examples[row], "name", None)
    return f"row {row} of the batch" + ("" if name is None else f" ({name})")


def _describe(error: BaseException) -> str:
    """Returns the type and message of an error, shortened."""
    try:
        text = str(error)
    except Exception:  # a class whose __str__ fails must not hide the error
        text = "(no message)"
    return shorten(f"{type(error).__name__}: {text}", MAX_MESSAGE_CHARS)


def _first_failing_row(reward: UserReward, completions: Sequence[str], examples: Sequence[Any]) -> int | None:
    for row, (completion, example) in enumerate(zip(completions, examples, strict=True)):
        try:
            reward.function([completion], [example])
        except (Exception, SystemExit):
            return row
    return None


def _place(reward: UserReward, error: BaseException) -> str:
    """Returns the last line of the user's module in an exception's traceback, as " (file:line)".

    If the traceback has no line of the user's module, the last line of any other module is returned; "" if there is
    none.
    """
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without the first frame, the call in this module
    file = getattr(sys.modules.get(reward.function.__module__), "__file__", None)
    own = [frame for frame in frames if frame.filename == file] or frames
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
