"""The scorer pool with real processes: hangs, crashes, errors, memory, order, and what is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.waiting import wait_until

from r1vl_jax.rewards import Score, ScorerPool, score_answer

LIMIT_S = 3
HEAD = "### Image Description: d\n### Rationales: r\n### Step 1: one\n### The final answer is: "
# What the workers run in place of score_answer: does as the completion says, else scores it.
SCORER = """
import os, pathlib, resource, signal, sys, time
from r1vl_jax.rewards import Score, score_answer

def burn(started):
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if soft != resource.RLIM_INFINITY:  # the pool's limit, which this test need not burn to its end
        used = int(time.process_time())
        assert soft - used < 10
        resource.setrlimit(resource.RLIMIT_CPU, (min(soft, used + 1), hard))
    pathlib.Path(started).touch()
    while True:
        pass

def score(completion, solution, key_steps, **options):
    if completion == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60)
    if completion.startswith("burn"):
        burn(completion.split()[1])
    if completion == "crash":
        os._exit(7)
    if completion == "raise":
        raise ArithmeticError("no " + "x" * 10_000)
    if completion == "modules":
        return Score(note=" ".join(sorted({name.split(".")[0] for name in sys.modules})))
    if completion == "memory":
        bytearray(16 << 30)
    if completion.startswith("wait"):
        while not pathlib.Path(completion.split()[1]).exists():
            time.sleep(0.01)
        return score_answer("", solution, key_steps, **options)
    return score_answer(completion, solution, key_steps, **options)
"""

# The real score_answer, in a worker whose math-verify does as the final answer says.
VERIFIER = """
import ctypes, os
import math_verify
from r1vl_jax.rewards import score_answer

def arithmetic():  # runs in C, where no signal interrupts it
    base, exponent = 10, 10**9
    return base**exponent

def memory():
    hoard = []
    while True:
        hoard.append(bytearray(16 << 20))

FAULTS = {"arithmetic": arithmetic, "memory": memory, "abort": os.abort, "segfault": lambda: ctypes.string_at(0)}
real = math_verify.parse

def parse(text):
    fault = FAULTS.get(text.split()[-1])
    return fault() if fault else real(text)

math_verify.parse = parse
score = score_answer
"""


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    (folder / "pool_scorer.py").write_text(SCORER)
    (folder / "pool_verifier.py").write_text(VERIFIER)
    sys.path.insert(0, str(folder))
    yield "pool_scorer:score"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool(scorer):
    with ScorerPool(2, LIMIT_S, function=scorer) as pool:
        yield pool


def run(pool, completions, solution="3", key_steps=None, **options):
    count = len(completions)
    return pool.score(completions, [solution] * count, [key_steps] * count, **options)


def make_ready(pool):
    """Until all workers have started, one alone might get the first answers."""
    while not all(worker.ready for worker in pool._workers):
        run(pool, [HEAD + "3"])


def alive(pid):
    """Whether a process runs; one that waits for its parent to notice its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_scores_equal_those_in_process(pool):
    completions = [HEAD + "3", HEAD + "4", "", HEAD + "\\frac{6}{2}"]
    for rules in ("released", "paper"):
        expected = [score_answer(text, "3", ["one"], rules=rules, alpha=0.5) for text in completions]
        assert run(pool, completions, key_steps=["one"], rules=rules, alpha=0.5) == expected


def test_order_is_kept_whatever_the_time_each_takes(pool, tmp_path):
    """The first answer waits for the result of the second, the fourth for that of the third."""
    make_ready(pool)
    completions = [f"wait {tmp_path}/1", HEAD + "1", HEAD + "2", f"wait {tmp_path}/2", HEAD + "4"]
    arrived = []

    def on_result(score):
        arrived.append(score)
        (tmp_path / str(score.answer)).touch()

    scores = run(pool, completions, on_result=on_result)
    assert [score.answer for score in scores] == [None, "1", "2", None, "4"]
    assert sorted(map(id, arrived)) == sorted(map(id, scores)) and arrived[0].answer == "1"


def test_a_failing_answer_costs_only_itself(pool):
    completions = ["hang", HEAD + "3", "crash", "raise", "memory", HEAD + "3", "hang", "crash", HEAD + "3"]
    scores = run(pool, completions, key_steps=["one"])
    statuses = ["timeout", "ok", "crash", "error", "error", "ok", "timeout", "crash", "ok"]
    assert [score.status for score in scores] == statuses
    for score in scores:
        if score.status == "ok":
            assert score.reward == pytest.approx(2.1)
        else:
            assert score == Score(status=score.status, note=score.note)
    notes = [score.note for score in scores]
    assert notes[0] == f"took longer than {LIMIT_S} s" and notes[2] == "the worker ended with code 7"
    assert notes[3].startswith("ArithmeticError: no") and len(notes[3]) == 300
    assert notes[4].startswith("MemoryError")
    assert run(pool, [HEAD + "3"])[0].correct  # and the pool goes on


FAULTS = {"arithmetic": "timeout", "abort": "crash", "memory": "error", "segfault": "crash"}


