"""Image patches: parity with transformers' PIL image processor, and what our loader does with files and bytes."""

import io
import json
import os
import warnings

import numpy as np
import pytest
from helpers.paths import GEOMETRY
from PIL import Image, ImageFile
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from r1vl_jax.common import image_files
from r1vl_jax.common.image_files import load_image, to_rgb
from r1vl_jax.processing.images import ImageSpec, image_patches, smart_resize, video_patches

SIZES = [
    (1, 1), (2, 3), (13, 15), (14, 14), (27, 29), (28, 28), (41, 43), (42, 70), (56, 56), (57, 199), (100, 140),
    (101, 333), (5, 999), (999, 5), (1, 200), (300, 300), (640, 427), (1333, 777),
]  # fmt: skip


def noise(width, height, seed=0, mode="RGB"):
    channels = {"RGB": (3,), "RGBA": (4,), "L": (), "LA": (2,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    return Image.fromarray(pixels, mode) if mode == "CMYK" else Image.fromarray(pixels)


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def normalised(patches, spec):
    """What the model makes of uint8 patches; their columns are (channel, frame, y, x)."""
    values = patches.reshape(len(patches), 3, -1).astype(np.float32) / np.float32(255)
    mean, std = (np.asarray(value, np.float32)[:, None] for value in (spec.mean, spec.std))
    return ((values - mean) / std).reshape(patches.shape)


def assert_same_as_hf(image, spec):
    hf = Qwen2VLImageProcessorPil(size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels})
    expected = hf(image, return_tensors="np")
    patches, grid = image_patches(image, spec)
    assert patches.dtype == np.uint8 and patches.flags.c_contiguous
    assert grid == tuple(expected["image_grid_thw"][0].tolist())
    np.testing.assert_allclose(normalised(patches, spec), expected["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_equal_transformers(size):
    assert_same_as_hf(noise(*size), ImageSpec(max_pixels=400_000))


@pytest.mark.parametrize("budget", [(1, 28 * 28), (3136, 3136), (50_000, 60_000), (3136, 589_824)], ids=str)
def test_patches_equal_transformers_on_other_budgets(budget):
    for size in [(31, 77), (500, 333)]:
        assert_same_as_hf(noise(*size), ImageSpec(min_pixels=budget[0], max_pixels=budget[1]))


@pytest.mark.skipif(not GEOMETRY.is_dir(), reason="needs shared/real/geometry3k beside the checkout")
def test_real_images_equal_transformers():
    files = sorted((GEOMETRY / "images").iterdir())
    assert len(files) == 10
    for file in files:
        assert_same_as_hf(load_image(file), ImageSpec(max_pixels=400_000))


def test_smart_resize_equals_transformers_on_every_small_size():
    budget = {"factor": 28, "min_pixels": 3136, "max_pixels": 40_000}
    for height in range(1, 300, 3):
        for width in range(1, 300, 7):
            if max(height, width) <= 200 * min(height, width):
                assert smart_resize(height, width, **budget) == hf_smart_resize(height, width, **budget)


def test_smart_resize_by_hand():
    budget = {"factor": 28, "min_pixels": 3136, "max_pixels": 400_000}
    assert smart_resize(70, 126, **budget) == (56, 112)  # 2.5 -> 2 and 4.5 -> 4: Python rounds halves to even
    assert smart_resize(1, 1, **budget) == (56, 56)
    height, width = smart_resize(3000, 4000, **budget)
    assert (height, width) == (532, 728) and height * width <= 400_000
    assert smart_resize(28, 5600, factor=28, min_pixels=1, max_pixels=784) == (28, 392)  # never below one factor


@pytest.mark.parametrize("size", [(300, 1), (1, 201), (0, 5)], ids=str)
def test_smart_resize_refuses(size):
    with pytest.raises(ValueError, match=f"{size[1]}x{size[0]} pixels; expected .* 200 times"):
        smart_resize(*size, factor=28, min_pixels=3136, max_pixels=400_000)


def test_row_order_by_hand():
    # One 28-pixel token across, two down; the value of a pixel is its row.
    image = Image.fromarray(np.repeat(np.arange(56, dtype=np.uint8)[:, None], 28, 1)).convert("RGB")
    patches, grid = image_patches(image, ImageSpec(min_pixels=1))
    assert grid == (1, 4, 2) and patches.shape == (8, 1176)
    tops = patches.reshape(8, 3, 2, 14, 14)[:, 0, 0, 0, 0]
    np.testing.assert_array_equal(tops, [0, 0, 14, 14, 28, 28, 42, 42])
    np.testing.assert_array_equal(patches.reshape(8, 3, 2, -1)[:, :, 0], patches.reshape(8, 3, 2, -1)[:, :, 1])


def test_column_order_by_hand():
    # Inside a row of patches: channel, frame, y, x. Red is 10, green 100 plus its row, blue 200 plus its column.
    red, green, blue = np.full((28, 28), 10), 100 + np.arange(28)[:, None], 200 + np.arange(28)
    pixels = np.stack(np.broadcast_arrays(red, green, blue), -1).astype(np.uint8)
    second = np.where(np.arange(3) == 0, 11, pixels).astype(np.uint8)
    frames = [Image.fromarray(pixels), Image.fromarray(second)]
    patches, _ = video_patches(frames, ImageSpec(min_pixels=1))
    got = patches.reshape(2, 2, 3, 2, 14, 14)  # mh, mw, c, T, ph, pw
    assert set(got[:, :, 0, 0].flat) == {10} and set(got[:, :, 0, 1].flat) == {11}
    for T in (0, 1):
        for block in (0, 1):
            np.testing.assert_array_equal(got[block, 0, 1, T, :, 0], 100 + 14 * block + np.arange(14))
            np.testing.assert_array_equal(got[0, block, 2, T, 0], 200 + 14 * block + np.arange(14))


def test_a_still_image_is_resized_once(monkeypatch):
    calls, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **options: calls.append(0) or resize(*args, **options))
    image_patches(noise(90, 120), ImageSpec())
    assert len(calls) == 1


def test_video_patches():
    spec = ImageSpec(max_pixels=20_000)
    frames = [noise(90, 120, seed) for seed in range(3)]
    patches, grid = video_patches(frames, spec)
    stills = [image_patches(frame, spec)[0].reshape(-1, 3, 2, 196) for frame in frames]
    assert grid == (2, 8, 6) and patches.shape == (96, 1176)
    got = patches.reshape(2, 48, 3, 2, 196)
    for t, T, frame in [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 2)]:  # the last frame stands twice
        np.testing.assert_array_equal(got[t, :, :, T], stills[frame][:, :, 0])
    still, still_grid = image_patches(frames[0], spec)
    single, single_grid = video_patches(frames[:1], spec)
    assert single_grid == still_grid
    np.testing.assert_array_equal(single, still)


def test_video_refuses():
    with pytest.raises(ValueError, match="without frames"):
        video_patches([], ImageSpec())
    with pytest.raises(ValueError, match=r"sizes \[\(28, 28\), \(28, 56\)\]; expected one size"):
        video_patches([noise(28, 28), noise(28, 56)], ImageSpec())


def test_alpha_goes_over_white():
    for mode, pixel, expected in [
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # 0.2 black on white
        ("LA", (0, 51), (204, 204, 204)),
        ("La", (0, 0), (255, 255, 255)),
    ]:
        assert to_rgb(Image.new(mode, (2, 2), pixel)).getpixel((0, 0)) == expected


def test_transparent_palette_and_colour_key(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    opaque = load_image(saved(tmp_path, palette, "p.png"))
    assert [opaque.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (200, 100, 50)]
    keyed = load_image(saved(tmp_path, palette, "k.png", transparency=0))
    assert [keyed.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]
    rgb = load_image(saved(tmp_path, Image.new("RGB", (1, 1), (1, 2, 3)), "r.png", transparency=(1, 2, 3)))
    assert rgb.getpixel((0, 0)) == (255, 255, 255)


def test_other_modes(tmp_path):
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert deep.mode == "I;16"
    loaded = load_image(saved(tmp_path, deep, "deep.png"))
    assert [loaded.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]
    assert to_rgb(Image.fromarray(np.array([[65535]], np.int32))).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "LA", "RGBA"):
        assert load_image(saved(tmp_path, noise(9, 7, mode=mode), f"{mode}.png")).mode == "RGB"
    assert load_image(saved(tmp_path, noise(9, 7, mode="CMYK"), "c.jpg")).mode == "RGB"
    assert load_image(saved(tmp_path, Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "c.tif")).getpixel((0, 0))[0] == 255
    assert load_image(saved(tmp_path, Image.new("1", (3, 3), 1), "b.png")).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="f.tif.*expected 8 or 16 bits"):
        load_image(saved(tmp_path, Image.new("F", (3, 3)), "f.tif"))
    with pytest.raises(ValueError, match="expected 0 to 65535"):
        to_rgb(Image.fromarray(np.array([[-1]], np.int32)))


