"""How the memory of a run on this CPU grows after its weights are asked for, as JSON.

python memory_of_a_run.py make FOLDER     makes a task, a random model of 190M parameters and FOLDER/run.yaml
python memory_of_a_run.py run FOLDER      trains it

{"steps": bytes until the first checkpoint is written, "run": bytes of the whole run}
"""

import json
import resource
import sys
from pathlib import Path

from helpers.tiny_jax import run_config, write_run_inputs

from r1vl_jax.checkpoint.state import StageCheckpoints
from r1vl_jax.config import load
from r1vl_jax.inference.open_model import OpenModel
from r1vl_jax.training.run import train

MODEL = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 2, "mrope_section": (16, 24, 24), "vision_depth": 2, "vision_embed_dim": 128,
    "vision_num_heads": 4,
}  # fmt: skip


def make(folder: Path) -> None:
    write_run_inputs(folder, MODEL)
    run_config(
        folder, folder / "run", sft={"steps": 2}, rl={"steps": 2}, model={"remat": "full"}, checkpoint={"every": 9}
    )


def run(folder: Path) -> dict[str, int]:
    before, steps = [], []
    load_weights, save = OpenModel.load_weights, StageCheckpoints.save

    def first_load(self, *arguments):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before.append(pages * resource.getpagesize())
        return load_weights(self, *arguments)

    def first_save(self, *arguments):
        steps.append(peak())
        return save(self, *arguments)

    OpenModel.load_weights, StageCheckpoints.save = first_load, first_save
    train(load(folder / "run.yaml"))
    return {"steps": steps[0] - before[0], "run": peak() - before[0]}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    command, place = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(make(place) if command == "make" else run(place)))
