"""Reads the images and videos of a row: paths, file contents, lists of them, and the typed parts of a turn."""

from __future__ import annotations

import os
from typing import Any

from r1vl_jax.common.text import shown
from r1vl_jax.errors import RowError

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
    values = {field: row[field] for field in MEDIA[kind] if not _is_nothing(row.get(field))}
    if in_turns[kind]:
        values["content"] = in_turns[kind]
    if len(values) > 1:
        raise RowError(f"{name}, {' and '.join(values)}: all of them have {kind[1:-1]}s; expected one of them")
    return next(iter(values.items()), (MEDIA[kind][0], None))


def _is_nothing(value: object) -> bool:
    """Returns whether a value has no file: null, an empty list, or parquet's {"bytes": null, "path": null}."""
    empty = isinstance(value, dict) and "path" in value and all(item is None for item in value.values())
    return value is None or value == [] or empty


def content_text(parts: list[Any], name: str, in_turns: dict[str, list[Any]] | None) -> str:
    """Returns the text of a turn that is a list of parts, with a placeholder for each image and video.

    Args:
      in_turns: gets the image or video that a part names. A part without one, such as {"type": "image"}, is a
        placeholder for a file of the row's own fields. None: the turn may have only text.
    """
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        placeholder = PARTS.get(kind) if isinstance(kind, str) else None
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
        elif isinstance(kind, str) and "audio" in kind:
            raise RowError(f"{name}[{i}]: audio is not read; expected images, videos or text")
        else:
            expected = "a part of type text" + (f", {', '.join(PARTS)}" if in_turns is not None else "")
            raise RowError(f"{name}[{i}]: {shown(part)}; expected {expected}")
    return "".join(texts)


def image_files(value: object, name: str, root: str) -> list[File]:
    """Returns the images of a field: a path, the contents of a file, {"bytes", "path"}, or lists of them.

    Lists inside of lists are read in order.
    """
    files: list[File] = []
    for item in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(item, list):
            files += image_files(item, name, root)
            continue
        path, data = (item.get("path"), item.get("bytes")) if isinstance(item, dict) else (item, None)
        if isinstance(item, bytes):
            path, data = None, item
        if data is None:
            path = item if path is None else path
        elif not isinstance(data, bytes) or not data:
            raise RowError(f"{name}: its bytes are {shown(data)}; expected the contents of an image file")
        files.append((_path(path, name, root), None) if data is None else (str(path or ""), data))
    return files


def split_contents(files: list[File], name: str) -> tuple[tuple[str, ...], tuple[bytes, ...] | None]:
    """Returns the names of images, and the contents of the files; None if all are paths."""
    contents = tuple(data for _, data in files if data is not None)
    if contents and len(contents) < len(files):
        raise RowError(f"{name}: {len(contents)} of {len(files)} images are in the row; expected all, or all as paths")
    field = name.rpartition(", ")[2]
    return tuple(path or f"{field}[{i}]" for i, (path, _) in enumerate(files)), contents or None


def video_files(value: object, name: str, root: str) -> tuple[str | tuple[str, ...], ...]:
    """Returns the absolute path of each video file. For a video given as a list of frames, returns a tuple of paths."""
    videos = [] if value is None else value if isinstance(value, list) else [value]
    paths = []
    for i, video in enumerate(videos):
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
