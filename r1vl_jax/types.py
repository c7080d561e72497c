"""Defines the values that stages pass to each other, and the letters that name the axes of arrays.

Dimension key. The suffix of an array's name lists its axes (`logits_BTV`); a digit is an axis of that size. Einsum
labels and sizes in a function (`B, T, D = x.shape`) use the same letters; so do the kernels.

    B  questions of a batch                G  answers to a question (the group)
    T  query tokens                        S  keys: the positions that queries attend to
    L  layers                              D  model width
    N  query heads (K*E)                   K  key/value heads
    E  query heads of a key/value head     H  head width
    F  MLP width                           V  vocabulary
    R  answers as rows (B*G)               J  steps of an answer
    W  packed vision rows                  P  patches of a vision row
    C  values of a patch (3*2*14*14)       M  merged image tokens of a vision row (P/4)
    Q  query rows that read the same keys, merged into one axis: (E, T) or (G, E, T)

Stages (data, processing, rollout, rewards, step_grpo, sft, checkpoint) never import each other. They share the types
of this module, and training/ passes values between them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import flax.struct
import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """One question as read from a file; nothing is decoded yet.

    A conversation of several turns becomes several examples, one per answer, with all earlier turns as history.

    Attributes:
      source: the file, the folder or the Hub data set that the row came from.
      row: the row's number in the source, from 0.
      images: absolute paths of the row's images, in the order of their placeholders.
      question: the user's text, with "<image>" or "<video>" at the place of each image and video.
      answer: SFT: the assistant's text. RL: the reference solution.
      key_steps: RL: groups of alternatives; None if the row has none.
      videos: absolute paths of video files, or of the frames of a video, in the order of their placeholders.
      system: the text of the system turn; None: the default text.
      history: earlier turns (question, answer); their images and videos come first.
      image_bytes: the contents of the image files, if the source holds them (TFDS, parquet); `images` then only names
        them.
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
        """Returns the name by which messages refer to this question."""
        turn = f", turn {len(self.history)}" if self.history else ""
        return f"{self.source}, row {self.row}{turn}"


@flax.struct.dataclass  # a tree of arrays, which grain's worker processes return through shared memory
class EncodedPrompt:
    """One question as the model reads it (NumPy, no padding).

    Attributes:
      tokens_T: int32 ids, image placeholders expanded.
      positions_3T: int32 M-RoPE positions (t, h, w).
      image_slot_T: int32, the index of the merged image feature that replaces the token's embedding; -1 for text.
      patches_PC: uint8 patches (R, G, B values) of all images and videos of the question in order, P = sum t*h*w.
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


# jax.Array on devices; np.ndarray on the host; ShapeDtypeStruct if a program is compiled ahead of time.
Array: TypeAlias = Any


@flax.struct.dataclass
class Prompts:
    """A padded batch of questions. Padding may be on either side; mask_BT alone marks padding, never a token id.

    If the batch axis of a field is not 0, the field's metadata declares the axis for parallel.sharding.put_batch.

    Attributes:
      tokens_BT: token ids.
      mask_BT: True for real tokens, False for padding.
      positions_3BT: M-RoPE positions (t, h, w).
      image_slot_BT: index into the image features, flattened to (W*M); -1 for text.
      next_position_B: position of the first token after the prompt.
      patches_WPC: image patches as pixel values, packed; W = 0 if no question has an image.
      patch_hw_WP2: (h, w) of each patch in its frame.
      segment_WP: the frame number of each patch, -1 for padding.
    """

    tokens_BT: Array
    mask_BT: Array
    positions_3BT: Array = flax.struct.field(metadata={"batch_axis": 1})
    image_slot_BT: Array
    next_position_B: Array
    patches_WPC: Array
    patch_hw_WP2: Array
    segment_WP: Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options for sampling answers. Trained log-probabilities are computed at the same temperature.

    A checkpoint's generation_config.json is never read.

    Attributes:
      temperature: 0 is greedy.
      top_p: 1 keeps all tokens.
      top_k: 0 keeps all tokens.
      max_new_tokens: the maximum number of tokens of an answer, the stop token included.
    """

    temperature: float = 1.2
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024


@flax.struct.dataclass
class Rollout:
    """Sampled answers: ids, log-probabilities, and a mask that is True up to and including the first stop token."""

    tokens_BGT: Array
    logprobs_BGT: Array
    mask_BGT: Array


@flax.struct.dataclass
class TrainBatch:
    """The input of one gradient computation.

    Attributes:
      prompts: B questions; SFT: each is followed by its answer in the same row.
      tokens_BGT: G answers per question (SFT: one).
      weight_BGT: the weight of each token in the loss, 0 outside the answer. Weights contain the whole normalisation
        of an update, so losses and gradients of its micro-batches are simply added.
      advantage_BGT, ref_logprobs_BGT: RL only.
      old_logprobs_BGT: RL only: log-probabilities under the policy that sampled; None if that is the trained policy.
      start_B: SFT only: the number of tokens before the answer in its row.
    """

    prompts: Prompts
    tokens_BGT: Array
    weight_BGT: Array
    advantage_BGT: Array | None = None
    ref_logprobs_BGT: Array | None = None
    old_logprobs_BGT: Array | None = None
    start_B: Array | None = None


@flax.struct.dataclass
class TrainState:
    """The step counter, fp32 master parameters and optimizer state of a training stage."""

    step: Array
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The description of one parameter of the model; model.spec builds the tree of ParamSpecs.

    Attributes:
      shape: the parameter's shape; the first axis of a stacked parameter is the layer.
      axes: the logical name of each axis, or None; parallel.sharding maps names to mesh axes.
      init: "normal", "ones" or "zeros"; see model.spec.init_params.
      hf_name: the tensor's name in a Hugging Face checkpoint; "{}" is the layer number of a stacked parameter.
      hf_shape: the tensor's shape in that checkpoint (of one layer).
      transpose: True if the checkpoint stores (out, in...) while this project stores (in..., out).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str
    hf_name: str
    hf_shape: tuple[int, ...]
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"


def is_spec(node: Any) -> bool:
    """Returns True for a ParamSpec; spec trees have ParamSpecs as leaves."""
    return isinstance(node, ParamSpec)
