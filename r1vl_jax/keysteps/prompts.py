"""Asks a model to extract key steps, to shorten key steps, or to state key steps in other words.

Every prompt asks for the JSON of R1-VL-10K, {"Steps": [["a", "other words for a"], ...]}; reply.py reads the replies.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import os
import re
from pathlib import Path
from typing import Any

from r1vl_jax.common.endpoint import Endpoint
from r1vl_jax.common.files import outside
from r1vl_jax.common.image_files import read_image_file
from r1vl_jax.common.text import shown
from r1vl_jax.errors import RowError
from r1vl_jax.keysteps.augment import augmented
from r1vl_jax.keysteps.jobs import Made
from r1vl_jax.keysteps.refine import refine_row, refined
from r1vl_jax.keysteps.reply import read_groups
from r1vl_jax.keysteps.rows import Groups, InputError, groups_of, text_field, with_groups

# OUT.partial stores a hash of this prompt: after a change here, an interrupted run cannot be continued.
EXTRACT = """\
Below are a question about an image and a correct solution that goes step by step. List its key steps: the few facts,
relations and intermediate results that every correct solution has to reach, whatever way it takes there.

- Three to six key steps, in the order of the solution.
- Each as short as it can be and still be checked alone: an equation ("12/2 = 6"), a relation ("AD is a median"), a
  value ("radius = 5"). No sentence around it, no "so" or "therefore".
- Only what the solution says. Nothing that the question already gives.
- With each, other ways in which people write the very same thing, if there are any: "a = b" and "b = a", LaTeX and
  plain text, symbols and words.

Reply with JSON only, one list for each key step, its shortest wording first:
{"Steps": [["12/2 = 6", "\\\\frac{12}{2} = 6"], ["AD is a median", "median AD"]]}

Question:
{problem}

Solution:
{solution}
"""

_REFINE = """\
Here are the key steps of a solution, each a list of wordings of one statement. Shorten every wording to what the
statement needs: drop words that carry nothing, keep all names, numbers and signs, change no meaning. Keep the number of
lists and their order. Reply with JSON only, in the same form:
{groups}
"""

_AUGMENT = """\
Here are the key steps of a solution, each a list of wordings of one statement. They are looked for, letter by letter,
in what people answer. Add to each list up to three more wordings that people would write for the very same statement:
other notation, exchanged sides, symbols for words and words for symbols. Change no meaning, add no new statement. Keep
the number of lists and their order. Reply with JSON only, in the same form:
{groups}
"""


def read_prompt(path: str) -> str:
    """Reads the user's prompt. Raises InputError if the file cannot be read, or lacks {problem} or {solution}."""
    try:
        prompt = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error
    for name in ("{problem}", "{solution}"):
        if name not in prompt:
            raise InputError(f"{path}: has no {name}; expected {{problem}} and {{solution}} in it")
    return prompt


def extract(
    row: dict[str, Any],
    endpoint: Endpoint,
    prompt: str = EXTRACT,
    images: Path | None = None,
    allow_outside: bool = False,
) -> Made:
    """Returns the row with the key steps that the model extracts from its solution.

    Args:
      row: has the fields problem and solution.
      endpoint: the model.
      prompt: a text that contains {problem} and {solution}. Other braces are kept.
      images: the folder of the images. The row's images are sent with the prompt. None sends no image.
      allow_outside: whether images may be outside of that folder.

    Raises:
      RowError: a field or an image is missing, or the reply has no key steps.
      EndpointError, EndpointStop: the request failed, or the model's reply has no usable text.
    """
    fields = {name: text_field(row, name) for name in ("problem", "solution")}
    pictures = [] if images is None else [_picture(images, path, allow_outside) for path in _image_paths(row)]
    # Both fields are filled in together: a question may contain "{solution}".
    text = re.sub(r"\{(problem|solution)\}", lambda match: fields[match[1]], prompt)
    content = [*pictures, {"type": "text", "text": text}] if pictures else text
    return Made(with_groups(row, read_groups(endpoint.complete([{"role": "user", "content": content}]))))


def refine(row: dict[str, Any], endpoint: Endpoint) -> Made:
    """Returns the row with key steps shortened by the model, then by rule.

    If the reply has no key steps or another number of groups, the key steps are shortened only by rule, and a note says
    so.
    """
    by_rule = refine_row(row)
    groups = groups_of(by_rule)
    shorter = _same_groups(endpoint, _REFINE, groups)
    if shorter is None or not refined(shorter):
        return Made(by_rule, ("refined by rule alone because the reply did not fit",))
    return Made(with_groups(row, refined(shorter)))


def augment(row: dict[str, Any], endpoint: Endpoint, most: int) -> Made:
    """Returns the row with alternatives from the model, then alternatives made by rule. `most` is the limit per group.

    If the reply has no key steps or another number of groups, only the alternatives made by rule are added, and a note
    says so.
    """
    groups = groups_of(row)
    wordings = _same_groups(endpoint, _AUGMENT, groups)
    made = with_groups(row, augmented(groups, str(row.get("problem", "")), most, wordings))
    return Made(made, () if wordings else ("augmented by rule alone because the reply did not fit",))


def _same_groups(endpoint: Endpoint, prompt: str, groups: Groups) -> Groups | None:
    """Returns the groups in the model's reply; None if it has no groups, or another number of groups."""
    asked = prompt.replace("{groups}", json.dumps({"Steps": groups}, ensure_ascii=False))
    try:
        replied = read_groups(endpoint.complete([{"role": "user", "content": asked}]))
    except RowError:
        return None
    return replied if len(replied) == len(groups) else None


def _image_paths(row: dict[str, Any]) -> list[str]:
    paths = row.get("image_path")
    paths = [] if paths is None else paths if isinstance(paths, list) else [paths]
    if not all(isinstance(path, str) and path for path in paths):
        raise RowError(f"field 'image_path': {shown(paths)}; expected a path, or a list of them")
    return paths


def _picture(folder: Path, path: str, allow_outside: bool) -> dict[str, Any]:
    """Returns an image file as a part of a message, with the image as a data URL. Sends nothing but images."""
    try:
        if not allow_outside and (problem := outside(os.path.join(folder, path), os.fspath(folder))):
            raise ValueError(f"{problem}; expected a file in that folder, or --allow-outside")
        data = base64.b64encode(read_image_file(os.path.join(folder, path))).decode()
    except ValueError as error:
        raise RowError(f"field 'image_path': {shown(path)} cannot be read: {error}") from error
    kind = mimetypes.guess_type(path)[0] or ""
    kind = kind if kind.startswith("image/") else "image/png"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
