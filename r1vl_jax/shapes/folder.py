"""Makes the built-in task together with a model to train on it.

FOLDER/task/    sft.json, rl.json, heldout.json and the pictures
FOLDER/model/   a random Qwen2-VL of about 1M parameters, with a tokenizer, in Hugging Face layout
"""

from __future__ import annotations

import shutil

import jax

from r1vl_jax.checkpoint.hf import save_hf
from r1vl_jax.common.files import locked
from r1vl_jax.config import ShapesSection, shapes_folder
from r1vl_jax.errors import ConfigError
from r1vl_jax.model.config import load_config
from r1vl_jax.model.spec import init_params
from r1vl_jax.shapes import ShapesConfig, make_task
from r1vl_jax.shapes.tokenizer import task_texts, train_tokenizer, write_checkpoint_files


def make_shapes(config: ShapesSection) -> None:
    """Makes the task and the model in `shapes_folder(config)`. Keeps what is already there.

    Several processes may call this at once: one makes the folder, and the others wait for it.

    Raises: FileExistsError if the folder contains anything other than such a task; ConfigError if there can be no such
      task.
    """
    folder = shapes_folder(config)
    task, model = folder / "task", folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        try:
            cfg = ShapesConfig(careless_share=config.careless_share, answer_format=config.format)
            make_task(
                task, seed=config.seed, sft_rows=config.sft_rows, rl_rows=config.rl_rows,
                heldout_rows=config.heldout_rows, cfg=cfg,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"shapes: {error}") from error
        if model.exists():
            return
        draft = folder / "model.draft"
        shutil.rmtree(draft, ignore_errors=True)
        tokenizer = train_tokenizer(task_texts(task), draft)
        write_checkpoint_files(draft, tokenizer)
        cfg = load_config(draft)
        save_hf(init_params(jax.random.key(config.seed), cfg), cfg, model, source=draft)
        shutil.rmtree(draft)
