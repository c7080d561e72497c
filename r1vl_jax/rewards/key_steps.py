"""Key steps: which of a question's expected reasoning steps occur in an answer (the k of StepRAR), and where.

    k = |key steps found in the answer's steps| / |key steps of the question|          (arXiv 2503.12937, eq. 4)

A key step is a group of alternatives ("12/2 = 6", "frac{12}{2} = 6"): one found alternative is enough.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from r1vl_jax.rewards.normal import END, NormalText, normal_text
from r1vl_jax.rewards.rules import Rules
from r1vl_jax.rewards.steps import step_bodies

Groups = tuple[tuple[str, ...], ...]
Finder = Callable[[str], Iterable[tuple[int, int]]]  # a text to find -> ranges of characters, from left to right

# Words that only string key steps together, and words that make one follow from another.
_LIST_WORDS = frozenset(["and", "or", "also", "then", "plus", "next", "key", "step", "steps", "frac"])
_REASONS = frozenset(
    ["so", "since", "because", "therefore", "thus", "hence", "as", "if", "when", "where", "which", "by"]
)
_REPEATED_SHARE = 0.5  # a step repeats text if more of it than this are sentences that were said before
_SENTENCE = 4  # tokens; of fewer, nothing can be said


class Hit(NamedTuple):
    """A key step found: its group, and the characters of the completion that say it."""

    group: int
    start: int
    end: int


def key_step_groups(key_steps: Any) -> tuple[Groups, tuple[str, ...]]:
    """The groups of a question's key steps, and what was wrong with them as short phrases.

    Args:
      key_steps: R1-VL-10K's `{"Steps": [["a", "b"], "c"]}`, or the list of groups itself; None where there are none.
        A group is a text or a list of texts.

    Returns:
      One tuple of alternatives for each group, in order. Whatever is not a text is left out and named, never an error:
      its group stays, and so still counts in the denominator.
    """
    if isinstance(key_steps, dict):
        key_steps = key_steps.get("Steps")
    if key_steps is None:
        return (), ("key steps missing",)
    if not isinstance(key_steps, list | tuple):
        return (), (f"key steps are not a list but {type(key_steps).__name__}",)
    if not key_steps:
        return (), ("key steps empty",)
    lists = [group if isinstance(group, list | tuple) else [group] for group in key_steps]
    groups = tuple(tuple(text for text in group if isinstance(text, str)) for group in lists)
    dropped = sum(map(len, lists)) - sum(map(len, groups))
    return groups, ((f"{dropped} key-step alternatives are not text",) if dropped else ())


def key_step_hits(completion: str, groups: Sequence[Sequence[str]], rules: Rules) -> tuple[Hit, ...]:
    """The first place of each group that is found in the steps of a completion, in the order of the groups.

    Of a group's alternatives, the one that is said completely first counts.
    """
    if not groups:
        return ()
    bodies = step_bodies(completion)
    tokens = _tokens(completion, bodies) if rules.match_tokens or rules.refuse_stuffing else None
    find = tokens.find if rules.match_tokens else _substring_finder(completion, bodies)
    blank = (bodies[0][0],) * 2 if bodies else (0, 0)

    def places(alternative: str) -> Iterable[tuple[int, int]]:
        if alternative.strip():
            return find(alternative)
        return (blank,) if rules.empty_alternative_matches else ()

    if not rules.refuse_stuffing or not bodies:
        found = [[next(iter(places(text)), None) for text in group] for group in groups]
    else:
        every = [[list(places(text)) for text in group] for group in groups]
        stuffed = _stuffed_bodies(tokens, bodies, every)
        starts = [start for start, _ in bodies]

        def counts(place: tuple[int, int]) -> bool:
            return bisect_right(starts, place[0]) - 1 not in stuffed

        found = [[next(filter(counts, ranges), None) for ranges in group] for group in every]
    firsts = [min(filter(None, ranges), key=lambda place: place[1], default=None) for ranges in found]
    return tuple(Hit(index, *place) for index, place in enumerate(firsts) if place is not None)


def _substring_finder(completion: str, bodies: list[tuple[int, int]]) -> Finder:
    """Finds texts, lower-cased, in the lower-cased bodies joined by a blank: what the released functions search."""
    joined = " ".join(completion[start:end] for start, end in bodies)
    lowered = joined.lower()
    # Characters of the completion: of each of the joined text, and of each of the lower-cased one ("İ" becomes two).
    offsets = list(itertools.accumulate((end - start + 1 for start, end in bodies), initial=0))
    same = len(lowered) == len(joined)
    origin = None if same else [i for i, char in enumerate(joined) for _ in char.lower()]

    def place(index: int) -> int:
        index = index if same else origin[index]
        body = bisect_right(offsets, index) - 1
        return bodies[body][0] + index - offsets[body]

    def find(text: str) -> Iterator[tuple[int, int]]:
        wanted = text.lower()
        index = lowered.find(wanted)
        while index >= 0:
            yield place(index), place(index + len(wanted) - 1) + 1
            index = lowered.find(wanted, index + len(wanted))

    return find


def _tokens(completion: str, bodies: list[tuple[int, int]]) -> NormalText:
    """The normal form of all bodies, each ended by a sentence's end: no key step lies in two steps."""
    words, starts, ends = [], [], []
    for start, end in bodies:
        body = normal_text(completion, start, end)
        words += [*body.words, END]
        starts += [*body.starts, end]
        ends += [*body.ends, end]
    return NormalText(completion, words, starts, ends)


