"""Odd and broken image files, one table: what comes out of each, or what the error says.

Every file is made here, and read as a path and as bytes.
"""

import dataclasses
import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r1vl_jax.common.image_files import load_image
from r1vl_jax.processing.images import ImageSpec, image_patches

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
      name: of the file.
      make: its bytes, or what puts it at the path that it is given.
      error: what the message says behind the path; "": the file is read.
      size: (width, height) of the image.
      pixels: {(x, y): (r, g, b)}.
      within: how far a value may be from that.
      grid: of its patches, where that is of interest.
    """

    name: str
    make: bytes | Callable[[Path], object]
    error: str = ""
    size: tuple[int, int] = (0, 0)
    pixels: dict = dataclasses.field(default_factory=dict)
    within: int = 0
    grid: tuple[int, int, int] | None = None


def file_of(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(mode, color, size=(16, 16)):
    return Image.new(mode, size, color)


def gray(*values, dtype=np.uint8):
    """One row of pixels."""
    return Image.fromarray(np.array([values], dtype))


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def palette():
    """Black and orange, next to each other."""
    image = gray(0, 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


def card():
    """40 x 20: red and green above blue and white."""
    image = Image.new("RGB", (40, 20), "red")
    for color, corner in ((GREEN, (20, 0)), (BLUE, (0, 10)), (WHITE, (20, 10))):
        image.paste(color, (*corner, corner[0] + 20, corner[1] + 10))
    return image


def exif(orientation):
    value = Image.Exif()
    value[0x0112] = orientation
    return value


def corners(width, height, *colors):
    """Pixels in the middle of the four quarters: top left, top right, bottom left, bottom right."""
    places = ((x, y) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4))
    return {"size": (width, height), "pixels": dict(zip(places, colors, strict=True))}


def row(*colors):
    return {"size": (len(colors), 1), "pixels": {(x, 0): color for x, color in enumerate(colors)}}


def filled(color, size=(16, 16)):
    return {"size": size, "pixels": {(0, 0): color, (size[0] - 1, size[1] - 1): color}}


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, color_type, line=b"", lines=1):
    """A PNG of equal lines, in kinds that PIL does not write; with no line, a header and nothing behind it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + line) * lines)) + chunk(b"IEND", b"") if line else b""
    return b"\x89PNG\r\n\x1a\n" + header + pixels


def broken(content, at, by):
    assert len(content) > at + len(by)
    return content[:at] + by + content[at + len(by) :]


def cut(content, part):
    return content[: int(len(content) * part)]


def jpeg_of_size(width, height):
    """A small JPEG whose header says otherwise."""
    content = file_of(plain("RGB", "red"), "JPEG")
    return broken(content, content.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def webp_of_size(width, height):
    """A small lossless WebP whose header says otherwise: 14 bits for each side, less 1."""
    content = file_of(plain("RGB", "red"), "WEBP", lossless=True)
    (bits,) = struct.unpack_from("<I", content, content.index(b"VP8L") + 9)
    sides = (width - 1) | (height - 1) << 14
    return broken(content, content.index(b"VP8L") + 9, struct.pack("<I", bits & ~0xFFFFFFF | sides))


def animated(kind, **options):
    frames = [plain("RGB", color) for color in ("red", "blue")]
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)


TURNED = file_of(card(), "JPEG", exif=exif(6), quality=95)
TOO_LARGE = "in all; expected at most 178956970$"
UNREADABLE = r"cannot be read as an image \(.+\); expected a complete PNG, JPEG, WEBP, GIF, BMP, TIFF or PPM file$"
ASPECT = "expected sides of at least 1 and a longer side of at most 200 times the shorter$"

# EXIF orientation n says which side of the picture the first row and the first column of the file are (EXIF 2.32,
# tag 0x0112): 6, as phones write it, has the row at the right and the column at the top.
UPRIGHT = {
    1: corners(40, 20, RED, GREEN, BLUE, WHITE),
    2: corners(40, 20, GREEN, RED, WHITE, BLUE),
    3: corners(40, 20, WHITE, BLUE, GREEN, RED),
    4: corners(40, 20, BLUE, WHITE, RED, GREEN),
    5: corners(20, 40, RED, BLUE, GREEN, WHITE),
    6: corners(20, 40, BLUE, RED, WHITE, GREEN),
    7: corners(20, 40, WHITE, GREEN, BLUE, RED),
    8: corners(20, 40, GREEN, WHITE, RED, BLUE),
}

