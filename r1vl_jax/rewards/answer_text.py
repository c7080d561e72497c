"""Normalises the text of an answer: peels what surrounds it, and folds different spellings of one thing.

    **Answer: B**      B           The final answer is: $\boxed{\frac{1}{2}}$.        frac(1)(2)
    “−5”               -5          12, because the side is 4 and 12 = 3*4            12
    negative five      -5          \text{12 cm}²                                     12 cm^2

The result is in plain notation (latex.py). Both sides of a comparison are normalised.
"""

from __future__ import annotations

import functools
import re
import unicodedata

from r1vl_jax.rewards.latex import MONEY, plain_notation
from r1vl_jax.rewards.signs import FRACTIONS, LOWERED, RAISED, RELATIONS, SIGNS

# A longer answer is cut to this length. No correct answer is longer, and comparing a longer one could take very long:
# Unicode normalisation sorts runs of combining marks in quadratic time.
MAX_ANSWER_CHARS = 4096
_MAX_ROUNDS = 12  # of peeling; what is still wrapped then is no answer

_MORE_FRACTIONS = {"⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
_CHARACTERS = str.maketrans(
    {
        **SIGNS,
        **{fraction: f" {plain.replace(' ', '')}" for fraction, plain in (FRACTIONS | _MORE_FRACTIONS).items()},
        **dict.fromkeys("‘’′`´", "'"),
        **dict.fromkeys("“”″„«»「」『』", '"'),
        **dict.fromkeys("º˚∘", "°"),
        **dict.fromkeys("、；", ","),
        **dict.fromkeys("～∼∽≃", "≈"),
        **dict.fromkeys("⟨〈", "("),
        **dict.fromkeys("⟩〉", ")"),
        **{"。": ".", "【": "[", "】": "]", "…": "...", "—": " - ", "⩽": "≤", "⩾": "≥"},
        **dict.fromkeys("✅✓✔☑", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufe0e\ufe0f\ufeff\u00ad\x00", ""),
    }
)
_RAISED = re.compile(f"⁻?[{RAISED}]+")
_LOWERED = re.compile(f"[{LOWERED}]+")
_BASE = re.compile(f"[{LOWERED}]+(?=\\d)")  # of a logarithm: log₂3
_CIRCLED = re.compile(r"([①-⑩])(?=\s*[①-⑩])")
_DIGITS = str.maketrans(RAISED + LOWERED + "⁻", "01234567890123456789-")
_RELATION = re.compile("|".join(map(re.escape, RELATIONS)) + r"|=<")

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?(?:answer|think|strong|em|span|code)>|<br\s*/?>|<([bip])>(?=.*</\1>)|</[bip]>", re.I | re.DOTALL)
_EMPHASIS = re.compile(r"(?<![\w*\\)])(\*{1,3}|__?|`{1,3})(?=\S)([^\n]{1,200}?)(?<=\S)\1(?![\w*(])")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"[{}]")
_JOINED = re.compile(r"(?:[\s$,;&]|\\(?:text|mathrm|quad)\b|[{}]|\b(?:and|or)\b|\\[()\[\]])*")
_DENIED_BOX = re.compile(r"(?:\bnot|n't|不是)\W*;|;\W*(?:is|are|was)(?:n't| (?:not|wrong|incorrect|false))\b", re.I)
_PROSE = re.compile(r"[^\W\d_]{2,}\W+[^\W\d_]{2,}")

# What may come before an answer. A text that is denied ("I do not think the answer is ...") is not peeled.
_NEGATION = re.compile(r"\b(?:not|never|no|nor|neither|cannot|wrong|incorrect|false|other|unless|except)\b|n't\b", re.I)
_LEADS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"#+\s*|[-=]>\s*|[:=→⇒∴•,;≈*`]+\s*",
        r".*[,.;]\s+(?:so|thus|hence|therefore|we (?:get|have|find|obtain))\b,?\s+(?=\D{0,200}\d)",
        r"(?:so|thus|hence|therefore|then|finally|in conclusion|(?:we|i) (?:get|got|have|find|found|obtain|conclude|"
        r"see)|that is|i think|i believe|it follows|(?:i )?(?:would )?(?:choose|pick|select))\b"
        r"[\s,:]*(?:that\b)?\s*(?=\S)",
        r"(?:(?:a total of|exactly|precisely|only|just|(?:in |on |at )?the year)\s+|总?共计?有?)(?=\d)",
        r"(?:in|on|at)\s+(?=\d|(?-i:[A-Z][a-z]))|(?:it|they)\s+(?=(?:can|cannot|does|do|will)\b)|是(?!的)(?=[^\W\d_]{2})",
        r"[^\d=<>|]{0,120}?\b(?:answer|ans|result|solution)s?(?: set)?\b(?: (?:to|of|for) [^\d=:]{1,60}?)?[\s*]*"
        r"(?:(?:is|are|would be|should be|must be|will be|equals)\b|[=:→]|[-.](?=\s))\s*(?:[=:](?!>)\s*)*(?=\S)",
        r"(?:the )?(?:(?:final|correct|right|best) )*(?:answer|ans)s?\s*(?:is|are|:|=|\s)\s*(?=\(?\w)",
        r"(?:the )?(?:(?:correct|right|best) )*(?:one|choice|option)s?\s*(?:is|are|:|=)\s*(?=\(?\w)",
        r"(?:the )?(?:correct|right|best) (?=(?:choice|option)\b)",
        r"(?:(?:it|this|that|there|these|they|here)(?:'s| (?:is|are|was|were)| (?:must|should|would|will) be)|is|are)"
        r"\b[\s:]+(?=\S)",
        r"(?:the|this) (?:statement|claim|conclusion) is\s+(?=\S)",
        r"(?:(?:所以|因此|故|则|综上(?:所述)?|于是)[,:]?\s*)?(?:本题)?的?(?:正确|最终|最后)?的?"
        r"\[?(?:答案|选项|结果|答|应?选择?)\]?"
        r"(?:应?该?[是为選选])?[:\s]*(?=\S)",
    )
]
_TRAILS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\s+(?:is|are)\s+(?:(?:the|my|our)\s+)?(?:(?:final|correct|right|best)\s*)?"
        r"(?:answers?|options?|choices?|solutions?|results?|correct|right)$|\s*选?项(?:正确)?$",
        r"\s*,?\s*\(?(?:approximately|approx\.?)\)?$",
        r"\s*,?\s+(?:(?:in )?total|in all|altogether|respectively|or so|as required|of (?:them|these|those))$",
        r"(?<=\d)\s*\.\.\.$(?<=\.\d\.\.\.|\d\d\.\.\.)|(?<=[^\W\d]{2})\s*\.\.\.$",
        r"(?<!\.)\.$|(?<=[^.]\.)\.$|[,;:?]+$|(?<=[^\W\d]{2})!+$|\s+[.!]+$|[*`]+$",
    )
]
_REASON = re.compile(
    r"(?<=\S)(?:(?:,|\s-)?\s+\(?because\b|,\s*(?:since|as|which|for|due to|given|being|where|by|using)\s"
    r"|,\s*(?:obtained|found|calculated|computed|derived)\s|\s+\(?(?:since|due to)\s|[,\s]\s*(?:因为|由于)).*",
    re.IGNORECASE | re.DOTALL,
)
# A second sentence after one with a number, if it names no other answer ("The answer is 12. I hope it is correct.")
_SENTENCE = re.compile(r"\.\s+(?=[A-Z])(?!.*(?:\d|\b(?:or|not|but|maybe|[A-H])\b)).*", re.DOTALL)