def _stuffed_bodies(
    tokens: NormalText, bodies: list[tuple[int, int]], every: list[list[list[tuple[int, int]]]]
) -> set[int]:
    """The bodies with key steps that repeat text, or that list key steps without other words.

    Every key step that stands apart from the others wants a word of the step's own; a reason ("since") serves two.
    """
    starts = [start for start, _ in bodies]
    depth = [0] * (len(tokens) + 1)  # +1 where a key step begins, -1 behind its end
    places = [[] for _ in bodies]  # (end, start, group) of each key step, in tokens
    for group, alternatives in enumerate(every):
        for start, end in dict.fromkeys(itertools.chain.from_iterable(alternatives)):
            first, last = bisect_right(tokens.ends, start), bisect_left(tokens.starts, end)
            depth[first] += 1
            depth[last] -= 1
            places[max(0, bisect_right(starts, start) - 1)].append((last, first, group))
    covered = list(itertools.accumulate(depth))
    stuffed, said = set(), set()
    for body, (start, end) in enumerate(bodies):
        first, last = bisect_left(tokens.starts, start), bisect_left(tokens.starts, end)
        words = tokens.words[first:last]
        repeated = _repeated(words, said)
        if places[body]:
            own = {
                word for word, inside in zip(words, covered[first:last], strict=True) if not inside and _is_word(word)
            }
            own -= _LIST_WORDS
            if repeated > _REPEATED_SHARE * len(words) or len(own) + len(own & _REASONS) < _apart(places[body]):
                stuffed.add(body)
    return stuffed


def _apart(places: list[tuple[int, int, int]]) -> int:
    """How many key steps stand side by side rather than one in another; a group counts once."""
    count, behind = 0, 0
    for end, start, _ in sorted(places):
        if start >= behind:
            count, behind = count + 1, end
    return min(count, len({group for *_, group in places}))


def _repeated(words: list[str], said: set[tuple[str, ...]]) -> int:
    """How many of the words are in sentences that are in `said`, which all of these then join."""
    count, start = 0, 0
    ends = [i for i, word in enumerate(words) if word == END]
    for end in [*ends, len(words)]:
        sentence = tuple(words[start:end])
        if len(sentence) >= _SENTENCE:
            count += len(sentence) if sentence in said else 0
            said.add(sentence)
        start = end + 1
    return count


def _is_word(word: str) -> bool:
    return word.isalpha() and (len(word) > 1 or word > "\u03ff")  # a letter, Latin or Greek, is a variable
