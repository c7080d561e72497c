"""Which frames of a video file are taken, what they look like, and what a file that cannot serve is told.

Every video is made here; its frames carry their number as black and white squares, which any codec keeps.
"""

import builtins
import itertools
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from r1vl_jax.processing import videos
from r1vl_jax.processing.images import ImageSpec, video_patches
from r1vl_jax.processing.videos import VideoSpec, load_video, pick_frames, sample_times

BITS = 12
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def numbered(number):
    """(32, 192) gray: the bits of a number as squares of 16 pixels in the upper half."""
    squares = np.array([[number >> bit & 1 for bit in range(BITS)], [0] * BITS], np.uint8) * 255
    return np.kron(squares, np.ones((16, 16), np.uint8))


def numbers(frames):
    """The numbers of frames; 4095 for what is no frame of ours but white."""
    found = []
    for frame in frames:
        assert frame.mode == "RGB" and frame.size == (192, 32)
        squares = np.asarray(frame.convert("L"))[8, 8::16] > 127
        found.append(sum(int(square) << bit for bit, square in enumerate(squares)))
    return found


def encode(container, stream, pictures, times=None):
    for i, picture in enumerate(pictures):
        kind = "gray" if picture.ndim == 2 else "rgb24"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=kind)
        if times is not None:
            frame.pts, frame.time_base = times[i], Fraction(1, 1000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write(path, pictures=50, *, codec="mpeg4", rate=25, times=None, rotation=0, options=None, **container_options):
    """A video of numbered frames, or of given pictures; `times` in milliseconds in place of a constant rate."""
    pictures = [numbered(i) for i in range(pictures)] if isinstance(pictures, int) else pictures
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        encode(container, stream, pictures, times)
    return path


def write_gif(path, count=50):
    first, *others = (Image.fromarray(numbered(i)) for i in range(count))
    first.save(path, save_all=True, append_images=others, duration=40)
    return path


def write_sound(path, codec, cover=False):
    with av.open(str(path), "w") as container:
        sound = container.add_stream(codec, rate=44100)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 192, 32, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            encode(container, picture, [numbered(1)])
        kind = "s16" if codec.startswith("pcm") else "fltp"
        silence = np.zeros((1, 2048), np.int16) if kind == "s16" else np.zeros((2, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format=kind, layout="stereo")
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def overwritten(path, begin, end):
    """The file with 0xff from one part of its length to another."""
    content = bytearray(path.read_bytes())
    begin, end = (int(part * len(content)) for part in (begin, end))
    content[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(content)
    return path


def shortened(path, part):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    return path


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("x.mp4", "mpeg4"), ("b.mp4", "libx264"), ("x.mov", "mjpeg"), ("x.mkv", "libx264"), ("x.webm", "libvpx"),
        ("x.avi", "mpeg4"), ("x.ts", "libx264"), ("x.mpg", "mpeg2video"), ("x.flv", "flv"), ("x.wmv", "wmv2"),
        ("x.h264", "libx264"), ("x.gif", "gif"),
    ],
    ids=str,
)  # fmt: skip
def test_two_frames_a_second_in_every_format(tmp_path, name, codec):
    path = write_gif(tmp_path / name) if codec == "gif" else write(tmp_path / name, codec=codec)
    # 0.5 s lies between the frames 12 and 13, at 0.48 s and 0.52 s: the earlier is taken.
    assert numbers(load_video(path, VideoSpec())) == [0, 12, 25, 37]
    assert numbers(load_video(str(path), VideoSpec(max_frames=2))) == [0, 49]


def test_times_that_run_backwards(tmp_path):
    # AVI cannot say when the B-frames of H.264 are shown: FFmpeg gives 0.04 s, 0.12, 0.16, 0.08, 0.28, ...
    found = numbers(load_video(write(tmp_path / "x.avi", codec="libx264"), VideoSpec()))
    np.testing.assert_allclose(found, [0, 12, 25, 37], atol=2)


@pytest.mark.parametrize("name", ["x.mkv", "x.mp4"])
@pytest.mark.parametrize("start", [0, 7300])
def test_variable_frame_rate(tmp_path, name, start):
    times = [start + time for time in (0, 100, 110, 120, 900, 1000, 1400, 2600, 3000)]
    path = write(tmp_path / name, len(times), codec="libx264", times=times)
    # Sampled at 0, 0.5, 1, 1.5, 2 (as near to 1.4 as to 2.6), 2.5, 3, and to be even at 3.5.
    assert numbers(load_video(path, VideoSpec())) == [0, 3, 5, 6, 6, 7, 8, 8]
    assert numbers(load_video(path, VideoSpec(max_frames=4))) == [0, 5, 6, 8]  # at 0, 1, 2, 3


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [0, 0]), (2, [0, 1]), (3, [0, 2]), (4, [0, 2]), (5, [0, 2, 4, 4]), (6, [0, 2, 4, 5]), (7, [0, 2, 4, 6]),
        (8, [0, 2, 4, 6]), (9, [0, 2, 4, 6, 8, 8]), (12, [0, 2, 4, 6, 8, 10]), (13, [0, 2, 5, 7, 10, 12]),
        (40, [0, 8, 16, 23, 31, 39]),
    ],
)  # fmt: skip
def test_even_numbers_of_frames(tmp_path, count, expected):
    path = write(tmp_path / "x.mkv", count, rate=4)
    assert numbers(load_video(path, VideoSpec(max_frames=6))) == expected


