"""python -m r1vl_jax.data.check --config F: reads all rows as training would, and says what is in them.

Flow: a configuration's data sets -> read_rows with training's encoding, measured where it runs -> one Record a row ->
check_report.py -> text on standard output, FOLDER/check.json, FOLDER/check.png.

Needs no accelerator and, of the model, no weights: the tokenizer, the image processor and config.json alone. A command,
which lies here for its name: no module imports it.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from r1vl_jax import config as configs
from r1vl_jax.checkpoint.store import find_model
from r1vl_jax.common.arguments import non_negative_int
from r1vl_jax.common.files import atomic_write
from r1vl_jax.config import Config, DataSection
from r1vl_jax.data.batching import PLANNED_ROWS, Size, in_micro_batches, plan_shapes
from r1vl_jax.data.loader import read_rows
from r1vl_jax.data.sources import Source, open_source
from r1vl_jax.data_check.report import (
    FILTERED,
    NAMED,
    REASONS,
    Part,
    Picture,
    Plan,
    Record,
    Survey,
    leak_text,
    numbers,
    plot,
    rows_alike,
    text,
)
from r1vl_jax.errors import CheckpointError, ConfigError, RowError
from r1vl_jax.keysteps import lint
from r1vl_jax.processing.images import FORMATS, ImageSpec, smart_resize
from r1vl_jax.processing.processor import Processor
from r1vl_jax.types import EncodedPrompt, Example


def parts(config: Config, spec: ImageSpec) -> list[Part]:
    """What the configured stages read, and what they make of it."""
    sft, rl, held, data = config.sft, config.rl, config.eval, config.data

    def plan(name: str, batches: Callable, *, count: int = data.buckets) -> Plan:
        options = {"count": count, "multiple": data.pad_multiple, "merge": spec.merge_size, "shards": 1}
        return Plan(name, batches, partial(plan_shapes, **options))

    def budgets(stage: str, answer: str, longest: int) -> dict[str, dict[str, int]]:
        pixels = {f"{stage}.{name}": getattr(getattr(config, stage), name) for name in ("min_pixels", "max_pixels")}
        return {
            "prompt_tokens": {"data.max_prompt_tokens": data.max_prompt_tokens},
            "image_tokens": {f"image tokens at {stage}.max_pixels": pixels[f"{stage}.max_pixels"] // spec.factor**2},
            "answer_tokens": {answer: longest},
            "pixels": pixels,
        }

    found = []
    if "sft" in config.stages:
        batches = partial(in_micro_batches, update=sft.batch_size, count=sft.micro_batch_size)
        limits = budgets("sft", "sft.max_answer_tokens", sft.max_answer_tokens)
        found += [Part("data.sft", data.sft, sft, (plan("sft", batches),), PLANNED_ROWS, limits, sft.max_answer_tokens)]
    if "step_grpo" in config.stages:
        plans = tuple(
            plan(name, partial(in_micro_batches, update=rl.questions_per_step, count=count))
            for name, count in (("rollout", rl.questions_per_step), ("step_grpo", rl.micro_batch_size))
        )
        limits = budgets("rl", "rl.max_new_tokens", rl.max_new_tokens)
        found += [Part("data.rl", data.rl, rl, plans, PLANNED_ROWS, limits)]
    if held.rows:
        plans = (plan("held out", partial(_filled, count=held.batch_size), count=1),)
        limits = budgets("rl", "eval.max_new_tokens", held.max_new_tokens)
        found += [Part("data.heldout", data.heldout, rl, plans, held.rows, limits, limit=held.rows)]
    return found


def _filled(sizes: list[Size], count: int) -> list[list[Size]]:
    """Batches as the held-out judgement makes them: in order, the last one filled with its last row."""
    batches = [sizes[i : i + count] for i in range(0, len(sizes), count)]
    return [batch + batch[-1:] * (count - len(batch)) for batch in batches]


@dataclasses.dataclass(frozen=True)
class Measure:
    """Encodes an example as training does and gives its `Record`. It pickles, and runs where rows are read."""

    processor: Processor
    max_tokens: int
    max_answer_tokens: int | None  # None: the question alone

    def __call__(self, example: Example) -> Record:
        seen = {"row": example.row, "turn": len(example.history)}
        limits = {"max_tokens": self.max_tokens}
        if self.max_answer_tokens is not None:
            limits["max_answer_tokens"] = self.max_answer_tokens
        try:
            prompt, answer = self._encode(example, **limits)
        except RowError as error:
            seen |= {"message": str(error), "reason": reason_of(str(error), example.name)}
            try:
                prompt, answer = self._encode(example)  # where it is only too long, its lengths are of interest
            except RowError:
                return Record(**seen)
        return Record(
            **seen,
            prompt=len(prompt.tokens_T),
            answer=answer,
            image_tokens=prompt.num_image_tokens,
            pictures=tuple(_pictures(example, prompt, self.processor.image_spec)),
            question=_hash(_normal(example).encode()),
        )

    def _encode(self, example: Example, **limits: int) -> tuple[EncodedPrompt, int]:
        """The prompt, and how many tokens the answer has; 0 where training does not encode it and could not."""
        if self.max_answer_tokens is not None:
            prompt, answer = self.processor.encode_pair(example, **limits)
            return prompt, len(answer)
        prompt, answer = self.processor.encode_prompt(example, **limits), ()
        with suppress(RowError):
            answer = self.processor.encode_answer(example.answer)
        return prompt, len(answer)


def reason_of(message: str, name: str) -> str:
    """Which of REASONS an error of the row called `name` is."""
    said = message.removeprefix(name)
    return next(reason for reason, (pattern, _) in REASONS.items() if re.match(pattern, said))


def _pictures(example: Example, prompt: EncodedPrompt, spec: ImageSpec) -> Iterator[Picture]:
    text = "".join([*(question for question, _ in example.history), example.question])
    files, start = iter(example.image_bytes or example.images), 0
    for kind, (t, h, w) in zip(re.findall("<(image|video)>", text), prompt.grids, strict=True):
        patches = prompt.patches_PC[start : start + t * h * w]
        digest, start = _hash(patches, f"{t} {h} {w}".encode()), start + t * h * w
        if kind == "video":
            yield Picture(t, h, w, 0, 0, digest)
            continue
        width, height = _size_of(next(files))
        free = smart_resize(height, width, factor=spec.factor, min_pixels=1, max_pixels=sys.maxsize)
        made = (h * spec.patch_size) * (w * spec.patch_size)
        yield Picture(t, h, w, width * height, int(np.sign(made - math.prod(free))), digest)


def _size_of(file: str | bytes) -> tuple[int, int]:
    """Width and height of an image file, from its header."""
    known = [name for name in FORMATS if name in Image.OPEN]
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=known) as image:
        return image.size


def _normal(example: Example) -> str:
    """All that is asked: in lower case, without placeholders, extra spaces, and Mulberry's "Question:" in front."""
    text = " ".join([*(question for question, _ in example.history), example.question])
    return " ".join(re.sub("<image>|<video>", " ", text).casefold().split()).removeprefix("question: ")


