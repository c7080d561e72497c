"""From files on disk to logits, beside transformers: images and video through the whole pipeline, in fp32.

Ours: a JSON file -> source -> Loader -> Processor -> planned shapes, images packed -> logits and log-probabilities.
Theirs, with nothing of ours in it: the files opened by plain PIL, transformers' image processor, the published chat
template with its placeholders expanded here, transformers' model; each chat by itself, question and answer as one text.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from contextlib import closing
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.tiny_tokenizer import QWEN2_VL_TEMPLATE, make_tokenizer
from PIL import Image, ImageOps

from r1vl_jax.checkpoint.hf import load_hf
from r1vl_jax.config import SourceSection
from r1vl_jax.data.batching import collate_pairs, collate_prompts, pad_answers, plan_shapes, size_of
from r1vl_jax.data.buckets import Buckets
from r1vl_jax.data.loader import Loader, read_rows
from r1vl_jax.data.sources import open_source
from r1vl_jax.model import qwen2_vl
from r1vl_jax.model.answers import answer_logprobs
from r1vl_jax.model.config import ModelConfig, load_config
from r1vl_jax.model.vision import normalise
from r1vl_jax.processing.processor import Processor
from r1vl_jax.processing.videos import VideoSpec
from r1vl_jax.sft.loss import sft_loss, token_weights
from r1vl_jax.types import EncodedPrompt, Prompts, TrainBatch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
av = pytest.importorskip("av")

TOKEN = 28 * 28  # pixels of an image token
MIN_PIXELS, MAX_PIXELS, VIDEO_PIXELS = 4 * TOKEN, 30 * TOKEN, 12 * TOKEN
PIXELS = {  # mean and std; the second ones are nobody's default
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "other": ((0.5, 0.4, 0.3), (0.5, 0.25, 0.125)),
}

# The files. All is noise: nothing is alike by chance.


def noise(width: int, height: int, seed: int, *channels: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8))


def clip(count: int, width: int, height: int, seed: int) -> list[Image.Image]:
    return [noise(width, height, 100 * seed + i, 3) for i in range(count)]


def write_video(path: Path, frames: list[Image.Image], codec: str, pixels: str) -> None:
    """A video of four frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=4)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = pixels
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


FRAMES = [f"frames/{i}.png" for i in range(5)]  # odd: the last one stands twice
LOSSLESS = clip(11, 112, 84, seed=9)
MANY = [f"many/{i}.png" for i in range(12)]  # small, and more of them than transformers 5.23 counts rightly


