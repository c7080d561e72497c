"""Divides a step's questions and answers into micro-batches: sorted by length, padded to few shapes, collated.

Without sorting, most of the work on answers would be padding: if answers have 400 of 1,024 tokens on average, 60%.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from r1vl_jax.data.batching import by_length, collate_pairs, collate_prompts, padding, size_of
from r1vl_jax.data.buckets import Buckets, bucket
from r1vl_jax.sft.loss import token_weights
from r1vl_jax.step_grpo.loss import answer_weights
from r1vl_jax.training.judging import ScoredAnswer
from r1vl_jax.types import EncodedPrompt, Example, Prompts, TrainBatch

ANSWER_UNIT = 128  # answers of a micro-batch are padded to a multiple of at most this many tokens
Question = tuple[Example, EncodedPrompt]


@dataclasses.dataclass(frozen=True)
class Groups:
    """Questions with their scored answers, as NumPy arrays; T is the maximum length of an answer.

    Attributes:
      mask_BGT: True on sampled tokens.
      trained_BGT: True on those that the loss may use; with `rl.truncated: mask`, truncated answers have none.
      logprobs_BGT: log-probabilities that the rollout computed while it sampled.
      ref_logprobs_BGT: log-probabilities under the reference, 0 after the end of their micro-batch's answer length.
      has_signal_B: True if some advantage of a token that may be trained is not 0.
      shaping_alone_B: True if the group has a signal although its outcomes are equal.
    """

    questions: list[Question]
    scored: list[list[ScoredAnswer]]
    tokens_BGT: np.ndarray
    mask_BGT: np.ndarray
    trained_BGT: np.ndarray
    logprobs_BGT: np.ndarray
    ref_logprobs_BGT: np.ndarray
    advantage_BGT: np.ndarray
    reward_BG: np.ndarray
    has_signal_B: np.ndarray
    shaping_alone_B: np.ndarray

    @staticmethod
    def concatenate(parts: Sequence[Groups]) -> Groups:
        """Concatenates the groups of several rollouts of one step."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return sum(values, []) if isinstance(values[0], list) else np.concatenate(values)

        return Groups(**{field.name: joined(field.name) for field in dataclasses.fields(Groups)})


@dataclasses.dataclass(frozen=True)
class Batching:
    """The rules by which a step is divided into micro-batches.

    Attributes:
      micro_batch_size: questions in a micro-batch.
      buckets: the shapes that their prompts are padded to.
      unit: answers are padded to multiples of it, in tokens.
      put: places a host batch on the devices.
    """

    micro_batch_size: int
    buckets: Buckets
    unit: int
    put: Callable[[Any], Any]

    def split(
        self, questions: Sequence[Question], mask_BGT: np.ndarray, used_B: np.ndarray | None = None
    ) -> list[tuple[np.ndarray, int]]:
        """Returns (indices of questions, answer length) of each micro-batch: sorted by longest answer, then by prompt.

        Args:
          used_B: False for questions that do not count: they come last, and only fill the last micro-batch.
        """
        longest_B = mask_BGT.any(axis=1).sum(axis=1)
        length_B = np.array([min(mask_BGT.shape[2], bucket(max(1, n), self.unit)) for n in longest_B.tolist()])
        used_B = np.ones(len(questions), bool) if used_B is None else used_B
        prompt_B = np.array([size_of(prompt).tokens for _, prompt in questions])
        order = np.lexsort((prompt_B, length_B, ~used_B))
        parts = [order[i : i + self.micro_batch_size] for i in range(0, max(1, used_B.sum()), self.micro_batch_size)]
        return [(part, int(length_B[part[used_B[part]]].max(initial=self.unit))) for part in parts]

    def collate(self, questions: Sequence[Question], part: np.ndarray) -> Prompts:
        """Returns the prompts of a micro-batch, on the host."""
        return collate_prompts([questions[b][1] for b in part], self.buckets)


