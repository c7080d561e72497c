"""Makes questions about a scene, with step-by-step solutions and key steps.

Flow of the built-in task: scene (draw.py) -> question (here) -> files (task.py). A solution has an image description, a
rationale, numbered steps and a final answer, in one of the formats of rewards/formats.py. A key step is a list of
alternative wordings. One of the wordings occurs word for word in a step of the solution, so the solution earns the full
step-wise accuracy reward. Every step also contains words that do not belong to its key step.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import partial

from r1vl_jax.rewards.formats import FORMATS
from r1vl_jax.shapes.draw import Scene, ShapesConfig

KeyStep = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about one scene, with a good and a careless solution.

    Attributes:
      problem: text of the question, without an image placeholder.
      solution: the reference solution.
      answer: the final answer alone: a number in digits, or yes/no.
      careless: a worse solution. It has no rationale, and its final answer is a guess that ignores the steps.
      key_steps: the key steps of the solution; each is a tuple of alternative wordings.
    """

    problem: str
    solution: str
    answer: str
    careless: str
    key_steps: tuple[KeyStep, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """The shapes of one colour, of one kind, or of one colour and kind. With neither (both None), it is all shapes."""

    colour: str | None = None
    kind: str | None = None

    def name(self, number: int = 2) -> str:
        """Returns, for example, "red circles", "red shapes", "circles" or "shapes"; the singular if number is 1."""
        noun = (self.kind or "shape") + ("" if number == 1 else "s")
        return f"{self.colour} {noun}" if self.colour else noun

    def count(self, scene: Scene) -> int:
        """Returns how many shapes of the scene belong to the group."""
        return sum(self.colour in (None, shape.colour) and self.kind in (None, shape.kind) for shape in scene)


@dataclasses.dataclass(frozen=True)
class Step:
    """The text of one step of a solution, and the key steps that occur in it."""

    body: str
    key_steps: tuple[KeyStep, ...]


def make_question(scene: Scene, rng: random.Random, cfg: ShapesConfig) -> Question:
    """Returns a random question about the scene. The question's type and its groups of shapes are drawn from rng."""
    ask: Callable[..., Question] = rng.choice((_ask_count, _ask_rest, _ask_two))
    return ask(scene, rng, cfg)


def _ask_count(scene: Scene, rng: random.Random, cfg: ShapesConfig) -> Question:
    """Asks how many shapes a group has."""
    group = _pick_group(scene, rng, cfg, both=True)
    problem = f"How many {group.name()} are there?"
    return _question(
        scene, rng, cfg, problem, f"Count the {group.name()}.", [_count_step(scene, group)], group.count(scene)
    )


def _ask_rest(scene: Scene, rng: random.Random, cfg: ShapesConfig) -> Question:
    """Asks how many shapes remain after those of one group are removed.

    The remaining shapes are counted among all shapes, or among the shapes of one kind or colour.
    """
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
    """Asks whether one kind or colour has more shapes than another, or how many shapes both have in total."""
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
    """Returns one group per kind (by_kind), or one group per colour."""
    if by_kind:
        return [Group(kind=kind) for kind in cfg.kinds]
    return [Group(colour=colour) for colour in cfg.colour_names]


def _full_groups(cfg: ShapesConfig) -> list[Group]:
    """Returns one group per pair of kind and colour, ordered by kind."""
    return [Group(colour, kind) for kind in cfg.kinds for colour in cfg.colour_names]


def _pick_group(scene: Scene, rng: random.Random, cfg: ShapesConfig, both: bool) -> Group:
    """Picks a random group: a colour, a kind or, if `both`, a colour of a kind. One pick in ten may be empty."""
    choices = [_simple_groups(cfg, by_kind=True), _simple_groups(cfg, by_kind=False)]
    groups = rng.choice(choices + [_full_groups(cfg)] if both else choices)
    if rng.random() < 0.9:
        groups = [group for group in groups if group.count(scene)]
    return rng.choice(groups)


def _count_step(scene: Scene, group: Group) -> Step:
    """Returns the step that counts a group.

    The text names the group before the number, so that a small model has just written the name when it counts.
    """
    number = group.count(scene)
    stated = f"number of {group.name()} is {number}"
    forms = (stated, f"{number} {group.name(number)}")
    if number == 0:
        forms += (f"no {group.name()}",)
    return Step(f"The {stated}.", (forms,))


def _equation_step(sign: str, numbers: Sequence[int]) -> Step:
    """Returns the step that adds two or more numbers ("+"), or subtracts the second from the first ("-")."""
    word = {"+": "plus", "-": "minus"}[sign]
    result = sum(numbers) if sign == "+" else numbers[0] - numbers[1]
    texts = [str(number) for number in numbers]
    forms = [f"{f' {sign} '.join(texts)} = {result}", f"{f' {word} '.join(texts)} is {result}"]
    if sign == "+" and texts != texts[::-1]:
        forms += [f"{' + '.join(texts[::-1])} = {result}", f"{' plus '.join(texts[::-1])} is {result}"]
    return Step(f"So {forms[0]}.", (tuple(forms),))


def _compare_step(first: int, second: int) -> Step:
    """Returns the step that compares two numbers."""
    if first > second:
        forms = (f"{first} is more than {second}", f"{first} > {second}", f"{second} < {first}")
    elif first < second:
        forms = (f"{first} is less than {second}", f"{first} < {second}", f"{second} > {first}")
    else:
        forms = (f"{first} is equal to {second}", f"{first} = {second}")
    return Step(f"So {forms[0]}.", (forms,))


def _description(scene: Scene, cfg: ShapesConfig) -> str:
    """Describes every cell in reading order. A small model can then count in the description that it has written."""
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
    """Builds a question with its good and careless solutions."""
    write = partial(FORMATS[cfg.answer_format].write, line=" ", gap="\n")
    description, bodies = f"{_description(scene, cfg)}.", [step.body for step in steps]
    key_steps = tuple(key_step for step in steps for key_step in step.key_steps)
    guesses = ("yes", "no") if answer in ("yes", "no") else range(cfg.max_shapes + 1)
    careless = write(description, None, bodies, str(rng.choice(guesses)))
    return Question(problem, write(description, rationale, bodies, str(answer)), str(answer), careless, key_steps)
