"""Questions about a scene with step-by-step solutions and key steps: the second step of the built-in task.

A solution has R1-VL's format (image description, rationale, numbered steps, final answer). Each key step is a group
of alternatives, one of which stands word for word in a step of the solution, so that the reference
solution earns the full step-wise accuracy reward. Every step has words beside its key step.
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
      careless: a worse solution: no rationale, and the answer is a guess that forgets the steps.
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
        return sum(self.colour in (None, shape.colour) and self.kind in (None, shape.kind) for shape in scene)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step's text and the key steps that it takes."""

    body: str
    key_steps: tuple[KeyStep, ...]


def make_question(scene: Scene, rng: random.Random, cfg: ShapesConfig) -> Question:
    """Asks one question about the scene; its kind, wording and objects come from rng."""
    ask: Callable[..., Question] = rng.choice((_ask_count, _ask_rest, _ask_two))
    return ask(scene, rng, cfg)


def _ask_count(scene: Scene, rng: random.Random, cfg: ShapesConfig) -> Question:
    wanted = _pick_group(scene, rng, cfg, both=True)
    problem = f"How many {wanted.name()} are there?"
    return _question(
        scene, rng, cfg, problem, f"Count the {wanted.name()}.", [_count_step(scene, wanted)], wanted.count(scene)
    )


def _ask_rest(scene: Scene, rng: random.Random, cfg: ShapesConfig) -> Question:
    """Take some shapes away and count the rest: of all shapes, or of one kind or colour."""
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
    """Compare two kinds or two colours, or add them."""
    groups = _simple_groups(cfg, by_kind=rng.random() < 0.5)
    pairs = [(a, b) for a in groups for b in groups if a != b]
    if rng.random() < 0.5:
        # "yes" and "no" come equally often, or a model learns the more frequent word instead of counting.
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
    if by_kind:
        return [Group(kind=kind) for kind in cfg.kinds]
    return [Group(colour=colour) for colour in cfg.colour_names]


def _full_groups(cfg: ShapesConfig) -> list[Group]:
    """Every colour of every kind, in the canonical order: kinds first."""
    return [Group(colour, kind) for kind in cfg.kinds for colour in cfg.colour_names]


def _pick_group(scene: Scene, rng: random.Random, cfg: ShapesConfig, both: bool) -> Group:
    """A group to ask for: a colour, a kind or (where `both`) a colour of a kind; one in ten may be absent."""
    choices = [_simple_groups(cfg, by_kind=True), _simple_groups(cfg, by_kind=False)]
    groups = rng.choice(choices + [_full_groups(cfg)] if both else choices)
    if rng.random() < 0.9:
        groups = [group for group in groups if group.count(scene)]
    return rng.choice(groups)


def _count_step(scene: Scene, group: Group) -> Step:
    """Names the group before its number: a small model then counts what it has just named."""
    number = group.count(scene)
    stated = f"number of {group.name()} is {number}"
    forms = (stated, f"{number} {group.name(number)}")
    if number == 0:
        forms += (f"no {group.name()}",)
    return Step(f"The {stated}.", (forms,))


def _equation_step(sign: str, numbers: Sequence[int]) -> Step:
    """Two or more numbers added, or the second subtracted from the first."""
    word = {"+": "plus", "-": "minus"}[sign]
    result = sum(numbers) if sign == "+" else numbers[0] - numbers[1]
    texts = [str(number) for number in numbers]
    forms = [f"{f' {sign} '.join(texts)} = {result}", f"{f' {word} '.join(texts)} is {result}"]
    if sign == "+" and texts != texts[::-1]:
        forms += [f"{' + '.join(texts[::-1])} = {result}", f"{' plus '.join(texts[::-1])} is {result}"]
    return Step(f"So {forms[0]}.", (tuple(forms),))


def _compare_step(first: int, second: int) -> Step:
    if first > second:
        forms = (f"{first} is more than {second}", f"{first} > {second}", f"{second} < {first}")
    elif first < second:
        forms = (f"{first} is less than {second}", f"{first} < {second}", f"{second} > {first}")
    else:
        forms = (f"{first} is equal to {second}", f"{first} = {second}")
    return Step(f"So {forms[0]}.", (forms,))


def _description(scene: Scene, cfg: ShapesConfig) -> str:
    """Every cell in reading order: what a small model has to see, it is told, and it counts from its own words."""
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
    """Puts the sections together in R1-VL's order."""
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
