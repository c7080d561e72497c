"""Formats values and names for error messages. Imports no other module of r1vl_jax."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

LIMIT = 80  # maximum number of characters of a value in a message


def shorten(text: str, limit: int = LIMIT) -> str:
    """Cuts a text to `limit` characters; a text that was cut ends in "..."."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shown(value: object, limit: int = LIMIT) -> str:
    """Returns the `repr` of a value, shortened to `limit` characters."""
    try:
        return shorten(repr(value), limit)
    except (ValueError, RecursionError):  # thousands of digits, or of nested lists
        return f"a {type(value).__name__} that is too large to print"


def one_line(value: object, limit: int = 200) -> str:
    """Returns a value's text with each run of white space as one space, shortened to `limit` characters."""
    return shorten(" ".join(str(value).split()), limit)


def nearest(name: object, known: Iterable[str]) -> str | None:
    """Returns the known name that is most similar to `name`; None if no known name is similar."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)


def first_few(texts: Sequence[str], limit: int = 5) -> str:
    """Joins the first `limit` texts with commas, and adds the number of the remaining texts if there are more.

    Texts come from files, so each is shortened to 300 characters.
    """
    more = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return ", ".join(shorten(text, 300) for text in texts[:limit]) + more


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns "; did you mean 'NAME'?" for the most similar known name; "" if no known name is similar."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""
