"""The rules of the house, read from the source: who may import whom, and how long files and functions may be.

Stages meet in types.py and in the rooms above them, never directly; data flows one way.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from helpers.paths import ROOT, SCRIPTS

PACKAGE = ROOT / "r1vl_jax"
STAGES = ("data", "processing", "rollout", "rewards", "step_grpo", "sft", "checkpoint")
SHARED = {"config", "config_stages", "types", "errors"}  # files directly in the package that are no commands
ENTRIES = {"data.check", "data.build", "data.shapes"}  # commands that lie in a stage for their name alone
MAX_FILE_LINES, MAX_FUNCTION_LINES = 330, 60


def name_of(path: Path, root: Path = ROOT) -> str:
    """The name under which a file is imported; a package's is that of its folder."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SOURCES = [*MODULES.values(), *KERNELS, *sorted(SCRIPTS.glob("*.py"))]
ROOMS = sorted({name.split(".")[1] for name, path in MODULES.items() if path.parent != PACKAGE})


def names_in(source: str, package: str) -> set[str]:
    """Every name that a source imports, wherever in it; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, node.module or ""]).strip(".")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


@cache
def names_imported(path: Path) -> set[str]:
    here = name_of(path) if path.is_relative_to(PACKAGE) else ""
    return names_in(path.read_text(), here if path.name == "__init__.py" else here.rpartition(".")[0])


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in names_imported(path)}


@cache
def imports(module: str) -> set[str]:
    """The modules of r1vl_jax that one of them imports by name; a package only where no module of it is meant."""
    names = names_imported(MODULES[module]) & MODULES.keys()
    return {name for name in names if not any(other.startswith(name + ".") for other in names)} - {module}


def room_of(module: str) -> str:
    """data for r1vl_jax.data.rows; also types for r1vl_jax.types."""
    return module.split(".")[1] if "." in module else ""


def is_command(module: str) -> bool:
    inside = module.partition(".")[2]
    top = MODULES[module].parent == PACKAGE and inside not in {"", *SHARED}
    return top or inside in ENTRIES or inside.endswith("__main__")


def in_room(room: str) -> list[str]:
    """Its modules, commands left out."""
    return [module for module in MODULES if room_of(module) == room and not is_command(module)]


def rooms_imported(room: str) -> set[str]:
    return {room_of(name) for module in in_room(room) for name in imports(module)} - {room}


def arrows(modules, forbidden) -> list[str]:
    """`a imports b` for every import of these modules that is forbidden."""
    return [f"{module} imports {name}" for module in modules for name in sorted(imports(module)) if forbidden(name)]


def test_the_reader_sees_imports():
    """This test's own tool: imports inside functions, `from` imports and relative ones are all seen."""
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import i"
    assert names_in(source, "x.y") == {"a.b", "c", "c.d", "x.y", "x.y.e", "x.f", "x.f.g", "i"}
    assert "r1vl_jax.shapes.draw" in imports("r1vl_jax.shapes.questions")
    assert "r1vl_jax.data.tfds_source" in imports("r1vl_jax.data.sources")  # inside a function
    assert "r1vl_jax.config" in imports("r1vl_jax.training.run_folder")  # as `from r1vl_jax import config as ...`
    assert {"jax", "optax"} <= libraries(MODULES["r1vl_jax.training.programs"])
    assert set(STAGES) < set(ROOMS)
    assert all(f"r1vl_jax.{name}" in MODULES for name in SHARED | ENTRIES)
    assert is_command("r1vl_jax.train") and is_command("r1vl_jax.data.check") and not is_command("r1vl_jax.config")


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_each_other(stage):
    assert not arrows(in_room(stage), lambda name: room_of(name) in set(STAGES) - {stage})


def test_only_training_imports_every_stage():
    everything = {room for room in ROOMS if rooms_imported(room) >= set(STAGES) - {room}}
    assert everything == {"training"}
    for command in filter(is_command, MODULES):
        assert not {room_of(name) for name in imports(command)} >= set(STAGES), command


def test_nothing_imports_a_command():
    """A command parses, calls and prints; what two of them need has a room."""
    assert not arrows(MODULES, is_command)


@pytest.mark.parametrize("folder", ["model", "parallel"])
def test_the_model_knows_no_stage(folder):
    assert not arrows(in_room(folder), lambda name: room_of(name) in STAGES)


def test_what_all_share_stands_on_nothing():
    for room in ("types", "errors"):
        assert not rooms_imported(room), room
    assert rooms_imported("common") <= {"errors"}


def test_no_circle():
    """Modules in the order of a depth-first walk; the path back to one that is still open would be a circle."""
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module not in done:
            open_.append(module)
            for name in sorted(imports(module)):
                visit(name)
            done.add(open_.pop())

    for module in MODULES:
        visit(module)


def reached(modules) -> set[str]:
    """All modules of r1vl_jax that are loaded with these, packages' own __init__ among them."""
    seen, left = set(), list(modules)
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            parts = module.split(".")
            left += [".".join(parts[:count]) for count in range(1, len(parts))] + list(imports(module))
    return seen


def test_rewards_and_processing_need_no_jax():
    """Scorers are many processes and load nothing of jax, not even through what they import; processing is NumPy."""
    for module in (*reached(in_room("rewards")), *in_room("processing")):
        assert not libraries(MODULES[module]) & {"jax", "flax", "optax", "orbax"}, module
    assert rooms_imported("rewards") <= {"errors", "common"}


@pytest.mark.parametrize("path", [*MODULES.values(), *KERNELS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_torch(path):
    assert not libraries(path) & {"torch", "torchvision", "tensorflow", "qwen_vl_utils"}


def functions(path: Path):
    """(name, lines) of every function, decorators counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(part.lineno for part in (node, *node.decorator_list))
            yield node.name, node.end_lineno - first + 1


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES}


def test_functions_are_short():
    lengths = {f"{path.relative_to(ROOT)}: {name}": lines for path in SOURCES for name, lines in functions(path)}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
