"""Rewrites LaTeX as plain notation, in one pass over the text.

    \\dfrac{1}{2}          frac(1)(2)           x^{2}             x^(2)
    8\\sqrt{10}            8 sqrt(10)           60^{\\circ}        60°
    12\\text{ cm}          12 cm                \\{1, 2\\}          {1, 2}
    1{,}234               1,234                \\$15              ¤15
    0.1\\overline{6}       frac(15)(90)

Every $, \\(, \\), \\[ and \\] becomes "$". A command without a plain sign becomes its name, between blanks.
"""

from __future__ import annotations

import re

from r1vl_jax.rewards.signs import APPEARANCE, COMMANDS, GREEK

MONEY = "¤"  # a dollar sign that is not LaTeX's

_TOKEN = re.compile(
    r"\\(?:begin|end)\s*\{(?P<environment>[A-Za-z*]{1,20})\}(?:\s*\{[clr|\s]{1,20}\})?|\\sqrt\s*(?P<index>\[[^\[\]{}\\]{1,20}\])?"
    r"|\\(?P<command>[A-Za-z]+)|\\(?P<escape>.)|(?P<comma>\{,\})|(?P<brace>[{}])|[^\\{}]+|\\",
    re.DOTALL,
)
_FRACTIONS = frozenset(["frac", "dfrac", "tfrac", "cfrac"])
_BINOMIALS = frozenset(["binom", "dbinom", "tbinom"])
_MATRICES = frozenset(["matrix", "pmatrix", "bmatrix", "vmatrix", "array"])
_SPACING = "left right big Big bigg Bigg quad qquad displaystyle textstyle limits nolimits middle hfill"
_NO_ARGUMENT = frozenset(_SPACING.split())
_LOOKS = (APPEARANCE - _NO_ARGUMENT) | {"fbox", "emph"}
_SIGNS = {
    **COMMANDS,
    **GREEK,
    **dict(circ="°", degree="°", cup="∪", cap="∩", setminus="∖", emptyset="∅", varnothing="∅", mp="∓", mid="|"),
    **{"in": "∈", "neg": "¬", "prime": "'", "colon": ":", "vert": "|", "lvert": "|", "rvert": "|", "lbrace": "{"},
    **dict.fromkeys(["dots", "ldots", "cdots"], "..."),
    **dict(lparen="(", rparen=")", langle="(", rangle=")"),
    **dict(rbrace="}", angle="∠", triangle="△", sim="≈", simeq="≈", varepsilon="ε", varphi="φ"),
    **dict(land=" and ", lor=" or ", wedge=" and ", vee=" or ", dollar=MONEY, euro="€", pounds="£", cents="¢"),
    **dict(log=" log ", cdotp="*", bullet="*", over="/", infin="∞", textdegree="°", textdollar=MONEY, colon=":"),
}
_ESCAPES = {
    **dict.fromkeys("()[]", "$"),
    **dict.fromkeys(",;: ", " "),
    **{"!": "", "\\": ";", "$": MONEY, "/": ""},
}
_RAISED_SIGN = re.compile(r"\^\s*(?:\(\s*([°'][°']?)\s*\)|([°']))")
_THOUSANDS = re.compile(r",\\!\s*(?=\d{3})")
_REPEATING = re.compile(r"(\d{1,20})\.(\d{0,20})\s*\\(?:overline|bar|dot)\s*\{\s*(\d{1,20})\s*\}")
_CASES = re.compile(  # a system of equations as an array behind one brace
    r"\\left\s*\\\{\s*\\begin\s*\{array\}\s*\{[clr|\s]{1,20}\}([^$]{1,500}?)\\end\s*\{array\}\s*\\right\s*\."
)
_BARE_COMMAND = re.compile(r"(?<![A-Za-z])(?:[dtc]?(?P<frac>frac)|sqrt)\s*$")  # written without its backslash

# What a group in braces may still be: of a fraction or binomial the first or second, or the only one of ^, _ and sqrt.
_NONE, _FIRST, _SECOND, _ONLY = range(4)


def plain_notation(text: str) -> str:
    """Returns `text` with its LaTeX rewritten as plain notation."""
    if "\\" not in text and "{" not in text:
        return text
    text = _CASES.sub(r"\\begin{cases}\1\\end{cases}", _REPEATING.sub(_repeating, _THOUSANDS.sub("{,}", text)))
    out: list[str] = []
    closers: list[tuple[str, int]] = []  # for each open brace: what closes it, and what comes after it
    coming = _NONE
    looks = False  # the next group belongs to a command that only changes how it looks
    for token in _TOKEN.finditer(text):
        command, brace = token["command"], token["brace"]
        if brace == "{":
            opening, closing = ("(", ")") if coming else (" ", " ") if looks else ("{", "}")
            out.append(opening)
            closers.append((closing, _SECOND if coming == _FIRST else _NONE))
            coming, looks = _NONE, False
        elif brace == "}":
            closing, coming = closers.pop() if closers else ("}", _NONE)
            out.append(closing)
        elif command in _FRACTIONS or command in _BINOMIALS:
            out.append(" frac" if command in _FRACTIONS else " binom")
            coming, looks = _FIRST, False
        elif token[0].startswith("\\sqrt"):
            out.append(" sqrt" + (token["index"] or ""))
            coming, looks = _ONLY, False
        else:
            plain, coming = _plain(token, coming)
            out.append(plain)
            looks = (command is not None and _command(command) == " ") or (looks and not token[0].strip())
    return _RAISED_SIGN.sub(lambda match: match[1] or match[2], "".join(out))


def _repeating(match: re.Match[str]) -> str:
    """Returns a repeating decimal as a fraction."""
    whole, fixed, period = match.groups()
    top = int(whole + fixed + period) - int(whole + fixed)
    return f" frac({top})({'9' * len(period)}{'0' * len(fixed)})"


def _plain(token: re.Match[str], coming: int) -> tuple[str, int]:
    """Returns the plain notation of a token that is no brace, and what is still to come.

    In a fraction a single character may stand for a group: \\frac12 is frac(1)(2).
    """
    after = _SECOND if coming == _FIRST else _NONE
    if token["comma"]:
        return ",", _NONE
    if token["environment"]:
        if token["environment"].rstrip("*") not in _MATRICES:
            return " ", _NONE
        return (" matrix(" if token[0].startswith("\\begin") else ")"), _NONE
    if token["escape"]:
        return _ESCAPES.get(token["escape"], token["escape"]), _NONE
    if token["command"]:
        plain = _command(token["command"])
        return (f"({plain})", after) if coming in (_FIRST, _SECOND) else (plain, _NONE)
    text, head = token[0], ""
    while coming in (_FIRST, _SECOND) and text[:1].isalnum() | text[:1].isspace():
        if text[0].isalnum():
            head, coming = f"{head}({text[0]})", _SECOND if coming == _FIRST else _NONE
        text = text[1:]
    bare = _BARE_COMMAND.search(text, max(0, len(text) - 20))
    if text.rstrip().endswith(("^", "_")) or bare:
        coming = _FIRST if bare and bare["frac"] else _ONLY
    elif text.strip():
        coming = _NONE
    return head + text, coming


def _command(name: str) -> str:
    if name in ("left", "right"):
        return ""
    if name in _LOOKS or name in _NO_ARGUMENT:
        return " "
    sign = _SIGNS.get(name)
    if sign is None:
        return " " if name.startswith(("text", "math")) else f" {name} "
    return sign
