"""Chat text and whole prompts: the published template, expansion by hand, and what is refused."""

import dataclasses
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.paths import GEOMETRY
from helpers.tiny_tokenizer import QWEN2_VL_TEMPLATE, make_tokenizer, write_checkpoint
from PIL import Image

from r1vl_jax.config import DataSection, RLSection
from r1vl_jax.data.sources import JsonSource
from r1vl_jax.errors import ConfigError, RowError
from r1vl_jax.processing import chat
from r1vl_jax.processing.chat import find_chat_template, render_chat, split_questions
from r1vl_jax.processing.images import image_patches
from r1vl_jax.processing.positions import mrope_positions
from r1vl_jax.processing.processor import Processor
from r1vl_jax.processing.videos import VideoSpec
from r1vl_jax.types import Example

TEXT_TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
VISION = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
PROMPT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
needs_geometry = pytest.mark.skipif(not GEOMETRY.is_dir(), reason="needs shared/real/geometry3k beside the checkout")


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_folder(folder, max_pixels=20_000)


def split_question(question, **counts):
    (parts,) = split_questions([question], **counts)
    return parts


def user(parts):
    return [{"role": "user", "content": parts}]


def test_split_question():
    assert split_question("Find x.", images=0) == [{"type": "text", "text": "Find x."}]
    assert split_question("Find x.", images=2) == [{"type": "image"}] * 2 + [{"type": "text", "text": "Find x."}]
    parts = split_question("a <image>\n<video> b<image>", images=2, videos=1)
    kinds = ["text", "image", "text", "video", "text", "image"]
    assert [part["type"] for part in parts] == kinds
    assert [part["text"] for part in parts if part["type"] == "text"] == ["a ", "\n", " b"]
    assert split_question("", images=1) == [{"type": "image"}]


@pytest.mark.parametrize(("question", "images"), [("<image>", 0), ("<image> <image>", 1), ("<image> x", 2)])
def test_placeholders_must_match(question, images):
    with pytest.raises(ValueError, match=f"has {question.count('<image>')} <image> and the row has {images}"):
        split_question(question, images=images)


@pytest.mark.parametrize("question", ["Find x.", "<image>Find x.", "a <image><video>\nb <image>", "{{ x }} {% if %}"])
def test_own_format_equals_the_published_template(question):
    tokenizer = make_tokenizer()
    parts = split_question(question, images=question.count("<image>"), videos=question.count("<video>"))
    published = render_chat(tokenizer, user(parts), vision=VISION, template=QWEN2_VL_TEMPLATE)
    ours = render_chat(tokenizer, user(parts), vision=VISION)
    text = question.replace("<image>", VISION["image"]).replace("<video>", VISION["video"])
    assert published == ours == PROMPT.format(text) + "<|im_start|>assistant\n"


def test_where_the_template_comes_from(tmp_path):
    tokenizer = make_tokenizer()
    assert find_chat_template(tmp_path, tokenizer) is None
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    assert find_chat_template(tmp_path, tokenizer) == "D"
    tokenizer.chat_template = "A"
    assert find_chat_template(tmp_path, tokenizer) == "A"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "B"}))
    assert find_chat_template(tmp_path, tokenizer) == "B"
    (tmp_path / "chat_template.jinja").write_text("C")
    assert find_chat_template(tmp_path, tokenizer) == "C"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(ValueError, match="chat_template.json: no text under chat_template"):
        find_chat_template(tmp_path, tokenizer)


def test_template_that_does_not_serve(tmp_path, processor):
    with pytest.raises(ValueError, match="takes no message with images"):
        render_chat(processor.tokenizer, user([{"type": "image"}]), vision=VISION, template=TEXT_TEMPLATE)
    with pytest.raises(ValueError, match=r"expected '<\|im_start\|>assistant"):
        render_chat(processor.tokenizer, user([{"type": "image"}]), vision=VISION, template="hello")
    drops = dataclasses.replace(processor, chat_template="no picture<|im_start|>assistant\n\n")
    with pytest.raises(ValueError, match=r"template made the placeholders \[\] of \['image'\]") as caught:
        drops.encode_question("x", [noise(30, 30)])
    assert not isinstance(caught.value, RowError)  # the checkpoint's fault: no row may be dropped for it