def test_other_frame_rates(tmp_path):
    path = write(tmp_path / "x.mp4", 41, rate=10)
    assert numbers(load_video(path, VideoSpec(fps=1))) == [0, 10, 20, 30, 40, 40]
    assert numbers(load_video(path, VideoSpec(fps=0.5))) == [0, 20, 40, 40]
    assert numbers(load_video(path, VideoSpec(fps=0.1))) == [0, 40]
    assert numbers(load_video(path, VideoSpec(fps=10, max_frames=64))) == [*range(41), 40]
    assert numbers(load_video(path, VideoSpec(fps=20, max_frames=128))) == [*np.repeat(range(41), 2)[:-1], 40]


def test_sample_times():
    half = Fraction(1, 2)
    assert sample_times(Fraction(0), VideoSpec()) == [0, half]
    assert sample_times(Fraction(15, 2), VideoSpec()) == [half * k for k in range(16)]
    assert sample_times(Fraction(15, 2) + half, VideoSpec()) == [Fraction(8 * k, 15) for k in range(16)]
    # As floats, 0.3 a second would miss the last of these.
    assert sample_times(Fraction(10), VideoSpec(fps=0.3)) == [Fraction(10 * k, 3) for k in range(4)]
    assert sample_times(Fraction(10**9), VideoSpec(fps=1e6, max_frames=4))[-1] == 10**9


def test_pick_frames():
    assert pick_frames(0, 16) == [] and pick_frames(5, 16) == [0, 1, 2, 3, 4] and pick_frames(4, 4) == [0, 1, 2, 3]
    assert pick_frames(100, 4) == [0, 33, 66, 99] and pick_frames(5, 2) == [0, 4]
    for limit in (2, 4, 16, 30):
        for count in range(limit + 1, 120):
            picked = pick_frames(count, limit)
            gaps = {b - a for a, b in itertools.pairwise(picked)}
            assert len(picked) == limit and (picked[0], picked[-1]) == (0, count - 1)
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
            assert all(type(index) is int for index in picked)


def test_long_video_is_not_held_in_memory(tmp_path, monkeypatch):
    live, most, decoded, converted = 0, 0, 0, 0

    class Counted:
        def __init__(self, frame):
            nonlocal live, most, decoded
            self.frame, live, decoded = frame, live + 1, decoded + 1
            most = max(most, live)

        def __del__(self):
            nonlocal live
            live -= 1

        def __getattr__(self, name):
            nonlocal converted
            converted += name == "to_ndarray"
            return getattr(self.frame, name)

    path = write(tmp_path / "x.mp4", 2000)
    frames = videos._frames
    monkeypatch.setattr(videos, "_frames", lambda *args: (Counted(frame) for frame in frames(*args)))
    picked = load_video(path, VideoSpec())
    assert numbers(picked) == [int(1999 * k / 15 + 0.5) for k in range(16)]  # no index is a half
    assert (decoded, converted, live) == (2000, 16, 0) and most <= 3


def test_frames_go_into_patches(tmp_path):
    frames = load_video(write(tmp_path / "x.mp4"), VideoSpec())
    patches, grid = video_patches(frames, ImageSpec(max_pixels=VideoSpec().max_pixels))
    assert grid == (2, 2, 14) and patches.shape == (2 * 2 * 14, 1176) and patches.dtype == np.uint8


