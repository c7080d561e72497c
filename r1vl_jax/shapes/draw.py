"""Draws scenes of coloured shapes.

Flow of the built-in task: scene (here) -> question (questions.py) -> files (task.py). A scene is a few shapes in
different cells of a grid. With the default sizes a cell is 28 x 28 pixels, the same area that one image token of
Qwen2-VL covers (2x2 patches of 14 x 14 pixels). Each token then sees exactly one cell, so a very small vision tower can
learn the task from random weights.
"""

from __future__ import annotations

import dataclasses
import random

from PIL import Image, ImageDraw

from r1vl_jax.rewards.formats import FORMATS

KINDS = ("circle", "square", "triangle")
REPEAT = 1 / 3  # probability that a shape copies an earlier one's kind and colour, so that counts above 1 are common
COLOURS = (
    ("red", (222, 32, 38)),
    ("green", (28, 158, 62)),
    ("blue", (34, 74, 222)),
    ("yellow", (246, 204, 20)),
)


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """The settings of the pictures and of the answers. Lengths are in pixels.

    Attributes:
      picture_size: width and height of the picture.
      grid: number of cells along each side; picture_size must be a multiple of grid.
      kinds: names of the shapes, a selection of KINDS.
      colours: (name, (red, green, blue)) pairs.
      min_shapes, max_shapes: minimum and maximum number of shapes in a picture.
      careless_share: share of the warm-up answers that have no rationale and end in a guess, like the worst answers in
        machine-written data sets. The warm-up (SFT) imitates good and careless answers; StepGRPO has to learn which
        kind is rewarded.
      answer_format: the format of the solutions: r1vl, think or boxed.
      min_size, max_size: minimum and maximum width and height of a shape. One pixel of the cell stays free around it.

    Raises: ValueError, naming the field, if such pictures cannot be drawn.
    """

    picture_size: int = 56
    grid: int = 2
    kinds: tuple[str, ...] = KINDS
    colours: tuple[tuple[str, tuple[int, int, int]], ...] = COLOURS[:3]
    min_shapes: int = 2
    max_shapes: int = 4
    min_size: int = 18
    max_size: int = 24
    careless_share: float = 0.6
    answer_format: str = "r1vl"

    def __post_init__(self) -> None:
        if not 0 <= self.careless_share <= 1:
            raise ValueError(f"careless_share = {self.careless_share}: expected 0 to 1")
        if self.answer_format not in FORMATS:
            raise ValueError(f"answer_format = {self.answer_format}: expected {', '.join(FORMATS)}")
        if self.grid < 1 or self.picture_size < 1 or self.picture_size % self.grid:
            raise ValueError(f"picture_size = {self.picture_size}: expected a positive multiple of grid = {self.grid}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or len(set(self.kinds)) < 2 or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds = {self.kinds}: expected two or more different ones of {KINDS}")
        if len(self.colours) < 2 or len(dict(self.colours)) != len(self.colours):
            raise ValueError(f"colours = {self.colours}: expected two or more colours with different names")
        if not 1 <= self.min_shapes <= self.max_shapes <= self.grid**2:
            raise ValueError(
                f"min_shapes = {self.min_shapes}, max_shapes = {self.max_shapes}: expected "
                f"1 <= min_shapes <= max_shapes <= {self.grid**2} (the cells)"
            )
        if not 4 <= self.min_size <= self.max_size <= self.cell_size - 2:
            raise ValueError(
                f"min_size = {self.min_size}, max_size = {self.max_size}: expected "
                f"4 <= min_size <= max_size <= {self.cell_size - 2} (a cell less its border)"
            )

    @property
    def cell_size(self) -> int:
        return self.picture_size // self.grid

    @property
    def colour_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.colours)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape in a scene.

    Attributes:
      cell: index of the shape's cell, counted row by row from 0.
      left, top: position of the shape's top left corner in the picture, in pixels.
      size: width and height, in pixels.
    """

    kind: str
    colour: str
    cell: int
    left: int
    top: int
    size: int


Scene = tuple[Shape, ...]
SceneKey = tuple[tuple[str, str, int], ...]  # (kind, colour, cell) of each shape


def random_scene(rng: random.Random, cfg: ShapesConfig) -> Scene:
    """Returns a random scene: shapes in different cells, in random order."""
    number = rng.randint(cfg.min_shapes, cfg.max_shapes)
    shapes: list[Shape] = []
    for cell in rng.sample(range(cfg.grid**2), number):
        if shapes and rng.random() < REPEAT:
            model = rng.choice(shapes)
            kind, colour = model.kind, model.colour
        else:
            kind, colour = rng.choice(cfg.kinds), rng.choice(cfg.colour_names)
        row, column = divmod(cell, cfg.grid)
        size = rng.randint(cfg.min_size, cfg.max_size)
        slack = cfg.cell_size - 1 - size
        left = column * cfg.cell_size + rng.randint(1, slack)
        top = row * cfg.cell_size + rng.randint(1, slack)
        shapes.append(Shape(kind, colour, cell, left, top, size))
    return tuple(shapes)


def scene_key(scene: Scene) -> SceneKey:
    """Returns the kind, colour and cell of each shape, without exact positions and sizes.

    Two pictures with equal keys count as the same picture.
    """
    return tuple(sorted((shape.kind, shape.colour, shape.cell) for shape in scene))


def draw_scene(scene: Scene, cfg: ShapesConfig) -> Image.Image:
    """Draws a scene on white. Returns an RGB image of picture_size x picture_size pixels."""
    image = Image.new("RGB", (cfg.picture_size, cfg.picture_size), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    rgb = dict(cfg.colours)
    for shape in scene:
        left, top = shape.left, shape.top
        right, bottom = left + shape.size - 1, top + shape.size - 1
        if shape.kind == "circle":
            pen.ellipse((left, top, right, bottom), fill=rgb[shape.colour])
        elif shape.kind == "square":
            pen.rectangle((left, top, right, bottom), fill=rgb[shape.colour])
        else:
            pen.polygon(((left + right) / 2, top, left, bottom, right, bottom), fill=rgb[shape.colour])
    return image