@pytest.mark.parametrize("template", [None, QWEN2_VL_TEMPLATE])
def test_prompt_equals_expansion_by_hand(tmp_path, template):
    processor = Processor.from_folder(write_checkpoint(tmp_path, chat_template=template), max_pixels=20_000)
    assert processor.chat_template == template
    images = [noise(120, 90), noise(56, 56, 1)]
    prompt = processor.encode_question("<image>Find x in <image>.", images)
    expected = [image_patches(image, processor.image_spec) for image in images]
    assert prompt.grids == ((1, 6, 8), (1, 4, 4)) == tuple(grid for _, grid in expected)
    np.testing.assert_array_equal(prompt.patches_PC, np.concatenate([patches for patches, _ in expected]))

    def pads(count):
        return f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"

    text = PROMPT.format(f"{pads(12)}Find x in {pads(4)}.") + "<|im_start|>assistant\n"
    expected_T = processor.tokenizer.encode(text, add_special_tokens=False)
    assert prompt.tokens_T.dtype == np.int32 and prompt.tokens_T.tolist() == expected_T
    slots = iter(range(16))
    by_hand = [next(slots) if token == processor.ids.image else -1 for token in expected_T]
    assert prompt.image_slot_T.tolist() == by_hand and prompt.num_image_tokens == 16
    first = expected_T.index(processor.ids.image)
    second = expected_T.index(processor.ids.image, first + 12)
    tail = len(expected_T) - second - 4
    positions_3T, next_position = mrope_positions([first, (1, 6, 8), second - first - 12, (1, 4, 4), tail], 2)
    np.testing.assert_array_equal(prompt.positions_3T, positions_3T)
    assert prompt.next_position == next_position


def test_text_only(processor):
    prompt = processor.encode_question("Find x.")
    assert prompt.grids == () and prompt.patches_PC.shape == (0, 1176) and prompt.num_image_tokens == 0
    np.testing.assert_array_equal(prompt.positions_3T, [range(len(prompt.tokens_T))] * 3)
    assert prompt.next_position == len(prompt.tokens_T)


def test_video_keeps_the_order_of_placeholders(processor):
    image, frames = noise(60, 60), [noise(58, 60, seed) for seed in range(5)]
    prompt = processor.encode_question("<video>what<image>", [image], videos=[frames])
    assert prompt.grids == ((3, 4, 4), (1, 4, 4))
    kinds = [token for token in prompt.tokens_T if token in (processor.ids.image, processor.ids.video)]
    assert kinds == [processor.ids.video] * 12 + [processor.ids.image] * 4
    assert prompt.image_slot_T[prompt.image_slot_T >= 0].tolist() == list(range(16))
    np.testing.assert_array_equal(prompt.patches_PC[48:], image_patches(image, processor.image_spec)[0])
    assert prompt.next_position == prompt.positions_3T.max() + 1


@pytest.mark.parametrize("template", [None, QWEN2_VL_TEMPLATE])
def test_conversation_equals_expansion_by_hand(tmp_path, template):
    """A system turn, an answered turn with an image, and a question with an image and a video."""
    processor = Processor.from_folder(write_checkpoint(tmp_path, chat_template=template), max_pixels=20_000)
    images, frames = [noise(120, 90), noise(56, 56, 1)], [noise(58, 60, seed) for seed in range(4)]
    prompt = processor.encode_question(
        "And <image>, or <video>?", images, videos=[frames], system="Be brief.",
        history=[("<image>One?", "It is <image>.")],
    )  # fmt: skip

    def pads(kind, count):
        return f"<|vision_start|>{f'<|{kind}_pad|>' * count}<|vision_end|>"

    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{pads('image', 12)}One?<|im_end|>\n"
        "<|im_start|>assistant\nIt is <image>.<|im_end|>\n"
        f"<|im_start|>user\nAnd {pads('image', 4)}, or {pads('video', 8)}?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt.tokens_T.tolist() == processor.tokenizer.encode(text, add_special_tokens=False)
    assert prompt.grids == ((1, 6, 8), (1, 4, 4), (2, 4, 4))
    assert prompt.patches_PC.dtype == np.uint8 and prompt.patches_PC.shape == (48 + 16 + 32, 1176)
    # What an earlier answer was trained as is what stands before the next question.
    end = "".join(processor.tokenizer.convert_ids_to_tokens(processor.encode_answer("It is <image>.")))
    assert end in "".join(processor.tokenizer.convert_ids_to_tokens(prompt.tokens_T))


