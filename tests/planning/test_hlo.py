"""The figures of hlo_report.py, counted by hand on a small program, and on one that XLA has compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from r1vl_jax.planning.hlo import array_bytes, program_cost

PROGRAM = """HloModule jit_f, entry_computation_layout={...}

%update (p0: bf16[4,100], p1: bf16[4,1], p2: s32[]) -> bf16[4,100] {
  %p0 = bf16[4,100]{1,0} parameter(0)
  %p1 = bf16[4,1]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %dus = bf16[4,100]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%matmul (a: bf16[4,8], w: bf16[8,16]) -> f32[4,16] {
  %a = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,16]{1,0} parameter(1)
  ROOT %dot = f32[4,16]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%half (q0: f32[10,6]) -> bf16[5,6] {
  %q0 = f32[10,6]{1,0} parameter(0)
  %narrow = bf16[10,6]{1,0} convert(%q0)
  ROOT %part = bf16[5,6]{1,0} slice(%narrow), slice={[5:10], [0:6]}
}

%condition (state: (s32[], bf16[4,100], bf16[4,8], bf16[8,16])) -> pred[] {
  %state = (s32[], bf16[4,100]{1,0}, bf16[4,8]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

%body (loop: (s32[], bf16[4,100], bf16[4,8], bf16[8,16])) -> (s32[], bf16[4,100], bf16[4,8], bf16[8,16]) {
  %loop = (s32[], bf16[4,100]{1,0}, bf16[4,8]{1,0}, /*index=3*/bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %cache = bf16[4,100]{1,0} get-tuple-element(%loop), index=1
  %x = bf16[4,8]{1,0} get-tuple-element(%loop), index=2
  %weight = bf16[8,16]{1,0} get-tuple-element(%loop), index=3
  %new = bf16[4,1]{1,0} bitcast(%x)
  %fused = bf16[4,100]{1,0} fusion(%cache, %new, %i), kind=kLoop, calls=%update
  %product = f32[4,16]{1,0} fusion(%x, %weight), kind=kCustom, calls=%matmul
  ROOT %out = (s32[], bf16[4,100]{1,0}, bf16[4,8]{1,0}, bf16[8,16]{1,0}) tuple(%i, %fused, %x, %weight)
}

ENTRY %main (start: (s32[], bf16[4,100], bf16[4,8], bf16[8,16]), m: f32[10,6]) -> bf16[5,6] {
  %start = (s32[], bf16[4,100]{1,0}, bf16[4,8]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %m = f32[10,6]{1,0} parameter(1)
  %while.1 = (s32[], bf16[4,100]{1,0}, bf16[4,8]{1,0}, bf16[8,16]{1,0}) while(%start), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %last = bf16[5,6]{1,0} fusion(%m), kind=kLoop, calls=%half
}
"""


def test_a_program_by_hand():
    cost = program_cost(PROGRAM, logits=64)
    assert cost.kernels == 3 * (1 + 2) + 1
    update = 4 * 1 * 2 + 4 + 4 * 1 * 2  # reads the new column and the index, writes the column
    matmul = 4 * 8 * 2 + 8 * 16 * 2 + 4 * 16 * 4
    compare = 4 + 4 + 1
    half = 5 * 6 * 4 + 5 * 6 * 2  # reads a half
    assert cost.bytes == 3 * (compare + update + matmul) + half
    assert cost.elementwise_bytes == 3 * (compare + update) + half
    assert cost.flops == 3 * 2 * 4 * 8 * 16
    assert cost.logit_passes == 3  # the result of the matmul has 64 elements, as no other array


@pytest.mark.parametrize(
    "shape, size",
    [("f32[2,3]{1,0}", 24), ("(bf16[4]{0}, u8[10], pred[])", 19), ("s32[]", 4), ("s64[2]", 16), ("token[]", 0)],
)
def test_bytes_of_a_shape(shape, size):
    assert array_bytes(shape) == size


def test_a_compiled_loop():
    """XLA's own text: seven matmuls in a loop whose length it knows."""
    x, w = jnp.ones((64, 32)), jnp.ones((32, 32))

    def f(x, w):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), x)

    assert program_cost(jax.jit(f).lower(x, w).compile().as_text()).flops == 7 * 2 * 64 * 32 * 32
