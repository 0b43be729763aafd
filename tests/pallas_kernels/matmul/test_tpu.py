# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels: equal to their meaning, free of races, and sparing.

Tiles are made small, so that small matrices have several.
"""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import Target, quantized
from pallas_kernels.matmul import tpu, xla
from pallas_kernels.matmul.cases import cases
from tests.pallas_kernels.copies import copies
from tests.pallas_kernels.matmul.weights import normal, weight
from tests.pallas_kernels.races import none_seen

pytestmark = pytest.mark.usefixtures("quick_compiles", "small_tiles")

GENERIC = Target("tpu", "TPU v5 lite", interpret=True)
CAREFUL = dataclasses.replace(
    GENERIC, interpret=pltpu.InterpretParams(detect_races=True))
MLP = dict(eps=1e-5, activation="silu")


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(tpu, "TILE", 1024)
  monkeypatch.setattr(tpu, "TOY", 32 << 10)
  monkeypatch.setattr(tpu, "CHUNK", 128)


def streamed(target=GENERIC):
  return jax.jit(functools.partial(tpu.streamed_matmul, target=target))


def fused(target=GENERIC, **options):
  return jax.jit(functools.partial(tpu.fused_mlp, target=target,
                                   **(MLP | options)))


def block(depth, width, mlp, dtype=jnp.float32, kind="plain"):
  """Weights of MLP blocks: norm, gate, up, down."""
  return (1 + 0.1 * normal(depth, width, seed=2), *(
      weight(kind, depth, *shape, seed=seed, dtype=dtype) for seed, shape in
      enumerate([(mlp, width), (mlp, width), (width, mlp)], 3)))


@pytest.mark.medium
@pytest.mark.parametrize("kind,dtype,rows,inputs,outputs", [
    ("plain", jnp.float32, 1, 320, 384),
    ("plain", jnp.bfloat16, 19, 256, 384),
    ("int8", jnp.bfloat16, 19, 320, 256),
    ("int4 of 32", jnp.bfloat16, 3, 192, 256),
    ("int4 of 64 with zeros", jnp.bfloat16, 19, 320, 256),
    ("int4 of 128", jnp.float32, 1, 256, 384)])
def test_products(kind, dtype, rows, inputs, outputs):
  x = normal(rows, inputs, dtype=dtype)
  stack = weight(kind, 3, outputs, inputs, dtype=dtype)
  live = jnp.arange(rows) % 3 == 0
  # What stands in a row that has left is nobody's business.
  x = jnp.where(live[:, None], x, jnp.nan)
  y = streamed()(x, stack, jnp.int32(1), live)
  expected = xla.streamed_matmul(x, stack, jnp.int32(1), live)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  assert np.abs(y).max() > 1


@pytest.mark.parametrize("kind", ["int8", "int4 of 128"])
def test_quantized_product(kind):
  x, w = normal(2, 128), weight(kind, 128, 128)
  y = tpu.quantized_matmul(x, w, target=GENERIC)
  np.testing.assert_allclose(y, xla.quantized_matmul(x, w), atol=1e-5)


@pytest.mark.parametrize("kind,activation,dtype", [
    ("plain", "silu", jnp.bfloat16), ("plain", "gelu", jnp.float32),
    ("int8", "gelu_tanh", jnp.bfloat16)])
def test_mlp(kind, activation, dtype):
  x, weights = normal(5, 192, dtype=dtype), block(2, 192, 256, dtype, kind)
  live = jnp.array([True, False, True, True, False])
  x = jnp.where(live[:, None], x, jnp.nan)
  arguments = (x, *weights, jnp.int32(1), live)
  y = fused(activation=activation)(*arguments)
  expected = xla.fused_mlp(*arguments, eps=1e-5, activation=activation)
  # A hidden value may be rounded the other way.
  np.testing.assert_allclose(
      y, expected, atol=1e-5 if dtype == jnp.float32 else 1e-2)


def test_toys_are_one_tile():
  x, weights = normal(3, 32), block(1, 32, 48)
  y = fused()(x, *weights, jnp.int32(0), None)
  expected = xla.fused_mlp(x, *weights, jnp.int32(0), None, **MLP)
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "int4 of 64 with zeros"])
def test_products_do_not_race(kind):
  x, stack = normal(2, 128), weight(kind, 2, 384, 128)
  live = jnp.array([True, False])
  y = streamed(CAREFUL)(x, stack, jnp.int32(1), live)
  none_seen("tpu")
  np.testing.assert_allclose(
      y, xla.streamed_matmul(x, stack, jnp.int32(1), live), atol=1e-5)


def test_mlp_does_not_race():
  x, weights = normal(2, 128), block(2, 128, 256)
  y = fused(CAREFUL)(x, *weights, jnp.int32(1), None)
  none_seen("tpu")
  np.testing.assert_allclose(
      y, xla.fused_mlp(x, *weights, jnp.int32(1), None, **MLP), atol=1e-5)


def test_other_layers_are_not_read():
  stack = weight("plain", 3, 256, 128).at[jnp.array([0, 2])].set(jnp.nan)
  y = streamed()(normal(1, 128), stack, jnp.int32(1), None)
  assert np.isfinite(y).all()


def test_nothing_moves_when_all_rows_have_left():
  """No copy starts but behind the question whether a row is live."""
  x, live = normal(2, 128), jnp.zeros(2, bool)
  weights = jax.tree.map(lambda w: w * jnp.nan, block(2, 128, 256))
  calls = [(streamed(), (x, weights[1], jnp.int32(1), live)),
           (fused(), (x, *weights, jnp.int32(1), live))]
  for f, arguments in calls:
    assert np.all(f(*arguments) == 0)
    kernel, = _kernels(jax.make_jaxpr(f)(*arguments).jaxpr)
    assert not copies(kernel, "dma_start", outside=True)
    assert copies(kernel, "dma_start", outside=False)
  stack = weights[1]
  stays = tpu.moved_bytes(x, stack, outputs=256, live=True)
  left = tpu.moved_bytes(x, stack, outputs=256, live=True, exited=True)
  assert stays - left == 256 * 128 * 4


def _kernels(jaxpr):
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      yield eqn.params["jaxpr"]
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from _kernels(inner)


def test_lowers_for_tpu():
  shape = jax.ShapeDtypeStruct
  target = Target("tpu", "TPU v5 lite")
  lowered = export.export(streamed(target), platforms=["tpu"])(
      shape((8, 576), jnp.bfloat16), shape((30, 1536, 576), jnp.bfloat16),
      shape((), jnp.int32), shape((8,), jnp.bool_))
  assert "tpu_custom_call" in lowered.mlir_module()


def test_cases_move_no_more_than_they_must():
  for case in cases():
    assert case.least_bytes <= case.moved_bytes <= 1.1 * case.least_bytes, case


def test_refusals_say_what_else_to_do():
  x = normal(2, 128)
  refused = [
      (normal(300, 128), normal(1, 128, 128), "up to 256 rows"),
      (x, normal(1, 200, 128), "outputs by the 128"),
      (x, normal(1, 128, 128, dtype=jnp.bfloat16), "one dtype"),
      (x, quantized.quantize_groups(normal(1, 128, 128), 16), "32, 64 or 128"),
  ]
  for rows, stack, reason in refused:
    with pytest.raises(NotImplementedError, match=reason) as error:
      tpu.streamed_matmul(rows, stack, jnp.int32(0), None, target=GENERIC)
    assert "implementation='xla'" in str(error.value)
