"""Tables of spellings that mean the same: signs, LaTeX commands, Greek letters, fractions, units.

The normal form of key steps (lexer.py) and that of final answers (answer_text.py) share them.
"""

from __future__ import annotations

SIGNS = {
    **dict.fromkeys("×·⋅∗•∙", "*"),
    **dict.fromkeys("÷⁄∕", "/"),
    **dict.fromkeys("−–‐‑", "-"),
    **{"％": "%", "⟂": "⊥"},
}
RELATIONS = {"<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "=>": "→", "->": "→", "⇒": "→", "||": "∥"}
FRACTIONS = {"½": "1 / 2", "¼": "1 / 4", "¾": "3 / 4", "⅓": "1 / 3", "⅔": "2 / 3"}
RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹", "₀₁₂₃₄₅₆₇₈₉"
FULL_WIDTH = {code + 0xFEE0: code for code in range(0x21, 0x7F)} | {0x3000: " "}
_GREEK_NAMES = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi omega"
GREEK = dict(zip(_GREEK_NAMES.split(), "αβγδεθλμπρστφω", strict=True))

# Commands that only change how their argument looks, or that are white space.
_APPEARANCE = (
    "left right big Big bigg Bigg quad qquad text textbf textit textrm mathrm mathbf mathit mathsf operatorname boxed "
    "mbox overline underline widehat hat bar vec overrightarrow overleftrightarrow displaystyle limits"
)
APPEARANCE = frozenset(_APPEARANCE.split())
COMMANDS = {
    **dict.fromkeys(["times", "cdot", "ast"], "*"),
    **dict.fromkeys(["div"], "/"),
    **dict.fromkeys(["le", "leq", "leqslant"], "≤"),
    **dict.fromkeys(["ge", "geq", "geqslant"], "≥"),
    **dict.fromkeys(["ne", "neq"], "≠"),
    **dict.fromkeys(["to", "rightarrow", "Rightarrow", "implies", "Longrightarrow"], "→"),
    **dict(lt="<", gt=">", pm="±", approx="≈", cong="≅", sim="∼", perp="⊥", parallel="∥", infty="∞", percent="%"),
    **dict.fromkeys(APPEARANCE, ""),
}
UNITS = {
    **{f"{prefix}{unit}": sign + "m" for prefix, sign in (("", ""), ("centi", "c"), ("milli", "m"), ("kilo", "k"))
       for unit in ("meter", "meters", "metre", "metres")},
    **{f"{prefix}{unit}": sign + "g" for prefix, sign in (("", ""), ("milli", "m"), ("kilo", "k"))
       for unit in ("gram", "grams")},
    **dict(inch="in", inches="in", foot="ft", feet="ft", yard="yd", yards="yd", mile="mi", miles="mi", liter="l"),
    **dict(liters="l", litre="l", litres="l", second="s", seconds="s", sec="s", secs="s", minute="min", minutes="min"),
    **dict(hour="h", hours="h", hr="h", hrs="h", pound="lb", pounds="lb", lbs="lb", ounce="oz", ounces="oz"),
    **dict(degree="°", degrees="°", deg="°", percent="%"),
}  # fmt: skip
