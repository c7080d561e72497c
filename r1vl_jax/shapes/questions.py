"""Questions about a scene, with step-by-step solutions and key steps.

Flow of the built-in task: scene (draw.py) -> question (here) -> files (task.py). A solution has R1-VL's format: image
description, rationale, numbered steps, final answer. Each key step is a group of alternatives. One of them is part of a
step of the solution, word for word, so the solution earns the full step-wise accuracy reward. Every step also has words
that are not part of its key step.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from r1vl_jax.shapes.draw import Scene, ShapesConfig

KeyStep = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about one scene.

    Attributes:
      problem: the question's text, without an image placeholder.
      solution: the reference solution.
      answer: the final answer alone, digits or yes/no.
      careless: a worse solution: it has no rationale, and its answer is a guess that ignores the steps.
      key_steps: groups of alternatives.
    """

    problem: str
    solution: str
    answer: str
    careless: str
    key_steps: tuple[KeyStep, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """The shapes of a colour, of a kind, of both, or all of them (both None)."""

    colour: str | None = None
    kind: str | None = None

    def name(self, number: int = 2) -> str:
        """The group's name, as in "red circles", "red shapes", "circles" or "shapes"; singular where number is 1."""
        noun = (self.kind or "shape") + ("" if number == 1 else "s")
        return f"{self.colour} {noun}" if self.colour else noun

    def count(self, scene: Scene) -> int:
        """How many of the scene's shapes are in the group."""
        return sum(self.colour in (None, shape.colour) and self.kind in (None, shape.kind) for shape in scene)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step's text and the key steps in it."""

    body: str
    key_steps: tuple[KeyStep, ...]


def make_question(scene: Scene, rng: random.Random, cfg: ShapesConfig) -> Question:
    """A random question about the scene: its type and its groups of shapes are drawn from rng."""
    ask: Callable[..., Question] = rng.choice((_ask_count, _ask_rest, _ask_two))
    return ask(scene, rng, cfg)


def _ask_count(scene: Scene, rng: random.Random, cfg: ShapesConfig) -> Question:
    """How many shapes of a group there are."""
    group = _pick_group(scene, rng, cfg, both=True)
    problem = f"How many {group.name()} are there?"
    return _question(
        scene, rng, cfg, problem, f"Count the {group.name()}.", [_count_step(scene, group)], group.count(scene)
    )


def _ask_rest(scene: Scene, rng: random.Random, cfg: ShapesConfig) -> Question:
    """How many shapes are left without those of a group: of all shapes, or of one kind or colour."""
    removed = _pick_group(scene, rng, cfg, both=False)
    base = Group()
    if rng.random() < 0.5:
        present = [g for g in _simple_groups(cfg, by_kind=removed.kind is None) if g.count(scene)]
        base = rng.choice(present)
    gone = Group(removed.colour or base.colour, removed.kind or base.kind)
    numbers = [base.count(scene), gone.count(scene)]
    steps = [
        _count_step(scene, base),
        _count_step(scene, gone),
        _equation_step("-", numbers),
    ]
    problem = f"Remove all {removed.name()}. How many {base.name()} are left?"
    return _question(scene, rng, cfg, problem, f"Subtract the {gone.name()}.", steps, numbers[0] - numbers[1])


def _ask_two(scene: Scene, rng: random.Random, cfg: ShapesConfig) -> Question:
    """Whether one kind or colour has more shapes than another, or how many both have in total."""
    groups = _simple_groups(cfg, by_kind=rng.random() < 0.5)
    pairs = [(a, b) for a in groups for b in groups if a != b]
    if rng.random() < 0.5:
        # "yes" and "no" are equally frequent. Otherwise a model learns the more frequent word instead of counting.
        yes = rng.random() < 0.5
        fitting = [(a, b) for a, b in pairs if (a.count(scene) > b.count(scene)) == yes]
        first, second = rng.choice(fitting or pairs)
        problem = f"Are there more {first.name()} than {second.name()}?"
        rationale = "Compare the two numbers."
        last = _compare_step(first.count(scene), second.count(scene))
        answer = "yes" if first.count(scene) > second.count(scene) else "no"
    else:
        first, second = rng.choice(pairs)
        problem = f"How many {first.name()} and {second.name()} are there in total?"
        rationale = "Add the two numbers."
        last = _equation_step("+", [first.count(scene), second.count(scene)])
        answer = first.count(scene) + second.count(scene)
    return _question(
        scene, rng, cfg, problem, rationale, [_count_step(scene, first), _count_step(scene, second), last], answer
    )


def _simple_groups(cfg: ShapesConfig, by_kind: bool) -> list[Group]:
    """The group of each kind, or of each colour."""
    if by_kind:
        return [Group(kind=kind) for kind in cfg.kinds]
    return [Group(colour=colour) for colour in cfg.colour_names]


def _full_groups(cfg: ShapesConfig) -> list[Group]:
    """The group of each kind and colour, ordered by kind."""
    return [Group(colour, kind) for kind in cfg.kinds for colour in cfg.colour_names]


def _pick_group(scene: Scene, rng: random.Random, cfg: ShapesConfig, both: bool) -> Group:
    """A random group: a colour, a kind or, with `both`, a colour of a kind. In one of ten cases it may be empty."""
    choices = [_simple_groups(cfg, by_kind=True), _simple_groups(cfg, by_kind=False)]
    groups = rng.choice(choices + [_full_groups(cfg)] if both else choices)
    if rng.random() < 0.9:
        groups = [group for group in groups if group.count(scene)]
    return rng.choice(groups)


def _count_step(scene: Scene, group: Group) -> Step:
    """Counts a group. Names it before the number, so that a small model counts what it has just named."""
    number = group.count(scene)
    stated = f"number of {group.name()} is {number}"
    forms = (stated, f"{number} {group.name(number)}")
    if number == 0:
        forms += (f"no {group.name()}",)
    return Step(f"The {stated}.", (forms,))


def _equation_step(sign: str, numbers: Sequence[int]) -> Step:
    """Adds two or more numbers ("+"), or subtracts the second from the first ("-")."""
    word = {"+": "plus", "-": "minus"}[sign]
    result = sum(numbers) if sign == "+" else numbers[0] - numbers[1]
    texts = [str(number) for number in numbers]
    forms = [f"{f' {sign} '.join(texts)} = {result}", f"{f' {word} '.join(texts)} is {result}"]
    if sign == "+" and texts != texts[::-1]:
        forms += [f"{' + '.join(texts[::-1])} = {result}", f"{' plus '.join(texts[::-1])} is {result}"]
    return Step(f"So {forms[0]}.", (tuple(forms),))


def _compare_step(first: int, second: int) -> Step:
    """Compares two numbers."""
    if first > second:
        forms = (f"{first} is more than {second}", f"{first} > {second}", f"{second} < {first}")
    elif first < second:
        forms = (f"{first} is less than {second}", f"{first} < {second}", f"{second} > {first}")
    else:
        forms = (f"{first} is equal to {second}", f"{first} = {second}")
    return Step(f"So {forms[0]}.", (forms,))


def _description(scene: Scene, cfg: ShapesConfig) -> str:
    """Every cell in reading order: a small model that has written this can count in its own words."""
    cells = {shape.cell: f"{shape.colour} {shape.kind}" for shape in scene}
    rows = [range(start, start + cfg.grid) for start in range(0, cfg.grid**2, cfg.grid)]
    return "; ".join(", ".join(cells.get(cell, "no shape") for cell in row) for row in rows)


def _question(
    scene: Scene,
    rng: random.Random,
    cfg: ShapesConfig,
    problem: str,
    rationale: str,
    steps: Sequence[Step],
    answer: str | int,
) -> Question:
    """The question with its solutions, whose sections are in R1-VL's order."""
    lines = [
        f"### Image Description: {_description(scene, cfg)}.",
        f"### Rationales: {rationale}",
        "### Let's think step by step.",
        *(f"### Step {number}: {step.body}" for number, step in enumerate(steps, start=1)),
        f"### The final answer is: {answer}",
    ]
    key_steps = tuple(key_step for step in steps for key_step in step.key_steps)
    guesses = ("yes", "no") if answer in ("yes", "no") else range(cfg.max_shapes + 1)
    careless = [lines[0], *lines[3:-1], f"### The final answer is: {rng.choice(guesses)}"]
    return Question(problem, "\n".join(lines), str(answer), "\n".join(careless), key_steps)