def _hash(*parts: bytes | np.ndarray) -> int:
    found = blake2b(digest_size=8)
    for part in parts:
        found.update(part)
    return int.from_bytes(found.digest(), "little")


def read(survey: Survey, processor: Processor, data: DataSection, *, stage=None, workers: int = 0) -> Iterator[Record]:
    """The records of a data set, one for each example that training reads; `stage`: with that one's pixel budget."""
    part, seen_by = survey.part, processor.for_stage(stage or survey.part.stage, data.video)
    measure = Measure(seen_by, data.max_prompt_tokens, part.max_answer_tokens)
    label = part.key if stage is None else f"{part.key} as the warm-up sees it"
    workers = 0 if part.limit else workers  # few rows, which training reads in threads
    with closing(read_rows(survey.source, measure, seed=None, workers=workers)) as rows:
        for _, row in tqdm(islice(rows, survey.wanted), total=survey.wanted, desc=label, unit="row", file=sys.stderr):
            if isinstance(row, RowError):  # the source's own
                reason = FILTERED if "left out by drop_matching" in str(row) else "unread"
                yield Record(reason=reason, message=str(row))
            else:
                yield row[1]


@dataclasses.dataclass
class _Blank:
    """A source of as many rows with nothing in them."""

    count: int
    name: str = ""
    fingerprint: str = ""
    errors: tuple = ()
    filtered: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return Example("", index, (), "", "")


def training_order(count: int, seed: int) -> list[int]:
    """The first epoch's order of so many examples."""
    with closing(read_rows(_Blank(count), lambda example: None, seed=seed)) as rows:
        bar = tqdm(islice(rows, count), total=count, desc="order", unit="row", delay=2, leave=False, file=sys.stderr)
        return [example.row for _, (example, _) in bar]


def lint_key_steps(source: Source) -> list[lint.Finding]:
    """What r1vl_jax.keysteps lint finds; `row` is the index of an example."""

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for index in tqdm(range(len(source)), desc="key steps", unit="row", file=sys.stderr):
            try:
                example = source[index]
            except RowError:
                continue
            problem = re.sub("<image>|<video>", " ", example.question)
            yield index, {"problem": problem, "solution": example.answer, "key_steps": example.key_steps}

    return lint.lint_rows(rows())


@dataclasses.dataclass
class Found:
    """All that was found. `leaks`: for each training set, what held-out rows share with it (see `alike`)."""

    surveys: list[Survey]
    leaks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    complete: bool = False