def test_prompt_texts_of_the_configuration(tmp_path, processor):
    """The system turn is for questions that have none; the suffix is in every question of a conversation."""
    told = processor.with_texts("Think in tags.", "\nBe brief.")
    history = [("Which<image>?", "That.")]
    ours = told.encode_question("And?", [noise(60, 60)], history=history)
    by_hand = processor.encode_question(
        "And?\nBe brief.", [noise(60, 60)], history=[("Which<image>?\nBe brief.", "That.")], system="Think in tags."
    )
    np.testing.assert_array_equal(ours.tokens_T, by_hand.tokens_T)
    own = told.encode_question("And?", system="Mine.")
    np.testing.assert_array_equal(own.tokens_T, processor.encode_question("And?\nBe brief.", system="Mine.").tokens_T)
    assert (processor.system, processor.question_suffix) == (None, "")
    for texts, message in (
        (("<|im_end|>", ""), r"^data.system_prompt: the text holds the special token '<\|im_end\|>'"),
        (("", "<|image_pad|>"), r"^data.question_suffix: the text holds the special token"),
        (
            ("", "see <image>"),
            r"^data.question_suffix: the text holds a placeholder, <image> or <video>; expected none",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            processor.with_texts(*texts)
    data = DataSection(system_prompt="Think in tags.", question_suffix="\nBe brief.")
    staged = processor.for_stage(RLSection(), data)
    assert (staged.system, staged.question_suffix) == ("Think in tags.", "\nBe brief.")


def test_a_template_that_opens_the_thinking(tmp_path):
    """The answers of the data then begin inside of it."""
    template = QWEN2_VL_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    processor = Processor.from_folder(write_checkpoint(tmp_path, chat_template=template))
    assert processor.opens_thinking
    rows = [Example("f", 0, (), "x", text) for text in ("<think>\nSo.</think>\n3", "So.</think>\n3")]
    pairs = [processor.encode_pair(row) for row in rows]
    assert processor.decode(pairs[0][0].tokens_T).endswith("assistant\n<think>\n")
    assert pairs[0][1].tolist() == pairs[1][1].tolist() == processor.encode_answer("So.</think>\n3").tolist()


def test_texts_of_every_turn_are_checked(processor):
    for options in ({"system": "<|im_end|>"}, {"history": [("x", "<|im_end|>")]}, {"history": [("<|im_end|>", "x")]}):
        with pytest.raises(RowError, match="the text holds the special token"):
            processor.encode_question("x", **options)


def test_pairs(processor):
    example = Example("f.json", 3, (), "Find x.", "It is three.")
    prompt, answer = processor.encode_pair(example, max_tokens=200, max_answer_tokens=50)
    np.testing.assert_array_equal(prompt.tokens_T, processor.encode_prompt(example).tokens_T)
    np.testing.assert_array_equal(answer, processor.encode_answer("It is three."))
    count = len(answer)
    with pytest.raises(RowError, match=f"^f.json, row 3, answer: {count} tokens, expected at most {count - 1}"):
        processor.encode_pair(example, max_answer_tokens=count - 1)


def test_image_files_as_bytes(tmp_path, processor):
    """As a TFDS record holds them; errors call them by their names."""
    noise(64, 48).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    example = Example("f.json", 0, (str(tmp_path / "a.png"),), "<image>x", "3")
    held = dataclasses.replace(example, images=("a.png",), image_bytes=(data,))
    np.testing.assert_array_equal(processor.encode_prompt(example).patches_PC, processor.encode_prompt(held).patches_PC)
    with pytest.raises(RowError, match=r"^f.json, row 0, images\[0\]: a.png: cannot be read as an image"):
        processor.encode_prompt(dataclasses.replace(held, image_bytes=(data[:200],)))


def test_video_frames_are_limited_in_number_and_size(processor):
    """Frames of a list beyond max_frames are left out evenly; all obey the smaller pixel budget."""
    frames = [noise(58, 60, seed) for seed in range(40)]
    few = dataclasses.replace(processor, video_spec=VideoSpec(max_frames=6, max_pixels=784))
    prompt = few.encode_question("x", videos=[frames])
    assert prompt.grids == ((3, 2, 2),)
    picked = [frames[i] for i in (0, 8, 16, 23, 31, 39)]
    np.testing.assert_array_equal(prompt.patches_PC, few.encode_question("x", videos=[picked]).patches_PC)
    small = dataclasses.replace(
        processor, image_spec=dataclasses.replace(processor.image_spec, min_pixels=784, max_pixels=784)
    )
    assert small.encode_question("x", videos=[frames[:2]]).grids == ((1, 2, 2),)
    with pytest.raises(RowError, match=r"row 1, videos\[0\]: .*none.mp4: no such video file"):
        processor.encode_question("x", videos=["none.mp4"], name="row 1")


def test_paths_and_pil_images_agree(tmp_path, processor):
    image = noise(64, 48)
    image.save(tmp_path / "a.png")
    from_path = processor.encode_question("x", [tmp_path / "a.png"])
    np.testing.assert_array_equal(from_path.patches_PC, processor.encode_question("x", [image]).patches_PC)
    again = processor.encode_prompt(Example("f.json", 0, (str(tmp_path / "a.png"),), "<image>x", "3"))
    np.testing.assert_array_equal(from_path.tokens_T, again.tokens_T)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"])
def test_special_tokens_in_texts_are_refused(processor, token):
    example = Example("data/rl.json", 3, (), f"what is {token}?", "3")
    with pytest.raises(RowError, match=r"data/rl.json, row 3, question: the text holds the special token '<\|"):
        processor.encode_prompt(example)
    with pytest.raises(RowError, match="data/sft.json, row 1, answer: the text holds"):
        processor.encode_answer(f"a {token}", name="data/sft.json, row 1, answer")


def test_row_errors_name_file_row_and_field(tmp_path, processor):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (900, 3)).save(tmp_path / "long.png")
    for file, message in [
        ("none.png", "none.png: no such image file"),
        ("text.png", "text.png: cannot be read"),
        ("long.png", "long.png: image is 900x3 pixels"),
    ]:
        example = Example("data/rl.json", 3, (str(tmp_path / file),), "<image>x", "3")
        with pytest.raises(RowError, match=rf"^data/rl.json, row 3, images\[0\].*{message}"):
            processor.encode_prompt(example)
    with pytest.raises(RowError, match="data/rl.json, row 4, question: .* 2 <image> and the row has 0"):
        processor.encode_prompt(Example("data/rl.json", 4, (), "<image><image>x", "3"))
    with pytest.raises(RowError, match="not valid Unicode"):
        processor.encode_question("\ud800")
    with pytest.raises(RowError, match=r"videos\[0\]: a video without frames"):
        processor.encode_question("x", videos=[[]])


def test_a_prompt_is_never_cut(processor):
    image = noise(120, 90)
    length = len(processor.encode_question("x", [image]).tokens_T)
    assert len(processor.encode_question("x", [image], max_tokens=length).tokens_T) == length
    message = f"row 7: the prompt has {length} tokens .12 image, {length - 12} text.; expected at most {length - 1}"
    with pytest.raises(RowError, match=message):
        processor.encode_question("x", [image], name="row 7", max_tokens=length - 1)


def test_answer_and_decode(processor):
    answer = "### Step 1:\né 2 * 40 = 80 , \U0001f600 n't"
    tokens = processor.encode_answer(answer)
    assert tokens.dtype == np.int32
    assert processor.decode(tokens) == answer + "\n"
    newline = processor.tokenizer.encode("\n", add_special_tokens=False)
    assert tokens[-2:].tolist() == [processor.ids.im_end, *newline]
    assert processor.decode(tokens[:-2]) == answer == processor.decode(tokens[:-1].tolist())
    assert processor.encode_answer("").tolist() == [processor.ids.im_end, *newline]


def test_ids_come_from_the_files(tmp_path, processor):
    vocabulary = processor.tokenizer.get_vocab()
    assert processor.ids.image == vocabulary["<|image_pad|>"]
    assert set(processor.stop_ids) == {vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]}
    assert processor.ids.video == vocabulary["<|video_pad|>"]
    assert Processor.from_folder(write_checkpoint(tmp_path, nested=True)).ids == processor.ids
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("image_token_id", "video_token_id", "vision_end_token_id"):
        config["vision_config"][key] = config.pop(key)
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert Processor.from_folder(tmp_path).ids == processor.ids
    config["vision_config"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Processor.from_folder(tmp_path).ids == processor.ids  # the tokenizer's


def test_missing_parts_of_a_checkpoint(tmp_path):
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(message, without=None, **changes):
        fields = {key: value for key, value in (config | changes).items() if key != without}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=message):
            Processor.from_folder(tmp_path)

    refused("config.json: vision_end_token_id is 99999", vision_end_token_id=99_999)
    refused("vision_config.patch_size is 16, .* patch_size is 14", vision_config={"patch_size": 16})
    refused(r"config.json: text_config is \[\]; expected an object", text_config=[])
    refused("config.json: vision_config is 3; expected an object", vision_config=3)
    names = (tmp_path / "tokenizer.json").read_text(), (tmp_path / "tokenizer_config.json").read_text()
    for file, text in zip(("tokenizer.json", "tokenizer_config.json"), names, strict=True):
        (tmp_path / file).write_text(text.replace("<|image_pad|>", "<|other|>"))
    refused("config.json: image_token_id is missing", without="image_token_id")
    for file, text in zip(("tokenizer.json", "tokenizer_config.json"), names, strict=True):
        (tmp_path / file).write_text(text)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text().replace("<|im_end|>", "<|other|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = (tmp_path / "tokenizer_config.json").read_text().replace("<|im_end|>", "<|other|>")
    (tmp_path / "tokenizer_config.json").write_text(settings)
    refused("has no '<.im_end.>'")
    (tmp_path / "tokenizer.json").unlink()
    refused("vocab.json: no such file; expected tokenizer.json")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: no such file"):
        Processor.from_folder(tmp_path)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", b"[]", "config.json: holds a list; expected an object"),
        ("config.json", b"\xff", "config.json: not UTF-8"),
        ("tokenizer.json", b"[]", "the tokenizer or its chat template cannot be read"),
        ("tokenizer.json", b"{", "the tokenizer or its chat template cannot be read"),
        ("tokenizer.json", b"{}", "the tokenizer or its chat template cannot be read"),
        ("tokenizer_config.json", b"\xff", "the tokenizer or its chat template cannot be read"),
        ("preprocessor_config.json", b"[]", "preprocessor_config.json: holds a list; expected an object"),
        ("preprocessor_config.json", b"{", "preprocessor_config.json: not JSON"),
        ("chat_template.json", b"[]", "chat_template.json: holds a list; expected an object"),
        ("chat_template.json", b"{", "chat_template.json: not JSON"),
        ("chat_template.jinja", b"\xff", "the tokenizer or its chat template cannot be read .*utf-8"),
    ],
)
def test_damaged_files_of_a_checkpoint(tmp_path, file, content, message):
    write_checkpoint(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Processor.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages[0]['content'] | nothing }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ [][7].x }}",
        "{{ messages[7].content.x.y }}",
        "{{ [1, 'a'] | sort }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(10000000000) | list }}",
        "{{ messages.append(1) }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ 'x'.ljust(1000000000000) }}",
    ],
)
def test_a_chat_template_that_is_no_jinja(tmp_path, template):
    with pytest.raises(ValueError, match=f"{tmp_path}: the chat template (cannot be used|takes no message)") as caught:
        Processor.from_folder(write_checkpoint(tmp_path, chat_template=template))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}" + "{% endfor %}" * 2
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, "it takes longer than 0.2 s"),
        (
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
            "longer than 0.2 s",
        ),
        ("{{ 10 ** 10 ** 10 }}", "multiplies (** in line 1)"),
        ("{% set x = 'x' %}\n{{ x * 1000000000000 }}", "multiplies (* in line 2)"),
        ("x" * 2_000_000, "2,000,000 characters, expected at most 1,048,576"),
        (
            "{% for a in range(50000) %}{{ '" + "x" * 500 + "' }}{% endfor %}",
            "25,000,000 characters, the limit is 16,777,216",
        ),
    ],
    ids=["loops", "recursion", "power", "product", "long", "writes"],
)
def test_a_chat_template_that_never_ends(tmp_path, monkeypatch, template, message):
    """A template is a program of whoever made the checkpoint."""
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2 if "longer" in message else 600.0)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: the chat template .*{re.escape(message)}"):
        Processor.from_folder(write_checkpoint(tmp_path, chat_template=template))


