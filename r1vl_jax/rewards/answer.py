"""Reads the final answer of a completion and of a solution, and says whether the two agree.

`paper` and `robust` read final-answer sections and compare them with the answer check (compare.py). `released` compares
as the functions released with R1-VL (arXiv 2503.12937): math-verify's `parse`, then `verify`, on the whole texts; then
equality as text.

math-verify limits each `parse` and each comparison to 5 s with SIGALRM, which works only in the main thread of a
process. math-verify loads SymPy, so it is imported only when an answer needs it.
"""

from __future__ import annotations

import re
import threading

from r1vl_jax.rewards.answer_text import MAX_ANSWER_CHARS, boxed_parts, last_run
from r1vl_jax.rewards.compare import Verdict, check_answer
from r1vl_jax.rewards.formats import FORMATS, R1VL
from r1vl_jax.rewards.rules import Rules
from r1vl_jax.rewards.steps import answer_line

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####(?!#)[ \t]*(\S[^\n]*)")
_MARKER = re.compile(r"(?:\banswer(?:\s+is)?|答案[是为]?)\**\s*[:：]\s*(\S[^\n]*)", re.IGNORECASE)
_ONLY_MARKER = re.compile(r"\W*(?:(?:the )?(?:final )?(?:answer|result)(?: is)?|(?<=```)\w+)?\W*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[a-z\d)$}°%])(?<!\bSt)(?<!\bMt)(?<!\b[DM]r)(?<!\bNo)\.\s+(?=[A-Z][a-z]* [a-z\d$\\])")
_FORMULA_END = {"$$": "$$", "\\]": "\\["}


def final_answer(completion: str, rules: Rules) -> str | None:
    """Returns the final answer of a completion; None if it has none where the format has it, or an empty one."""
    if not rules.answer_from_section:
        return answer_line(completion) or None
    section = FORMATS[rules.format].final_answer(completion)
    return _first_answer(section)[:MAX_ANSWER_CHARS] or None if section else None


def expected_answer(solution: str, rules: Rules) -> str:
    """Returns the final answer of a solution.

    A solution without R1-VL's final-answer header gives it by the last <answer>, \\boxed, ####, or "Answer:", in this
    order, or else by its last line. With `answer_from_section` off, it is the whole solution, stripped.
    """
    if not rules.answer_from_section:
        line = answer_line(solution)
        return solution.strip() if line is None else line
    section = R1VL.final_answer(solution)
    return (_marked_answer(solution.strip()) if section is None else _first_answer(section))[:MAX_ANSWER_CHARS]


def judge(completion: str, solution: str, rules: Rules) -> Verdict:
    """Returns whether the final answer of the completion equals that of the solution, and what decided.

    Raises:
      RuntimeError: SymPy is needed outside the main thread, and no time limit can be enforced there.
    """
    answer, gold = final_answer(completion, rules), expected_answer(solution, rules)
    if rules.check_answer or rules.answer_from_section:
        if answer is None:
            return Verdict(False, "no final answer")
        return check_answer(answer, gold) if rules.check_answer else _released_verdict(answer, gold, answer, gold)
    line = answer_line(completion)
    return _released_verdict(completion.strip() if line is None else line, gold, completion, solution)


def _marked_answer(solution: str) -> str:
    """Returns what a solution without R1-VL's header marks as its answer."""
    tagged = _ANSWER_TAG.findall(solution)
    boxes = boxed_parts(solution)
    for found in (
        tagged[-1] if tagged else "",
        ", ".join(solution[start:close] for _, start, close in last_run(solution, boxes)) if boxes else "",
        *(match[-1] for match in (_HASHES.findall(solution), _MARKER.findall(solution)) if match),
    ):
        if found.strip():
            return found.strip()
    line = solution.rpartition("\n")[2].strip()
    sentence = _SENTENCE_END.split(line)[-1]
    opening = _FORMULA_END.get(line)
    if opening is not None:  # a formula of several lines
        return solution[solution.rfind(opening, 0, len(solution) - len(line)) :]
    return sentence if any(map(str.isdigit, sentence)) else line


def _first_answer(section: str) -> str:
    """Returns the first line of an answer section, or what it begins: an <answer> or a formula of several lines.

    The rest of the section is not an answer. Otherwise one answer could make several guesses.
    """
    tagged = _ANSWER_TAG.match(section)
    if tagged is not None:
        return tagged[1].strip()
    line, _, rest = (part.strip() for part in section.partition("\n"))
    opened = (
        line.count("$$") % 2 or line.count("\\[") > line.count("\\]") or line.count("\\begin{") > line.count("\\end{")
    )
    if opened:
        return section
    return _first_answer(rest) if rest and _ONLY_MARKER.fullmatch(line) else line


def _released_verdict(answer: str, gold: str, parsed: str, parsed_gold: str) -> Verdict:
    """Compares as the released functions do: two answers as text, and two texts through math-verify."""
    if answer == gold:
        return Verdict(True, "text: the same")
    right = _verified(parsed, parsed_gold)
    return Verdict(right, f"math-verify: {'equal' if right else 'not equal'}")


def _verified(answer: str, gold: str) -> bool:
    """Returns whether math-verify says that the two are equal; False if math-verify fails, as in the released code."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("answers can only be checked in the main thread (math-verify uses SIGALRM): use ScorerPool")
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        return float(verify(parse(answer), parse(gold))) > 0
    except MemoryError:  # the pool handles it: such an answer loses its whole reward
        raise
    except (Exception, TimeoutException):  # TimeoutException is not an Exception
        return False
