"""Accumulates gradients and applies the AdamW update of both stages, as pure functions; training/programs.py jits them.

Master parameters, gradients and moments are fp32 (the first moment may be bfloat16: the second changes by less than
bfloat16 can hold). An update computes:

    grads = sum over micro-batches of the gradient of the loss at the cast parameters
    state = AdamW(state, grads clipped by their global norm)     if loss and gradient are finite, else the old state
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from r1vl_jax.config_stages import OptimizerSection
from r1vl_jax.model.qwen2_vl import cast
from r1vl_jax.model.spec import tree_map_spec
from r1vl_jax.parallel.sharding import replicated
from r1vl_jax.types import TrainBatch, TrainState

LossFn = Callable[[Any, TrainBatch], tuple[jax.Array, dict[str, jax.Array]]]


def trained_parts(config: OptimizerSection) -> tuple[str, ...]:
    """Returns the names of the parameter subtrees that are trained; the others get neither gradients nor moments."""
    return ("text",) if config.freeze_vision else ("vision", "text")


def make_schedule(config: OptimizerSection, steps: int) -> optax.Schedule:
    """Returns a linear warm-up over warmup_ratio * steps, then the named decay to 0 at `steps`."""
    warmup = round(config.warmup_ratio * steps)
    rate, rest = config.learning_rate, max(1, steps - warmup)
    decay = {
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "constant": optax.constant_schedule(rate),
    }[config.schedule]
    # The first update's rate is not 0: step s of the warm-up has (s + 1) / warmup of the full rate.
    rise = optax.linear_schedule(rate / max(1, warmup), rate, max(1, warmup - 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimizerSection, steps: int, spec_tree: Any) -> optax.GradientTransformation:
    """Returns clipping by global norm, then AdamW with weight decay on matrices only."""
    parts = trained_parts(config)
    decayed = {part: tree_map_spec(lambda spec: spec.init == "normal", spec_tree[part]) for part in parts}
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            make_schedule(config, steps),
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decayed,
            mu_dtype=config.first_moment,
        ),
    )


def abstract_state(
    optimizer: optax.GradientTransformation, parts: tuple[str, ...], spec_tree: Any, shardings: Any, mesh: Mesh
) -> TrainState:
    """Returns shapes, dtypes and shardings of a state; allocates nothing. Moments are sharded like their parameters."""

    def placed(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    shapes = tree_map_spec(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), spec_tree)
    opt_state = optax.tree_map_params(
        optimizer,
        placed,
        jax.eval_shape(optimizer.init, {part: shapes[part] for part in parts}),
        {part: shardings[part] for part in parts},
        transform_non_params=lambda shape: placed(shape, replicated(mesh)),
    )
    step = placed(jax.ShapeDtypeStruct((), jnp.int32), replicated(mesh))
    return TrainState(step, jax.tree.map(placed, shapes, shardings), opt_state)


def init_state(
    params: Any, *, optimizer: optax.GradientTransformation, parts: tuple[str, ...], layout: TrainState
) -> TrainState:
    """Returns a fresh state in the layout of `abstract_state`, from fp32 parameters that are already on the devices."""
    sharding = jax.tree.map(lambda shape: shape.sharding, layout.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=sharding)({part: params[part] for part in parts})
    return TrainState(jax.device_put(jnp.int32(0), layout.step.sharding), params, opt_state)


def accumulate(
    grads: Any, params: Any, batch: TrainBatch, *, loss_fn: LossFn, parts: tuple[str, ...], dtype: str
) -> tuple[Any, dict[str, jax.Array]]:
    """Returns (grads + gradient of the loss at the parameters cast to `dtype`, metrics).

    Args:
      grads: the sum so far; None: the result is this micro-batch's gradient alone.
    """

    def loss(trained: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss_fn(cast({**params, **trained}, dtype), batch)

    (_, metrics), new = jax.value_and_grad(loss, has_aux=True)({part: params[part] for part in parts})
    return new if grads is None else jax.tree.map(jnp.add, grads, new), metrics


def update(
    state: TrainState, grads: Any, loss: jax.Array, *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """Runs one step of the optimizer. Returns (state, gradient norm before clipping).

    If `loss` or the norm is not finite, the update is skipped: parameters, moments and the schedule's count stay as
    they are. state.step goes on: it counts the updates that were tried. The choice is made inside the loop that writes
    the new values, which has read the old ones, so it costs no pass over memory. New weights are not looked at: with
    the limits of config_stages.OptimizerSection they are finite if the old state, the loss and the norm are.
    """
    norm = optax.global_norm(grads)
    usable = jnp.isfinite(norm) & jnp.isfinite(loss)
    trained = {part: state.params[part] for part in grads}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats; our own code does not
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    new = optax.apply_updates(trained, updates), opt_state
    new, opt_state = jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, (trained, state.opt_state))
    return TrainState(state.step + 1, state.params | new, opt_state), norm


def not_finite(state: TrainState) -> TrainState:
    """Returns, for each array of the state, whether it holds a number that is not finite."""
    return jax.tree.map(lambda a: ~jnp.isfinite(a).all(), state)


def zero_grads(params: Any, parts: tuple[str, ...]) -> Any:
    """Returns fp32 zeros with shapes and shardings of the trained parameters, to which gradients are added."""
    trained = {part: params[part] for part in parts}
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32, device=a.sharding), trained)
