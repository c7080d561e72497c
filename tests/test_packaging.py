"""What pyproject.toml installs."""

from __future__ import annotations

import tomllib

from helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_modules_is_a_package():
    """`packages.find` leaves out a folder without __init__.py, and its modules would be missing in a wheel."""
    for top in (ROOT / "r1vl_jax", ROOT / "kernels" / "r1vl_kernels"):
        for path in top.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path.parent


def test_kernels_is_no_package():
    """A top-level importable `kernels` breaks transformers where Hugging Face's package of that name is installed."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert PROJECT["tool"]["setuptools"]["packages"]["find"]["where"] == [".", "kernels"]


def test_torch_is_for_tests_only():
    everywhere = PROJECT["project"]["dependencies"]
    assert not [name for name in everywhere if name.startswith("torch")]
    assert [name for name in PROJECT["project"]["optional-dependencies"]["test"] if name.startswith("torch")]
