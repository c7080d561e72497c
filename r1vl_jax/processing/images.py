"""Cuts images into the patches that are the input of the vision tower.

Flow: data -> processing (here) -> rollout. The rule is that of Qwen2-VL's image processor (arXiv 2409.12191;
transformers `Qwen2VLImageProcessorPil`):

- The image is resized (bicubic), so that both sides are multiples of patch_size * merge_size and the number of pixels
  is within a budget.
- The image is cut into patches of (channel, frame, y, x). Patches are in the order (t, h/merge, w/merge, merge, merge),
  so the patches that the merger joins into one token are next to each other.
- A still image counts as temporal_patch_size equal frames.

Patches are uint8, so a quarter of the bytes of float32 patches is copied to the device. There the model normalises the
patches with the spec's mean and std.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from r1vl_jax.common.files import inner_object, read_object
from r1vl_jax.common.image_files import check_sides, to_rgb


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """The settings for resizing, cutting and normalising images.

    The defaults are Qwen2-VL's. They apply to checkpoint folders that have no file with these settings.

    Attributes:
      patch_size: width and height of a patch, in pixels.
      temporal_patch_size: frames per patch.
      merge_size: patches along each side of one image token.
      min_pixels, max_pixels: budget for height * width after resizing.
      mean, std: per channel (R, G, B), of pixels in [0, 1]; the model normalises with them.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        for field in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} is {value!r}; expected a positive whole number")
        if not max(self.min_pixels, self.factor**2) <= self.max_pixels:
            raise ValueError(
                f"max_pixels is {self.max_pixels}; expected at least min_pixels ({self.min_pixels}) and one image "
                f"token ({self.factor}x{self.factor} = {self.factor**2} pixels)"
            )
        for field in ("mean", "std"):
            values = getattr(self, field)
            if len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
                raise ValueError(f"image {field} is {values}; expected three numbers (R, G, B)")
        if min(self.std) <= 0:
            raise ValueError(f"image std is {self.std}; expected positive numbers")

    @property
    def factor(self) -> int:
        """Width and height of one image token, in pixels. The sides of a resized image are multiples of this number."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ImageSpec:
        """Reads a checkpoint's `preprocessor_config.json` (or the `image_processor` of `processor_config.json`).

        Args:
          min_pixels, max_pixels: replacements for the file's budget; None: the file's value.
        Raises: ValueError naming the file and the field that is not supported.
        """
        path, fields = _read_image_fields(Path(folder))
        size = inner_object(fields, "size", path)
        budget = {
            "min_pixels": (min_pixels, fields.get("min_pixels"), size.get("min_pixels"), size.get("shortest_edge")),
            "max_pixels": (max_pixels, fields.get("max_pixels"), size.get("max_pixels"), size.get("longest_edge")),
        }
        values: dict[str, Any] = {
            key: next((value for value in options if value is not None), None) for key, options in budget.items()
        }
        values |= {key: fields.get(key) for key in ("patch_size", "temporal_patch_size", "merge_size")}
        try:
            values |= {key: tuple(fields.get(f"image_{key}") or ()) or None for key in ("mean", "std")}
            return cls(**{key: value for key, value in values.items() if value is not None})
        except (TypeError, ValueError) as error:  # TypeError: mean or std is a number
            raise ValueError(f"{path}: {error}") from error


def _read_image_fields(folder: Path) -> tuple[Path, dict]:
    """Returns the path of the image processor's file, and its fields. Raises ValueError if a field is not supported."""
    path, fields = folder / "preprocessor_config.json", {}
    if path.is_file():
        fields = read_object(path)
    elif (folder / "processor_config.json").is_file():  # written by transformers 5
        path = folder / "processor_config.json"
        fields = inner_object(read_object(path), "image_processor", path)
    supported = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": int(Image.Resampling.BICUBIC)}
    for key, expected in supported.items():
        if fields.get(key, expected) != expected:
            raise ValueError(f"{path}: {key} is {fields[key]!r}; only {expected!r} is supported")
    scale = fields.get("rescale_factor", 1 / 255)
    if not isinstance(scale, (int, float)) or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{path}: rescale_factor is {scale!r}; only 1/255 is supported")
    return path, fields


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns the size to which an image is resized, with nearly the same aspect ratio.

    Sides are rounded to multiples of `factor` (half to even). If the result has more than max_pixels, both sides are
    instead scaled by the same number and rounded down, to at least `factor`. If it has fewer than min_pixels, both
    sides are scaled and rounded up. A very long image can therefore have slightly more than max_pixels.

    Returns: (height, width) in pixels.
    Raises: UnusableImage (a ValueError) if a side is 0, or if the longer side is over 200 times the shorter.
    """
    check_sides(width, height)
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height, new_width = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return new_height, new_width


def image_patches(image: Image.Image, spec: ImageSpec) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cuts a still image into patches.

    Args:
      image: any PIL image.
    Returns: patches_PC uint8 (C = 3 * temporal_patch_size * patch_size**2; values of R, G and B, not normalised), and
      the grid (1, h, w) in patches, with P = h * w. The image becomes h * w / merge_size**2 tokens.
    Raises: ValueError if a side is 0, or if the aspect ratio is extreme.
    """
    return video_patches([image], spec)


def video_patches(frames: Sequence[Image.Image], spec: ImageSpec) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cuts frames of the same size into patches. Repeats the last frame up to a multiple of temporal_patch_size.

    The pixel budget applies to each frame.

    Returns: patches as in `image_patches`, and the grid (t, h, w), with t = frames / temporal_patch_size.
    Raises: ValueError if there are no frames, if frames have different sizes, or if the aspect ratio is extreme.
    """
    if not frames:
        raise ValueError("a video without frames; expected at least one")
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"frames of one video have sizes {sorted(sizes)}; expected one size")
    width, height = frames[0].size
    new_height, new_width = smart_resize(
        height, width, factor=spec.factor, min_pixels=spec.min_pixels, max_pixels=spec.max_pixels
    )
    resized = [to_rgb(frame).resize((new_width, new_height), Image.Resampling.BICUBIC) for frame in frames]
    # Channels are moved first here, so `rearrange` copies longer runs of pixels (expected, not measured: 3x faster).
    pixels = [np.ascontiguousarray(np.moveaxis(np.asarray(frame), -1, 0)) for frame in resized]
    pixels += [pixels[-1]] * (-len(pixels) % spec.temporal_patch_size)
    patches_PC = rearrange(
        np.stack(pixels),
        "(t T) c (h mh ph) (w mw pw) -> (t h w mh mw) (c T ph pw)",
        T=spec.temporal_patch_size,
        mh=spec.merge_size,
        mw=spec.merge_size,
        ph=spec.patch_size,
        pw=spec.patch_size,
    )
    grid = (len(pixels) // spec.temporal_patch_size, new_height // spec.patch_size, new_width // spec.patch_size)
    return patches_PC, grid