def test_the_time_limit_holds_in_every_thread_and_leaves_no_trace(processor, monkeypatch):
    """Rows are encoded in threads. A debugger's own trace function is put back."""
    endless = dataclasses.replace(processor, chat_template=LOOPS)
    with ThreadPoolExecutor(2) as threads:
        assert threads.submit(processor.encode_question, "Find x.").result().tokens_T.size
        monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
        for error in [threads.submit(endless.encode_question, "Find x.").exception() for _ in range(2)]:
            assert isinstance(error, ValueError) and "it takes longer than 0.2 s" in str(error)
        assert threads.submit(sys.gettrace).result() is None


# The first is that of the published base models: it takes the parts of one text for messages.
BASE_TEMPLATES = [
    "{% if messages is string %}{{ messages }}{% else %}{% for part in messages %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}",
    "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endfor %}",
    "",
]


@pytest.mark.parametrize("template", BASE_TEMPLATES)
@pytest.mark.parametrize("place", ["chat_template.json", "chat_template.jinja", "tokenizer"])
def test_a_template_without_chat_turns_gives_way_to_the_built_in_one(tmp_path, processor, template, place):
    write_checkpoint(tmp_path, chat_template=template if place == "tokenizer" else QWEN2_VL_TEMPLATE)
    if place != "tokenizer":
        text = json.dumps({"chat_template": template}) if place.endswith("json") else template
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        (tmp_path / place).write_text(text)
    base = Processor.from_folder(tmp_path, max_pixels=20_000)
    assert base.chat_template is None and processor.note == ""
    assert base.note == (
        f"{tmp_path}: its chat template renders no chat turns, as a base model's; the built-in ChatML is used"
    )
    images = [noise(60, 60)]
    expected = processor.encode_question("<image>Find x.", images)
    np.testing.assert_array_equal(base.encode_question("<image>Find x.", images).tokens_T, expected.tokens_T)


