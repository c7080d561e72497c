"""Defines `Processor`, which encodes a question as an `EncodedPrompt` and an answer as tokens.

Flow: data (`Example`) -> processing (here) -> rollout and training (`EncodedPrompt`). Each image placeholder becomes
t*h*w / merge_size**2 tokens (Qwen2-VL, arXiv 2409.12191). `image_slot_T` says which image feature each token gets, so
the model never searches for a token id. A prompt is never truncated: a prompt over its token limit raises a RowError,
and the caller drops and counts the row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from r1vl_jax.common.files import inner_object, read_object
from r1vl_jax.common.image_files import load_image
from r1vl_jax.config import DataSection, RLSection, SFTSection
from r1vl_jax.errors import ConfigError, RowError
from r1vl_jax.model.vision_ids import read_vision_ids
from r1vl_jax.processing.assembly import assemble
from r1vl_jax.processing.chat import (
    PLACEHOLDERS,
    THINKING_HEADER,
    find_chat_template,
    render_chat,
    renders_turns,
    split_questions,
)
from r1vl_jax.processing.images import ImageSpec, image_patches, video_patches
from r1vl_jax.processing.spans import decode, token_at
from r1vl_jax.processing.tokenizer import IM_END, SpecialIds, read_tokenizer, special_ids
from r1vl_jax.processing.videos import VideoSpec, load_video, pick_frames
from r1vl_jax.types import EncodedPrompt, Example

ImageLike = str | os.PathLike | bytes | Image.Image
VideoLike = str | os.PathLike | Sequence[ImageLike]
Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Processor:
    """Encodes questions as prompts and answers as tokens, and decodes tokens to text.

    Attributes:
      tokenizer: the checkpoint's tokenizer.
      ids: the tokenizer's special ids.
      image_spec: settings for resizing and cutting images.
      video_spec: settings for sampling frames of a video.
      chat_template: Jinja text; None: the format in chat.py.
      reserved: texts that the tokenizer reads as one special token; questions and answers may not contain them.
      system: text of the system turn of questions that have none; None: the chat template's.
      question_suffix: text that is appended to every question.
      opens_thinking: the chat template begins the answer with "<think>", so answers come without it.
      note: a line for the user about the chat template; empty in most cases.
    """

    tokenizer: PreTrainedTokenizerBase
    ids: SpecialIds
    image_spec: ImageSpec
    video_spec: VideoSpec
    chat_template: str | None
    reserved: tuple[str, ...]
    system: str | None = None
    question_suffix: str = ""
    opens_thinking: bool = False
    note: str = ""

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Processor:
        """Reads tokenizer, ids, image settings and chat template of a checkpoint folder.

        Args:
          min_pixels, max_pixels: replacements for the checkpoint's pixel budget per image; None: the checkpoint's
            value.
        Raises: ValueError naming the file and the key that is missing or wrong.
        """
        folder = Path(folder)
        config = read_object(folder / "config.json")
        spec = ImageSpec.from_folder(folder, min_pixels=min_pixels, max_pixels=max_pixels)
        vision = inner_object(config, "vision_config", folder / "config.json")
        for key in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
            field = key.removeprefix("spatial_")
            if vision.get(key, getattr(spec, field)) != getattr(spec, field):
                raise ValueError(
                    f"{folder / 'config.json'}: vision_config.{key} is {vision[key]}, the image processor's {field} is "
                    f"{getattr(spec, field)}; expected the same"
                )
        vision_ids = read_vision_ids(config, folder / "config.json")
        tokenizer = read_tokenizer(folder)
        ids = special_ids(folder, vision_ids, tokenizer)
        # `ids` are added, because a tokenizer that was loaded and saved again may no longer mark its tokens as special.
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.convert_ids_to_tokens(list(dataclasses.astuple(ids))))
        template, note = find_chat_template(folder, tokenizer), ""
        if template is not None and not renders_turns(tokenizer, template):
            template = None
            note = f"{folder}: its chat template renders no chat turns, as a base model's; the built-in ChatML is used"
        processor = cls(
            tokenizer=tokenizer,
            ids=ids,
            image_spec=spec,
            video_spec=VideoSpec(),
            chat_template=template,
            reserved=tuple(sorted(special)),
            note=note,
        )
        # If the template cannot be used, this raises before a run has begun.
        text = processor._render([{"role": "user", "content": [{"type": "image"}]}])
        return dataclasses.replace(processor, opens_thinking=text.endswith(THINKING_HEADER))

    def for_stage(self, stage: SFTSection | RLSection, data: DataSection) -> Processor:
        """Returns the same processor with a stage's pixel budget, and the video sampling and prompt texts of `data`.

        Raises: ConfigError if one of the texts contains a special token.
        """
        spec = dataclasses.replace(self.image_spec, min_pixels=stage.min_pixels, max_pixels=stage.max_pixels)
        video = VideoSpec(**dataclasses.asdict(data.video))
        return dataclasses.replace(self, image_spec=spec, video_spec=video).with_texts(
            data.system_prompt, data.question_suffix
        )

    def with_texts(self, system: str, question_suffix: str, section: str = "data.") -> Processor:
        """Returns the same processor with a system turn for questions that have none ("": the chat template's), and a
        text that is appended to every question.

        Args:
          section: what stands before the texts' names in error messages.
        Raises: ConfigError if one of them contains a special token or a placeholder.
        """
        for name, text in ((f"{section}system_prompt", system), (f"{section}question_suffix", question_suffix)):
            try:
                self._check_text(text, name)
            except RowError as error:
                raise ConfigError(str(error)) from error
            if any(placeholder in text for placeholder in PLACEHOLDERS):
                raise ConfigError(f"{name}: the text holds a placeholder, {' or '.join(PLACEHOLDERS)}; expected none")
        return dataclasses.replace(self, system=system or None, question_suffix=question_suffix)

    @property
    def stop_ids(self) -> tuple[int, int]:
        """The tokens that end an answer: <|im_end|> and <|endoftext|>."""
        return self.ids.im_end, self.ids.end_of_text

    def encode_prompt(self, example: Example, *, max_tokens: int | None = None) -> EncodedPrompt:
        """Encodes a row's question and all turns before it; see `encode_question`. RowErrors name file, row, field."""
        return self.encode_question(
            example.question, example.image_bytes or example.images,
            videos=example.videos, system=example.system, history=example.history, name=example.name,
            image_names=example.images, max_tokens=max_tokens,
        )  # fmt: skip

    def encode_pair(
        self, example: Example, *, max_tokens: int | None = None, max_answer_tokens: int | None = None
    ) -> tuple[EncodedPrompt, np.ndarray]:
        """Encodes a row's question and answer. Returns the prompt and the answer's int32 tokens.

        Args:
          max_tokens: token limit of the prompt; None: no limit.
          max_answer_tokens: token limit of the answer; None: no limit.
        Raises: RowError if the row cannot be encoded or a limit is exceeded.
        """
        text = example.answer
        if self.opens_thinking and text.startswith("<think>"):
            text = text.removeprefix("<think>").lstrip("\n")
        answer = self.encode_answer(text, name=f"{example.name}, answer")
        if max_answer_tokens is not None and len(answer) > max_answer_tokens:
            raise RowError(f"{example.name}, answer: {len(answer)} tokens, expected at most {max_answer_tokens}")
        return self.encode_prompt(example, max_tokens=max_tokens), answer

    def encode_question(
        self,
        question: str,
        images: Sequence[ImageLike] = (),
        *,
        videos: Sequence[VideoLike] = (),
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
        name: str = "prompt",
        image_names: Sequence[str] = (),
        max_tokens: int | None = None,
    ) -> EncodedPrompt:
        """Encodes a question up to and including the assistant header. The processor's `question_suffix` is appended.

        Args:
          question: text with "<image>" and "<video>" as placeholders. If there are none, all images and videos are put
            before the text.
          images: paths, image files as bytes, or PIL images, in the order of their placeholders.
          videos: paths of video files, or lists of frames, in the order of their placeholders.
          system: text of the system turn; None: the processor's, or else the chat template's.
          history: earlier (question, answer) turns. Their images and videos come first.
          name: name of the question in error messages.
          image_names: names in error messages, for images given as bytes.
          max_tokens: token limit of the prompt; None: no limit. A longer prompt raises RowError.
        Returns: the prompt, with patches and grids in the order of the placeholders.
        Raises: RowError, with `name` and the field in its message; ValueError if the chat template cannot be used.
        """
        questions = [text + self.question_suffix for text in (*(earlier for earlier, _ in history), question)]
        system = self.system if system is None else system
        answers = [answer for _, answer in history]
        for field, texts in (("question", questions), ("system", [system or ""]), ("answer", answers)):
            for text in texts:
                self._check_text(text, f"{name}, {field}")
        try:
            parts = split_questions(questions, images=len(images), videos=len(videos))
        except ValueError as error:
            raise RowError(f"{name}, question: {error}") from error
        named = zip_longest(images, image_names)
        stills = (self._image(f"{name}, images[{i}]", image, label) for i, (image, label) in enumerate(named))
        clips = (self._video(f"{name}, videos[{i}]", video) for i, video in enumerate(videos))
        kinds = [part["type"] for turn in parts for part in turn if part["type"] != "text"]
        blocks = [next(stills if kind == "image" else clips) for kind in kinds]
        grids = tuple(grid for _, grid in blocks)
        turns: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        for turn, answer in zip_longest(parts, answers):
            turns.append({"role": "user", "content": turn})
            if answer is not None:
                turns.append({"role": "assistant", "content": answer})
        tokens_T = self._expand(self._tokenize(self._render(turns)), kinds, grids, name)
        is_image_T = np.isin(tokens_T, (self.ids.image, self.ids.video))
        prompt = assemble(tokens_T, is_image_T, grids, [patches for patches, _ in blocks], self.image_spec)
        if max_tokens is not None and len(tokens_T) > max_tokens:
            raise RowError(
                f"{name}: the prompt has {len(tokens_T)} tokens ({prompt.num_image_tokens} image, "
                f"{len(tokens_T) - prompt.num_image_tokens} text); expected at most {max_tokens}: "
                "lower the pixel budget or raise the prompt's"
            )
        return prompt

    def encode_answer(self, text: str, *, name: str = "answer") -> np.ndarray:
        """Returns int32 tokens of an answer and of the "<|im_end|>\\n" after it. These tokens are the targets of SFT.

        Raises: RowError, with `name` in its message, if the text contains a special token.
        """
        self._check_text(text, name)
        return self._tokenize(f"{text}{IM_END}\n")

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens, without the special tokens."""
        return decode(self.tokenizer, np.asarray(tokens).tolist())

    def token_at(self, tokens: Sequence[int] | np.ndarray, text: str, chars: Sequence[int]) -> list[int]:
        """For each of `chars` (ascending indices into the decoded `text`), returns the index of its token."""
        return token_at(self.tokenizer, tokens, text, chars)

    def _check_text(self, text: str, name: str) -> None:
        """Raises RowError on a special token, which would end a turn or ask for image features that do not exist."""
        for token in self.reserved:
            if token in text:
                raise RowError(f"{name}: the text holds the special token {token!r}; expected plain text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(f"{name}: the text is not valid Unicode ({error})") from error

    def _vision_text(self) -> dict[str, str]:
        """Returns the chat text of an image and of a video, before the placeholder token is repeated."""
        start, image, video, end = self.tokenizer.convert_ids_to_tokens(
            [self.ids.vision_start, self.ids.image, self.ids.video, self.ids.vision_end]
        )
        return {"image": f"{start}{image}{end}", "video": f"{start}{video}{end}"}

    def _tokenize(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)

    def _render(self, turns: list[dict[str, Any]]) -> str:
        return render_chat(self.tokenizer, turns, vision=self._vision_text(), template=self.chat_template)

    def _image(self, name: str, image: ImageLike, label: str | None = None) -> tuple[np.ndarray, Grid]:
        """Returns the patches and the grid of one image. `label`: name of an image given as bytes."""
        with _row_errors(name, image if label is None else label):
            return image_patches(_opened(image, label), self.image_spec)

    def _video(self, name: str, video: VideoLike) -> tuple[np.ndarray, Grid]:
        """Returns the patches and the grid of one video, which is a file or a list of frames."""
        limit = min(self.video_spec.max_pixels, self.image_spec.max_pixels)
        spec = dataclasses.replace(self.image_spec, max_pixels=limit, min_pixels=min(self.image_spec.min_pixels, limit))
        with _row_errors(name, video):
            if isinstance(video, (str, os.PathLike)):
                return video_patches(load_video(video, self.video_spec), spec)
            frames = [_opened(video[i]) for i in pick_frames(len(video), self.video_spec.max_frames)]
            return video_patches(frames, spec)

    def _expand(self, tokens_T: np.ndarray, kinds: list[str], grids: tuple[Grid, ...], name: str) -> np.ndarray:
        """Repeats each placeholder token, so that an image or a video has as many as its features."""
        where = np.flatnonzero(np.isin(tokens_T, (self.ids.image, self.ids.video)))
        made = ["image" if token == self.ids.image else "video" for token in tokens_T[where]]
        if made != kinds:
            # A text-only template drops images, or prints them as text. The row is valid, so this is no RowError.
            raise ValueError(f"{name}: the chat template made the placeholders {made} of {kinds}; expected the same")
        counts_T = np.ones(len(tokens_T), np.int64)
        counts_T[where] = [t * h * w // self.image_spec.merge_size**2 for t, h, w in grids]
        return np.repeat(tokens_T, counts_T)


def _opened(image: ImageLike, name: str | None = None) -> Image.Image:
    return image if isinstance(image, Image.Image) else load_image(image, name=name)


@contextlib.contextmanager
def _row_errors(name: str, source: object) -> Iterator[None]:
    """Turns errors while reading an image or a video into RowErrors that name the row and the file.

    Args:
      name: name of the row and the field.
      source: the image or video. If it is a path that the error does not mention, the RowError adds it.
    """
    try:
        yield
    except (ValueError, OSError) as error:  # OSError: a PIL image reads its file only when it is used
        where = f" ({source})" if isinstance(source, (str, os.PathLike)) and str(source) not in str(error) else ""
        raise RowError(f"{name}{where}: {error}") from error
