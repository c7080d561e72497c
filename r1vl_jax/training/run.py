"""Runs a whole training run, from a configuration to an exported checkpoint.

    check inputs -> open the model -> run folder -> stages (sft, step_grpo) -> export

What can be checked without reading weights or rows is checked before the run folder is made or an old one removed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax

from r1vl_jax.checkpoint.hf import save_hf
from r1vl_jax.config import Config
from r1vl_jax.inference.open_model import open_model
from r1vl_jax.model.config import load_config
from r1vl_jax.parallel.devices import matmul_precision, prepare_devices
from r1vl_jax.parallel.memory import out_of_memory
from r1vl_jax.reporting.curves import heldout_table, plot_metrics
from r1vl_jax.rewards import ScorerPool
from r1vl_jax.shapes.folder import make_shapes
from r1vl_jax.training.checks import check_inputs
from r1vl_jax.training.context import Run
from r1vl_jax.training.judging import RewardSpec
from r1vl_jax.training.programs import Compilations, enable_compilation_cache
from r1vl_jax.training.rehearsal import LATER, rehearse
from r1vl_jax.training.run_folder import RunLog
from r1vl_jax.training.run_record import record_start
from r1vl_jax.training.sft import plan_sft, sft
from r1vl_jax.training.signals import Signals
from r1vl_jax.training.step_grpo import plan_step_grpo, step_grpo, warm_up_folder

STAGES = {"sft": (plan_sft, sft), "step_grpo": (plan_step_grpo, step_grpo)}


def train(config: Config, *, resume: bool = False, overwrite: bool = False, pool: ScorerPool | None = None) -> Path:
    """Runs the configured stages.

    Args:
      resume: continue from the run folder's newest checkpoint.
      overwrite: remove an existing run folder and start again.
      pool: scores the answers, and is not closed; None: a new pool of `scoring.workers` processes.
    Returns: the exported Hugging Face folder.
    Raises: ConfigError, CheckpointError, RowError, RewardError or OSError, with a message of one line.
    """
    prepare_devices(deterministic=config.deterministic)
    enable_compilation_cache(config.compilation_cache)
    if config.shapes.dir:
        make_shapes(config.shapes)
    mesh, section = check_inputs(config), config.model
    model = open_model(
        section.path, mesh=mesh, dtype=section.dtype, attention=section.attention, kernels=section.kernels
    )
    reward = RewardSpec.from_config(config.rl)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        log = stack.enter_context(contextlib.closing(RunLog(config, resume=resume, overwrite=overwrite)))
        if pool is None:
            pool = stack.enter_context(ScorerPool(config.scoring.workers, config.scoring.timeout))
        compilations = stack.enter_context(Compilations())
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(jax.default_matmul_precision(matmul_precision(section.matmul_precision, section.dtype)))
        run = Run(config, model, reward, log, pool, compilations, signals)
        for note in model.notes:
            log.say(note)
        log.say(f"{section.path}: {model.describe(section.dtype)}")
        record_start(log.folder, config)
        export = _run_stages(run, resume)
        if table := heldout_table(log.folder):
            log.say(table)
        log.say(f"done: checkpoint for Hugging Face in {export}, curves in {plot_metrics(log.folder)}")
    return export


def _run_stages(run: Run, resume: bool) -> Path:
    """Runs the stages in order and exports the model after each. Returns the folder of the last one.

    The rows of all stages are opened, and the largest batches run, so that a fault of the last stage shows before hours
    are spent.
    """
    params, export, files = None, run.log.folder / "export", run.model.files
    plans = {name: STAGES[name][0](run) for name in run.config.stages}
    rehearse(run, plans)
    for name, plan in plans.items():
        try:
            with out_of_memory(name, LATER[name]):
                params = STAGES[name][1](run, plan, params, resume)
        except BaseException as error:
            if params is not None and not hasattr(error, "__notes__"):
                error.add_note(f"{name}: no step was finished; --resume goes on with this stage")
            raise
        folder = export if name == run.config.stages[-1] else warm_up_folder(run)
        save_hf(params, load_config(files), folder, source=files, dtype=run.config.model.dtype, overwrite=True)
    return export
