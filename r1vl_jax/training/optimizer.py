"""Gradient accumulation and the AdamW update, for both stages. fp32 masters, gradients and moments.

for micro_batch in update:  grads, metrics += gradient of the loss at the cast parameters
state = update(state, grads)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from r1vl_jax.config import OptimizerSection
from r1vl_jax.model.qwen2_vl import cast
from r1vl_jax.model.spec import tree_map_spec
from r1vl_jax.parallel.sharding import replicated
from r1vl_jax.types import TrainState


def trained_parts(config: OptimizerSection) -> tuple[str, ...]:
    """The subtrees of the parameters that are trained; the others get neither gradients nor moments."""
    return ("text",) if config.freeze_vision else ("vision", "text")


def make_schedule(config: OptimizerSection, steps: int) -> optax.Schedule:
    """Linear warm-up over warmup_ratio * steps, then the named decay to 0 at `steps`."""
    warmup = round(config.warmup_ratio * steps)
    rate, rest = config.learning_rate, max(1, steps - warmup)
    decay = {
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "constant": optax.constant_schedule(rate),
    }[config.schedule]
    # The first update already moves: step s of the warm-up has (s + 1) / warmup of the rate.
    rise = optax.linear_schedule(rate / max(1, warmup), rate, max(1, warmup - 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimizerSection, steps: int, spec_tree: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decay on matrices only."""
    parts = trained_parts(config)
    decayed = {part: tree_map_spec(lambda spec: spec.init == "normal", spec_tree[part]) for part in parts}
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(make_schedule(config, steps), b2=config.b2, weight_decay=config.weight_decay, mask=decayed),
    )


def abstract_state(optimizer: optax.GradientTransformation, parts, spec_tree: Any, shardings: Any, mesh) -> TrainState:
    """The shapes and layout of a state, nothing allocated; moments lie as their parameters do."""

    def placed(shape, sharding):
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


def init_state(params: Any, optimizer: optax.GradientTransformation, parts, layout: TrainState) -> TrainState:
    """A fresh state on fp32 masters that are placed already, in the layout of `abstract_state`."""
    sharding = jax.tree.map(lambda shape: shape.sharding, layout.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=sharding)({part: params[part] for part in parts})
    return TrainState(jax.device_put(jnp.int32(0), layout.step.sharding), params, opt_state)


@partial(jax.jit, static_argnames=("loss_fn", "parts", "dtype"), donate_argnames="grads")
def accumulate(grads: Any, params: Any, batch: Any, *, loss_fn, parts: tuple[str, ...], dtype: str):
    """grads + gradient of `loss_fn(params in dtype, batch) -> (loss, metrics)`, and the metrics. grads None: 0."""

    def loss(trained):
        return loss_fn(cast({**params, **trained}, dtype), batch)

    (_, metrics), new = jax.value_and_grad(loss, has_aux=True)({part: params[part] for part in parts})
    return new if grads is None else jax.tree.map(jnp.add, grads, new), metrics


def make_update(optimizer: optax.GradientTransformation, layout: TrainState):
    """The jitted update (state, grads) -> (state, gradient norm), with the state donated and its layout kept."""

    def update(state: TrainState, grads: Any):
        trained = {part: state.params[part] for part in grads}
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = {**state.params, **optax.apply_updates(trained, updates)}
        return TrainState(state.step + 1, params, opt_state), optax.global_norm(grads)

    sharding = jax.tree.map(lambda shape: shape.sharding, layout)
    return jax.jit(update, donate_argnums=0, out_shardings=(sharding, sharding.step))


def zero_grads(params: Any, parts: tuple[str, ...]):
    """An accumulator that lies as the parameters do."""
    trained = {part: params[part] for part in parts}
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32, device=a.sharding), trained)


def gradient_step(state: TrainState, batches, *, update, loss_fn, parts, dtype: str, summed: bool = True):
    """One update from a step's micro-batches, on the device: (state, metrics summed over them, with grad_norm).

    Args:
      summed: False where there is never more than one micro-batch: its gradient then needs no sum to be added to.
    """
    grads, totals = zero_grads(state.params, parts) if summed else None, None
    for batch in batches:
        grads, metrics = accumulate(grads, state.params, batch, loss_fn=loss_fn, parts=parts, dtype=dtype)
        totals = metrics if totals is None else jax.tree.map(jnp.add, totals, metrics)
    state, norm = update(state, grads)
    return state, {**totals, "grad_norm": norm}
