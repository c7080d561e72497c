"""Reads the final answer of a completion, and compares it with the final answer of the solution.

Two answers are equal if their texts are equal, or if math-verify says so (`parse`, then `verify`), as in the functions
released with R1-VL (arXiv 2503.12937). The texts are compared first because math-verify is slow in comparison.

math-verify limits each `parse` and each comparison to 5 s with SIGALRM, which works only in the main thread of a
process. math-verify loads SymPy, so it is imported only when an answer needs it.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from fractions import Fraction

from r1vl_jax.rewards import steps
from r1vl_jax.rewards.rules import Rules

# A longer answer is cut to this length. No correct answer is longer, and comparing a longer one could take very long:
# Unicode normalisation sorts runs of combining marks in quadratic time.
MAX_ANSWER_CHARS = 4096

_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"(?P<word>option\s+)?(?:\((?P<paren>[a-z])\)|(?P<bare>[a-z]))(?P<rest>.*)", re.I | re.S)
_OPTION_TEXT = re.compile(r"\s+(?!(?:or|and)\b)[\w$\\]", re.I)

_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")
# Matches brackets and the separators of a list of answers: "or" and similar words and signs anywhere, a comma outside
# brackets, a space before "x =", a space before a number (but not the space of a mixed number such as 3 1/2).
_SEPARATOR = re.compile(
    r"[()\[\]{}]|,|;|\n|\||±|\\pm\b|\bor\b|\band\b|(?<=\d)\s+to\s+(?=\d)|\$\s+\$"
    r"|(?<=\d)\s+(?=[-+]?\d+(?:\.\d+)?(?!\s*/|[\d.]))|(?<=\d)\s+(?=\\?[A-Za-z]+\s*=)"
)
_PLAIN_NUMBER = re.compile(r"[-+]?\d{1,100}(?:\.\d{1,100})?(?:/0*[1-9]\d{0,99})?")


def final_answer(completion: str, rules: Rules) -> str | None:
    """Returns the final answer of a completion; None if it has no final-answer header, or no text after the header."""
    if not rules.answer_from_section:
        return steps.answer_line(completion) or None
    section = steps.answer_section(completion)
    return _first_answer(section)[:MAX_ANSWER_CHARS] or None if section else None


def expected_answer(solution: str, rules: Rules) -> str:
    """Returns the final answer of a solution; if it has no final-answer header, the whole solution, stripped."""
    if not rules.answer_from_section:
        line = steps.answer_line(solution)
        return solution.strip() if line is None else line
    section = steps.answer_section(solution)
    return solution.strip() if section is None else _first_answer(section)


def is_correct(completion: str, solution: str, rules: Rules) -> bool:
    """Returns whether the final answer of the completion equals that of the solution.

    Raises:
      RuntimeError: math-verify is needed outside the main thread, and cannot enforce its time limit there.
    """
    if rules.answer_from_section:
        answer, gold = final_answer(completion, rules), expected_answer(solution, rules)
        if answer is None:
            return False
        if _text_equal(answer, gold, rules):
            return True
        letters = (choice_letter(answer), choice_letter(gold)) if rules.choice_letters else (None, None)
        if None not in letters:
            return letters[0] == letters[1]
        if rules.one_answer and _count_answers(answer) > max(1, _count_answers(gold)):
            return False
        return _math_equal(answer, gold, rules)
    line = steps.answer_line(completion)
    text = completion.strip() if line is None else line
    return _text_equal(text, expected_answer(solution, rules), rules) or _math_equal(completion, solution, rules)


def choice_letter(text: str) -> str | None:
    """Returns the multiple-choice option that a text names, as an upper-case letter; None if it names none.

    These are options: "B", "B.", "(B)", "B: 12", "B. 12", "B) 12", "(B) 12", "Option B", and each of these in
    \\boxed{}. A lower-case letter is an option only in "(b)" and "option b". These are not options: "A triangle", "b",
    "A:B = 1:2", "A or B", "(x) + 1".
    """
    text = unicodedata.normalize("NFKC", text[:MAX_ANSWER_CHARS]).strip()
    boxed = _BOXED.fullmatch(text)
    match = _CHOICE.fullmatch(boxed[1].strip() if boxed else text)
    if match is None:
        return None
    letter, rest = match["paren"] or match["bare"], match["rest"]
    bare_end = rest.strip() in ("", ".", ":", ")")
    if letter.islower():  # "b" is a variable unless brackets or the word "option" mark it
        return letter.upper() if bare_end and (match["paren"] or match["word"]) else None
    separated = len(rest) > 1 and rest[0] in ".:)" and rest[1].isspace()
    in_brackets = match["paren"] is not None and _OPTION_TEXT.match(rest) is not None
    return letter if bare_end or separated or in_brackets else None


def _count_answers(text: str) -> int:
    """Counts the numeric answers in `text`.

    Each list item that contains a number counts once. Different numbers joined by "=" count separately.
    """
    text = _THOUSANDS.sub("", unicodedata.normalize("NFKC", text[:MAX_ANSWER_CHARS]))
    depth, start, parts = 0, 0, []
    for match in _SEPARATOR.finditer(text):
        depth = max(0, depth + (match[0] in "([{") - (match[0] in ")]}"))
        before, after = text[start : match.end()], text[match.end() : match.end() + 1]
        if match[0].isspace() and after.isalpha() and "=" not in before:  # the space in "20 m" of "20 m = 2000 cm"
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
    """Returns the first line of an answer section; the whole section if that line opens a formula of several lines.

    All comparisons use this text. If math-verify compared the whole section, and the text comparison only the first
    line, one answer could make two guesses.
    """
    line = section.partition("\n")[0].strip()
    opened = (
        line.count("$$") % 2 or line.count("\\[") > line.count("\\]") or line.count("\\begin{") > line.count("\\end{")
    )
    return section if opened else line


def _math_equal(answer: str, gold: str, rules: Rules) -> bool:
    """Returns whether math-verify says that the two are equal; False if math-verify fails, as in the released code."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("answers can only be checked in the main thread (math-verify uses SIGALRM): use ScorerPool")
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        parsed, wanted = parse(answer), parse(gold)
        pair = (wanted, parsed) if rules.verify_gold_first else (parsed, wanted)
        return float(verify(*pair)) > 0
    except MemoryError:  # the pool handles it: such an answer loses its whole reward
        raise
    except (Exception, TimeoutException):  # TimeoutException is not an Exception
        return False


def _text_equal(answer: str, gold: str, rules: Rules) -> bool:
    if rules.fold_text:
        return _folded(answer) == _folded(gold)
    return answer == gold


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
