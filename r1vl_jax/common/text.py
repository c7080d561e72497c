"""Values as error messages show them: short, on one line, with the nearest known name. Imports nothing of r1vl_jax."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

LIMIT = 80  # characters of a value in a message


def shorten(text: str, limit: int = LIMIT) -> str:
    """The text, or its first characters and "..." where it is longer than `limit`."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shown(value: object, limit: int = LIMIT) -> str:
    """A value as Python writes it, shortened."""
    return shorten(repr(value), limit)


def one_line(value: object, limit: int = 200) -> str:
    """A value's text with every run of white space as one blank, shortened."""
    return shorten(" ".join(str(value).split()), limit)


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that is nearest to a wrong one; None where none is near."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)


def first_few(texts: Sequence[str], limit: int = 5) -> str:
    """The texts with commas between them; of a long list the first ones and how many more there are."""
    more = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """'; did you mean NAME?' for the nearest known name; empty where none is near."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""
