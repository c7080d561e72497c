"""The values that stages hand to each other, and the letters that name their axes.

Dimension key (the suffix of an array's name lists its axes):

    B  rows: questions in a batch          G  answers per question (the group)
    T  query tokens                        S  key or cache positions
    L  layers                              D  model width
    N  query heads    K  key/value heads   H  head width
    F  MLP width                           V  vocabulary
    R  packed vision rows                  P  patches in a vision row
    C  values in a patch (3*2*14*14)       M  merged image tokens (P / 4)

Stages (data, processing, rollout, rewards, step_grpo, sft, checkpoint) never import each other: they meet here, and
train.py passes values between them.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """One question as read from a file, nothing decoded yet.

    A conversation of several turns is several of these: each answer once, with all that came before it.

    Attributes:
      source: the file, or the TFDS folder, that the row came from.
      row: the row's number in it, from 0.
      images: absolute paths of its images, in the order of their placeholders.
      question: the user's text with one "<image>" or "<video>" where each image and video stands.
      answer: SFT: the assistant's text. RL: the reference solution.
      key_steps: RL: groups of alternatives; None where the row has none.
      videos: absolute paths of video files, or of the frames of a video, in the order of their placeholders.
      system: the system turn; None: the default one.
      history: earlier turns (question, answer); their images and videos come first.
      image_bytes: the image files themselves, where the source holds them (TFDS); `images` then only names them.
    """

    source: str
    row: int
    images: tuple[str, ...]
    question: str
    answer: str
    key_steps: tuple[tuple[str, ...], ...] | None = None
    videos: tuple[str | tuple[str, ...], ...] = ()
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    image_bytes: tuple[bytes, ...] | None = dataclasses.field(default=None, repr=False)

    @property
    def name(self) -> str:
        turn = f", turn {len(self.history)}" if self.history else ""
        return f"{self.source}, row {self.row}{turn}"


@flax.struct.dataclass  # a tree of arrays: grain then hands them from worker processes in shared memory
class EncodedPrompt:
    """One question in the model's terms (NumPy, no padding).

    Attributes:
      tokens_T: int32 ids, image placeholders expanded.
      positions_3T: int32 M-RoPE positions (t, h, w).
      image_slot_T: int32, the row of this question's merged image features that stands here; -1 where text stands.
      patches_PC: uint8 patches (R, G, B values) of all its images and videos in order, P = sum t*h*w.
      grids: (t, h, w) of each image in patches.
      next_position: the position of the first token after the prompt.
    """

    tokens_T: np.ndarray
    positions_3T: np.ndarray
    image_slot_T: np.ndarray
    patches_PC: np.ndarray
    grids: tuple[tuple[int, int, int], ...]
    next_position: int

    @property
    def num_image_tokens(self) -> int:
        return int((self.image_slot_T >= 0).sum())


@flax.struct.dataclass
class Prompts:
    """A padded batch of questions. Padding may stand on either side; masks say where, token ids never do.

    Attributes:
      tokens_BT, mask_BT: ids, and True where they are real.
      positions_3BT: M-RoPE positions (t, h, w).
      image_slot_BT: index into the flattened (R*M) image features, -1 for text.
      next_position_B: position of the first token after the prompt.
      patches_WPC: image patches as pixel values, packed; R = 0 where no row has an image.
      patch_hw_WP2: (h, w) of each patch in its frame.
      segment_WP: the frame of each patch, -1 for padding.
    """

    tokens_BT: jax.Array
    mask_BT: jax.Array
    positions_3BT: jax.Array
    image_slot_BT: jax.Array
    next_position_B: jax.Array
    patches_WPC: jax.Array
    patch_hw_WP2: jax.Array
    segment_WP: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the temperature is also that of the trained log-probability. Never inherited.

    Attributes:
      temperature: 0 is greedy.
      top_p: 1 keeps everything; top_k: 0 keeps everything.
      max_new_tokens: the stop token counts.
    """

    temperature: float = 1.2
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024


@flax.struct.dataclass
class Rollout:
    """Sampled answers: ids, their log-probabilities, True up to and including the first stop token."""

    tokens_BGT: jax.Array
    logprobs_BGT: jax.Array
    mask_BGT: jax.Array


@flax.struct.dataclass
class TrainBatch:
    """What one gradient computation sees.

    Attributes:
      prompts: B questions; SFT: with the answer behind each, in the same row.
      tokens_BGT: G answers each (SFT: one).
      weight_BGT: the weight of each token in the loss, 0 outside the answer; over all micro-batches of an update it
        carries the whole normalisation, so that losses and gradients of micro-batches simply add up.
      advantage_BGT, ref_logprobs_BGT: RL only.
      old_logprobs_BGT: RL only, under the policy that sampled; None where that is the one being trained.
      start_B: SFT only: where the answer begins in its row.
    """

    prompts: Prompts
    tokens_BGT: jax.Array
    weight_BGT: jax.Array
    advantage_BGT: jax.Array | None = None
    ref_logprobs_BGT: jax.Array | None = None
    old_logprobs_BGT: jax.Array | None = None
    start_B: jax.Array | None = None


@flax.struct.dataclass
class TrainState:
    """Step counter, fp32 master parameters, optimizer state."""

    step: jax.Array
    params: dict
    opt_state: tuple
