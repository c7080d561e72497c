"""The reply to R1-VL's published extraction prompt, in the forms that models give it."""

import contextlib
import json
import re

import pytest
from helpers.waiting import assert_linear

from r1vl_jax.errors import RowError
from r1vl_jax.keysteps.__main__ import main
from r1vl_jax.keysteps.convert import convert_row
from r1vl_jax.keysteps.elements import read_elements
from r1vl_jax.keysteps.reply import read_groups

WANTED = [["m∠4 + m∠5 = 180°"], ["57"], ["m∠5 = 123°"]]
PUBLISHED = (
    'Key Elements:\nImage Description: ["parallel lines", "57°"]; Rationales: ["interior angles"]; '
    'Step 1: ["m∠4 + m∠5 = 180°"], Step 2: ["57", "m∠5 = 123°"]'
)
LISTS = '["parallel lines"]', '["interior angles"]', '["m∠4 + m∠5 = 180°"]', '["57", "m∠5 = 123°"]'
NAMES = "Image Description", "Rationales", "Step 1", "Step 2"


def joined(form, separator="; ", lists=LISTS):
    return separator.join(form.format(name, list_) for name, list_ in zip(NAMES, lists, strict=True))


OBJECT = {
    "Image Description": ["lines"],
    "Rationales": [],
    "Step 1": ["m∠4 + m∠5 = 180°"],
    "Step 2": ["57", "m∠5 = 123°"],
}
FORMS = {
    "published": PUBLISHED,
    "with a last stop": f"{PUBLISHED}.",
    "in quotes": f'"{PUBLISHED}"',
    "written as JSON": json.dumps(PUBLISHED),
    "written as JSON, in ASCII": json.dumps(PUBLISHED, ensure_ascii=True),
    "backslashes before quotes": PUBLISHED.replace('"', '\\"'),
    "line ends as letters": '"' + joined("{}: {}", "\\n") + '"',
    "talk before": f"Here they are:\n\n{PUBLISHED}\n\nI hope this helps!",
    "thoughts": f'<think>Step 1: ["no"]</think>{PUBLISHED}',
    "bullets": "Key Elements:\n" + joined("- {}: {}", "\n"),
    "lines": joined("{}: {}", "\n"),
    "bold": "**Key Elements:**\n\n" + joined("**{}:** {}"),
    "bold names": joined("**{}**: {}", "\n"),
    "headers": joined("### {}:\n{}", "\n\n"),
    "headers without colons": joined("### {}\n{}", "\n\n"),
    "a fence": "```\n" + PUBLISHED + "\n```",
    "lower case": joined("{}: {}").replace("Step", "step").replace("Image Description", "image_description"),
    "without quotes": joined("{}: {}", lists=[text.replace('"', "") for text in LISTS]),
    "single quotes": joined("{}: {}", lists=[text.replace('"', "'") for text in LISTS]),
    "curly quotes": re.sub('"(.*?)"', "“\\1”", PUBLISHED),
    "a comma too many": joined("{}: {}", lists=[text.replace("]", ", ]") for text in LISTS]),
    "lists over lines": joined("{}: {}", lists=[text.replace("[", "[\n  ").replace(", ", ",\n  ") for text in LISTS]),
    "bulleted items": "\n".join([
        "Key Elements:", "Image Description:", "- lines", "Rationales:", "Step 1:", "- m∠4 + m∠5 = 180°", "Step 2:",
        '* "57"', "* **m∠5 = 123°**",
    ]),
    "no lists": "Key Elements:\nImage Description: lines; Step 1: m∠4 + m∠5 = 180°; Step 2: 57, m∠5 = 123°.",
    "an empty step": joined("{}: {}") + "; Step 3: []",
    "the last lines too": joined("{}: {}", "\n") + "\nThe final answer is: []",
    "steps alone": joined("{}: {}").partition("; ")[2].partition("; ")[2],
    "one object": json.dumps(OBJECT),
    "one object in text": f"```json\n{json.dumps(OBJECT, indent=1)}\n```",
    "a titled object": json.dumps({"Key Elements": OBJECT}),
    "a titled text": json.dumps({"Key Elements": joined("{}: {}")}),
    "an object under Steps": json.dumps({"Steps": OBJECT}),
    "a faulty object": json.dumps(OBJECT, ensure_ascii=False).replace("}", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    assert read_groups(FORMS[name]) == WANTED
    row = {"images": "a.png", "problem": "Q", "solution": "S", "key_steps": FORMS[name]}
    assert convert_row(row)["key_steps"] == {"Steps": WANTED}


@pytest.mark.parametrize(
    ("list_", "wanted"),
    [
        ('["$m\\angle 4 = 57^\\circ$", "\\frac{1}{2}"]', [["$m\\angle 4 = 57^\\circ$"], ["\\frac{1}{2}"]]),
        ('["$\\\\frac{1}{2}$"]', [["$\\frac{1}{2}$"]]),
        ("[1,000, 57]", [["1,000"], ["57"]]),
        ("[(3, 4), f(x, y) = 2]", [["(3, 4)"], ["f(x, y) = 2"]]),
        ('["(3, 4)", "a, b"]', [["(3, 4)"], ["a, b"]]),
        ('["a, b", c]', [["a, b"], ["c"]]),
        ('["AD\'s length", "5\' 3"]', [["AD's length"], ["5' 3"]]),
        ("[AD's length, x]", [["AD's length"], ["x"]]),
        ('[57, 12.5, "x"]', [["57"], ["12.5"], ["x"]]),
        ('[["12/2 = 6", "6 = 12/2"], "x = 3"]', [["12/2 = 6", "6 = 12/2"], ["x = 3"]]),
        ('["", " ", "x = 3"]', [["x = 3"]]),
        ('["see Step 2: here", "x = 3"]', [["see Step 2: here"], ["x = 3"]]),
        ("[a = b; c = d]", [["a = b"], ["c = d"]]),
    ],
)
def test_items_of_a_list(list_, wanted):
    assert read_groups(f'Image Description: ["[x]"]; Step 1: {list_}; Step 2: ["last"]') == [*wanted, ["last"]]


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, I can't help with that.",
        'Key Elements:\nImage Description: ["lines"]; Rationales: ["angles"]',
        'Key Elements:\nImage Description: ["lines"]; Rationales: []; Step 1: []; Step 2: []',
        'Key Elements:\nImage Description: ["lines"]; Step 1: ["a = b"], Step 2: ["c = d", "e',  # cut off
        'Image Description: ["lines", "57',
        'Image Description: ["lines"]; Step 1: ["a = b"]; Step 2: the sum of c and d\nis e',  # no list: not half of it
        # an answer in the format whose key steps were asked for
        "### Image Description:\nTwo lines.\n\n### Rationales:\nAngles add up.\n\n### Let's think step by step.\n\n"
        "### Step 1:\nThe sum is 180.\n\n### Step 2:\nSo x = 123.\n\n### The final answer is:\n123",
    ],
)
def test_nothing_is_invented_nor_read_by_halves(reply):
    with pytest.raises(RowError, match="no key steps in the text that starts"):
        read_groups(reply)


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ('{"Step 1": ["a = b", "b = a"], "Step 2": "c = d"}', [["a = b", "b = a"], ["c = d"]]),
        ('Rationale: short ones.\n{"Steps": [["a = b", "b = a"]]}', [["a = b", "b = a"]]),
        ("Rationale: short ones.\n1. a = b\n2. c = d", [["a = b"], ["c = d"]]),
        ("Step 1: AB = CD\nStep 2: x = 3", [["AB = CD"], ["x = 3"]]),
        ("Step 1: [0, 1] is it\nStep 2: x = 3", [["[0, 1] is it"], ["x = 3"]]),
    ],
)  # fmt: skip
def test_other_forms_stay_what_they_are(reply, wanted):
    assert read_elements(reply) is None
    assert read_groups(reply) == wanted