def test_exif_orientation_and_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    upright = load_image(saved(tmp_path, image, "e.jpg", exif=exif))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[0] < 50
    assert load_image(saved(tmp_path, image, "m.mpo", save_all=True, append_images=[image])).size == (40, 20)
    assert load_image(saved(tmp_path, image, "w.webp")).size == (40, 20)
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    assert load_image(saved(tmp_path, first, "a.gif", save_all=True, append_images=[second])).getpixel((0, 0))[0] > 200


def test_damaged_files(tmp_path):
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "PNG")
    whole = buffer.getvalue()
    files = {
        "truncated.png": whole[: len(whole) // 2],
        "header.png": whole[:20],
        "empty.png": b"",
        "text.png": b"not an image\n",
        "chunk.png": whole[:40] + b"\xff" * 60 + whole[100:],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as an image .*expected a complete PNG"):
            load_image(tmp_path / name)
    for missing in (tmp_path / "none.png", tmp_path, "a\0b.png"):
        with pytest.raises(ValueError, match="no such image file"):
            load_image(missing)


def test_truncation_anywhere_is_noticed(tmp_path):
    buffer = io.BytesIO()
    noise(40, 40).save(buffer, "PNG")
    whole = buffer.getvalue()
    idat_end = len(whole) - 12 - 4 - 8  # before IEND and the last chunk's checksum and a few bytes
    for cut in np.linspace(1, idat_end, 25).astype(int):
        (tmp_path / "cut.png").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut.png"):
            load_image(tmp_path / "cut.png")


def test_bytes_of_an_image_file(tmp_path):
    path = saved(tmp_path, noise(9, 7), "x.png")
    whole = path.read_bytes()
    for image in (load_image(whole), load_image(np.bytes_(whole))):
        np.testing.assert_array_equal(image, load_image(path))
    with pytest.raises(ValueError, match="^image file of 30 bytes: cannot be read as an image"):
        load_image(whole[:30])
    for source in (whole[:30], saved(tmp_path, Image.new("F", (3, 3)), "f.tif"), tmp_path / "none.png"):
        with pytest.raises(ValueError, match="^row 7, image 2: (?!.*none.png)"):
            load_image(source, name="row 7, image 2")


def test_decompression_bomb(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("1", (300, 300)), "bomb.png")
    monkeypatch.setattr(image_files, "MAX_PIXELS", 300 * 300)
    load_image(path)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 300 * 300 - 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # refused before pixels are decoded
    with pytest.raises(ValueError, match="bomb.png: image is 300x300 pixels, 90000 in all; expected at most 89999"):
        load_image(path)


@pytest.mark.parametrize(
    ("names", "limit"),
    [
        (("x.png", "x.jpg", "x.webp", "x.gif", "x.bmp", "x.tif", "x.ppm"), 40 * 30 - 1),  # PIL would warn
        (("x.png", "x.jpg", "x.gif", "x.bmp", "x.ppm"), 40 * 30 // 2 - 1),  # PIL would refuse
    ],
)
def test_the_limit_is_ours_and_not_pils(tmp_path, monkeypatch, names, limit):
    paths = [saved(tmp_path, Image.new("RGB", (40, 30), "red"), name) for name in names]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for path in paths:
            assert load_image(path).size == (40, 30)
    assert not seen


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path):
    path = saved(tmp_path, noise(4, 4))
    path.chmod(0)
    with pytest.raises(ValueError, match="PermissionError"):
        load_image(path)


def test_spec_from_folder(tmp_path):
    assert ImageSpec.from_folder(tmp_path) == ImageSpec()
    hf = Qwen2VLImageProcessorPil()
    assert ImageSpec().mean == tuple(hf.image_mean) and ImageSpec().std == tuple(hf.image_std)
    assert (ImageSpec().min_pixels, ImageSpec().max_pixels) == (hf.size["shortest_edge"], hf.size["longest_edge"])
    path = tmp_path / "preprocessor_config.json"
    for fields in (
        {"min_pixels": 4000, "max_pixels": 50_000},
        {"size": {"shortest_edge": 4000, "longest_edge": 50_000}},
        {"size": {"min_pixels": 4000, "max_pixels": 50_000}},
    ):
        path.write_text(json.dumps(fields | {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "merge_size": 4}))
        spec = ImageSpec.from_folder(tmp_path)
        assert (spec.min_pixels, spec.max_pixels, spec.factor) == (4000, 50_000, 56)
        assert (spec.mean, spec.std) == ((0, 0, 0), (1, 1, 1))
        assert ImageSpec.from_folder(tmp_path, max_pixels=5000).max_pixels == 5000
    path.unlink()
    hf.size = {"shortest_edge": 3200, "longest_edge": 6400}
    hf.save_pretrained(tmp_path)
    assert ImageSpec.from_folder(tmp_path) == ImageSpec(min_pixels=3200, max_pixels=6400)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(path.read_text())}))
    path.unlink()
    assert ImageSpec.from_folder(tmp_path) == ImageSpec(min_pixels=3200, max_pixels=6400)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resample": 2}, "resample is 2; only 3"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"min_pixels": 10_000, "max_pixels": 5000}, "max_pixels is 5000; expected at least min_pixels"),
        ({"min_pixels": 1, "max_pixels": 100}, "one image token"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"image_mean": [0.5]}, "image mean"),
        ({"image_std": [1, 0, 1]}, "image std"),
    ],
)
def test_spec_refuses(tmp_path, fields, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{message}"):
        ImageSpec.from_folder(tmp_path)
