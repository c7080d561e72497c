"""Runs one command's function on every row of a file. No finished row is lost.

Each finished row is written at once to OUT.partial. The first line of OUT.partial has the command, the SHA-256 of the
input and the settings; each further line is a finished row. At the end, OUT is written to a temporary file, which is
then renamed. If rows are missing (after an interruption, --limit, or failed rows), OUT.partial stays, and the same
command later works only on the missing rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from r1vl_jax.common.endpoint import EndpointError, EndpointStop, in_parallel
from r1vl_jax.common.files import atomic_write
from r1vl_jax.errors import RowError
from r1vl_jax.keysteps.rows import InputError, Row, read_rows
from r1vl_jax.rewards.key_steps import key_step_groups

MAX_REPORTED = 20  # maximum number of failed rows listed on standard error


class Made(NamedTuple):
    """The result for one row: the new row, and short phrases that the summary counts."""

    row: dict[str, Any]
    notes: tuple[str, ...] = ()

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Returns the groups of the new row's key steps."""
        return key_step_groups(self.row.get("key_steps"))[0]


class Job(NamedTuple):
    """The work of one command.

    Attributes:
      name: the command's name.
      settings: the options that the result depends on. Rows made with different settings are not mixed.
      work: returns a new row, or a Made, for a row. If it raises RowError or EndpointError, the row failed.
      threads: number of rows at a time if `work` waits for an endpoint; 0 runs `work` in the main thread.
    """

    name: str
    settings: dict[str, Any]
    work: Callable[[dict[str, Any]], Made | dict[str, Any]]
    threads: int = 0


def run(job: Job, source: str, out: str, *, limit: int | None = None, overwrite: bool = False) -> int:
    """Calls `job.work` on the rows of `source`, writes the new rows to `out`, and returns the exit code.

    The exit code is 0; 1 if rows failed; 2 if the endpoint cannot be used; 130 after Ctrl-C. `limit` is the maximum
    number of rows to use; None uses all rows.

    Raises:
      InputError: `source` or `out` cannot be used, or the rows in OUT.partial come from another file or other settings.
    """
    rows, digest = read_rows(source)
    target = Path(out)
    _check_target(target, Path(source), overwrite)
    chosen = rows[:limit]
    good = [row for row in chosen if not row.fault]
    failed = {row.number: row.fault for row in chosen if row.fault}
    with _Partial(target, {"command": job.name, "input": digest, "settings": job.settings}, overwrite) as partial:
        todo = [row for row in good if row.number not in partial.made]
        try:
            failed |= _work_through(job, todo, partial)
        except (KeyboardInterrupt, EndpointStop) as error:
            stopped = isinstance(error, EndpointStop)
            kept = f"{len(partial.made)} finished rows are kept, and the same command goes on with the others"
            print(f"{error if stopped else 'interrupted'}\n{job.name}: {kept}", file=sys.stderr)
            return 2 if stopped else 130
        made = [partial.made[row.number] for row in good if row.number in partial.made]
        _write_rows(target, [partial.made.get(row.number, Made(row.value)).row for row in good])
        _write_failed(target, failed)
        if not failed and len(chosen) == len(rows):
            partial.remove()
    counts = {
        "rows done": len(made),
        "of them before": len(good) - len(todo),
        "failed": len(failed) - len(chosen) + len(good),
        "skipped (no JSON object)": len(chosen) - len(good),
        "left out by --limit": len(rows) - len(chosen),
    }
    _report(job, failed, made, Counter({what: count for what, count in counts.items() if count}))
    return 1 if failed else 0


def _work_through(job: Job, todo: list[Row], partial: _Partial) -> dict[int, str]:
    """Calls `job.work` on each row of `todo`, and stores each new row in `partial` as soon as it is made.

    Returns the reasons of the failed rows, by row number.
    """

    def work(row: Row) -> RowError | None:
        try:
            made = job.work(row.value)
        except RowError as error:
            return error
        # Stored by the thread that made the row. Ctrl-C interrupts only the main thread, so the row is not lost.
        partial.add(row.number, made if isinstance(made, Made) else Made(made))
        return None

    failed = {}
    results: Generator[tuple[Row, RowError | EndpointError | None], None, None] = (
        in_parallel(work, todo, min(job.threads, len(todo))) if job.threads else ((row, work(row)) for row in todo)
    )
    with contextlib.closing(results), tqdm(total=len(todo), unit="row", desc=job.name, file=sys.stderr) as bar:
        for row, result in results:
            if result is not None:
                failed[row.number] = str(result)
                bar.set_postfix(failed=len(failed), refresh=False)
            bar.update()
    return failed


