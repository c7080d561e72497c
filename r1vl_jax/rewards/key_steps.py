"""Finds which key steps of a question occur in an answer, and at which characters. StepRAR needs their share k:

    k = |key steps that occur in the answer's steps| / |key steps of the question|          (arXiv 2503.12937, eq. 4)

A key step is a group of alternatives ("12/2 = 6", "frac{12}{2} = 6"). The group counts if one alternative occurs.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from r1vl_jax.rewards.formats import FORMATS, Place
from r1vl_jax.rewards.normal import END, NormalText, normal_text
from r1vl_jax.rewards.rules import Rules

Groups = tuple[tuple[str, ...], ...]
Finder = Callable[[str], Iterable[Place]]  # takes a text to find; returns its places, from left to right

# Words that only join the items of a list, and words that state a reason.
_LIST_WORDS = frozenset(["and", "or", "also", "then", "plus", "next", "key", "step", "steps", "frac"])
_REASONS = frozenset(
    ["so", "since", "because", "therefore", "thus", "hence", "as", "if", "when", "where", "which", "by"]
)
_REPEATED_SHARE = 0.5  # a step repeats text if more than this share of its tokens are in sentences that came before
_MIN_SENTENCE = 4  # tokens; a shorter sentence may recur by chance and does not count as repeated


class Hit(NamedTuple):
    """One key step that occurs: the index of its group, and the range of characters in the completion."""

    group: int
    start: int
    end: int


def key_step_groups(key_steps: Any) -> tuple[Groups, tuple[str, ...]]:
    """Returns the groups of a question's key steps, and their faults.

    Args:
      key_steps: R1-VL-10K's `{"Steps": [["a", "b"], "c"]}`, or the list of groups itself; None if there are none.
        A group is a text or a list of texts.

    Returns:
      groups: one tuple of alternatives per group, in order. An alternative that is not a text is left out. Its group
        stays, even if it is then empty, so the group still counts in the denominator of k.
      faults: short phrases that say what is wrong; empty if nothing is. Faulty key steps raise no error.
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
    """Returns the first occurrence of each group in the steps of a completion, in the order of the groups.

    A group that does not occur has no Hit. If several alternatives of a group occur, the one that ends first counts.
    """
    if not groups:
        return ()
    bodies = FORMATS[rules.format].step_bodies(completion)
    tokens = _tokens(completion, bodies) if rules.match_tokens or rules.refuse_stuffing else None
    find: Finder = tokens.find if tokens is not None and rules.match_tokens else _substring_finder(completion, bodies)
    empty: Place = (bodies[0][0], bodies[0][0]) if bodies else (0, 0)

    def occurrences(alternative: str) -> Iterable[Place]:
        if alternative.strip():
            return find(alternative)
        return (empty,) if rules.empty_alternative_matches else ()

    if tokens is None or not rules.refuse_stuffing or not bodies:
        candidates = [[next(iter(occurrences(text)), None) for text in group] for group in groups]
    else:
        places = [[list(occurrences(text)) for text in group] for group in groups]
        stuffed = _stuffed_bodies(tokens, bodies, places)
        starts = [start for start, _ in bodies]

        def counts(place: Place) -> bool:
            return bisect_right(starts, place[0]) - 1 not in stuffed

        candidates = [[next(filter(counts, ranges), None) for ranges in group] for group in places]
    firsts = [min(filter(None, ranges), key=lambda place: place[1], default=None) for ranges in candidates]
    return tuple(Hit(index, *place) for index, place in enumerate(firsts) if place is not None)


