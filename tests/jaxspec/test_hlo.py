# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 - lines of a compiler
"""What is counted in compiled programs is what they were written to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxspec import hlo


def compiled(f, *shapes, mesh=None, specs=None):
  """Its text, compiled for CPUs."""
  if mesh is None:
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  else:
    args = [jax.ShapeDtypeStruct(s, jnp.float32,
                                 sharding=NamedSharding(mesh, spec))
            for s, spec in zip(shapes, specs)]
  return jax.jit(f).lower(*args).compile().as_text()


@pytest.fixture(scope="module")
def mesh():
  return Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))


def test_a_product_and_its_bytes():
  cost = hlo.total(hlo.count(compiled(
      lambda x, w: x @ w, (16, 64), (64, 32))))
  assert cost.all_flops == 2 * 16 * 64 * 32
  assert cost.bytes == pytest.approx(4 * (16 * 64 + 64 * 32 + 16 * 32),
                                     rel=0.01)


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
  def f(x, w):
    return lax.fori_loop(0, 7, lambda i, x: jnp.tanh(x @ w), x)
  cost = hlo.total(hlo.count(compiled(f, (16, 64), (64, 64))))
  assert cost.all_flops == 7 * 2 * 16 * 64 * 64


def test_loops_in_loops_and_one_that_does_not_say_how_often():
  def f(x, w):
    def outer(carry):
      x = lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), carry)
      return x
    return lax.while_loop(lambda x: jnp.sum(x) > 1, outer, x)
  text = compiled(f, (16, 64), (64, 64))
  once = 2 * 16 * 64 * 64
  assert hlo.total(hlo.count(text)).all_flops == 3 * once
  assert hlo.total(hlo.count(
      text, trips=lambda name: 5)).all_flops == 15 * once
  assert hlo.total(hlo.count(text, step="jit(f)/while")).all_flops == 3 * once
  with pytest.raises(ValueError, match="no loop"):
    hlo.count(text, step="jit(g)/while")


def test_scopes_are_told_apart():
  def f(x, w):
    with jax.named_scope("first"):
      x = jnp.tanh(x @ w)
    with jax.named_scope("second"):
      return x @ w + x @ w.T
  costs = hlo.count(compiled(f, (16, 64), (64, 64)),
                    scopes=("first", "second"))
  once = 2 * 16 * 64 * 64
  assert costs["first"].all_flops == once
  assert costs["second"].all_flops == 2 * once


def test_operations_add_up_to_what_is_counted():
  def f(x, w):
    with jax.named_scope("first"):
      x = lax.fori_loop(0, 7, lambda i, x: jnp.tanh(x @ w), x)
    with jax.named_scope("second"):
      return x @ w.T
  text = compiled(f, (16, 64), (64, 64))
  found = hlo.operations(text, scopes=("first", "second"))
  assert hlo.by_scope(found) == hlo.count(text, scopes=("first", "second"))
  products = [(one.scope, one.times) for one in found if one.cost.all_flops]
  assert sorted(products) == [("first", 7), ("second", 1)]


def test_of_branches_the_dearest_or_the_cheapest():
  def f(x, w):
    return lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: x)
  text = compiled(f, (64, 64), (64, 64))
  assert hlo.total(hlo.count(text)).all_flops == 2 * 64**3
  assert not hlo.total(hlo.count(
      text, dearest=lambda name: False)).all_flops


def test_a_slice_that_is_read_or_written_is_not_the_whole():
  def f(cache, x):
    return lax.dynamic_update_slice(cache, x, (5, 0))
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1024, 64), (1, 64))]
  text = jax.jit(f, donate_argnums=0).lower(*args).compile().as_text()
  cost = hlo.total(hlo.count(text))
  assert 0 < cost.bytes <= 4 * 4 * 64

  def g(table, i):
    return table[i[0].astype(jnp.int32)] * 2
  cost = hlo.total(hlo.count(compiled(g, (1024, 64), (1,))))
  assert 0 < cost.bytes <= 4 * 4 * 64


def test_collectives_with_their_bytes_and_devices(mesh):
  def f(x, w):
    y = x @ w                                   # summed over b
    return lax.with_sharding_constraint(y, NamedSharding(mesh, P(None, None)))
  costs = hlo.total(hlo.count(compiled(
      f, (16, 64), (64, 32), mesh=mesh, specs=(P(None, "b"), P("b", None)))))
  (one,) = costs.collectives
  assert (one.kind, one.bytes, one.devices) == ("all-reduce", 4 * 16 * 32, 4)
  assert one.sent == 2 * 3 / 4 * one.bytes
  assert costs.exchanged() == {"all-reduce": (1, 4 * 16 * 32)}

  def g(x):
    return lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, None)))
  costs = hlo.total(hlo.count(compiled(
      g, (16, 64), mesh=mesh, specs=(P("a", None),))))
  (one,) = costs.collectives
  assert (one.kind, one.bytes, one.devices) == ("all-gather", 4 * 16 * 64, 2)
  assert one.sent == one.bytes / 2


def test_a_collective_in_a_loop_counts_as_often(mesh):
  def f(x, w):
    def body(i, x):
      y = lax.with_sharding_constraint(
          x @ w, NamedSharding(mesh, P(None, None)))
      return lax.with_sharding_constraint(
          jnp.tanh(y), NamedSharding(mesh, P(None, "b")))
    return lax.fori_loop(0, 6, body, x)
  costs = hlo.total(hlo.count(compiled(
      f, (16, 64), (64, 64), mesh=mesh, specs=(P(None, "b"), P("b", None)))))
  assert sum(c.times for c in costs.collectives) == 6


@pytest.mark.parametrize("text, devices", [
    ("replica_groups=mesh['x'=1,'y'=8] {'y'}", 8),
    ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", 4),
    ("replica_groups=mesh['x'=4,'y'=2] {'x','y'}", 8),
    ("replica_groups=[2,4]<=[8]", 4), ("replica_groups={{0,1},{2,3}}", 2),
    ("source_target_pairs={{0,1},{1,0}}", 2), ("", 1)])
def test_groups_are_read(text, devices):
  assert hlo._group(f", channel_id=1, {text}, use_global_device_ids=true"
                    ) == devices


TPU = """HloModule jit_f, is_scheduled=true

