"""The files of the built-in task: the third step (scene -> questions -> files), read back by the readers of data/.

    out_dir/sft.json      ShareGPT rows as in Mulberry-SFT: messages, images
    out_dir/rl.json       R1-VL-10K rows: image_path, problem, solution, key_steps
    out_dir/heldout.json  the same, for evaluation
    out_dir/images/       PNG
    out_dir/task.json     the parameters that made them

No row of the training files shows a held-out picture, and no two held-out rows the same one. The bytes depend on the
parameters alone, and the held-out rows on the seed and their number alone: a run with more training rows is measured
on the same questions.
"""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from pathlib import Path

from tqdm import tqdm

from r1vl_jax.shapes.draw import Scene, ShapesConfig, draw_scene, random_scene, scene_key
from r1vl_jax.shapes.questions import Question, make_question

FORMAT = 7  # counts up when the same parameters would give other files
MAX_REPEATS = 1000


def make_task(
    out_dir: str | Path,
    *,
    seed: int = 0,
    sft_rows: int = 6000,
    rl_rows: int = 1800,
    heldout_rows: int = 200,
    cfg: ShapesConfig | None = None,
    progress: bool = True,
) -> None:
    """Makes the task in out_dir, or leaves out_dir as it is where the same parameters made it before.

    It is written beside out_dir and renamed at the end, so out_dir is never half made.

    Raises FileExistsError where out_dir holds anything else, and ValueError for a negative number of rows or where
    the configuration has too few different pictures.
    """
    cfg = cfg or ShapesConfig()
    rows = {"heldout": heldout_rows, "sft": sft_rows, "rl": rl_rows}
    for name, number in rows.items():
        if number < 0:
            raise ValueError(f"{name}_rows = {number}: expected 0 or more")
    parameters = {"task": "shapes", "format": FORMAT, "seed": seed, "rows": rows, "config": dataclasses.asdict(cfg)}
    parameters = json.loads(json.dumps(parameters))  # as they read back: tuples are lists
    out_dir = Path(out_dir).absolute()
    if _already_made(out_dir, parameters):
        return
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as holder:
        new = Path(holder) / "task"
        _write_task(new, seed, rows, cfg, progress)
        _write_json(new / "task.json", parameters)
        try:
            new.rename(out_dir)
        except OSError:
            # Another process may have made the task meanwhile; anything else is for the caller to see.
            if not _already_made(out_dir, parameters):
                raise


def _already_made(out_dir: Path, parameters: dict) -> bool:
    """False where out_dir is missing or an empty folder; raises FileExistsError where it is something else."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    record = out_dir / "task.json"
    if not record.is_file():
        raise FileExistsError(f"{out_dir} exists and holds no task.json: choose another folder for the shapes task")
    found = json.loads(record.read_text(encoding="utf-8"))
    if found != parameters:
        raise FileExistsError(
            f"{record} was made with other parameters: remove the folder or choose another one.\n"
            f"  found:  {json.dumps(found)}\n  wanted: {json.dumps(parameters)}"
        )
    return True


def _write_task(out_dir: Path, seed: int, rows: dict[str, int], cfg: ShapesConfig, progress: bool) -> None:
    images = out_dir / "images"
    images.mkdir(parents=True)
    seen: set = set()
    with tqdm(total=sum(rows.values()), desc="shapes", unit="picture", disable=not progress) as bar:
        for split, number in rows.items():
            rng = random.Random(f"shapes/{seed}/{split}")
            table = []
            for index in range(number):
                scene = _new_scene(rng, cfg, seen, join=split == "heldout")
                image_path = f"images/{split}-{index:05d}.png"
                draw_scene(scene, cfg).save(out_dir / image_path, compress_level=1)
                question = make_question(scene, rng, cfg)
                careless = rng.random() < cfg.careless_share
                table.append(
                    _sft_row(image_path, question, careless) if split == "sft" else _rl_row(image_path, question)
                )
                bar.update()
            _write_json(out_dir / f"{split}.json", table)


def _new_scene(rng: random.Random, cfg: ShapesConfig, seen: set, join: bool) -> Scene:
    """A scene whose picture is not in `seen`, which it then joins where asked to."""
    for _ in range(MAX_REPEATS):
        scene = random_scene(rng, cfg)
        key = scene_key(scene)
        if key not in seen:
            if join:
                seen.add(key)
            return scene
    raise ValueError(
        f"no new picture in {MAX_REPEATS} tries after {len(seen)} pictures: ask for fewer rows, or for more cells, "
        f"kinds, colours or shapes (now {cfg})"
    )


def _sft_row(image_path: str, question: Question, careless: bool) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"<image>{question.problem}"},
            {"role": "assistant", "content": question.careless if careless else question.solution},
        ],
        "images": image_path,
    }


def _rl_row(image_path: str, question: Question) -> dict:
    return {
        "image_path": image_path,
        "problem": question.problem,
        "solution": question.solution,
        "key_steps": {"Steps": [list(key_step) for key_step in question.key_steps]},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