def examine(config: Config, workers: int) -> Found:
    """Reads everything; Ctrl-C ends it early. Raises what is wrong with the input as train.py does."""
    processor = _processor(config)
    found = Found([Survey(part, open_source(part.section)) for part in parts(config, processor.image_spec)])
    options = {"processor": processor, "data": config.data, "workers": workers}
    try:
        for survey in found.surveys:
            for record in read(survey, **options):
                survey.records.append(record)
        for survey in found.surveys:
            if survey.part.key == "data.heldout":
                found.leaks = _leaks(survey, found.surveys, options)
                survey.order = range(survey.wanted)
                continue
            survey.order = training_order(len(survey.source), config.seed)
            if survey.part.key == "data.rl":
                survey.findings = lint_key_steps(survey.source)
        found.complete = True
    except KeyboardInterrupt:
        pass
    return found


def _processor(config: Config) -> Processor:
    try:
        return Processor.from_folder(find_model(config.model.path).files)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _leaks(held: Survey, surveys: list[Survey], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the held-out rows share with each training set, both as that set's stage sees them."""
    found = {}
    for survey in surveys:
        if survey is held:
            continue
        stage, seen = survey.part.stage, held.records
        if (stage.min_pixels, stage.max_pixels) != (held.part.stage.min_pixels, held.part.stage.max_pixels):
            seen = read(held, stage=stage, **options)
        pairs = zip(held.records, seen, strict=True)
        found[survey.part.key] = rows_alike(survey.usable, [other for own, other in pairs if not own.reason])
    return found


def report(found: Found) -> dict[str, Any]:
    """All numbers, as check.json has them."""
    leaked = {row for shared in found.leaks.values() for _, row in shared["both"]["pairs"]}
    return {
        "complete": found.complete,
        "sets": {survey.part.key: numbers(survey) for survey in found.surveys if found.complete or survey.records},
        "heldout_like": found.leaks,
        "rows_dropped": sum(len(said) for survey in found.surveys for said in survey.dropped.values()),
        "rows_leaked": len(leaked),
    }


def say(numbers: dict[str, Any], named: int | None) -> str:
    """The numbers for people."""
    blocks = [text(key, found, named) for key, found in numbers["sets"].items()]
    blocks += [leak_text(key, found, named) for key, found in numbers["heldout_like"].items()]
    dropped, leaked = numbers["rows_dropped"], numbers["rows_leaked"]
    if not numbers["complete"]:
        blocks += ["interrupted: a report of what had been read; nothing is written"]
    elif numbers["heldout_like"]:
        blocks += [f"training drops {dropped:,} rows and sees {leaked:,} held-out rows"]
    else:
        blocks += [f"training drops {dropped:,} rows"]
    return "\n\n".join(blocks)


def _folder(config: Config, out: str | None) -> Path:
    """Where the report goes. Not into the run folder, which must be empty or a run's."""
    run = Path(config.output_dir)
    folder = Path(out) if out else run.with_name(f"{run.name}-check")
    if folder.resolve().is_relative_to(run.resolve()):
        raise ConfigError(f"--out: {folder} lies in output_dir {run}, which holds what a run writes")
    return folder


def write(found: Found, numbers: dict[str, Any], folder: Path) -> None:
    with atomic_write(folder / "check.json") as file:
        json.dump(numbers, file, indent=1)
    plot(found.surveys, folder / "check.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r1vl_jax.data.check",
        description=__doc__.splitlines()[0].split(": ", 1)[1],
        epilog="Further arguments override keys of the configuration, as in r1vl_jax.train: --data.rl.path FILE. Exit "
        "code: 0; 1 with --strict where training drops rows or sees held-out ones; 2 for bad input; 130 on Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--strict", action="store_true", help="exit code 1 for dropped and for leaked rows")
    parser.add_argument("--out", metavar="FOLDER", help="of check.json and check.png; default: output_dir and -check")
    parser.add_argument(
        "--workers", type=non_negative_int, metavar="N", help="processes that read; default: data.workers"
    )
    parser.add_argument("--all", action="store_true", help=f"name all rows and not {NAMED} of a kind")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        config = configs.load(arguments.config, overrides)
        folder = _folder(config, arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        if config.shapes.dir:
            jax.config.update("jax_platforms", "cpu")  # the tiny model is drawn: leave accelerators alone
            from r1vl_jax.shapes.folder import make_shapes

            make_shapes(config.shapes)
        found = examine(config, config.data.workers if arguments.workers is None else arguments.workers)
        numbers = report(found)
        print(say(numbers, None if arguments.all else NAMED))
        if not found.complete:
            return 130
        write(found, numbers, folder)
        print(f"written: {folder / 'check.json'}, {folder / 'check.png'}")
        for survey in found.surveys:
            if not survey.usable:
                raise RowError(f"{survey.source.name}: no usable row; training would stop")
    except (ConfigError, CheckpointError, RowError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1 if arguments.strict and (numbers["rows_dropped"] or numbers["rows_leaked"]) else 0
