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
    assert [(c.kind, c.bytes, c.times, c.size, c.between_hosts) for c in found] == [
        ("all-reduce", 2 * 32 * 3 / 4, 5, 4, True),
        ("reduce-scatter", 64 * 3 / 4, 1, 4, True),
        ("all-gather", 128 / 2, 1, 2, True),
    ]
    assert [c.between_hosts for c in collectives(text, 4, 4)] == [False] * 3


def test_a_compiled_program():
    mesh = make_mesh(1, 4, 2, devices=jax.devices()[:8])
    a = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
    b = jax.ShapeDtypeStruct((128, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
    whole = NamedSharding(mesh, P())
    text = jax.jit(lambda a, b: a @ b, out_shardings=whole).trace(a, b).lower().compile().as_text()
    found = collectives(text, 8, 4)
    assert found and {c.size for c in found} <= {4, 8}
    assert sum(c.bytes * c.times for c in found) >= 64 * 32 * 4 * 3 / 4
