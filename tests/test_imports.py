"""Who imports whom: stages meet in types.py and in the commands, never directly."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "r1vl_jax"
STAGES = ("data", "processing", "rollout", "rewards", "step_grpo", "sft", "checkpoint")
MODULES = sorted(PACKAGE.rglob("*.py"))
# A command that lies in a stage's folder for its name alone, `python -m r1vl_jax.data.check`, with its second module.
COMMANDS = {PACKAGE / "data" / "check.py", PACKAGE / "data" / "check_report.py"}
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it; of `from a import b` both a and a.b."""
    here = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def in_stage(folder: str) -> list[Path]:
    return [path for path in sorted((PACKAGE / folder).rglob("*.py")) if path not in COMMANDS]


def stage_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "r1vl_jax" and len(parts) > 1 and parts[1] in STAGES else None


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def test_the_reader_sees_imports(tmp_path):
    """This test's own tool: imports inside functions, `from` imports and relative ones are all found."""
    path = PACKAGE / "data" / "shapes" / "questions.py"
    assert "r1vl_jax.data.shapes.draw" in imports(path)
    assert {"jax", "r1vl_jax.rollout.generate"} <= imports(PACKAGE / "run.py")
    assert "transformers" in roots(PACKAGE / "data" / "shapes" / "tokenizer.py")  # inside a function
    assert all((PACKAGE / stage).is_dir() for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_each_other(stage):
    for path in in_stage(stage):
        others = {name for name in imports(path) if stage_of(name) not in (None, stage)}
        assert not others, f"{path.relative_to(ROOT)} imports {sorted(others)}"


@pytest.mark.parametrize("folder", ["model", "parallel", *STAGES])
def test_no_stage_imports_a_command(folder):
    """What the stages share is named here; all else at the top is a command, which imports them and not they it."""
    shared = {"types", "config", "jsonfile"}
    for path in in_stage(folder):
        tops = {
            parts[1] for parts in (name.split(".") for name in imports(path)) if parts[0] == "r1vl_jax" and parts[1:]
        }
        assert tops <= shared | set(STAGES) | {"model", "parallel"}, f"{path.relative_to(ROOT)} imports {sorted(tops)}"


@pytest.mark.parametrize("folder", ["model", "parallel"])
def test_the_model_knows_no_stage(folder):
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        assert not {name for name in imports(path) if stage_of(name)}, path


def test_only_train_imports_every_stage():
    reached = {path.name: {stage_of(name) for name in imports(path)} - {None} for path in MODULES}
    assert [name for name, found in reached.items() if found >= {"sft", "step_grpo"}] == ["train.py"]
    assert reached["train.py"] | reached["run.py"] == set(STAGES)  # run.py is what train.py's stages stand on
    several = [path for path in MODULES if len({stage_of(name) for name in imports(path)} - {None}) > 1]
    assert {path.parent for path in several if path not in COMMANDS} == {PACKAGE}, names(several)


def test_nothing_imports_a_command_of_a_stage_folder():
    """Else it would be a way around the rules of the stages."""
    assert all(path.is_file() for path in COMMANDS)
    main, second = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(COMMANDS))
    importers = {name: {path for path in MODULES if name in imports(path)} for name in (main, second)}
    assert importers == {main: set(), second: {PACKAGE / "data" / "check.py"}}


def test_rewards_and_processing_need_no_jax():
    """Scorers are many processes, and processing is NumPy: neither loads jax, not even through what it imports."""
    for folder in ("rewards", "processing"):
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            assert not roots(path) & {"jax", "flax", "optax", "orbax"}, path
    for path in sorted((PACKAGE / "rewards").rglob("*.py")):
        own = {name for name in imports(path) if name.startswith("r1vl_jax")}
        assert all(name.startswith("r1vl_jax.rewards") for name in own), (
            f"{path.relative_to(ROOT)} imports {sorted(own)}"
        )


@pytest.mark.parametrize("path", MODULES + KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_torch(path):
    assert not roots(path) & {"torch", "torchvision", "tensorflow", "qwen_vl_utils"}