@pytest.mark.parametrize(
    ("rotation", "size", "expected"),
    [
        (0, (64, 32), [RED, GREEN, BLUE, WHITE]),
        (-90, (32, 64), [BLUE, RED, WHITE, GREEN]),  # clockwise, as a phone held upright writes it
        (90, (32, 64), [GREEN, WHITE, RED, BLUE]),
        (180, (64, 32), [WHITE, BLUE, GREEN, RED]),
    ],
)
def test_rotation(tmp_path, rotation, size, expected):
    quarters = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(16, 0).repeat(32, 1)
    path = write(tmp_path / "x.mp4", [quarters] * 3, codec="libx264", options={"qp": "0"}, rotation=rotation)
    if rotation == -90:  # the matrix of QuickTime (ISO 14496-12, 8.3.2): (x, y) is shown at (-y, x), y pointing down
        assert struct.pack(">6i", 0, 1 << 16, 0, -1 << 16, 0, 0) in path.read_bytes()
    for frame in load_video(path, VideoSpec()):
        assert frame.size == size
        places = [(x, y) for y in (size[1] // 4, size[1] * 3 // 4) for x in (size[0] // 4, size[0] * 3 // 4)]
        assert np.abs(np.array([frame.getpixel(place) for place in places]) - expected).max() <= 12


def test_frames_of_several_sizes_take_the_first(tmp_path):
    path = tmp_path / "x.mjpeg"  # JPEG files one behind the other
    with open(path, "wb") as file:
        for number in range(50):
            image = Image.fromarray(numbered(number))
            (image if number < 20 else image.resize((96, 16))).save(file, "JPEG")
    assert numbers(load_video(path, VideoSpec())) == [0, 12, 25, 37]


def test_transparent_parts_become_white(tmp_path):
    clear = Image.new("P", (192, 32), 1)
    clear.putpalette([0, 0, 0, 200, 100, 50])
    clear.save(tmp_path / "x.gif", transparency=1)
    assert numbers(load_video(tmp_path / "x.gif", VideoSpec())) == [4095, 4095]
    frames = [Image.new("RGBA", (192, 32), (0, 255 * i, 0, 51)) for i in (0, 1)]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:], duration=1000)
    colors = [frame.getpixel((9, 9)) for frame in load_video(tmp_path / "x.png", VideoSpec())]
    assert colors == [(204, 204, 204), (204, 204, 204), (204, 255, 204), (204, 255, 204)]


@pytest.mark.parametrize(("name", "codec"), [("x.mkv", "mpeg4"), ("x.ts", "libx264"), ("fast.mp4", "mjpeg")])
def test_cut_short_is_sampled_over_what_there_is(tmp_path, name, codec):
    options = {"movflags": "faststart"} if name == "fast.mp4" else {}
    whole = write(tmp_path / name, 200, codec=codec, options={"g": "12"}, **options)
    assert numbers(load_video(whole, VideoSpec(max_frames=2)))[-1] == 199
    path = shortened(whole, 0.6)
    first, last = numbers(load_video(path, VideoSpec(max_frames=2)))
    assert first == 0 and 80 < last < 150
    expected = [0, *(pytest.approx(last * k / 3, abs=0.51) for k in (1, 2)), last]
    assert numbers(load_video(path, VideoSpec(max_frames=4))) == expected


def test_damaged_frames_are_passed_over(tmp_path):
    # All packets are there and say 200 frames; those behind the middle cannot be decoded.
    path = overwritten(write(tmp_path / "x.mp4", 200, codec="mjpeg", movflags="faststart"), 0.5, 1)
    _, last = numbers(load_video(path, VideoSpec(max_frames=2)))
    assert 80 < last < 110
    expected = [0, *(pytest.approx(last * k / 3, abs=0.51) for k in (1, 2)), last]
    assert numbers(load_video(path, VideoSpec(max_frames=4))) == expected
    # Damage in the middle leaves a gap, which its neighbours fill.
    path = overwritten(write(tmp_path / "y.mp4", 200, codec="mjpeg", movflags="faststart"), 0.4, 0.6)
    found = numbers(load_video(path, VideoSpec(max_frames=6)))
    assert [found[k] for k in (0, 1, 4, 5)] == [0, 40, 159, 199]
    assert 70 < found[2] < 85 and 115 < found[3] < 130


def test_the_same_every_time(tmp_path):
    path = overwritten(write(tmp_path / "x.mp4", 200, codec="libx264"), 0.3, 0.5)
    runs = [[frame.tobytes() for frame in load_video(path, VideoSpec(max_frames=64, fps=10))] for _ in range(3)]
    assert len(runs[0]) == 64 and runs[0] == runs[1] == runs[2]


def test_a_trimmed_video_starts_where_its_edit_list_says(tmp_path):
    path = write(tmp_path / "x.mp4", codec="libx264")
    content = bytearray(path.read_bytes())
    begin = content.index(b"elst") + 16  # 4: name, 4: version, 4: one entry, 4: its duration (ISO 14496-12, 8.6.6)
    (media_time,) = struct.unpack_from(">i", content, begin)
    struct.pack_into(">i", content, begin, media_time + 20 * 512)  # frames of 512 ticks
    path.write_bytes(content)
    assert numbers(load_video(path, VideoSpec(max_frames=2))) == [20, 49]
    assert numbers(load_video(path, VideoSpec())) == [20, 32, 45, 49]


