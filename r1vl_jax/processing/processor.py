"""One question to one `EncodedPrompt`: the whole of processing behind one object.

Flow: data (`Example`) -> processing (here) -> rollout and training (`EncodedPrompt`). Each image placeholder becomes
t*h*w / merge_size**2 tokens (Qwen2-VL, arXiv 2409.12191), and `image_slot_T` says which row of the merged image
features stands where: features are placed by prompt position, never by looking for a token id. A prompt is never cut:
one that is over its budget is an error that names the row, for the caller to drop and count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from r1vl_jax.common.files import inner_object, read_object
from r1vl_jax.config import RLSection, SFTSection, VideoSection
from r1vl_jax.errors import RowError
from r1vl_jax.processing.chat import find_chat_template, render_chat, split_questions
from r1vl_jax.processing.images import ImageSpec, image_patches, load_image, video_patches
from r1vl_jax.processing.positions import mrope_positions
from r1vl_jax.processing.spans import decode, token_at
from r1vl_jax.processing.videos import VideoSpec, load_video, pick_frames
from r1vl_jax.types import EncodedPrompt, Example

IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

ImageLike = str | os.PathLike | bytes | Image.Image
VideoLike = str | os.PathLike | Sequence[ImageLike]
Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Token ids with a meaning of their own, all read from the checkpoint's files."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    im_end: int
    end_of_text: int


@dataclasses.dataclass(frozen=True)
class Processor:
    """Everything that turns questions into prompts and answers into tokens, and back.

    Attributes:
      tokenizer: the checkpoint's.
      ids: its special ids.
      image_spec: how images are resized and cut.
      video_spec: which frames of a video are taken, and their size.
      chat_template: Jinja text; None: the format of Qwen2-VL itself.
      reserved: texts that the tokenizer reads as one special token; a question or an answer may not hold them.
    """

    tokenizer: PreTrainedTokenizerBase
    ids: SpecialIds
    image_spec: ImageSpec
    video_spec: VideoSpec
    chat_template: str | None
    reserved: tuple[str, ...]

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Processor:
        """Reads tokenizer, ids, image settings and chat template of a checkpoint folder.

        Args:
          min_pixels, max_pixels: replace the checkpoint's pixel budget for one image where given.
        Raises: ValueError that names the file and the key that is missing or does not fit.
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
        text = inner_object(config, "text_config", folder / "config.json")  # transformers 5 nests its fields
        tokenizer = _read_tokenizer(folder)
        ids = _special_ids(folder, text | config, tokenizer)
        # The structural tokens too: a tokenizer that was saved again may no longer mark them as special.
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.convert_ids_to_tokens(list(dataclasses.astuple(ids))))
        processor = cls(
            tokenizer=tokenizer,
            ids=ids,
            image_spec=spec,
            video_spec=VideoSpec(),
            chat_template=find_chat_template(folder, tokenizer),
            reserved=tuple(sorted(special)),
        )
        # A template that does not serve shows here, before a run has begun.
        processor._render([{"role": "user", "content": [{"type": "image"}]}])
        return processor

    def for_stage(self, stage: SFTSection | RLSection, video: VideoSection) -> Processor:
        """The same processor with a stage's pixel budget and a configuration's sampling of videos."""
        spec = dataclasses.replace(self.image_spec, min_pixels=stage.min_pixels, max_pixels=stage.max_pixels)
        return dataclasses.replace(self, image_spec=spec, video_spec=VideoSpec(**dataclasses.asdict(video)))

    @property
    def stop_ids(self) -> tuple[int, int]:
        """Either of these ends an answer."""
        return self.ids.im_end, self.ids.end_of_text

    def encode_prompt(self, example: Example, *, max_tokens: int | None = None) -> EncodedPrompt:
        """Encodes the question of a row, with all before it; see `encode_question`. RowError names file, row, field."""
        return self.encode_question(
            example.question, example.image_bytes or example.images,
            videos=example.videos, system=example.system, history=example.history, name=example.name,
            image_names=example.images, max_tokens=max_tokens,
        )  # fmt: skip

    def encode_pair(
        self, example: Example, *, max_tokens: int | None = None, max_answer_tokens: int | None = None
    ) -> tuple[EncodedPrompt, np.ndarray]:
        """Encodes question and answer of a row. Raises RowError, also where one is longer than it may be."""
        answer = self.encode_answer(example.answer, name=f"{example.name}, answer")
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
        """Encodes a question up to and with the assistant header.

        Args:
          question: text with "<image>" and "<video>" where those stand; with none, all are put in front.
          images: paths, image files as bytes, or PIL images, in the order of their placeholders.
          videos: paths of video files, or lists of frames, likewise.
          system: the system turn; None: the default one.
          history: earlier turns (question, answer); their images and videos come first.
          name: what errors call this question; `image_names`: and its images, where those are bytes.
          max_tokens: budget for the prompt; None: no limit. A prompt over it is an error; it is never cut.
        Returns: the prompt; patches and grids in the order of the placeholders.
        Raises: RowError, with `name` and the field in its message; ValueError if the chat template does not serve.
        """
        questions = [*(earlier for earlier, _ in history), question]
        answers = [answer for _, answer in history]
        for field, texts in (("question", questions), ("system", [system or ""]), ("answer", answers)):
            for text in texts:
                self._check_text(text, f"{name}, {field}")
        try:
            parts = split_questions(questions, images=len(images), videos=len(videos))
        except ValueError as error:
            raise RowError(f"{name}, question: {error}") from error
        named = zip_longest(images, image_names)
        stills = (self._still(f"{name}, images[{i}]", image, label) for i, (image, label) in enumerate(named))
        clips = (self._clip(f"{name}, videos[{i}]", video) for i, video in enumerate(videos))
        kinds = [part["type"] for turn in parts for part in turn if part["type"] != "text"]
        blocks = [next(stills if kind == "image" else clips) for kind in kinds]
        grids = tuple(grid for _, grid in blocks)
        turns = [] if system is None else [{"role": "system", "content": system}]
        for turn, answer in zip_longest(parts, answers):
            turns.append({"role": "user", "content": turn})
            if answer is not None:
                turns.append({"role": "assistant", "content": answer})
        tokens_T = self._expand(self._tokenize(self._render(turns)), kinds, grids, name)
        prompt = self._assemble(tokens_T, grids, [patches for patches, _ in blocks])
        if max_tokens is not None and len(tokens_T) > max_tokens:
            raise RowError(
                f"{name}: the prompt has {len(tokens_T)} tokens ({prompt.num_image_tokens} image, "
                f"{len(tokens_T) - prompt.num_image_tokens} text); expected at most {max_tokens}: "
                "lower the pixel budget or raise the prompt's"
            )
        return prompt

    def encode_answer(self, text: str, *, name: str = "answer") -> np.ndarray:
        """int32 tokens of an answer and its closing "<|im_end|>\\n", the targets of SFT.

        Raises: RowError, with `name` in its message, if the text holds a special token.
        """
        self._check_text(text, name)
        return self._tokenize(f"{text}{IM_END}\n")

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of tokens, special ones left out."""
        return decode(self.tokenizer, np.asarray(tokens).tolist())

    def token_at(self, tokens: Sequence[int] | np.ndarray, text: str, chars: Sequence[int]) -> list[int]:
        """For each of `chars`, ascending places in the decoded `text`, the index of the token that it comes from."""
        return token_at(self.tokenizer, tokens, text, chars)

    def _check_text(self, text: str, name: str) -> None:
        """A special token in a text would end a turn or ask for image features that do not exist."""
        for token in self.reserved:
            if token in text:
                raise RowError(f"{name}: the text holds the special token {token!r}; expected plain text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(f"{name}: the text is not valid Unicode ({error})") from error

    def _vision_text(self) -> dict[str, str]:
        start, image, video, end = self.tokenizer.convert_ids_to_tokens(
            [self.ids.vision_start, self.ids.image, self.ids.video, self.ids.vision_end]
        )
        return {"image": f"{start}{image}{end}", "video": f"{start}{video}{end}"}

    def _tokenize(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)

    def _render(self, turns: list[dict]) -> str:
        return render_chat(self.tokenizer, turns, vision=self._vision_text(), template=self.chat_template)

    def _still(self, name: str, image: ImageLike, label: str | None = None) -> tuple[np.ndarray, Grid]:
        """Patches and grid of one image."""
        with _row_errors(name, image if label is None else label):
            return image_patches(_opened(image, label), self.image_spec)

    def _clip(self, name: str, video: VideoLike) -> tuple[np.ndarray, Grid]:
        """Patches and grid of one video: a file, or its frames."""
        limit = min(self.video_spec.max_pixels, self.image_spec.max_pixels)
        spec = dataclasses.replace(self.image_spec, max_pixels=limit, min_pixels=min(self.image_spec.min_pixels, limit))
        with _row_errors(name, video):
            if isinstance(video, (str, os.PathLike)):
                return video_patches(load_video(video, self.video_spec), spec)
            frames = [_opened(video[i]) for i in pick_frames(len(video), self.video_spec.max_frames)]
            return video_patches(frames, spec)

    def _expand(self, tokens: np.ndarray, kinds: list[str], grids: tuple, name: str) -> np.ndarray:
        """Repeats each placeholder token as often as its image has tokens."""
        where = np.flatnonzero(np.isin(tokens, (self.ids.image, self.ids.video)))
        found = ["image" if token == self.ids.image else "video" for token in tokens[where]]
        if found != kinds:
            # A template for text alone drops images, or prints them as text. No row's fault, so no RowError.
            raise ValueError(f"{name}: the chat template made the placeholders {found} of {kinds}; expected the same")
        counts = np.ones(len(tokens), np.int64)
        counts[where] = [t * h * w // self.image_spec.merge_size**2 for t, h, w in grids]
        return np.repeat(tokens, counts)

    def _assemble(self, tokens_T: np.ndarray, grids: tuple, patches: list[np.ndarray]) -> EncodedPrompt:
        """Adds slots and positions to expanded tokens."""
        spec = self.image_spec
        is_image_T = np.isin(tokens_T, (self.ids.image, self.ids.video))
        slot_T = np.where(is_image_T, np.cumsum(is_image_T) - 1, -1).astype(np.int32)
        segments, begin, slot = [], 0, 0
        for grid in grids:
            at = int(np.flatnonzero(slot_T == slot)[0])
            size = grid[0] * grid[1] * grid[2] // spec.merge_size**2
            segments += [at - begin, grid]
            begin, slot = at + size, slot + size
        segments.append(len(tokens_T) - begin)
        positions_3T, next_position = mrope_positions(segments, spec.merge_size)
        width = 3 * spec.temporal_patch_size * spec.patch_size**2
        return EncodedPrompt(
            tokens_T=tokens_T.astype(np.int32),
            positions_3T=positions_3T,
            image_slot_T=slot_T,
            patches_PC=np.concatenate([np.zeros((0, width), np.uint8), *patches]),
            grids=grids,
            next_position=next_position,
        )


def _opened(image: ImageLike, name: str | None = None) -> Image.Image:
    return image if isinstance(image, Image.Image) else load_image(image, name=name)


@contextlib.contextmanager
def _row_errors(name: str, source: object) -> Iterator[None]:
    """Errors of reading an image or a video as RowErrors with the row's name, and the file's."""
    try:
        yield
    except (ValueError, OSError) as error:  # OSError: a PIL image whose file is read only now
        where = f" ({source})" if isinstance(source, (str, os.PathLike)) and str(source) not in str(error) else ""
        raise RowError(f"{name}{where}: {error}") from error


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. transformers makes an empty one where the vocabulary is missing: checked here."""
    if not (folder / "tokenizer.json").is_file():
        for path in (folder / "vocab.json", folder / "merges.txt"):
            if not path.is_file():
                raise ValueError(f"{path}: no such file; expected tokenizer.json, or vocab.json and merges.txt")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what transformers and tokenizers raise here is a bare Exception, or anything
        raise ValueError(f"{folder}: the tokenizer or its chat template cannot be read ({error})") from error


def _special_ids(folder: Path, config: dict, tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Vision ids from config.json, stop ids from the tokenizer."""
    vocabulary = tokenizer.get_vocab()

    def from_config(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or value not in known:
            raise ValueError(f"{folder / 'config.json'}: {key} is {value!r}; expected the id of one of its tokens")
        return value

    def from_tokenizer(token: str) -> int:
        if token not in vocabulary:
            raise ValueError(f"{folder}: the tokenizer (tokenizer.json, tokenizer_config.json) has no {token!r}")
        return vocabulary[token]

    known = set(vocabulary.values())
    return SpecialIds(
        image=from_config("image_token_id"),
        video=from_config("video_token_id"),
        vision_start=from_config("vision_start_token_id"),
        vision_end=from_config("vision_end_token_id"),
        im_end=from_tokenizer(IM_END),
        end_of_text=from_tokenizer(END_OF_TEXT),
    )