READ = [
    *(Case(f"exif{n}.png", file_of(card(), "PNG", exif=exif(n)), **upright) for n, upright in UPRIGHT.items()),
    Case("exif6.jpg", TURNED, **UPRIGHT[6], within=12),
    Case("exif6.webp", file_of(card(), "WEBP", exif=exif(6), lossless=True), **UPRIGHT[6]),
    Case("exif6.tif", file_of(card(), "TIFF", exif=exif(6)), **UPRIGHT[6]),
    Case("exif8_lzw.tif", file_of(card(), "TIFF", exif=exif(8), compression="tiff_lzw"), **UPRIGHT[8]),
    Case("exif9.png", file_of(card(), "PNG", exif=exif(9)), **UPRIGHT[1]),  # there is no such orientation
    Case("exif_garbage.jpg", broken(TURNED, TURNED.index(b"Exif") + 6, b"\xff" * 8), **UPRIGHT[1], within=12),
    # Colours: palettes, transparency over white, and modes that are not RGB.
    Case("palette.png", file_of(palette(), "PNG"), **row(BLACK, (200, 100, 50))),
    Case("palette_key.png", file_of(palette(), "PNG", transparency=0), **row(WHITE, (200, 100, 50))),
    Case("palette_alpha.png", file_of(palette(), "PNG", transparency=b"\x33\xff"), **row((204,) * 3, (200, 100, 50))),
    Case("palette.gif", file_of(palette(), "GIF"), **row(BLACK, (200, 100, 50))),
    Case("palette_key.gif", file_of(palette(), "GIF", transparency=1), **row(BLACK, WHITE)),
    Case("alpha.png", file_of(plain("RGBA", (0, 255, 0, 51)), "PNG"), **filled((204, 255, 204))),
    Case("alpha.webp", file_of(plain("RGBA", (0, 0, 255, 102)), "WEBP", lossless=True), **filled((153, 153, 255))),
    Case("alpha.tif", file_of(plain("RGBA", (255, 0, 0, 0)), "TIFF"), **filled(WHITE)),
    Case("gray_alpha.png", file_of(plain("LA", (0, 102)), "PNG"), **filled((153,) * 3)),
    Case("color_key.png", file_of(plain("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3)), **filled(WHITE)),
    Case("gray_key.png", file_of(gray(7, 8), "PNG", transparency=7), **row(WHITE, (8,) * 3)),
    Case("gray.png", file_of(gray(0, 128, 255), "PNG"), **row(BLACK, (128,) * 3, WHITE)),
    Case("gray.jpg", file_of(plain("L", 77), "JPEG"), **filled((77,) * 3), within=1),
    Case("1bit.png", file_of(gray(0, 255).convert("1"), "PNG"), **row(BLACK, WHITE)),
    Case("1bit_fax.tif", file_of(gray(0, 255).convert("1"), "TIFF", compression="group4"), **row(BLACK, WHITE)),
    Case("2bit.png", png(4, 1, 2, 0, b"\x1b"), **row(*((v,) * 3 for v in (0, 85, 170, 255)))),
    Case("16bit_gray.png", file_of(gray(0, 25700, 65535, dtype=np.uint16), "PNG"), **row(BLACK, (100,) * 3, WHITE)),
    Case("16bit_gray.tif", file_of(gray(0, 25700, 65535, dtype=np.uint16), "TIFF"), **row(BLACK, (100,) * 3, WHITE)),
    Case("16bit_gray.pgm", b"P5 2 1 65535\n" + struct.pack(">2H", 25700, 65535), **row((100,) * 3, WHITE)),
    Case("16bit_rgb.png", png(1, 1, 16, 2, struct.pack(">3H", 65535, 25700, 0)), **row((255, 100, 0))),
    Case("16bit_gray_alpha.png", png(1, 1, 16, 4, struct.pack(">2H", 0, 0x3333)), **row((204,) * 3)),
    Case("16bit_rgba.png", png(1, 1, 16, 6, struct.pack(">4H", 65535, 0, 0, 0x6666)), **row((255, 153, 153))),
    Case("cmyk.jpg", file_of(plain("CMYK", (0, 255, 255, 0)), "JPEG"), **filled(RED), within=2),
    Case("cmyk.tif", file_of(plain("CMYK", (255, 0, 0, 0)), "TIFF"), **filled((0, 255, 255))),
    Case("ycbcr.jpg", file_of(plain("YCbCr", (76, 85, 255)), "JPEG"), **filled(RED), within=2),
    Case("ycbcr.tif", file_of(plain("YCbCr", (29, 255, 107)), "TIFF"), **filled(BLUE), within=2),
    Case("lab.tif", file_of(plain("LAB", (136, 208, 195)), "TIFF"), **filled(RED), within=12),
    # Other containers, several frames, and names that lie.
    Case("progressive.jpg", file_of(card(), "JPEG", progressive=True, quality=95), **UPRIGHT[1], within=12),
    Case("rle.bmp", file_of(palette(), "BMP"), **row(BLACK, (200, 100, 50))),
    Case("text.ppm", b"P3\n# a comment\n2 1\n255\n255 0 0  0 0 255\n", **row(RED, BLUE)),
    Case("animated.gif", animated("GIF"), **filled(RED)),
    Case("animated.png", animated("PNG"), **filled(RED)),
    Case("animated.webp", animated("WEBP", lossless=True), **filled(RED)),
    Case("pages.tif", animated("TIFF"), **filled(RED)),
    Case("two.mpo", animated("MPO"), **filled(RED), within=2),
    Case("png_in_truth.jpg", file_of(card(), "PNG"), **UPRIGHT[1]),
    Case("no_ending", file_of(card(), "GIF"), **UPRIGHT[1]),
    Case("more_behind.png", file_of(card(), "PNG") + b"\0" * 999, **UPRIGHT[1]),
    # Extreme sizes.
    Case("tiny.png", file_of(plain("RGB", "red", (1, 1)), "PNG"), **filled(RED, (1, 1)), grid=(1, 4, 4)),
    Case("long.png", file_of(plain("L", 9, (200, 1)), "PNG"), **filled((9,) * 3, (200, 1)), grid=(1, 2, 58)),
    Case("high.gif", file_of(plain("L", 9, (1, 200)), "GIF"), **filled((9,) * 3, (1, 200)), grid=(1, 58, 2)),
]

REFUSED = [
    Case("too_long.png", file_of(plain("L", 0, (201, 1)), "PNG"), f"image is 201x1 pixels; {ASPECT}"),
    Case("too_high.jpg", file_of(plain("L", 0, (4, 900)), "JPEG"), f"image is 4x900 pixels; {ASPECT}"),
    Case("bomb.png", png(20_000, 9000, 1, 0, b"\0"), f"image is 20000x9000 pixels, 180000000 {TOO_LARGE}"),
    Case("bomb.jpg", jpeg_of_size(60_000, 3000), f"image is 60000x3000 pixels, 180000000 {TOO_LARGE}"),
    Case("bomb.gif", broken(animated("GIF"), 6, b"\xff" * 4), f"image is 65535x65535 pixels, 4294836225 {TOO_LARGE}"),
    Case("bomb.ppm", b"P6 90000 2000 255\n", f"image is 90000x2000 pixels, 180000000 {TOO_LARGE}"),
    # PIL's decoder makes room for the pixels when it opens the file, and so refuses by itself.
    Case("bomb.webp", webp_of_size(16_384, 16_384), r"Image size \(268435456 pixels\) exceeds limit of 178956970"),
    Case("bomb_almost.png", png(44_739, 4000, 1, 0, b"\0"), UNREADABLE),  # below the limit: its pixels are looked for
    Case("no_side.png", png(0, 5, 8, 2, b"\0"), UNREADABLE),
    Case("float.tif", file_of(plain("F", 0.5), "TIFF"), "pixels are floating-point numbers .* expected 8 or 16 bits$"),
    Case("float.pfm", b"Pf\n1 1\n-1.0\n" + b"\0" * 4, "pixels are floating-point numbers .* expected 8 or 16 bits$"),
    Case("32bit.tif", file_of(gray(0, 65536, dtype=np.int32), "TIFF"), "gray values from 0 to 65536; .* 0 to 65535$"),
    *(
        Case(f"cut_{kind}_{part}", cut(file_of(noise(), kind), part), UNREADABLE)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
        for part in (0.1, 0.6, 0.95)
    ),
    Case("one_byte.png", b"\x89", UNREADABLE),
    Case("header_only.png", png(5, 5, 8, 2), UNREADABLE),
    Case("crc.png", broken(file_of(noise(), "PNG"), 29, b"\0\0\0\0"), UNREADABLE),
    Case("damaged.png", broken(file_of(noise(), "PNG"), 300, b"\xff" * 60), UNREADABLE),
    Case("empty.png", b"", UNREADABLE),
    Case("text.png", b"not an image\n", UNREADABLE),
    Case("not_found.jpg", b"<!DOCTYPE html><html><title>404 Not Found</title></html>", UNREADABLE),
    Case("pointer.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", UNREADABLE),
    Case("figure.eps", file_of(card(), "EPS"), UNREADABLE),
    Case("figure.pdf", file_of(card(), "PDF"), UNREADABLE),
    Case("icon.ico", file_of(card(), "ICO"), UNREADABLE),
    Case("figure.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', UNREADABLE),
    Case("folder.png", Path.mkdir, "no such image file$"),
    Case("missing.png", lambda path: None, "no such image file$"),
    Case("dangling.png", lambda path: path.symlink_to("nowhere.png"), "no such image file$"),
]


@pytest.mark.parametrize("case", READ + REFUSED, ids=lambda case: case.name)
def test_odd_image(tmp_path, case):
    path = tmp_path / case.name
    sources = [path]
    if isinstance(case.make, bytes):
        path.write_bytes(case.make)
        sources.append(case.make)
    else:
        case.make(path)
    for source in sources:
        if case.error:
            called = f"image file of {len(source)} bytes" if isinstance(source, bytes) else re.escape(str(path))
            with pytest.raises(ValueError, match=f"^{called}: {case.error}"):
                load_image(source)
        else:
            image = load_image(source)
            assert (image.mode, image.size) == ("RGB", case.size)
            got = {place: image.getpixel(place) for place in case.pixels}
            differences = np.array(list(got.values())) - np.array(list(case.pixels.values()))
            assert np.abs(differences).max() <= case.within, (got, case.pixels)
            if case.grid:
                patches, grid = image_patches(image, ImageSpec())
                assert grid == case.grid and patches.shape == (grid[1] * grid[2], 1176)
                assert set(patches.flat) == set(case.pixels[0, 0])  # one colour stays one colour


def test_names_are_unique():
    names = [case.name for case in READ + REFUSED]
    assert len(names) == len(set(names))
