"""Video files to a few upright RGB frames, taken at even times.

Flow: data -> processing (here) -> rollout; `images.video_patches` cuts the frames. As in Qwen's qwen_vl_utils, two
frames a second (`fps`) and an even number of them, since a patch spans two; a video with more than `max_frames` gives
so many, spread over its whole length from the first frame to the last. Where that package counts frames, the times
that the file gives them are used here, so that a variable frame rate does no harm; and where a video has an odd number
of sampling times, it gets one more and not one less: that time lies behind the end, and its frame is the last.

A file is read twice: its packets' times, without decoding, say how long it is; then it is decoded from front to end,
two frames in memory at a time, the decoder's own, and those that are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from r1vl_jax.processing.images import to_rgb

if TYPE_CHECKING:
    import av

# Formats that FFmpeg may try. Others (hls, concat) are lists of further files, which it would open and read.
FORMATS = (
    "mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "flv", "asf", "ogg",
    "ivf", "mjpeg", "gif", "apng",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VideoSpec:
    """Which frames of a video are taken.

    Attributes:
      fps: frames a second.
      max_frames: the most for one video, even; a longer one gives so many, spread over its length.
      max_pixels: budget for height * width of each frame after resizing; the caller puts it into its ImageSpec.
    """

    fps: float = 2.0
    max_frames: int = 16
    max_pixels: int = 128 * 28 * 28

    def __post_init__(self):
        if isinstance(self.fps, bool) or not isinstance(self.fps, (int, float)) or not 0 < self.fps < math.inf:
            raise ValueError(f"fps is {self.fps!r}; expected a positive number")
        for field, least in (("max_frames", 2), ("max_pixels", 28 * 28)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field} is {value!r}; expected a whole number of at least {least}")
        if self.max_frames % 2:
            raise ValueError(f"max_frames is {self.max_frames}; expected an even number, since a patch spans two")


def load_video(path: str | os.PathLike, spec: VideoSpec) -> list[Image.Image]:
    """Reads the frames of a video file that are nearest to the sampling times: RGB, upright, of one size.

    Rotation is applied as the file asks for it; where frames differ in size, they take that of the first. A file that
    is damaged or cut short gives what can be decoded, as if it were no longer than that.

    Returns: an even number of frames, 2 to spec.max_frames. A frame stands twice where it is the nearest to two times,
      as that of a video with one frame is.
    Raises: ValueError that names the path and what was expected, for a file that is missing, not a video, or without a
      frame that can be decoded; or that says that PyAV is missing.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such video file")
    av = _pyav()
    try:
        announced = _packet_span(path)
        frames, span = _nearest_frames(path, sample_times(announced, spec))
        if span != announced:  # packets may be damaged, or cut off by the file's own edit list: sample what is shown
            frames, span = _nearest_frames(path, sample_times(span, spec))
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path}: cannot be read as a video ({type(error).__name__}: {error.strerror}); expected a file of one of "
            f"the formats {', '.join(FORMATS)}"
        ) from error
    return [frame if frame.size == frames[0].size else frame.resize(frames[0].size) for frame in frames]


def sample_times(span: Fraction, spec: VideoSpec) -> list[Fraction]:
    """When frames are taken, in seconds after the first frame, for a video whose last one begins `span` after it.

    Returns: an even number, ascending: every 1/fps seconds, or max_frames spread from 0 to `span` if those were more.
    """
    fps = Fraction(str(spec.fps))  # as it is written: 0.3, not the float next to it
    count = math.floor(span * fps) + 1
    count += count % 2
    if count <= spec.max_frames:
        return [k / fps for k in range(count)]
    return [span * k / (spec.max_frames - 1) for k in range(spec.max_frames)]


def pick_frames(count: int, limit: int) -> list[int]:
    """Which of a video's `count` frames are taken where at most `limit` may be: all, or `limit` from first to last."""
    if count <= limit:
        return list(range(count))
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def _packet_span(path: str | os.PathLike) -> Fraction:
    """Seconds from the first to the last frame, from the packets alone; 0 if there is none."""
    with _open(path) as container:
        stream = _video_stream(container, path)
        times = [_seconds(packet, number, stream) for number, packet in enumerate(_packets(container, stream))]
    return max(times, default=Fraction(0)) - min(times, default=Fraction(0))


def _nearest_frames(path: str | os.PathLike, times: Sequence[Fraction]) -> tuple[list[Image.Image], Fraction]:
    """For each of `times`, ascending, the frame nearest to it (of two, the earlier), and the seconds to the last one.

    Raises: ValueError if no frame can be decoded.
    """
    images: list[Image.Image] = []

    def take(frame: av.VideoFrame, until: Fraction | float) -> None:
        """Gives the frame to all times up to `until` that have none."""
        if count := bisect_right(times, until, lo=len(images)) - len(images):
            images.extend([_upright(frame)] * count)

    start = latest = None
    span = Fraction(0)  # when the latest frame is shown
    with _open(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"  # several frames at once
        for number, frame in enumerate(_frames(container, stream)):
            seconds = _seconds(frame, number, stream)
            if latest is None:
                start = seconds
            else:
                take(latest, until=(span + max(span, seconds - start)) / 2)
            latest, span = frame, max(span, seconds - start)  # max: in a broken file times may run backwards
        if latest is None:
            raise ValueError(f"{path}: no frame can be decoded; expected a video of at least one")
        take(latest, until=math.inf)
    return images, span


def _open(path: str | os.PathLike) -> av.container.InputContainer:
    return _pyav().open(
        f"file:{os.fsdecode(path)}",  # without "file:" a name with a colon would be the address of something else
        metadata_errors="replace",
        options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"},
    )


def _video_stream(container: av.container.InputContainer, path: str | os.PathLike) -> av.VideoStream:
    """The first video stream that is no cover picture of a piece of music."""
    cover = _pyav().stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover:
            return stream
    kinds = ("cover picture" if stream.type == "video" else stream.type for stream in container.streams)
    found = ", ".join(kinds) or "nothing"
    raise ValueError(f"{path}: no video stream (found: {found}); expected one")


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The stream's packets, up to the end or to where the file cannot be read on."""
    with contextlib.suppress(_pyav().error.FFmpegError):
        for packet in container.demux(stream):
            if packet.size:  # the last one is empty: it asks a decoder for what it still holds
                yield packet


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The stream's frames in the order they are shown; packets that cannot be decoded are passed over."""
    for packet in itertools.chain(_packets(container, stream), [None]):
        with contextlib.suppress(_pyav().error.FFmpegError):
            yield from stream.decode(packet)


def _seconds(item: av.Packet | av.VideoFrame, number: int, stream: av.VideoStream) -> Fraction:
    """When a frame is shown; raw streams do not say so, and theirs are counted."""
    for ticks in (item.pts, item.dts):
        if ticks is not None:
            return ticks * stream.time_base
    return number / Fraction(stream.average_rate or 25)


def _upright(frame: av.VideoFrame) -> Image.Image:
    """A decoded frame as RGB, rotated as its file asks for it; the transparent parts of a GIF become white."""
    transparent = any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba" if transparent else "rgb24"))
    return to_rgb(image).rotate(round(frame.rotation / 90) * 90, expand=True)


def _pyav() -> ModuleType:
    """PyAV, imported only here: whoever has no videos needs no FFmpeg."""
    try:
        import av
    except ImportError as error:
        raise ValueError("reading video files needs PyAV: pip install av") from error
    return av
