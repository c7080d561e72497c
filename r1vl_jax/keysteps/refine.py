"""Shorter key steps by rule: what stands around a statement goes, and so does what is there twice.

"2. So, AD is a median."   ->   "AD is a median"
"""

from __future__ import annotations

import re
from typing import Any

from r1vl_jax.keysteps.rows import Groups, RowFault, groups_of, normal_key, with_groups

# A dash before anything but a word may be a sign.
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
    """A key step without numbering, label, quotes, leading connectives and trailing punctuation."""
    text = " ".join(text.replace("**", "").split())
    before = None
    while text != before:
        before = text
        text = text.strip().rstrip(".,;:").strip()
        if len(text) > 1 and text[0] + text[-1] in _QUOTES and text[0] not in text[1:-1]:
            text = text[1:-1]
        for needless in (_LABEL, _CONNECTIVE):
            match = needless.match(text)
            text = text[match.end() :] if match else text
    return text


def refined(groups: Groups) -> Groups:
    """The groups with cleaned alternatives. Of two that the robust rules take for the same, in one group or in two, the
    first stays; groups that are left with nothing go."""
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
    """The row with refined key steps. Raises RowFault where it has none, or none is left."""
    groups = refined(groups_of(row))
    if not groups:
        raise RowFault("field 'key_steps': nothing is left of any group; expected texts that say something")
    return with_groups(row, groups)
