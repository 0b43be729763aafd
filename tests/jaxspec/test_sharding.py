# SPDX-License-Identifier: Apache-2.0
"""Names to mesh axes: every refusal, and where arrays come to lie."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxspec import sharding
from jaxspec.errors import InputError
from jaxspec.sharding import MESH_AXES, RULES, check, make_mesh, place, spec

CACHE = ("rows", "kv_heads", "slots", None)


@pytest.mark.parametrize("sizes, message", [
    ({"tensr": 2}, "mesh axis 'tensr' is unknown; axes are data, expert, "
     "tensor, sequence, stage. Did you mean 'tensor'?"),
    ({"pipeline": 2},
     "mesh axis 'pipeline' is unknown; axes are data, expert, tensor, "
     "sequence, stage."),
    ({"data": 0}, "mesh axis data must be at least 1, got 0"),
    ({"tensor": -2}, "mesh axis tensor must be at least 1, got -2"),
    ({"data": 3, "tensor": 3}, "mesh {'data': 3, 'tensor': 3} needs 9 "
     "devices, found 8; use a smaller mesh")])
def test_meshes_that_are_refused(sizes, message):
  with pytest.raises(InputError, match=re.escape(message) + "$"):
    make_mesh(sizes)


@pytest.mark.parametrize("sizes, shape", [
    (None, (1, 1, 1, 1, 1)), ({}, (1, 1, 1, 1, 1)),
    ({"tensor": 4}, (1, 1, 4, 1, 1)), ({"stage": 4}, (1, 1, 1, 1, 4)),
    ({"tensor": 2, "data": 4}, (4, 1, 2, 1, 1)),
    ({"tensor": 2, "sequence": 4}, (1, 1, 2, 4, 1)),
    ({"data": 2, "expert": 2, "tensor": 2}, (2, 2, 2, 1, 1))])
def test_meshes(sizes, shape):
  mesh = make_mesh(sizes)
  assert mesh.axis_names == MESH_AXES
  assert mesh.devices.shape == shape
  # The first devices, in order.
  assert mesh.devices.ravel().tolist() == jax.devices()[:mesh.size]


def test_a_mesh_of_chosen_devices():
  mesh = make_mesh({"tensor": 2}, jax.devices()[5:])
  assert mesh.devices.ravel().tolist() == jax.devices()[5:7]
  with pytest.raises(InputError, match="needs 4 devices, found 3"):
    make_mesh({"tensor": 4}, jax.devices()[5:])


@pytest.mark.parametrize("sizes, message", [
    ({"kv_heads": 8}, "8 kv_heads are not divisible by mesh axis tensor=3; "
     "use 1, 2, 4, 8"),
    ({"mlp": 6, "experts": 5},
     "5 experts are not divisible by mesh axis expert=2; use 1, 5")])
def test_what_a_mesh_does_not_divide(sizes, message):
  mesh = make_mesh({"tensor": 3, "expert": 2})
  with pytest.raises(InputError, match=re.escape(message) + "$"):
    check(mesh, **sizes)


def test_what_a_mesh_divides():
  check(make_mesh({"tensor": 3, "expert": 2}), kv_heads=9, mlp=6, experts=4,
        rows=1)
  check(make_mesh(), kv_heads=1, mlp=7)
  check(make_mesh({"tensor": 2, "sequence": 4}), mlp=6, slots=12)
  with pytest.raises(InputError, match="10 slots are not divisible by mesh "
                     "axis sequence=4; use 1, 2, 5, 10$"):
    check(make_mesh({"sequence": 4}), slots=10)


def test_only_sizes_worth_trying_are_named():
  with pytest.raises(InputError, match="use 1, 2, 4, 7, 8, 14, 16, 28$"):
    check(make_mesh({"tensor": 5}), mlp=14336)


def test_every_rule_names_a_mesh_axis():
  assert {axis for axes in RULES.values() for axis in axes} == set(MESH_AXES)


@pytest.mark.parametrize("sizes, axes, shape, wanted", [
    ({"data": 2, "tensor": 4}, CACHE, (4, 8, 16, 2),
     ("data", "tensor", None, None)),
    # An axis of one, or none, splits nothing.
    ({"tensor": 4}, CACHE, (4, 8, 16, 2), (None, "tensor", None, None)),
    ({}, CACHE, (4, 8, 16, 2), (None,) * 4),
    # What is not divided is replicated.
    ({"data": 2, "tensor": 4}, CACHE, (3, 8, 16, 2),
     (None, "tensor", None, None)),
    ({"data": 2, "tensor": 4}, ("vocab", None), (30, 8), (None, None)),
    ({"expert": 2}, ("experts", None, "mlp"), (4, 2, 8),
     ("expert", None, None)),
    # Over two axes, or the first of them that divides it.
    ({"tensor": 2, "sequence": 4}, CACHE, (4, 8, 16, 2),
     (None, "tensor", "sequence", None)),
    ({"tensor": 2, "sequence": 4}, ("mlp", None), (16, 3),
     (("tensor", "sequence"), None)),
    ({"tensor": 2, "sequence": 4}, ("mlp", None), (12, 3), ("tensor", None)),
    ({"tensor": 2, "sequence": 4}, ("mlp", None), (9, 3), (None, None)),
    ({"sequence": 4}, ("mlp", "kv_heads"), (12, 4), ("sequence", None)),
    # A name without a rule is a dimension that is never split.
    ({"data": 2}, ("rows", "width"), (2, 2), ("data", None)),
    ({"data": 2}, (), (), ())])
def test_spec(sizes, axes, shape, wanted):
  assert spec(axes, shape, make_mesh(sizes)) == PartitionSpec(*wanted)


def test_every_dimension_has_a_name():
  with pytest.raises(ValueError):
    spec(("rows",), (2, 2), make_mesh())


def test_place():
  mesh = make_mesh({"data": 2, "tensor": 4})
  array = np.arange(4 * 8 * 3).reshape(4, 8, 3).astype(np.float32)
  placed = place(array, ("rows", "kv_heads", None), mesh)
  np.testing.assert_array_equal(placed, array)
  assert len(placed.sharding.device_set) == 8
  for shard in placed.addressable_shards:
    data, _, tensor, *_ = np.argwhere(mesh.devices == shard.device)[0]
    np.testing.assert_array_equal(
        shard.data,
        array[2 * data:2 * data + 2, 2 * tensor:2 * tensor + 2])


def test_constrain():
  mesh = make_mesh({"data": 2, "tensor": 4})
  x = jnp.arange(32.0).reshape(4, 8)

  def f(x):
    return sharding.constrain(x * 2, "rows", "vocab")

  with jax.set_mesh(mesh):
    y = jax.jit(f)(x)
  np.testing.assert_array_equal(y, x * 2)
  assert y.sharding.spec == PartitionSpec("data", "tensor")
  assert {s.data.shape for s in y.addressable_shards} == {(2, 2)}


@pytest.mark.parametrize("sizes", [None, {}])
def test_constrain_is_nothing_without_a_mesh_to_speak_of(sizes):
  def f(x):
    return sharding.constrain(x, "rows", "vocab")

  def jaxpr():
    return str(jax.make_jaxpr(f)(jnp.zeros((4, 8))))

  if sizes is None:
    assert "sharding_constraint" not in jaxpr()
  else:
    with jax.set_mesh(make_mesh(sizes)):
      assert "sharding_constraint" not in jaxpr()
  with jax.set_mesh(make_mesh({"data": 2})):
    assert "sharding_constraint" in jaxpr()
