"""Exchanges in HLO text: three spellings of groups, bytes of rings, loops, and a program that XLA compiled."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r1vl_jax.parallel.sharding import make_mesh
from r1vl_jax.planning.collectives import collectives, replica_groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
    ],
)
def test_groups(text, groups):
    assert replica_groups(text, 4) == groups


def test_bytes_of_rings_and_loops():
    text = """
%body (p: (f32[8])) -> (f32[8]) {
  %x = f32[8]{0} get-tuple-element(%p), index=0
  ROOT %r = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
}
ENTRY %main (a: f32[16]) -> f32[64] {
  %a = f32[16]{0} parameter(0)
  %w = (f32[8]{0}) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %s = f32[4]{0} reduce-scatter(%a), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %g = f32[64]{0} all-gather(%a), replica_groups=mesh['x'=2,'y'=2] {'x'}, dimensions={0}
}
"""
    found = collectives(text, 4, 2)
    assert [(c.kind, c.bytes, c.times, c.size, c.ports) for c in found] == [
        ("all-reduce", 2 * 32 * 3 / 4, 5, 4, 2),
        ("reduce-scatter", 64 * 3 / 4, 1, 4, 2),
        ("all-gather", 128 / 2, 1, 2, 1),
    ]
    assert [c.ports for c in collectives(text, 4, 4)] == [0] * 3
    assert found[0].seconds(10.0, 2.0) == {"link": 5 * 48 / 10, "network": 5 * 48 / (2 * 2)}  # through two ports
    assert found[2].seconds(10.0, 2.0) == {"link": 0.0, "network": 64 / 2}
    assert collectives(text, 4, 4)[2].seconds(10.0, 2.0) == {"link": 6.4, "network": 0.0}


def test_the_text_of_tpus():
    """An exchange has one channel, though it is in three instructions; loops say their length in the condition; arrays
    in fast memory count; a reduce-scatter is an all-reduce in a computation of its own."""
    text = """
%async (p: bf16[8]) -> bf16[32] {
  %p = bf16[8]{0:T(1024)S(1)} parameter(0)
  ROOT %g = bf16[32]{0:T(1024)S(1)} all-gather(%p), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
}
%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  ROOT %r = f32[16]{0} all-reduce(%p), channel_id=10, replica_groups={{0,1,2,3}}, to_apply=%add
}
%condition (p: (s32[])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}
%body (p: (bf16[8])) -> (bf16[8]) {
  %x = bf16[8]{0} get-tuple-element(%p), index=0
  %start = bf16[32]{0} fusion(%x), kind=kCustom, calls=%async
  ROOT %done = bf16[32]{0} fusion(%start), kind=kCustom, calls=%async
}
ENTRY %main (a: f32[16]) -> f32[4] {
  %a = f32[16]{0} parameter(0)
  %w = (bf16[8]{0}) while(%a), condition=%condition, body=%body
  ROOT %s = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    found = collectives(text, 4, 4, rounds=99)
    assert [(c.kind, c.bytes, c.times) for c in found] == [
        ("all-gather", 64 * 3 / 4, 6),
        ("reduce-scatter", 64 * 3 / 4, 1),
    ]


def test_a_compiled_program():
    """Of a shard_map, so that what it exchanges is known."""
    mesh = make_mesh(1, 4, 2, devices=jax.devices()[:8])

    def exchange(a):
        def layer(total, _):
            return total + jax.lax.all_gather(a, "fsdp").sum(), None

        total, _ = jax.lax.scan(layer, jnp.zeros(()), None, length=3)
        return jax.lax.psum(total * a, "tensor")

    f = jax.shard_map(exchange, mesh=mesh, in_specs=P("fsdp", "tensor"), out_specs=P("fsdp"), check_vma=False)
    a = jax.ShapeDtypeStruct((4 * 64, 2), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", "tensor")))
    found = collectives(jax.jit(f).trace(a).lower().compile().as_text(), 8, 8)
    total = sum(c.bytes * c.times for c in found if c.kind == "all-reduce")
    assert total == 64 * 4  # two devices: 2 * 256 * 1/2
    gathered = [c for c in found if c.kind == "all-gather"]
    assert gathered and all((c.bytes, c.size) == (3 * 64 * 4, 4) for c in gathered)
    assert sum(c.times for c in gathered) in (1, 3)  # XLA may move it out of the loop
