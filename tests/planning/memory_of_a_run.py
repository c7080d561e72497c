"""How the memory of a run on this CPU grows after its weights are asked for, as JSON: bytes.

python memory_of_a_run.py make FOLDER          makes a task, a random model of 184M parameters and FOLDER/run.yaml
python memory_of_a_run.py run FOLDER STAGE     trains it in one stage
"""

import json
import resource
import sys
from pathlib import Path

from helpers.tiny_jax import run_config, write_run_inputs

from r1vl_jax.config import load
from r1vl_jax.inference.open_model import OpenModel
from r1vl_jax.training.run import train

MODEL = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 2, "mrope_section": (16, 24, 24), "vision_depth": 2, "vision_embed_dim": 128,
    "vision_num_heads": 4,
}  # fmt: skip


def make(folder: Path) -> None:
    write_run_inputs(folder, **MODEL)
    sections = {"sft": {"steps": 2}, "rl": {"steps": 2}, "model": {"remat": "full"}, "checkpoint": {"every": 9}}
    run_config(folder, folder / "run", **sections)


def run(folder: Path, stage: str) -> int:
    before = []
    load_weights = OpenModel.load_weights

    def first_load(self, *arguments):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before.append(pages * resource.getpagesize())
        return load_weights(self, *arguments)

    OpenModel.load_weights = first_load
    train(load(folder / "run.yaml", ["--stages", f"[{stage}]", "--output_dir", str(folder / stage)]))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before[0]


if __name__ == "__main__":
    name, place = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(make(place) if name == "make" else run(place, sys.argv[3])))
