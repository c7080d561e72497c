"""Adds alternatives to key steps: other spellings of the same statement.

An alternative is, for example, LaTeX as plain text, an equation with its sides exchanged, words for a sign, or a sign
for words. The rules `released` and `paper` search key steps as substrings, so a key step in another spelling is found
only if that spelling is an alternative. The rules `robust` treat most of these spellings as equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from r1vl_jax.keysteps.formulas import equations, split_relation, top_level
from r1vl_jax.keysteps.rows import Groups, groups_of, normal_key, with_groups
from r1vl_jax.rewards.normal import normal_text

# Each entry has the words, the sign and the LaTeX command of a relation.
_RELATIONS = (
    ("is perpendicular to", "⊥", "\\perp"),
    ("is parallel to", "∥", "\\parallel"),
    ("is congruent to", "≅", "\\cong"),
    ("is similar to", "∼", "\\sim"),
    ("is not equal to", "≠", "\\neq"),
)
_SHAPES = (("angle", "∠", "\\angle"), ("triangle", "△", "\\triangle"))
_EQUALS_WORDS = re.compile(r" (?:is equal to|are equal to|equals) ")
# Maps a relation to the relation after its sides are exchanged. The sides of other relations are not exchanged.
_EXCHANGED = {
    **{sign: sign for sign in ("=", "≠", "≅", "∼", "⊥", "∥", "≈", "\\neq", "\\cong", "\\sim", "\\perp", "\\parallel")},
    **{"<": ">", ">": "<", "≤": "≥", "≥": "≤", "<=": ">=", ">=": "<=", "\\leq": "\\geq", "\\geq": "\\leq"},
    **{"\\le": "\\ge", "\\ge": "\\le", "\\approx": "\\approx"},
}
_SUM = re.compile(r"(?<=\S) ?[-+−±] ?(?=\S)")
_PRODUCT = re.compile(r" ?(?:[*×·]|\\times(?![A-Za-z])|\\cdot(?![A-Za-z])) ?")
_REST = re.compile(r"\s*(?:degrees?|°|%|[a-z]{1,2})?")
_QUOTIENT = re.compile(r"[/÷^]|\\div(?![A-Za-z])")

_DELIMITER = re.compile(r"\$+|\\[()\[\]]")
_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"  # braces, which may contain one level of braces
_PLAIN_WORDS = {
    **dict(times="*", cdot="*", div="/", leq="<=", le="<=", geq=">=", ge=">=", neq="!=", ne="!=", approx="≈"),
    **dict(pi="pi", theta="theta", alpha="alpha", beta="beta", angle="angle ", triangle="triangle "),
    **dict(perp="⊥", parallel="∥", cong="≅", sim="∼", pm="±", sin="sin", cos="cos", tan="tan", log="log", ln="ln"),
    **dict(left="", right="", quad=" ", degree=" degrees"),
}


def augment_row(row: dict[str, Any], most: int) -> dict[str, Any]:
    """Returns the row with more alternatives in each group of key steps. Raises RowError if it has no key steps.

    `most` is the maximum number of alternatives per group.
    """
    return with_groups(row, augmented(groups_of(row), str(row.get("problem", "")), most))


def augmented(groups: Groups, problem: str, most: int = 8, wordings: Groups | None = None) -> Groups:
    """Returns the groups with more alternatives. The given alternatives come first and are all kept.

    Args:
      groups: the key steps.
      problem: the question. An alternative that occurs in the question is not added.
      most: maximum number of alternatives per group. A group that has more already is not changed.
      wordings: for each group, texts from a model. They are added before the alternatives made by rule, and more
        alternatives are made from them by rule. None means no such texts.
    """
    question = normal_text(problem)
    owner: dict[tuple[str, ...], int] = {}  # statement -> index of its group, so that no text pays for two groups
    for index, group in enumerate(groups):
        for text in group:
            owner.setdefault(normal_key(text), index)

    def more(index: int, wordings: list[str]) -> list[str]:
        texts = list(groups[index])
        spelled = {_spelling(text) for text in texts}

        def add(new: str) -> None:
            new = " ".join(new.split())
            key = normal_key(new)
            if len(texts) >= most or not key or _spelling(new) in spelled or any(question.find(new)):
                return
            if owner.setdefault(key, index) == index:
                spelled.add(_spelling(new))
                texts.append(new)

        for new in wordings:
            add(new)
        said = list(texts)
        for variants in (_bare, plain, _in_signs, exchanged, _in_words, _spaced, _equals):
            # _equals is not applied to texts made by rule: nobody writes "6 equals 12/2".
            for text in said if variants is _equals else list(texts):
                for new in variants(text):
                    add(new)
        return texts

    return [more(index, extra) for index, extra in enumerate(wordings or [[]] * len(groups))]


def _spelling(text: str) -> str:
    """Returns the form of a text that `released` and `paper` compare: lower case, with single spaces."""
    return " ".join(text.lower().split())


def _bare(text: str) -> Iterator[str]:
    """Yields the text without LaTeX's delimiters of mathematics, such as "$", if it has any."""
    if _DELIMITER.search(text):
        yield _DELIMITER.sub(" ", text)