@pytest.mark.parametrize(
    "template",
    ["Question: {{ messages[0]['content'] }}", "{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"],
)
def test_a_template_with_other_turns_is_refused(tmp_path, template):
    with pytest.raises(ValueError, match=r"the chat template ends a prompt with .*; expected '<\|im_start\|>assistant"):
        Processor.from_folder(write_checkpoint(tmp_path, chat_template=template))


@needs_geometry
def test_real_rows(processor):
    for file in ("rl.json", "sft.json"):
        examples = JsonSource(GEOMETRY / file)
        assert len(examples) == 10 and not examples.errors
        for example in examples:
            prompt = processor.encode_prompt(example)
            (t, h, w), *rest = prompt.grids
            assert not rest and t == 1 and h * w * 196 <= 20_000
            assert prompt.num_image_tokens == h * w // 4 == (prompt.tokens_T == processor.ids.image).sum()
            assert prompt.patches_PC.shape == (h * w, 1176)
            answer = processor.encode_answer(example.answer, name=example.name)
            assert processor.decode(answer[:-2]) == example.answer


def test_runs_without_torch(folder):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from r1vl_jax.processing.processor import Processor\n"
        f"print(len(Processor.from_folder({str(folder)!r}).encode_question('x').tokens_T))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and int(run.stdout) > 0, run.stderr
