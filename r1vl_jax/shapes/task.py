"""Writes the files of the built-in task, in the schemas that r1vl_jax/data reads.

    out_dir/sft.json      ShareGPT rows as in Mulberry-SFT: messages, images
    out_dir/rl.json       R1-VL-10K rows: image_path, problem, solution, key_steps
    out_dir/heldout.json  R1-VL-10K rows, for evaluation
    out_dir/images/       PNG files
    out_dir/task.json     the parameters with which the files were made

No training row has the picture of a held-out row, and no two held-out rows have the same picture. The bytes of the
files depend on the parameters alone. The held-out rows do not depend on the number of training rows, so runs with more
training rows are evaluated on the same questions.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from tqdm import tqdm

from r1vl_jax.common.files import atomic_folder, read_object, write_json
from r1vl_jax.shapes.draw import Scene, SceneKey, ShapesConfig, draw_scene, random_scene, scene_key
from r1vl_jax.shapes.questions import Question, make_question

FORMAT = 7  # increased when the same parameters would make other files
MAX_REPEATS = 1000  # scenes drawn at most to find a new picture
DEFAULTS = {"seed": 0, "sft_rows": 6000, "rl_rows": 1800, "heldout_rows": 200}  # of `make_task` and of the commands


def make_task(
    out_dir: str | Path,
    *,
    seed: int = DEFAULTS["seed"],
    sft_rows: int = DEFAULTS["sft_rows"],
    rl_rows: int = DEFAULTS["rl_rows"],
    heldout_rows: int = DEFAULTS["heldout_rows"],
    cfg: ShapesConfig | None = None,
    progress: bool = True,
) -> None:
    """Makes the task in out_dir. Does nothing if out_dir already holds a task made with the same parameters.

    The files are written to a temporary folder, which is renamed to out_dir when it is complete.

    Args:
      seed: determines every byte of the files.
      cfg: settings of the pictures and answers; None: the defaults.
      progress: whether to show a progress bar.
    Raises: FileExistsError if out_dir holds anything else; ValueError if a number of rows is negative, or if there are
      too few different pictures for so many rows.
    """
    cfg = cfg or ShapesConfig()
    rows = {"heldout": heldout_rows, "sft": sft_rows, "rl": rl_rows}
    for name, number in rows.items():
        if number < 0:
            raise ValueError(f"{name}_rows = {number}: expected 0 or more")
    parameters = {"task": "shapes", "format": FORMAT, "seed": seed, "rows": rows, "config": dataclasses.asdict(cfg)}
    parameters = json.loads(json.dumps(parameters))  # as read from task.json: tuples become lists
    out_dir = Path(out_dir).absolute()
    if _already_made(out_dir, parameters):
        return
    try:
        with atomic_folder(out_dir, replace=False) as folder:
            _write_task(folder, seed, rows, cfg, progress)
            write_json(folder / "task.json", parameters, indent=1)
    except OSError:
        # Another process may have made the same task meanwhile. Otherwise the error is passed on.
        if not _already_made(out_dir, parameters):
            raise


def _already_made(out_dir: Path, parameters: dict[str, Any]) -> bool:
    """Returns True if out_dir holds the task with these parameters, False if out_dir is missing or empty.

    Raises: FileExistsError if out_dir holds anything else.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    record = out_dir / "task.json"
    if not record.is_file():
        raise FileExistsError(f"{out_dir} exists and holds no task.json: choose another folder for the shapes task")
    actual = read_object(record)
    if isinstance(actual.get("config"), dict):  # a setting that did not exist then has its default
        actual["config"] = json.loads(json.dumps(dataclasses.asdict(ShapesConfig()))) | actual["config"]
    if actual != parameters:
        raise FileExistsError(
            f"{record} was made with other parameters: remove the folder or choose another one (there: "
            f"{json.dumps(actual)}; asked for: {json.dumps(parameters)})"
        )
    return True


def _write_task(out_dir: Path, seed: int, rows: dict[str, int], cfg: ShapesConfig, progress: bool) -> None:
    """Writes the pictures and the rows of each split. The held-out split is first: other splits avoid its pictures."""
    images = out_dir / "images"
    images.mkdir(parents=True)
    heldout: set[SceneKey] = set()
    with tqdm(total=sum(rows.values()), desc="shapes", unit="picture", disable=not progress) as bar:
        for split, number in rows.items():
            rng = random.Random(f"shapes/{seed}/{split}")
            table = []
            for index in range(number):
                scene = _new_scene(rng, cfg, heldout)
                if split == "heldout":
                    heldout.add(scene_key(scene))
                image_path = f"images/{split}-{index:05d}.png"
                draw_scene(scene, cfg).save(out_dir / image_path, compress_level=1)
                question = make_question(scene, rng, cfg)
                careless = rng.random() < cfg.careless_share
                table.append(
                    _sft_row(image_path, question, careless) if split == "sft" else _rl_row(image_path, question)
                )
                bar.update()
            write_json(out_dir / f"{split}.json", table, indent=1)


def _new_scene(rng: random.Random, cfg: ShapesConfig, heldout: set[SceneKey]) -> Scene:
    """Returns a random scene whose picture is in no held-out row. Raises ValueError after MAX_REPEATS tries."""
    for _ in range(MAX_REPEATS):
        scene = random_scene(rng, cfg)
        if scene_key(scene) not in heldout:
            return scene
    raise ValueError(
        f"no new picture in {MAX_REPEATS} tries after {len(heldout)} pictures: ask for fewer rows, or for more cells, "
        f"kinds, colours or shapes (now {cfg})"
    )


def _sft_row(image_path: str, question: Question, careless: bool) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"<image>{question.problem}"},
            {"role": "assistant", "content": question.careless if careless else question.solution},
        ],
        "images": image_path,
    }


def _rl_row(image_path: str, question: Question) -> dict[str, Any]:
    return {
        "image_path": image_path,
        "problem": question.problem,
        "solution": question.solution,
        "key_steps": {"Steps": [list(key_step) for key_step in question.key_steps]},
    }
