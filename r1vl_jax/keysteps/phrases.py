"""Finds named relations and quantities in running text, as ranges of characters.

    "AD is a median", "E is the midpoint of AD", "XZ is perpendicular to CD", "triangle ABC is isosceles",
    "radius is 5", "height of the triangle is 4", "3 red circles" (after "there are")

The phrases are found with regular expressions, without a grammar. A phrase that the expressions miss costs one key
step, but each phrase that they match should be a complete statement.
"""

from __future__ import annotations

import re

_SHAPES = (
    "angles?|arcs?|triangles?|segments?|lines?|sides?|chords?|points?|quadrilateral|parallelogram|rectangle|square|"
    "rhombus|trapezoid|circles?|rays?|diagonals?|radius|diameter|planes?|tangents?|secants?|polygon|hexagon|pentagon"
)
# Matches the name of an object: AD, $AD$, \\(AD\\), triangle ABC, \\angle A, angle 1, line l.
_ONE = (
    rf"(?:(?:(?i:{_SHAPES}) +)?(?:\$[^$\n]{{1,24}}\$|\\\([^\n()]{{1,24}}\\\)"
    r"|(?:\\(?:angle|triangle|overline|widehat|odot)|[∠△⊙]) *\{?[A-Z]{1,4}\}?|[A-Z]{1,4})"
    r"|(?i:lines?) [a-z]|(?:(?i:angles?) |∠)\d{1,2})(?![\w'])"
)
_SOME = rf"{_ONE}(?:(?:,|,? and) +{_ONE}){{0,5}}"
# Matches names at the end of a phrase, but not "AD and E" in "AE is half of AD and E is the midpoint of AD".
_ENDS = rf"{_ONE}(?:(?:,|,? and) +{_ONE}(?! +(?:is|are|[a-z]+s)\b)){{0,5}}"
_STOP = (
    "the|an?|so|and|because|since|which|that|if|when|where|while|but|as|then|therefore|thus|hence|for|is|are|was|were|it|"
    "we|with|of|to|from|by|in|on|at|not|also|both|equal|same|only|or|than|this|these|its|their|answer|result"
)
_WORD = rf"(?!(?:{_STOP})\b)[a-z]+(?:-[a-z]+)*"
_NOUN = rf"(?:{_WORD} ){{0,2}}{_WORD}"
_NUMBER = r"\$?-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?%?(?![\w/*^+=(-]|[.,]\d| *[-+*/×=^])"
_PARTNER = "perpendicular|parallel|congruent|similar|equal|tangent|opposite|adjacent|proportional|equidistant"
_STATE = (
    "isosceles|equilateral|scalene|right|right-angled|acute|obtuse|regular|cyclic|collinear|concentric|"
    "horizontal|vertical"
)
_VERBS = (
    "bisects?|trisects?|intersects?|meets?|touch(?:es)?|contains?|subtends?|intercepts?|equals?|passes through|"
    "is (?:half|twice|double|three times|one half|a third|one third)(?: of)?"
)
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_SOME} (?:is|are)(?: both)? (?:{_PARTNER}) (?:to|with|from) (?:the )?{_ENDS}",
        rf"{_SOME} are (?:{_PARTNER}|supplementary|complementary|{_STATE})\b(?! to\b)",
        rf"{_ONE} is (?:opposite|adjacent to) (?:the )?{_ONE}",
        rf"{_SOME} (?:is|are) (?:the |an? )?{_NOUN} (?:of|to) (?:(?:the )?{_ENDS}|(?:the |an? )?{_NOUN})",
        rf"{_SOME} (?:is|are) (?:the |an? ){_NOUN}",
        rf"{_SOME} are (?:{_WORD} )?[a-z]{{2,}}s\b",
        rf"{_ONE} is (?:{_STATE})\b",
        rf"{_ONE} (?:{_VERBS}) (?:the )?{_ONE}",
        rf"{_ONE} (?:is|equals|measures) {_NUMBER}",
        rf"\b(?:{_WORD} )?{_WORD}(?: of (?:the |an? )?(?:{_ONE}|(?:{_WORD} )?{_WORD}))?"
        rf" (?:is|was|equals|measures) {_NUMBER}",
        rf"(?<=\b[Tt]here are )\d+ {_NOUN}",
    )
)
# Matches the text before a name that is not the subject of its clause, as in "the angle at O is right" (before O) and
# "the sum of A and B is 90" (before B).
_INSIDE = re.compile(
    rf"\b(?:of|at|in|on|to|by|from|with|for) (?:the |an? )?(?:(?i:{_SHAPES}) |{_WORD} )?\Z"
    r"|\b(?:(?:sum|difference|product|ratio|total|average|mean|both) of|between) [^.,;]{1,40} and (?:the )?\Z"
)


def phrases(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Returns the character ranges of named relations and quantities in text[start:end], from left to right.

    If two phrases overlap, only the first is returned. If they begin at the same character, only the longer is.
    """
    spans = {match.span() for pattern in _PATTERNS for match in pattern.finditer(text, start, end)}
    spans = {span for span in spans if not _INSIDE.search(text, max(start, span[0] - 80), span[0])}
    chosen: list[tuple[int, int]] = []
    for first, last in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not chosen or first >= chosen[-1][1]:
            chosen.append((first, last))
    return chosen
