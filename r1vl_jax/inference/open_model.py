"""Opens a checkpoint folder: collects everything that a command needs before it reads the weights.

folder -> config.json, processor, backend -> parameter spec -> shardings
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from r1vl_jax.checkpoint.folder import verify_folder
from r1vl_jax.checkpoint.store import ModelFolder, find_model, load_model
from r1vl_jax.errors import CheckpointError, ConfigError
from r1vl_jax.model.backend import choose
from r1vl_jax.model.config import ModelConfig, load_config
from r1vl_jax.model.spec import num_params, param_spec
from r1vl_jax.parallel.memory import memory_limit
from r1vl_jax.parallel.sharding import RULES, Rules, make_mesh, param_shardings
from r1vl_jax.processing.processor import Processor


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A checkpoint without its weights.

    Attributes:
      folder: the folders of weights and files.
      config: sizes, pixel statistics and backend; a static argument of every program.
      mesh, shardings: the devices, and how the parameters are split over them, a tree of NamedSharding.
      processor: turns questions into prompts and tokens into text.
    """

    folder: ModelFolder
    config: ModelConfig
    mesh: Mesh
    shardings: Any
    processor: Processor

    @property
    def files(self) -> Path:
        """Returns the folder with config.json, tokenizer and processor files."""
        return self.folder.files

    @property
    def notes(self) -> list[str]:
        """Returns lines for the user: which weights were chosen, and which chat template."""
        return [note for note in (self.folder.note, self.processor.note) if note]

    def load_weights(self, dtype: str, folder: ModelFolder | Path | None = None) -> Any:
        """Loads the parameters onto the mesh. Raises CheckpointError.

        Args:
          folder: other weights of the same sizes; None: this checkpoint's.
        """
        return load_model(folder or self.folder, dtype=dtype, shardings=lambda _: self.shardings)[0]

    def describe(self, dtype: str) -> str:
        """Returns size, devices and backend in one line."""
        device = self.mesh.devices.flat[0]
        limit = memory_limit(device)
        memory = (
            "" if limit is None else f" of {limit / 1e9:.0f} GB for JAX (XLA_PYTHON_CLIENT_MEM_FRACTION changes it)"
        )
        return (
            f"{num_params(self.config) / 1e6:.1f}M parameters; {self.mesh.devices.size} {device.platform} device(s)"
            f"{memory}, mesh {dict(self.mesh.shape)}; compute in {dtype}, attention {self.config.attention}, kernels "
            f"{self.config.kernels}"
        )


def open_model(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    dtype: str = "bfloat16",
    attention: str = "auto",
    kernels: str = "auto",
) -> OpenModel:
    """Opens a checkpoint of any kind: Hugging Face, converted, or a training run's folder. Reads no weights.

    Args:
      mesh: the devices; None: the first device alone.
      rules: map logical axes to mesh axes, see parallel.sharding.
      dtype, attention, kernels: as in section `model` of the configuration.
    Raises:
      CheckpointError: the folder or one of its files cannot be used.
      ConfigError: this machine cannot run the named backend, or the mesh does not divide the model.
    """
    model_folder = find_model(folder)
    verify_folder(model_folder.files, weights=False)
    config = load_config(model_folder.files)
    try:
        processor = Processor.from_folder(model_folder.files)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    pixels = processor.image_spec
    config = config.with_pixels(pixels.mean, pixels.std)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    try:
        config = config.with_backend(*choose(attention, kernels, dtype=dtype))
        shardings = param_shardings(param_spec(config), mesh, rules)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return OpenModel(model_folder, config, mesh, shardings, processor)