class _Partial(contextlib.AbstractContextManager["_Partial"]):
    """The open file OUT.partial, locked against other runs. Finished rows are appended to it.

    Attributes:
      made: the finished rows in the file, by row number.
    """

    def __init__(self, target: Path, header: dict[str, Any], overwrite: bool) -> None:
        self.made: dict[int, Made] = {}
        self._lock = threading.Lock()
        self._path = target.with_name(target.name + ".partial")
        try:
            self._file = open(self._path, "a+b")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self._path}: another run is writing it") from error
        if overwrite:
            self._file.truncate(0)
        self._read(header)

    def _read(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a killed run may leave half a line
        self._file.truncate(len(whole))
        if whole.count(b"\n") < 2:  # no row is finished, so this run may have other settings
            self._file.truncate(0)
            self._append(header)
            return
        try:
            first, *records = map(json.loads, whole.splitlines())
            self.made = {record["row"]: Made(record["made"], tuple(record["notes"])) for record in records}
            before = {"command": first["command"], "input": first["input"], **first["settings"]}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._path}: not a file of this command ({error}); --overwrite starts over") from error
        now = {"command": header["command"], "input": header["input"], **header["settings"]}
        for name in now | before:
            if now.get(name) != before.get(name):
                what = (
                    "is another file" if name == "input" else f"was {before.get(name)!r} and is now {now.get(name)!r}"
                )
                raise InputError(
                    f"{self._path} holds {len(self.made)} finished rows of a run with other settings: {name} {what}; "
                    "--overwrite starts over"
                )

    def add(self, number: int, made: Made) -> None:
        """Stores a finished row in `made` and in the file."""
        with self._lock:
            self.made[number] = made
            self._append({"row": number, "made": made.row, "notes": made.notes})

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")  # ASCII, because UTF-8 cannot encode lone surrogates
        self._file.flush()

    def remove(self) -> None:
        """Deletes the file. Call this if no row is missing."""
        self._path.unlink()

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Raises InputError if OUT must not or cannot be written."""
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: exists and is not a plain file")
    if target.exists() and target.samefile(source):
        raise InputError(f"{target}: is the input; expected another file to write")
    if target.exists() and not overwrite and not target.with_name(target.name + ".partial").exists():
        raise InputError(f"{target}: exists and is complete; --overwrite replaces it")


def _write_rows(target: Path, rows: list[dict[str, Any]]) -> None:
    """Writes OUT: a JSON array if its name ends in .json, else JSON lines."""
    array = target.suffix == ".json"
    with atomic_write(target) as file:
        lines = (",\n" if array else "\n").join(map(json.dumps, rows))
        file.write(f"[\n{lines}\n]\n" if array else lines + "\n" * bool(lines))


def _write_failed(target: Path, failed: dict[int, str]) -> None:
    """Writes OUT.failed.jsonl, or deletes an old OUT.failed.jsonl if no row failed."""
    path = target.with_name(target.name + ".failed.jsonl")
    if not failed:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as file:
        for number, reason in sorted(failed.items()):
            file.write(json.dumps({"row": number, "reason": reason}) + "\n")


def _report(job: Job, failed: dict[int, str], made: list[Made], counts: Counter[str]) -> None:
    """Prints the failed rows, and a summary line about all rows, on standard error."""
    for number, reason in sorted(failed.items())[:MAX_REPORTED]:
        print(f"row {number}: {reason}", file=sys.stderr)
    if len(failed) > MAX_REPORTED:
        print(f"... and {len(failed) - MAX_REPORTED} more", file=sys.stderr)
    notes = Counter(note for one in made for note in one.notes)
    groups = [group for one in made for group in one.groups()]
    alternatives = sum(map(len, groups)) / max(1, len(groups))
    parts = [f"{count} {what}" for what, count in (counts + notes).items()]
    print(
        f"{job.name}: {', '.join(parts) or '0 rows'}; {len(groups)} groups, {alternatives:.1f} alternatives per group",
        file=sys.stderr,
    )