_GROUP = re.compile(r"\{(?!\s*\w+\s*[|:])\s*[^,\s}][^,]*")  # braces around no list, set-builder or nothing
_WORDS_IN_BRACKETS = re.compile(r"\([^\W\d_]{2,}(?: [^\W\d_]+)*\)")

_NUMBER = r"(?=\s*[-+]?\s*(?:[\d.√π(]|sqrt|frac|[a-z]\b))"  # what follows is a number or a letter
_FOLDS = [
    (re.compile(pattern, re.IGNORECASE), plain)
    for pattern, plain in (
        (r"\b(?:minus|negative)\s" + _NUMBER, "-"),
        (r"\bplus or minus\b|\+\s?/?\s?-", "±"),
        (r"\b(?:greater than or equal to|no less than|at least)\b" + _NUMBER, "≥"),
        (r"\b(?:less than or equal to|no more than|at most)\b" + _NUMBER, "≤"),
        (r"(?<!\d )\b(?:greater|more) than\b" + _NUMBER, ">"),
        (r"(?<!\d )\b(?:less|fewer) than\b" + _NUMBER, "<"),
        (r"\b(?:is |are )?(?=[≥≤<>])", ""),
        (r"(?:\b(?:approximately|approx\.?|about|roughly|around|nearly)|约为?|~)" + _NUMBER, "≈"),
        (r"(?<=\d)\s*degrees?\b(?!\s*(?:c|f|celsius|fahrenheit)\b)", "°"),
        (r"(?<=[\w)])\s+squared\b", "^2"),
        (r"(?<=[\w)])\s+cubed\b", "^3"),
        (r"\b(?:the )?square root of\b", "sqrt"),
        (r"\b(?:the )?cube root of\b", "sqrt[3]"),
        (r"(?<=[\w)])\s+divided by\b", "/"),
        (r"(?<=\d)\s+times\s+(?=\d)", " * "),
        (r"(?<=[\d)])\s*[xX]\s*(?=\d)", " * "),
        (r"(?<=\d)\s*\^\s*\(?o\)?(?!\w)", "°"),
        (r"(?<=\d)\s+out of\s+(?=\d)", "/"),
        (r"^(\S+) \(\1\)$", r"\1"),
        (r"\bper ?cent\b", "%"),
        (r"\*\*", "^"),
        (r"\b(?:is )?(?:exactly )?equal to\b", "="),
        (r"≅" + _NUMBER, "≈"),
        (r"(?<=(?-i:[A-Z]))\s*~\s*(?=△|(?-i:[A-Z]))", "≈"),
        (r"//", "∥"),
        (r"\{\s*\}|\b(?:the )?(?:empty|null) set\b", "∅"),
        (r"(?<=(?-i:[\dA-F]))_\((\d+)\)", r"_\1"),
        (r"\s*o'clock\b", ":00"),
        (r"\bhalf an? (?=[a-z])", "1/2 "),
        (r"(?<!\d )\ban? (?=(?:hundred|thousand|million|billion|dozen|half|quarter)\b)", "1 "),
        (r"(?<![\w.])((?-i:[A-Z]))\.((?-i:[A-Z]))(?:\.((?-i:[A-Z])))?\.?(?!\w)", r"\1\2\3"),
        (r"~", " "),
    )
]
_ONES = "zero one two three four five six seven eight nine"
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = {word: value for value, word in enumerate(f"{_ONES} {_TEENS}".split())}
_VALUES |= {word: 10 * tens for tens, word in enumerate(_TENS.split(), 2)}
_ONE, _TEN = ("|".join(words.split()[start:]) for words, start in ((_ONES, 1), (_TENS, 0)))
# "twenty-five"; the hyphen of "two-thirds" goes as well.
_SPELLED = re.compile(rf"\b(?:({_TEN})[- ]?({_ONE})|({'|'.join(_VALUES)}))\b(?:-(?=[a-z]))?", re.IGNORECASE)


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """Returns an answer in plain notation, without what surrounds it."""
    text = _THINKING.sub("", text[:MAX_ANSWER_CHARS])
    tagged = _ANSWER_TAG.findall(text)
    text = _boxed(_TAG.sub(" ", tagged[0] if len(tagged) == 1 else text))
    for _ in range(_MAX_ROUNDS):
        plain = _EMPHASIS.sub(r"\2", text)
        if plain == text:
            break
        text = plain
    text = _without_dollars(plain_notation(_unicode(text)))
    return _peel(_fold(_peel(" ".join(text.split()))))


