"""Shortens key steps by rule: removes words and marks before and after each statement, and repeated alternatives.

"2. So, AD is a median."   ->   "AD is a median"
"""

from __future__ import annotations

import re
from typing import Any

from r1vl_jax.errors import RowError
from r1vl_jax.keysteps.rows import Groups, groups_of, normal_key, with_groups

# A dash is a list mark only before a word; otherwise it may be a minus sign.
_LABEL = re.compile(r"(?:\(?\d{1,2}[.)]|[*•]|-(?=\s+[^\W\d]{2})|#*\s*(?:key )?step \d{1,2}\s*[:.)]?)\s+", re.I)
_CONNECTIVE = re.compile(
    r"(?:(?:first|next|now|also|finally|in other words|as a result|consequently)\s*[,:]\s*|"
    r"(?:so|therefore|thus|hence|then|and|since|because|note|"
    r"(?:we|you|one) (?:can )?(?:have|get|find|know|see|obtain|conclude|note)|"
    r"(?:this|which|it) (?:gives|means|implies|follows|shows)(?: us)?)(?: that)?(?:\s*[,:]\s*|\s+))",
    re.I,
)
_QUOTES = ('""', "''", "``", "“”", "‘’")


def cleaned(text: str) -> str:
    """Returns a text without numbering, label, quotes, leading connectives and trailing punctuation."""
    text = " ".join(text.replace("**", "").split())
    before = None
    while text != before:
        before = text
        text = text.strip().rstrip(".,;:").strip()
        if len(text) > 1 and text[0] + text[-1] in _QUOTES and text[0] not in text[1:-1]:
            text = text[1:-1]
        for removable in (_LABEL, _CONNECTIVE):
            match = removable.match(text)
            text = text[match.end() :] if match else text
    return text


def refined(groups: Groups) -> Groups:
    """Returns the groups with cleaned alternatives.

    If alternatives are equal under the robust rules, in one group or in several groups, only the first is kept. Groups
    that become empty are removed.
    """
    seen: set[tuple[str, ...]] = set()
    out = []
    for group in groups:
        kept = []
        for text in map(cleaned, group):
            key = normal_key(text)
            if key and key not in seen:
                seen.add(key)
                kept.append(text)
        if kept:
            out.append(kept)
    return out


def refine_row(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row with refined key steps. Raises RowError if the row has no key steps, or none is left."""
    groups = refined(groups_of(row))
    if not groups:
        raise RowError("field 'key_steps': nothing is left of any group; expected texts that state something")
    return with_groups(row, groups)
