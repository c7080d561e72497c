"""Key steps: which of a question's expected reasoning steps occur in an answer (the k of StepRAR), and where.

    k = |key steps found in the answer's steps| / |key steps of the question|          (arXiv 2503.12937, eq. 4)

A key step is a group of alternatives ("12/2 = 6", "frac{12}{2} = 6"): one found alternative is enough.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from r1vl_jax.rewards.normal import END, NormalText, normal_text
from r1vl_jax.rewards.rules import Rules
from r1vl_jax.rewards.steps import step_bodies

Groups = tuple[tuple[str, ...], ...]
Finder = Callable[[str], Iterator[tuple[int, int]]]  # a text to find -> ranges of characters, from left to right

# Words that only string key steps together.
_LIST_WORDS = frozenset(["and", "or", "also", "then", "plus", "next", "key", "step", "steps", "frac"])
# A step repeats text if less than this share of its word triples is new. Triples inside key steps do not count, and of
# a few others, such as "the number of", nothing can be said.
_NEW_SHARE = 0.5
_FEW_TRIPLES = 4


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
    find = _token_finder(tokens) if rules.match_tokens else _substring_finder(completion, bodies)
    blank = (bodies[0][0],) * 2 if bodies else (0, 0)

    def places(alternative: str) -> Iterator[tuple[int, int]]:
        if alternative.strip():
            return find(alternative)
        return iter((blank,) if rules.empty_alternative_matches else ())

    if not rules.refuse_stuffing:
        found = [[next(places(text), None) for text in group] for group in groups]
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
    return NormalText(words, starts, ends)


def _token_finder(tokens: NormalText) -> Finder:
    def find(text: str) -> Iterator[tuple[int, int]]:
        for first, last in tokens.find(text):
            yield tokens.starts[first], tokens.ends[last - 1]

    return find


def _stuffed_bodies(
    tokens: NormalText, bodies: list[tuple[int, int]], every: list[list[list[tuple[int, int]]]]
) -> set[int]:
    """The bodies with key steps that repeat text, or that have fewer words of their own than key steps."""
    starts = [start for start, _ in bodies]
    depth = [0] * (len(tokens) + 1)  # +1 where a key step begins, -1 behind its end
    groups_in = [set() for _ in bodies]
    for group, alternatives in enumerate(every):
        for start, end in itertools.chain.from_iterable(alternatives):
            depth[bisect_right(tokens.ends, start)] += 1
            depth[bisect_left(tokens.starts, end)] -= 1
            groups_in[max(0, bisect_right(starts, start) - 1)].add(group)
    covered = list(itertools.accumulate(depth))
    stuffed, said = set(), set()
    for body, (start, end) in enumerate(bodies):
        first, last = bisect_left(tokens.starts, start), bisect_left(tokens.starts, end)
        words = tokens.words[first:last]
        triples = list(zip(words, words[1:], words[2:]))  # noqa: B905 (as many as there are)
        if groups_in[body]:
            own = [not inside and _is_word(word) for word, inside in zip(words, covered[first:last], strict=True)]
            own_triples = [triple for triple, *any_own in zip(triples, own, own[1:], own[2:]) if any(any_own)]  # noqa: B905
            new = set(own_triples) - said
            repeats = len(own_triples) >= _FEW_TRIPLES and len(new) < _NEW_SHARE * len(own_triples)
            own_words = set(itertools.compress(words, own)) - _LIST_WORDS
            if repeats or len(own_words) < len(groups_in[body]):
                stuffed.add(body)
        said.update(triples)
    return stuffed


def _is_word(word: str) -> bool:
    return word.isalpha() and (len(word) > 1 or not word.isascii())
