"""Samples a few frames of a video file at regular times, and returns them as upright RGB images.

Flow: data -> processing (here) -> rollout; `images.video_patches` cuts the frames into patches. As in Qwen's
qwen_vl_utils, `fps` frames per second (default: 2) are sampled. The number of frames is even, since a patch spans two
frames. If it would be more than `max_frames`, `max_frames` frames are sampled at equal distances from the first frame
to the last.

There are two differences from qwen_vl_utils. It counts frames, but this module uses the times in the file, so a
variable frame rate is sampled correctly. And if the number of sampling times is odd, this module adds a time and does
not remove one. The added time is after the end, so its frame is the last one.

A file is read twice: first the times of its packets, without decoding, to find its length; then it is decoded from
start to end. At any time two frames, the decoder's own frames and the sampled frames are in memory.
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

from r1vl_jax.common.image_files import to_rgb

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

# Formats that FFmpeg may try. Others (hls, concat) are lists of further files, which FFmpeg would open.
FORMATS = (
    "mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "flv", "asf", "ogg",
    "ivf", "mjpeg", "gif", "apng",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VideoSpec:
    """The settings for sampling frames of a video.

    Attributes:
      fps: frames per second.
      max_frames: maximum number of frames per video, an even number. A longer video is sampled less densely.
      max_pixels: budget for height * width of each frame after resizing; applied by Processor.
    """

    fps: float = 2.0
    max_frames: int = 16
    max_pixels: int = 128 * 28 * 28

    def __post_init__(self) -> None:
        if isinstance(self.fps, bool) or not isinstance(self.fps, (int, float)) or not 0 < self.fps < math.inf:
            raise ValueError(f"fps is {self.fps!r}; expected a positive number")
        for field, least in (("max_frames", 2), ("max_pixels", 28 * 28)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field} is {value!r}; expected a whole number of at least {least}")
        if self.max_frames % 2:
            raise ValueError(f"max_frames is {self.max_frames}; expected an even number, since a patch spans two")


def load_video(path: str | os.PathLike, spec: VideoSpec) -> list[Image.Image]:
    """Reads the frames of a video file that are nearest to the sampling times, as upright RGB images of one size.

    The file's rotation is applied. Frames with another size than the first are resized to the first frame's size. If a
    file is damaged or cut short, the part that can be decoded is sampled.

    Returns: an even number of frames, from 2 to spec.max_frames. A frame that is nearest to two sampling times is
      repeated, for example in a video of one frame.
    Raises: ValueError, naming the path, if the file is missing, is not a video, or has no frame that can be decoded;
      also if PyAV is not installed.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such video file")
    av = _pyav()
    try:
        packet_span = _packet_span(path)
        frames, span = _nearest_frames(path, sample_times(packet_span, spec))
        if span != packet_span:  # packets may be damaged, or hidden by the file's edit list: sample the shown frames
            frames, span = _nearest_frames(path, sample_times(span, spec))
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path}: cannot be read as a video ({type(error).__name__}: {error.strerror}); expected a file of one of "
            f"the formats {', '.join(FORMATS)}"
        ) from error
    return [frame if frame.size == frames[0].size else frame.resize(frames[0].size) for frame in frames]


def sample_times(span: Fraction, spec: VideoSpec) -> list[Fraction]:
    """Returns the sampling times, in seconds after the first frame.

    Args:
      span: seconds from the start of the first frame to the start of the last.
    Returns: an even number of times, ascending, one every 1/fps seconds. If that is more than max_frames, returns
      max_frames times at equal distances from 0 to `span`.
    """
    fps = Fraction(str(spec.fps))  # 0.3 exactly, not the float nearest to it
    count = math.floor(span * fps) + 1
    count += count % 2
    if count <= spec.max_frames:
        return [k / fps for k in range(count)]
    return [span * k / (spec.max_frames - 1) for k in range(spec.max_frames)]


