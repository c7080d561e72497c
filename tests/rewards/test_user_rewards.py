"""Rewards that users write: how they are found, what they are given, and how each of their faults is named."""

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from r1vl_jax.errors import RewardError
from r1vl_jax.rewards.user import UserReward, load_reward, user_reward


@dataclasses.dataclass
class Row:
    name: str | None


ROWS = [Row("a.json, row 7"), Row("a.json, row 8"), Row("a.json, row 9")]
TEXTS = ["x", "xx", "xxx"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module where Python finds it; gives its path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, code):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(code)
        return tmp_path / f"{name}.py"

    return write


def run(function, completions=TEXTS, examples=ROWS):
    return user_reward(UserReward("m:f", function), completions, examples)


def error_of(result):
    with pytest.raises(RewardError) as caught:
        run(lambda completions, examples: result)
    message = str(caught.value)
    assert message.startswith("reward 'm:f' returned ")
    assert message.endswith("; expected 3 numbers, one for each completion")
    return message


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_function_is_found_by_module_and_name(module):
    module("user_lengths", "def lengths(completions, examples):\n    return [len(text) for text in completions]\n")
    reward = load_reward("user_lengths:lengths")
    assert reward.name == "user_lengths:lengths"
    np.testing.assert_array_equal(user_reward(reward, TEXTS, ROWS), [1.0, 2.0, 3.0])


def test_a_module_inside_a_package_is_found(module, tmp_path):
    (tmp_path / "user_package").mkdir()
    (tmp_path / "user_package" / "inner.py").write_text("ones = lambda completions, examples: [1] * len(completions)\n")
    np.testing.assert_array_equal(user_reward(load_reward("user_package.inner:ones"), TEXTS, ROWS), [1.0] * 3)


def test_a_command_finds_modules_in_the_current_folder(tmp_path):
    """As `python -m r1vl_jax.train` does; and without loading JAX."""
    (tmp_path / "my_module.py").write_text("def my_reward(completions, examples): return [0.5]\n")
    (tmp_path / "command.py").write_text(
        "import sys\n"
        "from r1vl_jax.rewards.user import load_reward, user_reward\n"
        "print(user_reward(load_reward('my_module:my_reward'), ['a'], [None]), 'jax' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-m", "command"], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "[0.5] False\n", run.stderr


@pytest.mark.parametrize("text", ["", "m", "m:", ":f", "m:f:g", "a/b:f", "m: f", ".m:f", "m:f()"])
def test_what_is_not_module_and_name_is_refused(text):
    with pytest.raises(RewardError) as caught:
        load_reward(text)
    assert str(caught.value) == f"reward {text!r}: expected 'module:name', as in 'my_module:my_reward'"


def test_a_module_that_is_not_there_is_named_with_the_import_error():
    with pytest.raises(RewardError, match=r"'no_such_module:f'.*ModuleNotFoundError: No module named 'no_such_module'"):
        load_reward("no_such_module:f")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_dependency\n", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("x = 1\ndef f(:\n", r"SyntaxError: .*user_broken\.py, line 2"),
        ("raise RuntimeError('no licence')\n", "RuntimeError: no licence"),
        ("import sys\nsys.exit('usage: ...')\n", "SystemExit: usage"),
    ],
)
def test_a_module_that_fails_is_named_with_its_error(module, code, message):
    module("user_broken", code)
    with pytest.raises(
        RewardError, match="'user_broken:f': module 'user_broken' cannot be imported: " + message
    ) as caught:
        load_reward("user_broken:f")
    assert caught.value.__cause__ is not None


def test_a_missing_name_suggests_the_nearest(module):
    module("user_names", "def brevity(completions, examples): ...\n")
    with pytest.raises(RewardError, match="'user_names' has no 'brevty'; did you mean 'brevity'?"):
        load_reward("user_names:brevty")
    with pytest.raises(RewardError) as caught:
        load_reward("user_names:zzzzzz")
    assert "did you mean" not in str(caught.value)


