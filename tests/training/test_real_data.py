"""The ten real problems through both doors: the JSON files, and TFDS data sets built from them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.paths import GEOMETRY
from helpers.tiny_jax import FakeScorerPool, read_lines, run_config, write_run_inputs

from r1vl_jax.data.batching import collate_pairs, collate_prompts
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.data.builders.build import build
from r1vl_jax.data.loader import Loader
from r1vl_jax.data.sources import open_source
from r1vl_jax.processing.processor import Processor
from r1vl_jax.train import train

pytestmark = pytest.mark.skipif(not GEOMETRY.is_dir(), reason="needs shared/real/geometry3k beside the checkout")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The same run from JSON and from TFDS, on real images at 64 tokens each."""
    folder = tmp_path_factory.mktemp("real")
    inputs = write_run_inputs(folder / "inputs")
    for name, file in (("mulberry_sft", "sft.json"), ("r1vl_10k", "rl.json")):
        build(name, folder / "tfds", source=GEOMETRY / file)
    tfds = {"tfds_dir": str(folder / "tfds"), "path": ""}
    doors = {
        "json": {"sft": {"path": str(GEOMETRY / "sft.json")}, "rl": {"path": str(GEOMETRY / "rl.json")}},
        "tfds": {"sft": {"tfds": "mulberry_sft", **tfds}, "rl": {"tfds": "r1vl_10k:1.0.0", **tfds}},
    }
    return {
        name: run_config(
            inputs, folder / f"run_{name}",
            data={**door, "max_prompt_tokens": 1024, "buckets": 1},
            sft={"steps": 2, "max_pixels": 50_176},
            rl={"steps": 2, "max_pixels": 50_176},
        )
        for name, door in doors.items()
    }  # fmt: skip


@pytest.mark.parametrize("stage, workers", [("sft", 0), ("rl", 1)])
def test_identical_batches(configs, stage, workers):
    """Over three epochs: the same rows in the same order, and the same arrays to the last bit."""
    processor = Processor.from_folder(configs["json"].model.path, max_pixels=50_176)
    encode = {"sft": processor.encode_pair, "rl": partial(processor.encode_prompt, max_tokens=1024)}[stage]
    collate = {"sft": collate_pairs, "rl": collate_prompts}[stage]

    def make(rows):
        examples = [(e.row, e.question, e.answer, e.key_steps, e.name.rpartition(",")[2]) for e, _ in rows]
        return examples, jax.tree.map(np.asarray, collate([encoded for _, encoded in rows], Buckets(32)))

    batches = {}
    for door, config in configs.items():
        source = open_source(getattr(config.data, stage))
        assert len(source) == 10 and not source.errors
        with Loader(source, encode, count=3, seed=1, make=make, workers=workers) as loader:
            batches[door] = [loader.take() for _ in range(10)]
            assert loader.dropped == 0
    for (json_rows, json_batch), (tfds_rows, tfds_batch) in zip(*batches.values(), strict=True):
        assert json_rows == tfds_rows
        jax.tree.map(np.testing.assert_array_equal, json_batch, tfds_batch)
        prompts = json_batch[0] if stage == "sft" else json_batch
        assert prompts.patches_WPC.dtype == np.uint8 and prompts.patches_WPC.std() > 10
    assert {row for rows, _ in batches["json"] for row, *_ in rows} == set(range(10))


def test_training_is_the_same(configs):
    """Both stages: the same metrics, the same sampled answers, and checkpoints equal to the last bit."""
    exports = {door: train(config, pool=FakeScorerPool()) for door, config in configs.items()}
    found = {}
    for door, config in configs.items():
        rows = read_lines(Path(config.output_dir) / "metrics.jsonl")
        of_process = ("seconds/", "tokens_per_second", "compilations")
        metrics = [{k: v for k, v in row.items() if not k.startswith(of_process)} for row in rows]
        rollouts = read_lines(Path(config.output_dir) / "rollouts.jsonl")
        found[door] = metrics, [{**row, "source": "", "images": ""} for row in rollouts]
        assert [row["step"] for row in metrics] == [1, 2] * 2 and all(row["rows_dropped"] == 0 for row in metrics)
        assert all(row["grad_norm"] > 0 for row in metrics) and len(rollouts) == 8
        names = {name for row in rollouts for name in row["images"]}
        assert names and all(name.endswith(".png") for name in names)
    assert found["json"] == found["tfds"]
    weights = [(export / "model.safetensors").read_bytes() for export in exports.values()]
    assert weights[0] == weights[1]