%fused (p0: bf16[8,16,64], p1: bf16[8,64,32]) -> f32[8,16,32] {
  %p0 = bf16[8,16,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[8,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = f32[8,16,32]{2,1,0:T(8,128)} convolution(%p0, %p1), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf, metadata={op_name="jit(f)/score/dot_general"}
}

ENTRY %main (a: bf16[8,16,64], b: bf16[8,64,32]) -> f32[8,16,32] {
  %a = bf16[8,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %start = (bf16[8,16,64]{2,1,0:T(8,128)(2,1)S(1)}, bf16[8,16,64]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %done = bf16[8,16,64]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %k = f32[8,16,32]{2,1,0:T(8,128)} custom-call(%done, %b), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/verify/kernel"}, backend_config={"custom_call_config":{"body":"eHg=","cost_estimate":{"flops":"123","transcendentals":"7","bytes_accessed":"45600","remote_bytes_transferred":"0"}}}
  ROOT %f = f32[8,16,32]{2,1,0:T(8,128)} fusion(%done, %b), kind=kOutput, calls=%fused
}
"""


def test_what_a_tpu_keeps_in_fast_memory_is_not_moved_twice():
  """A batched product is a convolution there; what is prefetched is moved
  once, for a kernel too, which says itself what it costs."""
  costs = hlo.count(TPU, scopes=("score", "verify"))
  moved = 2 * (8 * 16 * 64 + 8 * 64 * 32) + 4 * 8 * 16 * 32
  found = hlo.total(costs)
  assert found.flops == {"bf16": 123 + 2 * 8 * 16 * 64 * 32}
  assert found.bytes == moved + 45600 - 2 * 8 * 16 * 64
  assert costs["verify"].flops == {"bf16": 123}