def write_files(folder: Path) -> None:
    noise(117, 85, 1, 3).save(folder / "wide.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn to the right
    noise(140, 56, 2, 3).save(folder / "turned.jpg", exif=turned, quality=90)
    noise(90, 60, 3, 4).save(folder / "glass.png")  # RGBA
    noise(60, 84, 4).save(folder / "gray.png")
    noise(20, 31, 5, 3).save(folder / "small.png")  # under the budget
    noise(300, 240, 6, 3).save(folder / "large.png")  # over it
    frames = clip(5, 170, 115, seed=7) + clip(12, 60, 50, seed=10)  # the first ones over a video's budget
    for name, frame in zip(FRAMES + MANY, frames, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        frame.save(folder / name)
    write_video(folder / "film.mp4", clip(12, 96, 64, seed=8), "mpeg4", "yuv420p")
    write_video(folder / "exact.mkv", LOSSLESS, "ffv1", "bgr0")


GRIDS = {
    "wide.png": (1, 6, 8), "turned.jpg": (1, 10, 4), "glass.png": (1, 4, 6), "gray.png": (1, 6, 4),
    "small.png": (1, 6, 4), "large.png": (1, 8, 12),
    "frames": (3, 4, 8), "film.mp4": (3, 4, 6), "exact.mkv": (3, 6, 8),
}  # fmt: skip

# The rows, and beside each the chats that transformers is given: one for each answer, which stands last.


def image(name: str) -> dict[str, Any]:
    return {"type": "image", "image": name}


def video(name: str | list[str]) -> dict[str, Any]:
    return {"type": "video", "video": name}


def says(role: str, *parts: str | dict[str, Any]) -> dict[str, Any]:
    """A message: its content is one text, or parts."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": role, "content": parts[0]}
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


system, user, assistant = (partial(says, role) for role in ("system", "user", "assistant"))
ARCS = "### Rationales:\nEqual arcs.\n\n### The final answer is:\n80"
STEP = "### Let's think step by step.\n\n### Step 1:\n2 * 40 = 80."
TURNS = [
    system("You count circles."),
    user("First ", image("glass.png"), ": how many?"), assistant("Two circles."),
    user("And in ", image("turned.jpg"), "?"), assistant("### The final answer is:\nnone"),
]  # fmt: skip

SFT = [
    (
        {"messages": [user("Find 2 * 40."), assistant(STEP)], "images": None},
        [[user("Find 2 * 40."), assistant(STEP)]],
    ),
    (
        {"messages": [user("<image>Find x."), assistant(ARCS)], "images": "wide.png"},
        [[user(image("wide.png"), "Find x."), assistant(ARCS)]],
    ),
    (
        {
            "messages": [user("Is <image> in <image>\nor <image>?"), assistant("No circle is.")],
            "images": ["small.png", "large.png", "gray.png"],
        },
        [[
            user("Is ", image("small.png"), " in ", image("large.png"), "\nor ", image("gray.png"), "?"),
            assistant("No circle is."),
        ]],
    ),
    (
        {
            "messages": [user("<video>\nWhere does <image> stand?"), assistant("80")],
            "images": ["gray.png"],
            "videos": [FRAMES],
        },
        [[user(video(FRAMES), "\nWhere does ", image("gray.png"), " stand?"), assistant("80")]],
    ),
    (
        {
            "messages": [
                system("You count circles."),
                user("First <image>: how many?"), assistant("Two circles."),
                user("And in <image>?"), assistant("### The final answer is:\nnone"),
            ],
            "images": ["glass.png", "turned.jpg"],
        },
        [TURNS[:3], TURNS],
    ),
    (
        {"messages": [user("Tell what you see."), assistant(STEP)], "videos": "film.mp4"},
        [[user(video("film.mp4"), "Tell what you see."), assistant(STEP)]],
    ),
]  # fmt: skip

RL = [
    (
        {"image_path": "large.png", "problem": "How long is the arc?", "solution": ARCS, "key_steps": None},
        user(image("large.png"), "How long is the arc?"),
    ),
    (
        {"image_path": None, "problem": "How much is 40 + 40?", "solution": "80", "key_steps": {"Steps": ["40 + 40"]}},
        user("How much is 40 + 40?"),
    ),
    (
        {"image_path": ["glass.png"], "problem": "Is <image> in\n<video>?", "solution": "80", "videos": ["exact.mkv"]},
        user("Is ", image("glass.png"), " in\n", video("exact.mkv"), "?"),
    ),
    (
        {"image_path": ["turned.jpg", "small.png"], "problem": "Which?", "solution": "None.", "videos": "film.mp4"},
        user(image("turned.jpg"), image("small.png"), video("film.mp4"), "Which?"),
    ),
]
ANSWERS = ["### The final answer is:\n40", "It is 2."]  # two of different length for each question


@dataclasses.dataclass(frozen=True)
class Scored:
    """A text's tokens and the logits behind each, the log-probabilities of its answer, and tokens of its question."""

    tokens: np.ndarray
    logits: np.ndarray
    logprobs: np.ndarray
    asked: int


# Theirs.


def opened(path: Path) -> Image.Image:
    upright = ImageOps.exif_transpose(Image.open(path))
    if upright.mode == "RGBA":
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


@dataclasses.dataclass(frozen=True)
class Theirs:
    """transformers' half: what it makes of a checkpoint folder, and the folder of the files."""

    model: Any
    tokenizer: Any
    images: Any
    files: Path

    def still(self, picture: Image.Image, max_pixels: int = MAX_PIXELS) -> tuple[tuple, np.ndarray]:
        """Grid and pixel values of an image."""
        size = {"shortest_edge": MIN_PIXELS, "longest_edge": max_pixels}
        made = self.images(picture, size=size, return_tensors="np")
        return tuple(made["image_grid_thw"][0].tolist()), made["pixel_values"]

    def film(self, name: str | list[str]) -> tuple[tuple, np.ndarray]:
        """Grid and pixel values of a video: a patch has its first half from one frame, its second from the next.

        transformers' own video processor needs torchvision. It makes of a still image two equal frames.
        """
        frames = self._frames(name)
        made = [self.still(frame, VIDEO_PIXELS) for frame in frames + frames[-1:] * (len(frames) % 2)]
        (_, h, w), _ = made[0]
        halves = [values.reshape(h * w, 3, 2, 196) for _, values in made]
        pairs = zip(halves[::2], halves[1::2], strict=True)
        joined = [np.stack([a[:, :, 0], b[:, :, 1]], axis=2).reshape(h * w, 1176) for a, b in pairs]
        return (len(joined), h, w), np.concatenate(joined)

    def _frames(self, name: str | list[str]) -> list[Image.Image]:
        """Frames as they are listed; of a film of four a second, two a second."""
        if isinstance(name, list):
            return [opened(self.files / frame) for frame in name]
        if name == "exact.mkv":  # from 0 to 2.5 s
            return LOSSLESS[::2]
        with av.open(str(self.files / name)) as container:  # from 0 to 2.75 s
            return [frame.to_image() for frame in container.decode(video=0)][::2]

    def row(self, chat: list[dict]) -> tuple[tiny.Row, int]:
        """A chat with its answer, and how many tokens its question has."""
        grids, patches = [], []
        for part in [part for turn in chat if isinstance(turn["content"], list) for part in turn["content"]]:
            if part["type"] == "image":
                kind, (grid, values) = 1, self.still(opened(self.files / part["image"]))
            elif part["type"] == "video":
                kind, (grid, values) = 2, self.film(part["video"])
            else:
                continue
            grids.append((kind, grid))
            patches.append(values)
        question = self._tokens(chat[:-1], grids, add_generation_prompt=True)
        tokens = self._tokens(chat, grids)
        assert tokens[: len(question)] == question
        kinds = {self.model.config.image_token_id: 1, self.model.config.video_token_id: 2}
        return tiny.Row(tokens, [kinds.get(token, 0) for token in tokens], grids, patches), len(question)

    def _tokens(self, chat: list[dict], grids: list, **options) -> list[int]:
        text = self.tokenizer.apply_chat_template(chat, chat_template=QWEN2_VL_TEMPLATE, tokenize=False, **options)
        counts = iter([t * h * w // 4 for _, (t, h, w) in grids])
        text = re.sub(r"<\|(image|video)_pad\|>", lambda found: found[0] * next(counts), text)
        assert next(counts, None) is None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def score(self, chat: list[dict], positions: np.ndarray | None = None) -> Scored:
        """What the model gives; `positions` (3, T) replace transformers' own."""
        row, asked = self.row(chat)
        inputs = tiny.hf_inputs([row])
        if positions is not None:
            inputs["position_ids"] = torch.from_numpy(positions)[:, None]
        with torch.no_grad():
            logits = self.model(**inputs, use_cache=False).logits[0]
        answer = torch.tensor(row.tokens[asked:])
        picked = torch.log_softmax(logits[asked - 1 : -1], -1).gather(-1, answer[:, None])[:, 0]
        return Scored(np.array(row.tokens), logits.numpy(), picked.numpy(), asked)


# Ours.


@partial(jax.jit, static_argnums=1)
def forward(params, cfg, prompts, tokens_BGT, start_B):
    logprobs, _ = answer_logprobs(params, cfg, prompts, tokens_BGT, start_B=start_B)
    return qwen2_vl.prompt_logits(params, cfg, prompts), logprobs


@dataclasses.dataclass(frozen=True)
class Ours:
    """What r1vl_jax makes of the same checkpoint folder."""

    params: Any
    cfg: ModelConfig
    processor: Processor

    @classmethod
    def of(cls, folder: Path) -> Ours:
        processor = dataclasses.replace(Processor.from_folder(folder), video_spec=VideoSpec(max_pixels=VIDEO_PIXELS))
        cfg = load_config(folder).with_pixels(processor.image_spec.mean, processor.image_spec.std)
        return cls(jax.tree.map(jnp.asarray, load_hf(folder, cfg)), cfg, processor)

    def score(self, prompts: Prompts, tokens_BGT, mask_BGT, start_B=None) -> list[list[Scored]]:
        """For each row of a batch, what each of its answers gets; `start_B`: the rows hold the answers too."""
        logits, logprobs = jax.device_get(forward(self.params, self.cfg, prompts, tokens_BGT, start_B))
        assert logits.dtype == logprobs.dtype == np.float32
        scored = []
        for b, real in enumerate(prompts.mask_BT):
            asked = int(real.sum()) if start_B is None else int(start_B[b])
            answers = [logprobs[b, g][mask] for g, mask in enumerate(mask_BGT[b])]
            scored.append([Scored(prompts.tokens_BT[b][real], logits[b][real], answer, asked) for answer in answers])
        return scored


def read(path: Path, encode) -> list[tuple]:
    """(example, encoded) in the order of a file, as training reads it."""
    source = open_source(SourceSection(path=str(path), allow_outside=True))
    assert not source.errors
    with closing(read_rows(source, encode, seed=None)) as rows:
        return [row for _, row in rows]


def shape_of(prompts: Prompts, mask_BGT: np.ndarray) -> tuple[int, ...]:
    return prompts.tokens_BT.shape[1], mask_BGT.shape[2], *prompts.segment_WP.shape


# A checkpoint and the files.


@dataclasses.dataclass(frozen=True)
class World:
    folder: Path
    model: Any

    @property
    def files(self) -> Path:
        return self.folder / "files"

    @cache  # noqa: B019 (there is one world)
    def ours(self, name: str) -> Ours:
        return Ours.of(self.folder / name)

    @cache  # noqa: B019
    def theirs(self, name: str) -> Theirs:
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder / name)
        images = transformers.AutoImageProcessor.from_pretrained(self.folder / name, backend="pil")
        return Theirs(self.model, tokenizer, images, self.files)

    @cache  # noqa: B019
    def sft(self) -> dict[tuple[int, int], Scored]:
        """What transformers gives the answers of sft.json, by row and turn."""
        chats = {(row, turn): chat for row, (_, chats) in enumerate(SFT) for turn, chat in enumerate(chats)}
        return {key: self.theirs("clip").score(chat) for key, chat in chats.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Checkpoint folders "clip" and "other": equal weights, other normalisation. And a folder of images and rows."""
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = make_tokenizer()
    ids = {"IMAGE": "<|image_pad|>", "VIDEO": "<|video_pad|>", "START": "<|vision_start|>", "END": "<|vision_end|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in ids.items()}
    with mock.patch.multiple(tiny, VOCAB=len(tokenizer), **ids):
        model = tiny.tiny_hf(seed=4)
        checkpoint = tiny.save_tiny(model, folder / "clip")
    for stub in ("merges.txt", "chat_template.jinja"):
        (checkpoint / stub).unlink()
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": QWEN2_VL_TEMPLATE}))
    tokenizer.save_pretrained(checkpoint)
    shutil.copytree(checkpoint, folder / "other")
    for name, (mean, std) in PIXELS.items():
        fields = {
            "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "patch_size": 14, "temporal_patch_size": 2,
            "merge_size": 2, "image_mean": mean, "image_std": std, "image_processor_type": "Qwen2VLImageProcessor",
        }  # fmt: skip
        (folder / name / "preprocessor_config.json").write_text(json.dumps(fields))
    (folder / "files").mkdir()
    write_files(folder / "files")
    (folder / "files" / "sft.json").write_text(json.dumps([row for row, _ in SFT]))
    (folder / "files" / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in RL))
    return World(folder, model)


class Errors:
    """Compares, and keeps the largest errors of logits and of log-probabilities."""

    def __init__(self, name: str):
        self.name, self.found, self.scale = name, [], 0.0

    def check(self, ours: Scored, theirs: Scored, atol: float = 1e-4, rtol: float = 0.0) -> None:
        here = slice(0, len(ours.tokens))  # the question, or answer and all
        assert ours.asked == theirs.asked and len(ours.tokens) in (theirs.asked, len(theirs.tokens))
        np.testing.assert_array_equal(ours.tokens, theirs.tokens[here])
        np.testing.assert_allclose(ours.logits, theirs.logits[here], rtol=rtol, atol=atol)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=rtol, atol=atol)
        both = (ours.logits, theirs.logits[here]), (ours.logprobs, theirs.logprobs)
        self.found.append([np.abs(a - b).max() for a, b in both])
        self.scale = max(self.scale, np.abs(theirs.logits).max())

    def report(self) -> None:
        logits, logprobs = np.max(self.found, axis=0)
        print(f"\n{self.name}: {len(self.found)} answers, logits {logits:.1e} of {self.scale:.1f}, ", end="")
        print(f"log-probabilities {logprobs:.1e}")


# Pixels.


@pytest.mark.parametrize("name", PIXELS)
def test_normalised_patches_equal_pixel_values(world, name):
    ours, theirs = world.ours(name), world.theirs(name)
    assert (ours.cfg.vision.pixel_mean, ours.cfg.vision.pixel_std) == PIXELS[name]
    errors = []
    for file, grid in GRIDS.items():
        if file.endswith((".png", ".jpg")):
            got = ours.processor.encode_question("", [world.files / file])
            their_grid, expected = theirs.still(opened(world.files / file))
        else:
            listed = [world.files / frame for frame in FRAMES]
            got = ours.processor.encode_question("", videos=[listed if file == "frames" else world.files / file])
            their_grid, expected = theirs.film(FRAMES if file == "frames" else file)
        assert got.grids == (their_grid,) == (grid,)
        assert got.patches_PC.dtype == np.uint8
        normalised = np.asarray(normalise(jnp.asarray(got.patches_PC), ours.cfg.vision))
        np.testing.assert_allclose(normalised, expected, rtol=0, atol=1e-6)
        errors.append(np.abs(normalised - expected).max())
    print(f"\n{name}: pixel values {max(errors):.1e}")


# Rows.


def test_sft_rows_as_training_reads_them(world):
    """Shuffled by the Loader, in shapes planned from a look ahead; each answer behind its question."""
    ours, expected, count, seed = world.ours("clip"), world.sft(), 2, 3
    source = open_source(SourceSection(path=str(world.files / "sft.json")))
    assert len(source) == len(expected) == 7 and not source.errors
    with closing(read_rows(source, ours.processor.encode_pair, seed=seed)) as rows:
        sizes = [size_of(*pair) for _, (_, pair) in islice(rows, 2 * len(source))]
    batches = [sizes[i : i + count] for i in range(0, len(sizes), count)]
    buckets = plan_shapes(batches, count=3, multiple=8, merge=2, shards=1)
    seen, shapes, errors = [], set(), Errors("sft")

    def make(rows):
        return rows, *collate_pairs([pair for _, pair in rows], buckets)

    with Loader(source, ours.processor.encode_pair, count=count, seed=seed, make=make) as loader:
        for _ in batches:  # two epochs
            rows, prompts, start, tokens, mask = loader.take()
            shapes.add(shape_of(prompts, mask))
            for (example, _), (got,) in zip(rows, ours.score(prompts, tokens, mask, start), strict=True):
                seen.append((example.row, len(example.history)))
                errors.check(got, expected[seen[-1]])
    assert sorted(seen) == sorted([*expected, *expected])
    assert shapes <= set(map(dataclasses.astuple, buckets.shapes)) and len(shapes) > 1
    errors.report()


def test_rl_rows_with_two_answers_each(world):
    """Questions as a rollout takes them, a group of answers behind each; normalised as in no other checkpoint."""
    ours, theirs, errors = world.ours("other"), world.theirs("other"), Errors("rl")
    questions = [prompt for _, prompt in read(world.files / "rl.jsonl", ours.processor.encode_prompt)]
    batches = [questions[:2], questions[2:]]
    sizes = [[size_of(prompt) for prompt in batch] for batch in batches]
    buckets = plan_shapes(sizes, count=2, multiple=8, merge=2, shards=2)
    answers = [ours.processor.encode_answer(text) for text in ANSWERS]
    shapes = set()
    for batch, rows in zip(batches, (RL[:2], RL[2:]), strict=True):
        prompts = collate_prompts(batch, buckets)
        shapes.add((prompts.tokens_BT.shape[1], 0, *prompts.segment_WP.shape))
        scored = ours.score(prompts, *pad_answers([answers] * 2, 24))
        for (_, question), group in zip(rows, scored, strict=True):
            for text, got in zip(ANSWERS, group, strict=True):
                errors.check(got, theirs.score([question, assistant(text)]))
    assert shapes == set(map(dataclasses.astuple, buckets.shapes)) and len(shapes) == 2
    errors.report()


def test_order_company_and_shape_change_nothing(world):
    ours, expected = world.ours("clip"), world.sft()
    rows = read(world.files / "sft.json", ours.processor.encode_pair)
    batches = [
        (rows, plan_shapes([[size_of(*pair) for _, pair in rows]], count=1, multiple=8, merge=2, shards=1)),
        (rows[::-1], Buckets(12, shards=4, patches=130)),
        (rows[2:5], Buckets(8, shards=3, patches=96)),
        (rows[6:], Buckets(8)),
        (rows[:1], Buckets(8)),
    ]
    shapes, packings, errors, apart = [], [], Errors("other batches"), Errors("other batches, beside each other")
    first: dict[tuple[int, int], Scored] = {}
    for batch, buckets in batches:
        prompts, start, tokens, mask = collate_pairs([pair for _, pair in batch], buckets)
        for (example, _), (got,) in zip(batch, ours.score(prompts, tokens, mask, start), strict=True):
            key = example.row, len(example.history)
            errors.check(got, expected[key])
            apart.check(got, first.setdefault(key, got), atol=1e-5, rtol=1e-6)
        shapes.append(shape_of(prompts, mask))
        packings.append(packing(prompts, [prompt for _, (prompt, _) in batch]))
    assert len(set(shapes)) == len(batches)
    assert shapes[0] == dataclasses.astuple(batches[0][1].shapes[0]) and shapes[4][2] == 0
    assert "fewer rows than images" in packings[0] & packings[1] & packings[2] and not packings[4]
    assert set.union(*packings) == {
        "fewer rows than images", "a row for two questions", "a video in two rows", "a row filled in part",
        "an empty row",
    }  # fmt: skip
    errors.report()
    apart.report()


def packing(prompts: Prompts, encoded: list[EncodedPrompt]) -> set[str]:
    """What is true of a batch's vision rows."""
    questions = [set() for _ in prompts.segment_WP]  # whose images a row holds
    images, found = 0, set()
    for b, prompt in enumerate(encoded):
        slots = prompts.image_slot_BT[b]
        rows = iter((slots[slots >= 0] // (prompts.segment_WP.shape[1] // 4)).tolist())
        for t, h, w in prompt.grids:
            here = set(islice(rows, t * h * w // 4))
            images += 1
            found |= {"a video in two rows"} if len(here) > 1 else set()
            for row in here:
                questions[row].add(b)
        assert next(rows, None) is None
    filled = (prompts.segment_WP >= 0).sum(axis=1)
    assert [count > 0 for count in filled] == [bool(those) for those in questions]
    facts = {
        "fewer rows than images": (filled > 0).sum() < images,
        "a row for two questions": any(len(those) > 1 for those in questions),
        "a row filled in part": ((filled > 0) & (filled < prompts.segment_WP.shape[1])).any(),
        "an empty row": (filled == 0).any(),
    }
    return found | {fact for fact, holds in facts.items() if holds}


def test_loss_and_gradients(world, tmp_path):
    """The warm-up's loss of a packed batch is transformers' own; so are the gradients of every parameter."""
    ours, theirs, model = world.ours("clip"), world.theirs("clip"), world.model
    pairs = [pair for _, pair in read(world.files / "sft.json", ours.processor.encode_pair)][1:5]
    chats = [chat for _, chats in SFT for chat in chats][1:5]
    rows, asked = zip(*map(theirs.row, chats), strict=True)
    inputs = tiny.hf_inputs(list(rows))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for b, question in enumerate(asked):
        labels[b, :question] = -100
    model.zero_grad()
    expected = model(**inputs, labels=labels, use_cache=False).loss
    expected.backward()

    prompts, start, tokens, mask = collate_pairs(pairs, Buckets(8, shards=2))
    batch = TrainBatch(prompts, tokens, token_weights(mask, mask.sum()), start_B=start)
    loss = jax.jit(jax.grad(partial(sft_loss, cfg=ours.cfg, remat="full"), has_aux=True))
    gradients, metrics = loss(ours.params, batch)
    print(f"\nloss {metrics['loss']:.6f}, {abs(metrics['loss'] - expected.item()):.1e} from transformers', ", end="")
    np.testing.assert_allclose(metrics["loss"], expected.item(), rtol=0, atol=1e-5)
    tiny.check_gradients(gradients, model, tmp_path / "gradients", ours.cfg)


# Positions.


def by_hand(row: tiny.Row) -> np.ndarray:
    """Positions (3, T): text counts up; behind an image or a video it goes on above all that stands in there."""
    positions, blocks, start = [], iter(row.grids), 0
    while len(positions) < len(row.kinds):
        if row.kinds[len(positions)] == 0:
            positions.append((start, start, start))
            start += 1
        else:
            _, (t, h, w) = next(blocks)
            positions += [(start + a, start + b, start + c) for a, b, c in np.ndindex(t, h // 2, w // 2)]
            start += max(t, h // 2, w // 2)
    return np.array(positions).T


def test_long_video_against_positions_by_hand(world, tmp_path):
    """t = 6 > max(h, w) / 2 = 2, where transformers 5.23 uses positions twice: it is given the right ones here."""
    ours, theirs, errors = world.ours("clip"), world.theirs("clip"), Errors("long video")
    chat = [user("In ", video(MANY), " and ", image("wide.png"), "?"), assistant(ARCS)]
    row, asked = theirs.row(chat)
    assert [grid for _, grid in row.grids] == [(6, 4, 4), (1, 6, 8)]
    positions = by_hand(row)
    begin = row.kinds.index(2)
    assert positions[:, begin + 24].tolist() == [begin + 6] * 3  # six slots of 2 x 2 tokens: 24, and six positions

    messages = [user("In <video> and <image>?"), assistant(ARCS)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": messages, "images": str(world.files / "wide.png"),
                                 "videos": [[str(world.files / name) for name in MANY]]}]))  # fmt: skip
    ((_, pair),) = read(path, ours.processor.encode_pair)
    np.testing.assert_array_equal(pair[0].positions_3T, positions[:, :asked])
    assert pair[0].next_position == positions[0, asked]
    prompts, start, tokens, mask = collate_pairs([pair], Buckets(8, patches=80))
    assert prompts.segment_WP.shape == (2, 80)
    ((got,),) = ours.score(prompts, tokens, mask, start)
    expected = theirs.score(chat, positions)
    errors.check(got, expected)
    repeated = positions - 4 * (np.arange(len(row.tokens)) >= begin + 24)  # text behind the video at begin + 2
    assert np.abs(theirs.score(chat, repeated).logits - expected.logits).max() > 1e-2  # the logits do tell
    errors.report()