def test_the_command(tmp_path, capsys):
    """Rows of the published script have images and key_steps alone: the row says what it lacks."""
    rows = [
        {"images": "a.png", "problem": "Q", "solution": "S", "key_steps": PUBLISHED},
        {"images": "a.png", "key_steps": PUBLISHED},
        {"images": "a.png", "problem": "Q", "solution": "S", "key_steps": "I'm sorry, I can't."},
    ]
    source, out = tmp_path / "raw.jsonl", tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["convert", str(source), str(out)]) == 1
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert made[0] == {"image_path": "a.png", "problem": "Q", "solution": "S", "key_steps": {"Steps": WANTED}}
    assert made[1:] == rows[1:]
    err = capsys.readouterr().err
    assert "field 'problem': missing" in err and "no key steps in the text that starts \"I'm sorry" in err


HOSTILE = {
    "labels": lambda n: "Step 1: " * (n // 8),
    "open lists": lambda n: "Step 1: [" * (n // 9),
    "lists": lambda n: 'Step 1: ["a"]; ' * (n // 15),
    "labels and blanks": lambda n: ("Step 1" + " " * 90) * (n // 96),
    "blanks": lambda n: "Step 1" + " " * n + ":",
    "quotes": lambda n: "Key Elements: Step 1: [" + '"' * n + "]",
    "commas": lambda n: "Key Elements: Step 1: [" + "," * n + "]",
    "line ends": lambda n: "Key Elements: Step 1:" + "\n" * n,
    "backslashes": lambda n: '"' + "\\" * n,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_replies_are_read_in_linear_time(name):
    def work(text):
        with contextlib.suppress(RowError):
            read_groups(text)

    assert_linear(work, HOSTILE[name], 96_000)
