"""Makes the built-in task together with a model to train on it.

DIR/task/    sft.json, rl.json, heldout.json and the pictures
DIR/model/   a random Qwen2-VL of about 1M parameters, with a tokenizer, in Hugging Face layout
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import jax

from r1vl_jax.checkpoint.hf import save_hf
from r1vl_jax.config import ShapesSection
from r1vl_jax.errors import ConfigError
from r1vl_jax.model.config import load_config
from r1vl_jax.model.spec import init_params
from r1vl_jax.shapes import ShapesConfig, make_task
from r1vl_jax.shapes.tokenizer import task_texts, train_tokenizer, write_checkpoint_files


def make_shapes(config: ShapesSection, answer_format: str = "r1vl") -> None:
    """Makes the task and the model in config.dir. Keeps a task or model that is already there.

    The solutions are in `answer_format`. If the existing task was made with other parameters, removes the task and the
    model and makes both again.

    Raises: FileExistsError if config.dir/task contains anything other than a task; ConfigError if such a task cannot
      be made.
    """
    assert config.dir is not None  # callers call this only if dir is set
    folder = Path(config.dir)
    task, model = folder / "task", folder / "model"
    rows = {"sft_rows": config.sft_rows, "rl_rows": config.rl_rows, "heldout_rows": config.heldout_rows}
    cfg = ShapesConfig(careless_share=config.careless_share, answer_format=answer_format)

    def make() -> None:
        try:
            make_task(task, seed=config.seed, cfg=cfg, **rows)
        except ValueError as error:
            raise ConfigError(f"shapes: {error}") from error

    try:
        make()
    except FileExistsError:
        if not (task / "task.json").is_file():
            raise
        print(f"{folder}: made with other parameters; making it anew", file=sys.stderr)
        shutil.rmtree(task)
        shutil.rmtree(model, ignore_errors=True)
        make()
    if model.exists():
        return
    draft = folder / "model.draft"
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer = train_tokenizer(task_texts(task), draft)
    write_checkpoint_files(draft, tokenizer)
    cfg = load_config(draft)
    save_hf(init_params(jax.random.key(config.seed), cfg), cfg, model, source=draft)
    shutil.rmtree(draft)