def test_what_cannot_be_called_is_refused(module):
    module("user_values", "weight = 3\n")
    with pytest.raises(RewardError, match="'user_values:weight': expected a function, 'weight' is of type int"):
        load_reward("user_values:weight")


# --- calling ----------------------------------------------------------------------------------------------------------


def test_the_function_is_called_once_with_copies():
    calls = []

    def greedy(completions, examples):
        calls.append((list(completions), list(examples)))
        completions.clear()
        examples.pop()
        return [1, 2, 3]

    texts, rows = list(TEXTS), list(ROWS)
    np.testing.assert_array_equal(run(greedy, texts, rows), [1.0, 2.0, 3.0])
    assert calls == [(TEXTS, ROWS)]
    assert (texts, rows) == (TEXTS, ROWS)


def test_sequences_of_other_kinds_arrive_as_lists():
    arrived = []

    def note(completions, examples):
        arrived.extend([completions, examples])
        return [0.0] * 3

    run(note, tuple(TEXTS), tuple(ROWS))
    assert arrived == [list(TEXTS), list(ROWS)] and [type(each) for each in arrived] == [list, list]


def test_no_rows_call_nothing():
    found = run(lambda completions, examples: 1 / 0, [], [])
    assert (found.shape, found.dtype) == ((0,), np.float64)


def test_different_lengths_are_the_callers_error():
    with pytest.raises(ValueError, match="got 3 and 2") as caught:
        run(lambda completions, examples: [0] * 3, TEXTS, ROWS[:2])
    assert not isinstance(caught.value, RewardError)


@pytest.mark.parametrize(
    "result",
    [
        [0, 1, 2],
        (0.0, 1.0, 2.0),
        [False, True, 2],
        [np.float32(0), np.int8(1), np.bool_(True) + 1],
        np.array([0, 1, 2], np.uint8),
        np.array([0.0, 1.0, 2.0], np.float16),
        np.arange(6)[::2] // 2,
        jnp.array([0.0, 1.0, 2.0], jnp.bfloat16),
        jnp.arange(3),
        [jnp.float32(0), jnp.bfloat16(1), np.array(2)],
    ],
    ids=repr,
)
def test_numbers_of_every_kind_become_float64(result):
    found = run(lambda completions, examples: result)
    assert (type(found), found.dtype, found.shape) == (np.ndarray, np.float64, (3,))
    np.testing.assert_array_equal(found, [0.0, 1.0, 2.0])


def test_the_result_is_a_copy():
    own = np.zeros(3)
    found = run(lambda completions, examples: own)
    own[:] = 5
    np.testing.assert_array_equal(found, [0.0, 0.0, 0.0])


