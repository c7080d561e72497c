"""The built-in task: drawn pictures of coloured shapes with questions, made from a seed.

It takes the place of real data and needs no download: `make_task` writes files in the schemas of real data (sft.json,
rl.json, heldout.json and images/), and r1vl_jax/data reads them as it reads any others.

    draw.py       scenes and their pictures
    questions.py  questions, step-by-step solutions and key steps
    task.py       the files of the task
    tokenizer.py  a small byte-level BPE, and a checkpoint's files without the weights
    folder.py     the task with a tiny random model to train on it
    command.py    `python -m r1vl_jax.data.shapes --out DIR`
"""

from r1vl_jax.shapes.draw import ShapesConfig
from r1vl_jax.shapes.task import make_task

__all__ = ["ShapesConfig", "make_task"]
