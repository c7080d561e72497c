"""The built-in task: drawn pictures of coloured shapes with questions, made from a seed.

It stands where real data would stand (stage data/) and needs no download: `make_task` writes the same files that real
data comes in, `sft.json`, `rl.json` and `heldout.json` with `images/`, and the readers of data/ take it from there.

    draw.py       scenes and their pictures
    questions.py  questions, step-by-step solutions and key steps
    task.py       the files of the task
    tokenizer.py  a small byte-level BPE and the checkpoint's files but for the weights

By hand: `python -m r1vl_jax.data.shapes --out DIR`.
"""

from r1vl_jax.shapes.draw import ShapesConfig
from r1vl_jax.shapes.task import make_task

__all__ = ["ShapesConfig", "make_task"]