def _boxed(text: str) -> str:
    """Returns what is in the boxes of a text with prose around them, if they hold one answer or a list of answers."""
    boxes = boxed_parts(text)
    around = text[: boxes[0][0]] + ";" + text[boxes[-1][2] + 1 :] if boxes else ""
    if not _PROSE.search(around) or _DENIED_BOX.search(around):
        return text
    contents = [text[start:close].strip() for _, start, close in boxes]
    if len(set(contents)) == 1:
        return contents[0]
    return ", ".join(contents) if last_run(text, boxes) == boxes else text


def boxed_parts(text: str) -> list[tuple[int, int, int]]:
    """Returns (start, start of the content, closing brace) of each \\boxed{...} that is not inside another."""
    found: list[tuple[int, int, int]] = []
    for match in _BOXED.finditer(text):
        if not found or match.start() > found[-1][2]:
            found.append((match.start(), match.end(), closing_brace(text, match.end())))
    return found


def last_run(text: str, boxes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Returns the last box and those before it that are joined to it by commas, "and" or "or"."""
    first = len(boxes) - 1
    while first > 0 and _JOINED.fullmatch(text, boxes[first - 1][2] + 1, boxes[first][0]):
        first -= 1
    return boxes[first:]


def closing_brace(text: str, start: int) -> int:
    """Returns the index of the brace that closes the group whose content begins at `start`; or the text's end."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _unicode(text: str) -> str:
    if not text.isascii():
        text = _RAISED.sub(lambda match: "^" + match[0].translate(_DIGITS), text.translate(_CHARACTERS))
        text = _BASE.sub(lambda match: f"_({match[0].translate(_DIGITS)})", text)
        text = _LOWERED.sub(lambda match: "_" + match[0].translate(_DIGITS), text)
        text = _CIRCLED.sub(r"\1,", text)
        text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)[:MAX_ANSWER_CHARS]  # one sign may become 18
    return text


