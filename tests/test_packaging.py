"""pyproject.toml installs every package that there is."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    top, *rest = package.split(".")
    return ROOT.joinpath(SETUPTOOLS["package-dir"][top], *rest)


def test_every_package_is_listed():
    found = {path.parent.relative_to(ROOT) for path in (ROOT / "r1vl_jax").rglob("__init__.py")}
    found |= {path.parent.relative_to(ROOT) for path in (ROOT / "kernels").rglob("__init__.py")}
    listed = SETUPTOOLS["packages"]
    assert len(listed) == len(set(listed))
    assert found <= {folder_of(package).relative_to(ROOT) for package in listed}


def test_every_listed_package_is_there():
    """`r1vl_jax` and its folders have their __init__.py; a folder of modules without one would not be installed."""
    for package in SETUPTOOLS["packages"]:
        assert folder_of(package).is_dir(), package
    for path in (ROOT / "r1vl_jax").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), path.parent


def test_kernels_is_no_package():
    """A top-level importable `kernels` breaks transformers where Hugging Face's package of that name is installed."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [package for package in SETUPTOOLS["packages"] if package.split(".")[0] == "kernels"]
    assert SETUPTOOLS["package-dir"]["r1vl_kernels"] == "kernels/r1vl_kernels"


def test_torch_is_for_tests_only():
    everywhere = PROJECT["project"]["dependencies"]
    assert not [name for name in everywhere if name.startswith("torch")]
    assert [name for name in PROJECT["project"]["optional-dependencies"]["test"] if name.startswith("torch")]