def plain(text: str) -> Iterator[str]:
    """Yields LaTeX as plain text: "\\\\frac{12}{2} \\\\times 3" becomes "12/2 * 3".

    Yields nothing if the text has no LaTeX, or LaTeX that this function does not know.
    """
    out = re.sub(r"\\[,;!: ]", " ", _DELIMITER.sub(" ", text))
    for _ in range(8):  # from the innermost braces outwards
        before = out
        out = re.sub(rf"\\[dtc]?frac\s*{_GROUP}\s*{_GROUP}", _fraction, out)
        out = re.sub(rf"\\sqrt\s*{_GROUP}", r"sqrt(\1)", out)
        out = re.sub(rf"\\(?:text|textbf|mathrm|mathbf|overline|widehat|boxed|mbox)\s*{_GROUP}", r"\1", out)
        if out == before:
            break
    out = re.sub(r"\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})", " degrees", out)
    out = re.sub(r"([\^_])\{(\w+)\}", r"\1\2", out).replace("\\%", "%")
    out = re.sub(r"\\([A-Za-z]+)", lambda match: _PLAIN_WORDS.get(match[1], match[0]), out)
    # A text with an unknown command is not used: nobody writes half LaTeX and half plain text.
    if out != text and "\\" not in out and "{" not in out:
        yield out


def _fraction(match: re.Match[str]) -> str:
    """Returns a LaTeX fraction as a/b, with brackets if they are needed."""
    top, bottom = (
        part.strip() if re.fullmatch(r"\d+(?:\.\d+)?|[^\W\d]+|sqrt\([^()]*\)", part.strip()) else f"({part.strip()})"
        for part in match.groups()
    )
    after = match.string[match.end() : match.end() + 1]
    return f"({top}/{bottom})" if after.isalnum() or after == "(" else f"{top}/{bottom}"


def exchanged(text: str) -> Iterator[str]:
    """Yields an equation with its sides exchanged, then with the two terms or factors of one side exchanged."""
    parts = _equation(text)
    if parts is None or parts[1] not in _EXCHANGED:
        return
    left, sign, right = parts
    yield f"{right} {_EXCHANGED[sign]} {left}"
    for other in _with_terms_exchanged(left):
        yield f"{other} {sign} {right}"
    for other in _with_terms_exchanged(right):
        yield f"{left} {sign} {other}"


def _equation(text: str) -> tuple[str, str, str] | None:
    """Returns the left side, sign and right side of a text; None if the text is not one equation or inequality.

    A unit may follow the equation.
    """
    spans = equations(text, 0, len(text))
    whole = len(spans) == 1 and spans[0][0] == 0 and _REST.fullmatch(text, spans[0][1])
    return split_relation(text) if whole else None


def _with_terms_exchanged(side: str) -> Iterator[str]:
    """Yields a side of two terms, or of two factors, in the other order. Yields nothing for any other side."""
    sums, products = top_level(side, _SUM), top_level(side, _PRODUCT)
    places = sums if sums else [] if top_level(side, _QUOTIENT) else products
    if len(places) == 1:
        start, end = places[0]
        sign, first, second = side[start:end], side[:start].strip(), side[end:].strip()
        if sign.strip() not in "-−±" and first and second and first[0] not in "-−±":
            yield second + sign + first


def _in_signs(text: str) -> Iterator[str]:
    """Yields the text with signs, then with LaTeX commands, for words: "is parallel to", "angle A", "60 degrees"."""
    for words, sign, command in _RELATIONS:
        if f" {words} " in text:
            yield text.replace(words, sign)
            yield text.replace(words, command)
    if _EQUALS_WORDS.search(text):
        yield _EQUALS_WORDS.sub(" = ", text)
    for word, sign, command in _SHAPES:
        name = re.compile(rf"(?<!\\)\b{word} (?=[A-Z]{{1,4}}\b|\d\b)", re.I)
        if name.search(text):
            yield name.sub(sign, text)
            yield name.sub(lambda _, command=command: f"{command} ", text)
    if re.search(r"\d degrees?\b", text):
        yield re.sub(r"(?<=\d) degrees?\b", "°", text)
        yield re.sub(r"(?<=\d) degrees?\b", r"^\\circ", text)


def _in_words(text: str) -> Iterator[str]:
    """Yields the text with words for signs and LaTeX commands."""
    for words, *signs in _RELATIONS:
        for sign in signs:
            if sign in text and _equation(text) is not None:
                yield re.sub(rf"\s*{re.escape(sign)}(?![A-Za-z])\s*", f" {words} ", text)
    for word, *signs in _SHAPES:
        for sign in signs:
            if sign in text:
                yield re.sub(rf"{re.escape(sign)}\s*(?=[A-Z\d])", f"{word} ", text)
    if "°" in text:
        yield re.sub(r"\s*°", " degrees", text)


def _equals(text: str) -> Iterator[str]:
    """Yields an equation with words for "="."""
    parts = _equation(text)
    if parts is not None and parts[1] == "=" and "\\" not in text:
        yield f"{parts[0]} equals {parts[2]}"
        yield f"{parts[0]} is equal to {parts[2]}"


def _spaced(text: str) -> Iterator[str]:
    """Yields an equation without spaces around its signs, then with one space around each sign."""
    if _equation(text) is None or "\\" in text or re.search("[a-z]{4}", text):
        return
    yield re.sub(r"\s*([-+*/=<>×·÷])\s*", r"\1", text)
    yield re.sub(r"(?<=[\w)\]])\s*([-+*/=<>×·÷])\s*(?=[\w(\[])", r" \1 ", text)