# --- faults of the result ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (None, "None (NoneType)"),
        (1.0, "1.0 (float)"),
        ("abc", "'abc' (str)"),
        (b"abc", "b'abc' (bytes)"),
        ({0: 1, 1: 2, 2: 3}, "{0: 1, 1: 2, 2: 3} (dict)"),
        ({1, 2, 3}, "{1, 2, 3} (set)"),
        ([1, 2], "2 entries"),
        ([1, 2, 3, 4], "4 entries"),
        ([], "0 entries"),
        (np.zeros(2), "an array of shape (2,)"),
        (np.zeros((3, 1)), "an array of shape (3, 1)"),
        (np.float64(1), "an array of shape ()"),
        (jnp.zeros((1, 3)), "an array of shape (1, 3)"),
        (np.array([1, 2, 3], object), "an array of object"),
    ],
    ids=repr,
)
def test_a_result_of_the_wrong_form_is_named(result, what):
    assert f"returned {what}; expected" in error_of(result)


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (None, "None (NoneType)"),
        ("1.0", "'1.0' (str)"),
        (1j, "1j (complex)"),
        ([1.0], "[1.0] (list)"),
        (np.zeros(2), "array([0., 0.]) (ndarray)"),
        ([[1], [1, 2]], "[[1], [1, 2]] (list)"),
        (10**400, "1" + "0" * 56 + "... (int)"),
        (10**5000, "a value (int)"),
        (np.datetime64("2020-01-01"), "(datetime64)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_bad_entry_is_named_with_its_row(bad, shown):
    message = error_of([0.5, 0.5, bad])
    assert shown in message and "for row 2 of the batch (a.json, row 9)" in message


@pytest.mark.parametrize(
    ("array", "row"),
    [
        (np.array([0.5, 1, None]), "row 2 of the batch (a.json, row 9)"),
        (np.array(["1", "2", "3"]), "row 0 of the batch (a.json, row 7)"),
        (np.array([1, 2j, 3]), "row 0 of the batch (a.json, row 7)"),
    ],
    ids=repr,
)
def test_a_bad_entry_of_an_array_is_named_with_its_row(array, row):
    assert row in error_of(array)


@pytest.mark.parametrize(
    "result",
    [
        [0.0, float("nan"), float("-inf")],
        np.array([0, np.nan, -np.inf], np.float16),
        jnp.array([0.0, jnp.nan, -jnp.inf], jnp.bfloat16),
        [np.float32(0), np.float32("nan"), np.float64("-inf")],
    ],
    ids=repr,
)
def test_numbers_that_are_not_finite_are_returned_as_they_are(result):
    """Training skips the update and names the rows; a value in their place would be invented."""
    np.testing.assert_array_equal(run(lambda completions, examples: result), [0.0, np.nan, -np.inf])


def test_rows_without_a_name_are_named_by_number():
    for example in (Row(None), {"name": "not an attribute"}, None):
        with pytest.raises(RewardError, match=r"for row 0 of the batch; expected"):
            run(lambda completions, examples: [None], ["x"], [example])


def test_an_array_that_refuses_to_be_read_is_named():
    deleted = jnp.zeros(3)
    deleted.delete()
    assert "returned an array that cannot be read (RuntimeError: Array has been deleted" in error_of(deleted)


# --- exceptions -------------------------------------------------------------------------------------------------------

RAISING = """
def deep(completions, examples):
    return [outer(text) for text in completions]

def outer(text):
    return 10 / inner(text)

def inner(text):
    return 3 - len(text)

def library(completions, examples):
    import json
    return [json.loads(text) for text in completions]
"""


def test_an_exception_names_the_row_the_place_and_the_cause(module):
    path = module("user_raising", RAISING)
    with pytest.raises(RewardError) as caught:
        user_reward(load_reward("user_raising:deep"), TEXTS, ROWS)
    assert str(caught.value) == (
        "reward 'user_raising:deep' raised on row 2 of the batch (a.json, row 9): "
        f"ZeroDivisionError: division by zero ({path}:6)"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_place_of_an_exception_in_a_library_is_the_users_line(module):
    path = module("user_raising", RAISING)
    with pytest.raises(RewardError, match="JSONDecodeError: Expecting property name") as caught:
        user_reward(load_reward("user_raising:library"), ["1", "{", "{"], ROWS)
    assert "on row 1 of the batch" in str(caught.value) and str(caught.value).endswith(f"({path}:13)")


def test_a_function_that_no_module_of_the_users_holds_still_gives_its_error():
    with pytest.raises(RewardError, match="raised on row 0 of the batch .*: TypeError"):
        run(sorted)


def test_an_exception_that_only_the_batch_causes_says_so():
    def together(completions, examples):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="raised on the batch but on no row alone: RuntimeError: too many") as caught:
        run(together)
    assert str(caught.value.__cause__) == "too many"


def test_a_long_message_is_cut():
    def loud(completions, examples):
        raise ValueError("x" * 10**6)

    with pytest.raises(RewardError) as caught:
        run(loud)
    assert len(str(caught.value)) < 1000


def test_an_interruption_passes_through():
    def interrupted(completions, examples):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted)
