"""Converts raw model output to R1-VL-10K rows: renames fields, and reads key steps from a text.

    {"image": "a.png", "question": "...", "solution": "...", "response": "```json {\\"Steps\\": [...]} ```"}
 -> {"image_path": "a.png", "problem": "...", "solution": "...", "response": ..., "key_steps": {"Steps": [[...]]}}

All other fields are kept. reply.py says which forms of key steps are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r1vl_jax.common.text import shown
from r1vl_jax.errors import RowError
from r1vl_jax.keysteps.reply import groups_in, read_groups
from r1vl_jax.keysteps.rows import text_field, with_groups

FIELDS = ("key_steps", "response", "output")
_OTHER_NAMES = {"image_path": ("image", "images"), "problem": ("question",)}


def convert_row(row: dict[str, Any], fields: Sequence[str] = FIELDS) -> dict[str, Any]:
    """Returns the row in the schema of R1-VL-10K.

    Args:
      row: has image_path, image or images; problem or question; solution; and one of `fields`.
      fields: names of fields that may have the key steps. The first field that the row has is used.

    Raises:
      RowError: a field is missing, or no key steps can be read.
    """
    out = {}
    for name, value in row.items():
        ours = next((ours for ours, others in _OTHER_NAMES.items() if name in others and ours not in row), name)
        if ours == "image_path" and isinstance(value, list) and len(value) == 1:
            value = value[0]
        out[ours] = value
    for field in ("problem", "solution"):
        text_field(out, field)
    field = next((name for name in fields if row.get(name) is not None), None)
    if field is None:
        raise RowError(f"no field {' or '.join(map(repr, fields))}; expected key steps")
    value = row[field]
    groups = read_groups(value) if isinstance(value, str) else groups_in(value)
    if not groups:
        raise RowError(f"field {field!r}: {shown(value)}; expected key steps")
    return with_groups(out, groups)