def test_a_hang_a_crash_and_a_memory_bomb_in_the_verifier_each_cost_one_answer(scorer):
    half = "$\\frac{6}{2}$"  # right, and not as text: the verifier is asked
    finals = [half, "arithmetic", half, "abort", half, "memory", half, "segfault", "4", half]
    with ScorerPool(2, 4, memory_gib=0.5, function="pool_verifier:score") as pool:
        scores = run(pool, [HEAD + final for final in finals], key_steps=["one"], rules="released")
        assert run(pool, [HEAD + half], rules="released")[0].correct  # and the pool goes on
    found = dict(zip(finals, scores, strict=True))
    assert {final: found[final].status for final in FAULTS} == FAULTS
    for final in FAULTS:
        assert found[final] == Score(status=FAULTS[final], note=found[final].note)
    assert found["abort"].note == f"the worker ended with code {-signal.SIGABRT}"
    assert found["segfault"].note == f"the worker ended with code {-signal.SIGSEGV}"
    assert found["memory"].note.startswith("MemoryError")
    rest = [score.reward for final, score in zip(finals, scores, strict=True) if final not in FAULTS]
    assert rest == pytest.approx([2.1, 2.1, 2.1, 2.1, 1.1, 2.1])


def test_workers_load_neither_jax_nor_what_the_parent_runs(pool):
    names = set(run(pool, ["modules"])[0].note.split())
    assert "math_verify" in names
    assert names.isdisjoint({"jax", "jaxlib", "flax", "transformers", "torch", "pytest"})


def test_workers_killed_while_idle_or_starting_are_replaced_at_no_cost(pool):
    run(pool, [HEAD + "3"] * 4)
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    assert [score.status for score in run(pool, [HEAD + "3"] * 4)] == ["ok"] * 4


def test_rows_of_the_wrong_type_are_errors_of_their_own(pool):
    scores = pool.score([None, 5, HEAD + "3", HEAD + "3"], ["3", "3", "3", None], [None, None, lambda: 0, None])
    assert [score.status for score in scores] == ["error"] * 4
    assert "completion: expected a text, got NoneType" in scores[0].note or "AttributeError" in scores[0].note
    assert "cannot be sent" in scores[2].note


def test_hostile_text_travels(pool):
    texts = ["\x00", "\ud800\x00", "\udfff", "x" * 2**20, "\\frac{1}{", HEAD + "\ud800"]
    scores = run(pool, texts, key_steps=[["\ud800"], [None, 3], "x\x00"])
    assert [score.status for score in scores] == ["ok"] * 6
    assert scores[5].answer == "\ud800"


def test_after_an_interruption_nothing_is_left_over_for_the_next_call(pool, tmp_path):
    def interrupt(score):
        raise KeyboardInterrupt

    make_ready(pool)
    with pytest.raises(KeyboardInterrupt):
        run(pool, [HEAD + "1", f"wait {tmp_path}/next", HEAD + "2"], on_result=interrupt)
    (tmp_path / "next").touch()
    assert [score.answer for score in run(pool, [HEAD + "5", HEAD + "6", HEAD + "7"])] == ["5", "6", "7"]


def test_wrong_arguments_are_errors_of_the_caller(pool):
    with pytest.raises(ValueError, match="no preset is called 'papr'"):
        run(pool, ["a"], rules="papr")
    with pytest.raises(ValueError, match="1 completions, 2 solutions, 1 key_steps"):
        pool.score(["a"], ["a", "b"], [None])
    assert pool.score([], [], []) == []
    for arguments in ({"workers": 0}, {"timeout_s": 0}, {"timeout_s": float("nan")}, {"memory_gib": -1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            ScorerPool(**arguments)


def test_a_worker_that_cannot_start_is_a_clear_error():
    with ScorerPool(1, function="no_such:score") as broken, pytest.raises(RuntimeError, match="ended with code 1"):
        run(broken, ["a"])


def test_the_pool_leaves_no_process_and_closes_twice(scorer):
    with pytest.raises(KeyboardInterrupt), ScorerPool(2, 30, function=scorer) as pool:
        pids = [worker.process.pid for worker in pool._workers]
        raise KeyboardInterrupt
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        run(pool, ["a"])


def test_workers_do_not_outlive_a_killed_parent(scorer, tmp_path):
    """An idle worker sees its pipe close; a busy one is ended by its limit of processor time."""
    code = """
import sys, threading
sys.path[:] = {path!r}
from r1vl_jax.rewards import ScorerPool
pool = ScorerPool(2, 0.5, function={scorer!r})
pool.score(["3", "3"], ["3", "3"], [None, None])
print(*[worker.process.pid for worker in pool._workers], flush=True)
pool._timeout_s = 1e6
pool.score(["burn {busy}"], ["3"], [None])
"""
    busy = tmp_path / "busy"
    path = [entry or os.getcwd() for entry in sys.path]
    command = [sys.executable, "-c", code.format(path=path, scorer=scorer, busy=busy)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        wait_until(busy.exists, still_possible=lambda: parent.poll() is None)
        parent.kill()
    assert len(pids) == 2
    try:
        wait_until(lambda: not any(map(alive, pids)))
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_real_arithmetic_bombs_end():
    bombs = ["10^10^10^10", "$9^{9^{9^{9}}}$"]
    with ScorerPool(2, 2) as pool:
        scores = run(pool, [HEAD + bomb for bomb in bombs] + [HEAD + "3"])
    assert [score.correct for score in scores] == [False, False, True]
    assert {score.status for score in scores[:2]} <= {"timeout", "ok"}
