"""Reads image files from data sets, which may be anything: only regular files of known formats, sizes checked first."""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from r1vl_jax.common.limits import MAX_PIXELS

MAX_FILE_BYTES = 1 << 30
MAX_ASPECT_RATIO = 200
# Formats that PIL may try. Others are unsafe: for EPS, PIL would run an external program on a file from a data set.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Errors of PIL's decoders on damaged files (Warning: if Python is set to raise warnings); see `load_image`.
DECODE_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
    struct.error, zlib.error, Warning,
)  # fmt: skip


class UnusableImage(ValueError):
    """An image that can be decoded but not used. The message says why and what was expected."""


def load_image(source: str | os.PathLike | bytes, *, name: str | None = None) -> Image.Image:
    """Reads an image file as upright 8-bit RGB: EXIF orientation applied, transparency over white, first frame.

    Args:
      source: path of an image file, or its bytes.
      name: name of the file in error messages; None: the path, or "image file of N bytes".
    Raises: ValueError, naming the file, if the file is missing, not an image of FORMATS, damaged, cut short, larger
      than limits.MAX_PIXELS, or if one side is over 200 times as long as the other. The size is checked before pixels
      are decoded.
    """
    if name is None:
        name = f"image file of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise ValueError(f"{name}: no such image file")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115 (closed below)
        with file, _read_header(file) as image:
            _check_size(*image.size)
            with _no_bomb_warning(*image.size):
                image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (UnusableImage, Image.DecompressionBombError) as error:  # WebP's decoder checks the size itself
        raise ValueError(f"{name}: {error}") from error
    except DECODE_ERRORS as error:
        raise ValueError(
            f"{name}: cannot be read as an image ({type(error).__name__}: {error}); expected a complete "
            f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
        ) from error


def read_image_file(path: str | os.PathLike) -> bytes:
    """Returns the bytes of an image file, after it was decoded as `load_image` does. Raises ValueError as that does."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such image file")
    try:
        size = os.path.getsize(path)
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: has {size:,} bytes; expected an image file of at most {MAX_FILE_BYTES:,}")
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected an image file") from error
    load_image(data, name=os.fspath(path))
    return data


def _read_header(file: BinaryIO) -> Image.Image:
    """Returns the image in a file, without decoding its pixels.

    `Image.open` is not used, because it checks the size, too: it warns about sizes that are allowed here, and raises
    before the size can be read here. Its limit is a setting of the whole process, which a library must not change.
    """
    Image.init()  # registers all decoders
    start = file.read(16)
    for name in FORMATS:
        decoder, accepts = Image.OPEN.get(name, (None, None))  # PIL may be built without this format
        if decoder and accepts and accepts(start) is True:  # or a text that says why it is not supported
            file.seek(0)
            return decoder(file, "")
    raise ValueError("the file begins like none of these")


def _check_size(width: int, height: int) -> None:
    """Raises UnusableImage on too many pixels, a side of 0, or a longer side over 200 times the shorter."""
    if width * height > MAX_PIXELS:
        raise UnusableImage(f"image is {width}x{height} pixels, {width * height} in all; expected at most {MAX_PIXELS}")
    check_sides(width, height)


def check_sides(width: int, height: int) -> None:
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise UnusableImage(
            f"image is {width}x{height} pixels; expected sides of at least 1 and a longer side of at most "
            f"{MAX_ASPECT_RATIO} times the shorter"
        )


def _no_bomb_warning(width: int, height: int) -> contextlib.AbstractContextManager:
    """Silences the warning of PIL's decoders about an image that is large but allowed by `_check_size`.

    Does nothing for smaller images, because warning filters apply to the whole process, including other threads.
    """
    if width * height <= (Image.MAX_IMAGE_PIXELS or math.inf):
        return contextlib.nullcontext()
    return warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any PIL image to 8-bit RGB: scales 16-bit gray, puts transparent pixels over white.

    Raises: UnusableImage if the range of the pixel values is not known.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL's own conversion clips at 255, which turns most 16-bit images white.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnusableImage(f"gray values from {values.min()} to {values.max()}; expected 0 to 65535")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnusableImage("pixels are floating-point numbers of unknown range; expected 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
