"""The final answer: taking it from a text, and comparing it with the solution's.

Answers are equal if they are equal as text, or for math-verify (`parse`, then `verify`), as in the functions released
with R1-VL (arXiv 2503.12937). The text is looked at first, since math-verify takes milliseconds. Its own limits are 5 s
for each `parse` and each comparison, by SIGALRM: only the main thread of a process can use it. math-verify, and SymPy
with it, is imported when it is first needed.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from fractions import Fraction

from r1vl_jax.rewards import steps
from r1vl_jax.rewards.rules import Rules

# An answer taken from a section is cut here. Nothing that long is right, and comparing it could take very long:
# Unicode normalisation sorts runs of combining marks in quadratic time.
MAX_ANSWER_CHARS = 4096

_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"(?P<word>option\s+)?(?:\((?P<paren>[a-z])\)|(?P<bare>[a-z]))(?P<rest>.*)", re.I | re.S)
_OPTION_TEXT = re.compile(r"\s+(?!(?:or|and)\b)[\w$\\]", re.I)

_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")
# Brackets, and what stands between the answers of a list: "or" and the like anywhere, a comma outside of brackets, a
# blank before a number that is not the fraction of a mixed one (3 1/2), and before the next "x =".
_BETWEEN = re.compile(
    r"[()\[\]{}]|,|;|\n|\||±|\\pm\b|\bor\b|\band\b|(?<=\d)\s+to\s+(?=\d)|\$\s+\$"
    r"|(?<=\d)\s+(?=[-+]?\d+(?:\.\d+)?(?!\s*/|[\d.]))|(?<=\d)\s+(?=\\?[A-Za-z]+\s*=)"
)
_PLAIN_NUMBER = re.compile(r"[-+]?\d{1,100}(?:\.\d{1,100})?(?:/0*[1-9]\d{0,99})?")


def found_answer(completion: str, rules: Rules) -> str | None:
    """The final answer of a completion; None without a final-answer header, or with nothing after it."""
    if not rules.answer_from_section:
        return steps.answer_line(completion) or None
    section = steps.answer_section(completion)
    return _first_answer(section)[:MAX_ANSWER_CHARS] or None if section else None


def expected_answer(solution: str, rules: Rules) -> str:
    """The final answer of a solution; the whole solution, stripped, where it has no final-answer header."""
    if not rules.answer_from_section:
        line = steps.answer_line(solution)
        return solution.strip() if line is None else line
    section = steps.answer_section(solution)
    return solution.strip() if section is None else _first_answer(section)


def is_correct(completion: str, solution: str, rules: Rules) -> bool:
    """Whether the completion's final answer is the solution's.

    Raises:
      RuntimeError: math-verify is needed, and this is not the main thread, where alone it can limit its time.
    """
    if rules.answer_from_section:
        answer, gold = found_answer(completion, rules), expected_answer(solution, rules)
        if answer is None:
            return False
        if _text_equal(answer, gold, rules):
            return True
        letters = (choice_letter(answer), choice_letter(gold)) if rules.choice_letters else (None, None)
        if None not in letters:
            return letters[0] == letters[1]
        if rules.one_answer and _alternatives(answer) > max(1, _alternatives(gold)):
            return False
        return _math_equal(answer, gold, rules)
    line = steps.answer_line(completion)
    text = completion.strip() if line is None else line
    return _text_equal(text, expected_answer(solution, rules), rules) or _math_equal(completion, solution, rules)


def choice_letter(text: str) -> str | None:
    """The option that a text names, as an upper-case letter; None where it names none.

    Read as options: "B", "B.", "(B)", "B: 12", "B. 12", "B) 12", "(B) 12", "Option B", and each of them in \\boxed{};
    a lower-case letter only in "(b)" and "option b". Not options: "A triangle", "b", "A:B = 1:2", "A or B", "(x) + 1".
    """
    text = unicodedata.normalize("NFKC", text[:MAX_ANSWER_CHARS]).strip()
    boxed = _BOXED.fullmatch(text)
    match = _CHOICE.fullmatch(boxed[1].strip() if boxed else text)
    if match is None:
        return None
    letter, rest = match["paren"] or match["bare"], match["rest"]
    bare_end = rest.strip() in ("", ".", ":", ")")
    if letter.islower():  # "b" is a variable unless something marks it as an option
        return letter.upper() if bare_end and (match["paren"] or match["word"]) else None
    separated = len(rest) > 1 and rest[0] in ".:)" and rest[1].isspace()
    in_brackets = match["paren"] is not None and _OPTION_TEXT.match(rest) is not None
    return letter if bare_end or separated or in_brackets else None


def _alternatives(text: str) -> int:
    """How many answers with a number a text names: the parts of a list, and different numbers that it calls equal."""
    text = _THOUSANDS.sub("", unicodedata.normalize("NFKC", text[:MAX_ANSWER_CHARS]))
    depth, start, parts = 0, 0, []
    for match in _BETWEEN.finditer(text):
        depth = max(0, depth + (match[0] in "([{") - (match[0] in ")]}"))
        before, after = text[start : match.end()], text[match.end() : match.end() + 1]
        if match[0].isspace() and after.isalpha() and "=" not in before:  # "20 m" of "20 m = 2000 cm"
            continue
        if match[0] not in "([{}])" and (depth == 0 or match[0] not in ",;"):
            parts.append(text[start : match.start()])
            start = match.end()
    parts.append(text[start:])
    count = 0
    for part in parts:
        sides = [side.strip(" $\t\n") for side in part.split("=")]
        values = {Fraction(side) for side in sides if _PLAIN_NUMBER.fullmatch(side)}
        count += max(len(values), any(map(str.isdecimal, part)))
    return count


def _first_answer(section: str) -> str:
    """The section's first line, what follows is talk; all of it where that line opens mathematics over several lines.

    One text serves every comparison: were math-verify to read the section and the text comparison its first line,
    an answer could make two guesses.
    """
    line = section.partition("\n")[0].strip()
    opened = (
        line.count("$$") % 2 or line.count("\\[") > line.count("\\]") or line.count("\\begin{") > line.count("\\end{")
    )
    return section if opened else line


def _math_equal(answer: str, gold: str, rules: Rules) -> bool:
    """math-verify's verdict; False where it fails (as in the released code)."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("answers can only be checked in the main thread (math-verify uses SIGALRM): use ScorerPool")
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        found, wanted = parse(answer), parse(gold)
        pair = (wanted, found) if rules.verify_gold_first else (found, wanted)
        return float(verify(*pair)) > 0
    except MemoryError:  # of an answer that is to cost its own reward, all of it
        raise
    except (Exception, TimeoutException):  # TimeoutException is not an Exception
        return False


def _text_equal(answer: str, gold: str, rules: Rules) -> bool:
    if rules.fold_text:
        return _folded(answer) == _folded(gold)
    return answer == gold


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