def answer_unit(max_new_tokens: int, pad_multiple: int) -> int:
    """Returns the multiple that answers are padded to: a quarter of the maximum length, but at most ANSWER_UNIT."""
    return min(ANSWER_UNIT, bucket(-(-max_new_tokens // 4), pad_multiple))


def batched_logprobs(
    token_logprobs: Callable[..., jax.Array],
    params: Any,
    batching: Batching,
    questions: Sequence[Question],
    tokens_BGT: np.ndarray,
    mask_BGT: np.ndarray,
) -> np.ndarray:
    """Returns log-probabilities of answers under `params` (B, G, T).

    They are computed in micro-batches, and are 0 after the end of a micro-batch's answer length.
    """
    logprobs_BGT = np.zeros(tokens_BGT.shape, np.float32)
    parts = batching.split(questions, mask_BGT)
    pending = [
        token_logprobs(params, *batching.put((batching.collate(questions, part), tokens_BGT[part, :, :length])))
        for part, length in parts
    ]
    for (part, length), one in zip(parts, pending, strict=True):
        logprobs_BGT[part, :, :length] = jax.device_get(one)
    return logprobs_BGT


def rl_batches(
    groups: Groups,
    batching: Batching,
    *,
    max_questions: int,
    keep_all: bool,
    average: str,
    old_logprobs_BGT: np.ndarray | None,
) -> Iterator[tuple[np.ndarray, TrainBatch]]:
    """Yields (indices of questions, micro-batch) of the groups that count; other groups fill the last, with weight 0.

    The arrays are on the host. Truncated answers that are not trained still count in the mean over answers.

    Args:
      max_questions: groups that count, at most.
      keep_all: groups without a signal count too.
      average: the average that the loss takes, see step_grpo.loss.answer_weights.
      old_logprobs_BGT: log-probabilities under the policy that sampled; None if that is the trained policy.
    """
    used_B = groups.has_signal_B | keep_all
    used_B &= np.cumsum(used_B) <= max_questions
    used_BGT = groups.trained_BGT & used_B[:, None, None]
    answers = max(1, used_B.sum()) * groups.mask_BGT.shape[1]
    weights_BGT = answer_weights(used_BGT, answers, average)
    arrays = (groups.tokens_BGT, weights_BGT, groups.advantage_BGT, groups.ref_logprobs_BGT, old_logprobs_BGT)
    for part, length in batching.split(groups.questions, groups.trained_BGT, used_B):
        rows = [None if array is None else array[part, :, :length] for array in arrays]
        yield part, TrainBatch(batching.collate(groups.questions, part), *rows)


@dataclasses.dataclass(frozen=True)
class SFTUpdate:
    """The micro-batches of one SFT update on the device, their rows, number of tokens, and shares of padding."""

    rows: list[Example]
    batches: list[TrainBatch]
    tokens: int
    padding: dict[str, float]


def sft_update(
    rows: Sequence[tuple[Example, tuple[EncodedPrompt, np.ndarray]]],
    count: int,
    buckets: Buckets,
    put: Callable[[Any], Any],
) -> SFTUpdate:
    """Divides rows (example, (prompt, answer)), sorted by length, into micro-batches of `count`."""
    examples, pairs = [example for example, _ in rows], [pair for _, pair in rows]
    answer_tokens = sum(len(answer) for _, answer in pairs)
    batches = []
    for part in by_length(pairs, count, lambda pair: size_of(*pair)):
        prompts, start_B, tokens_BGT, mask_BGT = collate_pairs(part, buckets)
        batches.append(TrainBatch(prompts, tokens_BGT, token_weights(mask_BGT, answer_tokens), start_B=start_B))
    tokens = sum(size_of(*pair).tokens for pair in pairs)
    shares = padding([batch.prompts for batch in batches])
    return SFTUpdate(examples, [put(batch) for batch in batches], tokens, shares)
