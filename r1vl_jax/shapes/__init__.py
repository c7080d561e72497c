"""Makes the built-in task, which needs no download: drawn pictures of coloured shapes with questions about them.

The task is made from a seed and takes the place of real data. `make_task` writes files in the schemas of real data
(sft.json, rl.json, heldout.json and images/), and r1vl_jax/data reads these files like any others.

    draw.py       draws scenes
    questions.py  makes questions, step-by-step solutions and key steps
    task.py       writes the files of the task
    tokenizer.py  trains a small byte-level BPE; writes a checkpoint's files other than the weights
    folder.py     makes the task together with a tiny random model to train on it
    command.py    is the command `python -m r1vl_jax.data.shapes --out DIR`
"""

from r1vl_jax.shapes.draw import ShapesConfig
from r1vl_jax.shapes.task import make_task

__all__ = ["ShapesConfig", "make_task"]
