# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows mean what they say, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import (
  early_exit_stream,
  fused_mlp,
  quantized_matmul,
  streamed_matmul,
)
from pallas_kernels.matmul.stream import expected_bytes
from tests.pallas_kernels.matmul import weights
from tests.pallas_kernels.matmul.weights import KINDS, normal, weight, wide

pytestmark = pytest.mark.usefixtures("quick_compiles")

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 4e-6}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), layer=st.integers(0, 2),
       live=st.lists(st.booleans(), min_size=4, max_size=4))
def test_any_rows(seed, layer, live):
  """What rows that have left hold is not looked at."""
  x, stack = normal(4, 64, seed=seed), weight("int8", 3, 8, 64, seed=seed + 1)
  gone = np.logical_not(live)[:, None]
  y = streamed_matmul(jnp.where(gone, jnp.nan, x), stack, jnp.int32(layer),
                      jnp.asarray(live))
  np.testing.assert_allclose(y, np.where(
      gone, 0, np.float64(x) @ wide(stack)[layer].T), atol=2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_a_stack(kind, dtype):
  x = normal(5, 128, dtype=dtype)
  stack = weight(kind, 3, 6, 128, dtype=dtype)
  live = jnp.array([True, False, True, True, False])
  expected = np.float64(x) @ wide(stack)[2].T
  y = streamed_matmul(x, stack, 2)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, expected, atol=TOLERANCE[dtype])
  masked = streamed_matmul(x.at[1].set(jnp.nan), stack, jnp.int32(2), live)
  np.testing.assert_array_equal(
      masked, np.where(np.asarray(live)[:, None], y, 0))
  if kind != "plain":
    one = jax.tree.map(lambda w: w[2], stack)
    np.testing.assert_allclose(quantized_matmul(x, one), expected,
                               atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_mlp_block(kind, activation, dtype):
  x, norm = normal(3, 24, dtype=dtype), 1 + 0.1 * normal(2, 24, seed=2)
  gate, up, down = (weight(kind, 2, *s, seed=i, dtype=dtype) for i, s in
                    enumerate([(40, 24), (40, 24), (24, 40)], 3))
  options = dict(eps=1e-3, activation=activation)
  one = [jax.tree.map(lambda w: w[1], w) for w in (norm, gate, up, down)]
  expected = weights.mlp(x, *one, dtype=dtype, **options)
  y = fused_mlp(x, norm, gate, up, down, 1, **options)
  # Either may round a hidden value the other way.
  close = 4e-6 if dtype == jnp.float32 else 1e-2
  np.testing.assert_allclose(y, expected, atol=close)
  np.testing.assert_array_equal(fused_mlp(x, *one, **options), y)


def test_rows_leave_the_stream_one_by_one():
  depth, rows = 5, 3
  x, norm = normal(rows, 16), jnp.ones((depth, 16))
  gate, up, down = (weight("plain", depth, *s, seed=i) for i, s in
                    enumerate([(32, 16), (32, 16), (16, 32)]))
  options = dict(eps=1e-5, activation="silu")
  after = jnp.array([0, 2, 1])      # the last layer of each row
  y, read = early_exit_stream(
      x, norm, gate, up, down, layers=range(depth),
      leaves=lambda x, layer: layer >= after, **options)
  assert read == 3
  for row, last in enumerate(np.asarray(after)):
    expected = x[row:row + 1]
    for layer in range(last + 1):
      expected = expected + fused_mlp(expected, norm, gate, up, down, layer,
                                      **options)
    np.testing.assert_allclose(y[row], expected[0], atol=1e-5)


def test_bytes_fall_to_the_share_of_the_lower_layers():
  def share(exited, rows=4):
    return expected_bytes(exited, rows=rows, lower=8, depth=32,
                          layer_bytes=1000)
  assert share(0.0) == 32_000 and share(1.0) == 8_000
  table = [share(k / 8) for k in range(9)]
  assert table == sorted(table, reverse=True)
  assert share(0.5, rows=1) == 20_000


def test_unknown_names_explain_themselves():
  with pytest.raises(ValueError, match="streamed_matmul has no .*'cuda'"):
    streamed_matmul(normal(1, 8), normal(1, 4, 8), 0, implementation="cuda")
