"""Reads the images and videos of a row: paths, file contents, lists of them, and the typed parts of a turn."""

from __future__ import annotations

import os
from typing import Any

from r1vl_jax.common.files import outside
from r1vl_jax.common.text import shown
from r1vl_jax.errors import RowError
from r1vl_jax.types import Example

IMAGE, VIDEO, AUDIO = "<image>", "<video>", "<audio>"
# The fields of a row that have its images, videos and audio (which is refused). A row has at most one of a kind.
MEDIA = {
    IMAGE: ("images", "image", "image_path"),
    VIDEO: ("videos", "video"),
    AUDIO: ("audios", "audio"),
}
PARTS = {"image": IMAGE, "image_url": IMAGE, "video": VIDEO, "video_url": VIDEO}
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

File = tuple[str, bytes | None]  # the path of an image file; or a name for messages, and the contents of the file


def media_field(row: dict[str, Any], kind: str, in_turns: dict[str, list[Any]], name: str) -> tuple[str, object]:
    """Returns the name and value of the field that has a row's images or videos; the value None if there are none.

    Args:
      kind: IMAGE or VIDEO.
      in_turns: what the parts of the turns hold, for each kind.
    Raises: RowError if there is more than one such field.
    """
    values = [(field, row[field]) for field in MEDIA[kind] if field in row and not is_nothing(row[field])]
    if in_turns[kind]:
        values.append(("content", in_turns[kind]))
    if len(values) > 1:
        names = " and ".join(field for field, _ in values)
        raise RowError(f"{name}, {names}: all of them have {kind[1:-1]}s; expected one of them")
    return values[0] if values else (MEDIA[kind][0], None)


def is_nothing(value: object) -> bool:
    """Returns whether a value has no file: null, an empty list, or parquet's {"bytes": null, "path": null}."""
    if isinstance(value, dict):
        return "path" in value and all(item is None for item in value.values())
    return value is None or value == []


def content_text(parts: list[Any], name: str, in_turns: dict[str, list[Any]] | None) -> str:
    """Returns the text of a turn that is a list of parts, with a placeholder for each image and video.

    Args:
      in_turns: gets the image or video that a part names. A part without one, such as {"type": "image"}, is a
        placeholder for a file of the row's own fields. None: the turn may have only text.
    """
    texts = []
    for i, part in enumerate(parts):
        kind = str(part.get("type")) if isinstance(part, dict) else ""
        placeholder = PARTS.get(kind)
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif placeholder and in_turns is not None:
            texts.append(placeholder)
            values = (part.get(field) for field in (kind, "path", "url"))
            value = next((value for value in values if value is not None), None)
            if kind.endswith("_url") and isinstance(value, dict):
                value = value.get("url")
            if value is not None:
                in_turns[placeholder].append(value)
        elif "audio" in kind:
            raise RowError(f"{name}[{i}]: audio is not read; expected images, videos or text")
        else:
            expected = "a part of type text" + (f", {', '.join(PARTS)}" if in_turns is not None else "")
            raise RowError(f"{name}[{i}]: {shown(part)}; expected {expected}")
    return "".join(texts)


def image_files(value: object, name: str, root: str) -> list[File]:
    """Returns the images of a field: a path, the contents of a file, {"bytes", "path"}, or lists of them.

    Lists inside of lists are read in order.
    """
    if value is None:
        return []
    if isinstance(value, list):
        return [file for item in value for file in image_files(item, name, root)] if value else []
    path, data = value, None
    if isinstance(value, dict):
        path, data = value.get("path"), value.get("bytes")
        path = value if path is None and data is None else path
    elif isinstance(value, bytes):
        path, data = None, value
    if data is None:
        return [(_path(path, name, root), None)]
    if not isinstance(data, bytes) or not data:
        raise RowError(f"{name}: its bytes are {shown(data)}; expected the contents of an image file")
    return [(str(path or ""), data)]


def split_contents(files: list[File], name: str) -> tuple[tuple[str, ...], tuple[bytes, ...] | None]:
    """Returns the names of images, and the contents of the files; None if all are paths."""
    contents = tuple([data for _, data in files if data is not None])
    if not contents:
        return tuple([path for path, _ in files]), None
    if len(contents) < len(files):
        raise RowError(f"{name}: {len(contents)} of {len(files)} images are in the row; expected all, or all as paths")
    field = name.rpartition(", ")[2]
    return tuple(path or f"{field}[{i}]" for i, (path, _) in enumerate(files)), contents


def video_files(value: object, name: str, root: str) -> tuple[str | tuple[str, ...], ...]:
    """Returns the absolute path of each video file. For a video given as a list of frames, returns a tuple of paths."""
    if value is None:
        return ()
    paths = []
    for i, video in enumerate(value if isinstance(value, list) else [value]):
        field = f"{name}[{i}]"
        if video == []:
            raise RowError(f"{field}: no frames; expected the path of a video file or of at least one frame")
        if isinstance(video, list):
            paths.append(tuple(_path(frame, field, root) for frame in video))
            continue
        path = _path(_unwrapped(video), field, root)
        if path.lower().endswith(STILLS):
            raise RowError(f"{field}: {shown(video)} is an image; expected a video file, or a list of frames in a list")
        paths.append(path)
    return tuple(paths)


def paths_of(example: Example) -> list[tuple[str, str]]:
    """Returns ("images" or "videos", path) of each file of an example, frames of videos among them."""
    files = [("images", path) for path in example.images] if example.image_bytes is None else []
    for video in example.videos:
        files += [("videos", path) for path in ((video,) if isinstance(video, str) else video)]
    return files


def check_places(example: Example, root: str) -> Example:
    """Returns the example. Raises RowError if one of its files is outside of the folder `root`, links resolved."""
    for field, path in paths_of(example):
        if problem := outside(path, root):
            raise RowError(
                f"{example.name}, {field}: {problem}; expected a file in that folder. image_root names another folder, "
                "and allow_outside allows any file"
            )
    return example


def _unwrapped(video: object) -> object:
    """Returns the path in parquet's {"bytes": null, "path": ...}, and any other value as it is."""
    return video["path"] if isinstance(video, dict) and video.get("bytes") is None and "path" in video else video


def _path(value: object, name: str, root: str) -> str:
    """Returns the absolute path of a file. Raises RowError if the value is not a path, or is a URL."""
    if isinstance(value, str) and value.startswith("file://"):
        value = value.removeprefix("file://")
    if not isinstance(value, str) or not value.strip() or "\0" in value or "://" in value or value.startswith("data:"):
        raise RowError(f"{name}: {shown(value)}; expected the path of a file, or a list of them")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name}: not valid Unicode ({error})") from error
    return os.path.abspath(os.path.join(root, value))