def test_odd_names_and_metadata(tmp_path, monkeypatch):
    path = write(tmp_path / "x.mkv")
    with av.open(str(path)) as source, av.open(str(tmp_path / "titled.mkv"), "w") as target:
        target.metadata["title"] = "A TITLE!"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    titled = (tmp_path / "titled.mkv").read_bytes()
    assert titled.count(b"A TITLE!") == 1
    (tmp_path / "titled.mkv").write_bytes(titled.replace(b"A TITLE!", b"\xff" * 8))  # no text in UTF-8
    path.rename(tmp_path / "http:x.mkv")  # no address
    monkeypatch.chdir(tmp_path)
    for name in ("titled.mkv", "http:x.mkv"):
        assert numbers(load_video(name, VideoSpec())) == [0, 12, 25, 37]


def test_two_recordings_in_one_file(tmp_path):
    # The clock starts again in the middle: the second recording is not seen, and nothing fails.
    recordings = [write(tmp_path / f"{count}.ts", count, codec="libx264").read_bytes() for count in (50, 20)]
    (tmp_path / "two.ts").write_bytes(b"".join(recordings))
    assert numbers(load_video(tmp_path / "two.ts", VideoSpec())) == [0, 12, 25, 37]


CONCAT = b"ffconcat version 1.0\nfile x.mp4\n"
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nx.mp4\n#EXT-X-ENDLIST\n"
UNREADABLE = r"cannot be read as a video \(\w+: [\w ]+\); expected a file of one of the formats mov, .*gif"
REFUSED = {
    "missing.mp4": (lambda path: None, "no such video file"),
    "folder.mp4": (lambda path: path.mkdir(), "no such video file"),
    "empty.mp4": (b"", UNREADABLE),
    "text.mp4": (b"not a video\n", UNREADABLE),
    "zeros.mp4": (bytes(5000), UNREADABLE),
    "page.mp4": (b"<!DOCTYPE html><html><title>404 Not Found</title></html>", UNREADABLE),
    "subtitles.srt": (b"1\n00:00:01,000 --> 00:00:02,000\nhello\n", UNREADABLE),
    "picture.png": (lambda path: Image.new("RGB", (64, 64)).save(path), UNREADABLE),
    "sound.wav": (lambda path: write_sound(path, "pcm_s16le"), UNREADABLE),
    "sound.mp4": (lambda path: write_sound(path, "aac"), r"no video stream \(found: audio\); expected one"),
    "cover.mp4": (lambda path: write_sound(path, "aac", cover=True), r"no video stream \(.*cover picture\)"),
    # These name other files, which FFmpeg would open.
    "others.mp4": (CONCAT, UNREADABLE),
    "others.m3u8": (PLAYLIST, UNREADABLE),
    # An mp4 has its index at the end, and so nothing without it.
    "cut.mp4": (lambda path: shortened(write(path), 0.6), r"no video stream \(found: nothing\); expected one"),
    "no_frame.mp4": (
        lambda path: shortened(write(path, 3, codec="mjpeg", movflags="faststart"), 0.4),
        "no frame can be decoded; expected a video of at least one",
    ),
    "no_frame.gif": (lambda path: shortened(write_gif(path, 1), 0.2), "no frame can be decoded; expected a video of"),
    "codec.avi": (
        lambda path: path.write_bytes(write(path).read_bytes().replace(b"FMP4", b"ZZZZ")),
        "no frame can be decoded; expected a video of at least one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(tmp_path, name):
    make, message = REFUSED[name]
    path = tmp_path / name
    write(tmp_path / "x.mp4")
    path.write_bytes(make) if isinstance(make, bytes) else make(path)
    with pytest.raises(ValueError, match=f"^{path}: ({message})"):
        load_video(path, VideoSpec())


def test_without_pyav(tmp_path, monkeypatch):
    path, load = write(tmp_path / "x.mp4"), builtins.__import__

    def without(name, *args, **options):
        if name.split(".")[0] == "av":
            raise ImportError(name)
        return load(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="^reading video files needs PyAV: pip install av$"):
        load_video(path, VideoSpec())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *(("fps", value, "a positive number") for value in (0, -1.0, float("nan"), float("inf"), "2", None, True)),
        *(("max_frames", value, "a whole number of at least 2") for value in (0, 1, -2, 4.0, "4", True)),
        ("max_frames", 15, "an even number"),
        *(("max_pixels", value, "a whole number of at least 784") for value in (0, 783, 1e5, None)),
    ],
)
def test_spec_refuses(field, value, message):
    with pytest.raises(ValueError, match=f"^{field} is {value!r}; expected {message}"):
        VideoSpec(**{field: value})


def test_spec_defaults():
    assert VideoSpec() == VideoSpec(fps=2.0, max_frames=16, max_pixels=100_352)
    assert VideoSpec(fps=1, max_frames=2, max_pixels=784).max_pixels == 784