def _without_dollars(text: str) -> str:
    """Removes the dollar signs around formulas. One before or after a lone number is money."""
    if "$" not in text:
        return text
    parts = text.replace("$$", "$").split("$")
    out = [parts[0]]
    inside = False  # a formula
    for place, part in enumerate(parts[1:], 1):
        last = place == len(parts) - 1
        following = parts[place + 1] if not last else ""
        money = part[:1].isdigit() and not inside and (last or (part[-1:].isspace() and following[:1].isdigit()))
        if money or (last and not inside and parts[place - 1][-1:].isdigit() and not part.strip(" .,;")):
            out.append(MONEY + part)
        else:
            inside = not inside
            out.append(part)
    return "".join(out)


def _fold(text: str) -> str:
    text = _RELATION.sub(lambda match: RELATIONS.get(match[0], "≤"), text)
    text = _SPELLED.sub(_digits, text)
    for pattern, plain in _FOLDS:
        text = pattern.sub(plain, text)
    return " ".join(text.split())


def _digits(match: re.Match[str]) -> str:
    """Returns a number word in digits."""
    value = sum(_VALUES[word.lower()] for word in match.groups() if word)
    return f"{value} " if match[0].endswith("-") else str(value)


def _peel(text: str) -> str:
    for _ in range(_MAX_ROUNDS):
        before, text = text, text.strip()
        for lead in _LEADS:
            match = lead.match(text)
            if match is not None and match.end() < len(text) and not _NEGATION.search(match[0]):
                text = text[match.end() :]
        for trail in _TRAILS:
            match = trail.search(text)
            if match is not None and match.start() > 0:
                text = text[: match.start()]
        text = _REASON.sub("", _unwrapped(text))
        sentence = _SENTENCE.search(text)
        if sentence is not None and any(map(str.isdigit, text[: sentence.start()])):
            text = text[: sentence.start()]
        if text == before:
            break
    return text


def _unwrapped(text: str) -> str:
    """Removes quotes, brackets around words, and braces that hold no list, around the whole text."""
    if len(text) > 2 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]:
        return text[1:-1].strip()
    if text[:1] == "{" and _GROUP.fullmatch(text) and closing_brace(text, 1) == len(text) - 1:
        return text[1:-1].strip()
    return text[1:-1] if _WORDS_IN_BRACKETS.fullmatch(text) else text


_ARTICLE = re.compile(r"\b(?:an?|the)\s+(?=[^\W\d]{2})")
_BLANKS = re.compile(r"\s*([^\w\s])\s*")
_HYPHEN = re.compile(r"(?<=[A-Za-z][a-z]{2})-(?=[A-Za-z][a-z]{2})")  # of words, no minus sign
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth"
_ENDINGS = {1: "st", 2: "nd", 3: "rd"}
_ORDINAL = {word: f"{place}{_ENDINGS.get(place, 'th')}" for place, word in enumerate(_ORDINALS.split(), 1)}
_MONTH = "(january|february|march|april|may|june|july|august|september|october|november|december)"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_DATE = re.compile(rf"(?:\b{_DAY}(?: of)? {_MONTH}|\b{_MONTH} (?:the )?{_DAY})\b(?:,? ?(?=\d{{4}}\b))?")
_ORDINAL_WORD = re.compile(rf"\b(?:{'|'.join(_ORDINAL)})\b")


def text_key(text: str) -> str:
    """Returns a normalised text without case, articles, quotes, blanks around signs and final punctuation."""
    text = _HYPHEN.sub(" ", text).replace("∠", "angle ").replace("△", "triangle ").casefold()
    text = _ORDINAL_WORD.sub(lambda match: _ORDINAL[match[0]], _ARTICLE.sub("", text))
    text = _DATE.sub(lambda match: f"{match[2] or match[3]} {match[1] or match[4]} ", text)
    text = _BLANKS.sub(r"\1", " ".join(text.replace('"', " ").split()))
    return text.rstrip(".,;:?").replace(MONEY, "$")