def pick_frames(count: int, limit: int) -> list[int]:
    """Returns the indices of the frames to sample: all if `count` <= `limit`, else `limit` evenly spaced indices."""
    if count <= limit:
        return list(range(count))
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def _packet_span(path: str | os.PathLike) -> Fraction:
    """Returns the seconds from the first to the last frame according to the packets; 0 if there are no packets."""
    with _open(path) as container:
        stream = _video_stream(container, path)
        times = [_seconds(packet, number, stream) for number, packet in enumerate(_packets(container, stream))]
    return max(times, default=Fraction(0)) - min(times, default=Fraction(0))


def _nearest_frames(path: str | os.PathLike, times: Sequence[Fraction]) -> tuple[list[Image.Image], Fraction]:
    """Returns the frame nearest to each of `times`, and the seconds from the first frame to the last.

    Args:
      times: ascending times in seconds. If two frames are equally near, the earlier one is used.
    Raises: ValueError if no frame can be decoded.
    """
    images: list[Image.Image] = []

    def take(frame: av.VideoFrame, until: Fraction | float) -> None:
        """Uses the frame for all times up to `until` that have no frame yet."""
        if count := bisect_right(times, until, lo=len(images)) - len(images):
            images.extend([_upright(frame)] * count)

    start, span = Fraction(0), Fraction(0)  # span: time of `latest`, in seconds after the first frame
    latest: av.VideoFrame | None = None
    with _open(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"  # decode several frames at once
        for number, frame in enumerate(_frames(container, stream)):
            seconds = _seconds(frame, number, stream)
            if latest is None:
                start = seconds
            else:
                take(latest, until=(span + max(span, seconds - start)) / 2)
            latest, span = frame, max(span, seconds - start)  # max: in a broken file times may go backwards
        if latest is None:
            raise ValueError(f"{path}: no frame can be decoded; expected a video of at least one")
        take(latest, until=math.inf)
    return images, span


def _open(path: str | os.PathLike) -> InputContainer:
    av = _pyav()
    # Metadata need not be UTF-8. PyAV 19 reads it in any case, and has no such option.
    metadata = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    return av.open(
        f"file:{os.fsdecode(path)}",  # without "file:" FFmpeg takes a name with a colon for a URL
        options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"},
        **metadata,
    )


def _video_stream(container: InputContainer, path: str | os.PathLike) -> av.VideoStream:
    """Returns the first video stream that is not the cover picture of an audio file."""
    cover = _pyav().stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover:
            return stream
    kinds = ("cover picture" if stream.type == "video" else stream.type for stream in container.streams)
    raise ValueError(f"{path}: no video stream (found: {', '.join(kinds) or 'nothing'}); expected one")


def _packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yields the stream's packets, up to the end of the file or to the first error in it."""
    with contextlib.suppress(_pyav().error.FFmpegError):
        for packet in container.demux(stream):
            if packet.size:  # the last one is empty: it only tells a decoder to return its remaining frames
                yield packet


def _frames(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yields the stream's frames in the order of display; skips packets that cannot be decoded."""
    for packet in itertools.chain(_packets(container, stream), [None]):
        with contextlib.suppress(_pyav().error.FFmpegError):
            yield from stream.decode(packet)


def _seconds(item: av.Packet | av.VideoFrame, number: int, stream: av.VideoStream) -> Fraction:
    """Returns the display time of a frame, in seconds. Raw streams have no times, so the frame's number is used."""
    for ticks in (item.pts, item.dts):
        if ticks is not None and stream.time_base is not None:
            return ticks * stream.time_base
    return number / Fraction(stream.average_rate or 25)


def _upright(frame: av.VideoFrame) -> Image.Image:
    """Returns a decoded frame as RGB with the file's rotation applied; transparent parts of a GIF become white."""
    transparent = any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba" if transparent else "rgb24"))
    return to_rgb(image).rotate(round(frame.rotation / 90) * 90, expand=True)


def _pyav() -> ModuleType:
    """Returns the module PyAV, imported when the first video is read. Without videos it need not be installed."""
    try:
        import av
    except ImportError as error:
        raise ValueError("reading video files needs PyAV: pip install av") from error
    return av
