"""Checks a configuration without opening a model: paths, sources, mesh, divisibility."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from r1vl_jax.config import Config
from r1vl_jax.data.sources import HUB, check_source
from r1vl_jax.errors import ConfigError
from r1vl_jax.parallel.sharding import batch_shards, make_mesh


def check_inputs(config: Config) -> Mesh:
    """Checks a configuration before a model is opened or a run folder is changed. Returns the mesh.

    Raises ConfigError, RowError or OSError that names the fault.
    """
    sections, sizes = {}, {}
    if "sft" in config.stages:
        sections["data.sft"], sizes["sft.micro_batch_size"] = config.data.sft, config.sft.micro_batch_size
    if "step_grpo" in config.stages:
        sections["data.rl"], sizes["rl.micro_batch_size"] = config.data.rl, config.rl.micro_batch_size
    if config.eval.rows:
        sections["data.heldout"], sizes["eval.batch_size"] = config.data.heldout, config.eval.batch_size
    paths = [("model.path", config.model.path, "folder")]
    for key, section in sections.items():
        if section.image_root:
            paths.append((f"{key}.image_root", section.image_root, "folder"))
        if section.tfds and section.tfds_dir:
            paths.append((f"{key}.tfds_dir", section.tfds_dir, "folder"))
        if section.path and not section.path.startswith(HUB):
            paths.append((f"{key}.path", section.path, "file or folder"))
    for key, path, kind in paths:
        if not Path(path).exists():
            raise ConfigError(f"{key}: {path}: no such {kind}")
        if Path(path).resolve().is_relative_to(Path(config.output_dir).resolve()):
            raise ConfigError(f"{key}: {path} is inside output_dir {config.output_dir}, where only the run writes")
    for section in sections.values():
        check_source(section)
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key, size in sizes.items():
        if size % batch_shards(mesh):
            raise ConfigError(f"{key} is {size}, expected a multiple of mesh data*fsdp = {batch_shards(mesh)}")
    return mesh
