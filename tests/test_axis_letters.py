"""Axis letters of array names and einsum labels are those of the dimension key in r1vl_jax/types.py."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import r1vl_kernels.reference

import r1vl_jax.types

PACKAGE, KERNELS = (Path(str(module.__file__)).parent for module in (r1vl_jax.types, r1vl_kernels.reference))
FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
DIGITS = set("0123456789")
SUFFIX = re.compile(r"_?[a-z]\w*_([A-Z0-9][A-Za-z0-9]*)")  # a name in capitals alone is a constant, no array


def key() -> set[str]:
    """The letters of the key: in the indented lines of the docstring, a capital before its words and two spaces."""
    lines = [line for line in str(r1vl_jax.types.__doc__).splitlines() if line.startswith("    ")]
    return {letter for line in lines for letter in re.findall(r"(?:^|  )([A-Z])  (?=\S)", line)}


def axes_of(name: str) -> set[str]:
    """The axes that a name claims: its suffix, or itself if it is one capital (a size: `B, T = x.shape`)."""
    if re.fullmatch("[A-Z]", name):
        return {name}
    match = SUFFIX.fullmatch(name)
    return set(match[1]) if match and re.search("[A-Z]", match[1]) else set()


def identifiers(node: ast.AST) -> Iterator[str]:
    """Names in a node: variables and arguments; with a "_" also fields, functions and words of strings (docstrings)."""
    match node:
        case ast.Name(id=name) | ast.arg(arg=name):
            yield name
        case (
            ast.Attribute(attr=text)
            | ast.keyword(arg=str(text))
            | ast.FunctionDef(name=text)
            | ast.Constant(value=str(text))
        ):
            yield from (word for word in re.findall(r"\w+", text) if "_" in word)


def einsum_labels(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Call(
            func=ast.Attribute(attr="einsum") | ast.Name(id="einsum"), args=[ast.Constant(value=str(text)), *_]
        ):
            yield re.sub(r"\.\.\.|->|,|\s", "", text)


def wrong_letters(source: str) -> list[str]:
    """Every name and einsum label with a letter that is not in the key, with its line."""
    known, wrong = key() | DIGITS, []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.stmt, ast.expr, ast.arg, ast.keyword)):
            continue
        wrong += [f"line {node.lineno}: {name}" for name in identifiers(node) if not axes_of(name) <= known]
        wrong += [f"line {node.lineno}: einsum {label}" for label in einsum_labels(node) if not set(label) <= known]
    return wrong


def test_the_key():
    assert key() == set("BGTSLDNKEHFVRJWPCMQ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_letters(path):
    assert wrong_letters(path.read_text()) == []


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("logits_BTV = hidden_BTD @ head_DV", []),
        ("scores_BXS = 0", ["scores_BXS"]),
        ("def f(angle_WP2f): pass", ["angle_WP2f"]),
        ("batch.tokens_BGY", ["tokens_BGY"]),
        ("f(mask_ZT=1)", ["mask_ZT"]),
        ("check('rewards_BGI', a)", ["rewards_BGI"]),
        ("B, I = x.shape", ["I"]),
        ("re.I", []),
        ("LOGIT_ROWS, sha_256, x32, _Private = 1, 2, 3, 4", []),
        ("jnp.einsum('BTD,DV->BTV', a, b)", []),
        ("jnp.einsum('...D,DcF->...cF', a, b)", ["einsum DDcFcF"]),
        ("jnp.einsum('BTD, DY -> BTY', a, b)", ["einsum BTDDYBTY"]),
    ],
)
def test_a_planted_letter_is_named(line, wrong):
    assert wrong_letters(f'"""A module."""\n\n{line}\n') == [f"line 3: {name}" for name in wrong]