def _substring_finder(completion: str, bodies: list[Place]) -> Finder:
    """Returns a function that finds a text, in lower case, in the lower-cased step bodies joined by spaces.

    The released functions search in the same way.
    """
    joined = " ".join(completion[start:end] for start, end in bodies)
    lowered = joined.lower()
    # Two maps lead back to the completion: the start of each body in `joined`, and the character of `joined` that each
    # character of `lowered` comes from. The second is needed because "İ" becomes two characters in lower case.
    offsets = list(itertools.accumulate((end - start + 1 for start, end in bodies), initial=0))
    origin = None if len(lowered) == len(joined) else [i for i, char in enumerate(joined) for _ in char.lower()]

    def in_completion(index: int) -> int:
        index = index if origin is None else origin[index]
        body = bisect_right(offsets, index) - 1
        return bodies[body][0] + index - offsets[body]

    def find(text: str) -> Iterator[Place]:
        wanted = text.lower()
        index = lowered.find(wanted)
        while index >= 0:
            yield in_completion(index), in_completion(index + len(wanted) - 1) + 1
            index = lowered.find(wanted, index + len(wanted))

    return find


def _tokens(completion: str, bodies: list[Place]) -> NormalText:
    """Returns the normal form of all step bodies. END follows each body, so that no key step spans two steps."""
    words, starts, ends = [], [], []
    for start, end in bodies:
        body = normal_text(completion, start, end)
        words += [*body.words, END]
        starts += [*body.starts, end]
        ends += [*body.ends, end]
    return NormalText(completion, words, starts, ends)


def _stuffed_bodies(tokens: NormalText, bodies: list[Place], places: list[list[list[Place]]]) -> set[int]:
    """Returns the indices of the step bodies whose key steps earn nothing.

    Such a step repeats text, or lists key steps without other words. A step needs one word outside its key steps for
    each key step that does not overlap another key step. A word that states a reason ("since") counts twice.

    Args:
      places: the character ranges of each alternative of each group.
    """
    starts = [start for start, _ in bodies]
    changes = [0] * (len(tokens) + 1)  # +1 at the first token of a key step, -1 after its last
    in_body: list[list[tuple[int, int, int]]] = [[] for _ in bodies]  # (end, start, group) of key steps, in tokens
    for group, alternatives in enumerate(places):
        for start, end in dict.fromkeys(itertools.chain.from_iterable(alternatives)):
            first, last = bisect_right(tokens.ends, start), bisect_left(tokens.starts, end)
            changes[first] += 1
            changes[last] -= 1
            in_body[max(0, bisect_right(starts, start) - 1)].append((last, first, group))
    covered = list(itertools.accumulate(changes))  # for each token, the number of key steps that cover it
    stuffed: set[int] = set()
    said: set[tuple[str, ...]] = set()
    for body, (start, end) in enumerate(bodies):
        first, last = bisect_left(tokens.starts, start), bisect_left(tokens.starts, end)
        words = tokens.words[first:last]
        repeated = _count_repeated(words, said)
        if in_body[body]:
            own = {
                word for word, inside in zip(words, covered[first:last], strict=True) if not inside and _is_word(word)
            }
            own -= _LIST_WORDS
            if repeated > _REPEATED_SHARE * len(words) or len(own) + len(own & _REASONS) < _count_separate(
                in_body[body]
            ):
                stuffed.add(body)
    return stuffed


def _count_separate(places: list[tuple[int, int, int]]) -> int:
    """Counts the key steps of one body that do not overlap; at most one per group.

    Args:
      places: (end, start, group) of each key step, in tokens.
    """
    count, last_end = 0, 0
    for end, start, _ in sorted(places):
        if start >= last_end:
            count, last_end = count + 1, end
    return min(count, len({group for *_, group in places}))


def _count_repeated(words: list[str], said: set[tuple[str, ...]]) -> int:
    """Counts the words that belong to sentences in `said`, and adds the sentences of `words` to `said`."""
    count, start = 0, 0
    ends = [i for i, word in enumerate(words) if word == END]
    for end in [*ends, len(words)]:
        sentence = tuple(words[start:end])
        if len(sentence) >= _MIN_SENTENCE:
            count += len(sentence) if sentence in said else 0
            said.add(sentence)
        start = end + 1
    return count


def _is_word(word: str) -> bool:
    return word.isalpha() and (len(word) > 1 or word > "\u03ff")  # one Latin or Greek letter is a variable
