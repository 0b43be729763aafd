# SPDX-License-Identifier: Apache-2.0
"""Eight-bit matrices: how wrong they may be, and that rows stay apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QArray, quantized


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("shape", [(6, 8), (3, 2, 5, 8), (1, 1)])
def test_rounding_is_half_a_step(shape):
  weight = normal(*shape)
  weight = weight.at[0].multiply(100)  # a scale a channel: it harms no other
  q = quantized.quantize(weight)
  assert q.shape == shape and q.values.dtype == jnp.int8
  assert q.nbytes == weight.size + 4 * weight[..., 0].size
  error = np.abs(q.dequantize() - weight)
  assert np.all(error <= 0.5001 * q.scale[..., None])
  np.testing.assert_allclose(
      np.abs(q.dequantize()).max(-1), np.abs(weight).max(-1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch", [(1,), (1, 1), (5,), (2, 3)])
def test_product_is_within_its_bound(batch, dtype):
  x = jnp.asarray(normal(*batch, 64), dtype)
  weight = normal(3, 5, 64, seed=1)
  q = quantized.quantize(weight)
  y = jax.jit(quantized.matmul)(x, q)
  assert y.shape == (*batch, 3, 5) and y.dtype == jnp.float32
  x = np.asarray(x, np.float64)
  step = np.abs(x).max(-1) / 127
  bound = 0.501 * (
      np.einsum("...d,gh->...gh", np.abs(x), np.asarray(q.scale, np.float64))
      + np.einsum("...,ghd->...gh", step, np.abs(weight))
      + 32 * np.einsum("...,gh->...gh", step, np.asarray(q.scale)))
  error = np.abs(y - np.einsum("...d,ghd->...gh", x, weight))
  assert np.all(error <= bound)
  assert error.mean() < 0.1 < np.abs(y).mean()


def test_rows_are_independent():
  """Of their number, and of large neighbours."""
  x, q = normal(4, 32), quantized.quantize(normal(7, 32, seed=1))
  x = x.at[2].multiply(1e6)
  together = quantized.matmul(x, q)
  for row in range(4):
    np.testing.assert_allclose(quantized.matmul(x[row:row + 1], q)[0],
                               together[row], rtol=1e-6)


def test_zeros_stay_zero():
  q = quantized.quantize(jnp.zeros((3, 4)))
  np.testing.assert_array_equal(q.dequantize(), 0)
  np.testing.assert_array_equal(
      quantized.matmul(jnp.zeros((2, 4)), q), 0)


def test_it_is_a_pytree_and_read_whole():
  q = quantized.quantize(normal(3, 4))
  assert [x.dtype for x in jax.tree.leaves(q)] == [jnp.int8, jnp.float32]
  donated = jax.jit(lambda q: jax.tree.map(lambda x: x + x, q),
                    donate_argnums=0)(q)
  assert isinstance(donated, QArray) and q.values.is_deleted()
  assert donated[...] is donated
  with pytest.raises(IndexError, match="read whole, not at 0"):
    donated[0]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [4, 32])
def test_four_bits_are_half_a_step(group, zeros):
  weight = normal(2, 6, 64) + 0.5
  q = quantized.quantize_groups(weight, group, zeros=zeros)
  assert q.shape == weight.shape and q.ndim == 3 and q.group == group
  assert q.values.nbytes == weight.size // 2
  assert q.nbytes == weight.size // 2 + weight.size // group * (5 if zeros
                                                                else 4)
  error = np.abs(q.dequantize() - weight)
  step = np.repeat(np.swapaxes(q.scale, -1, -2), group, -1)
  # A zero that is rounded moves the ends of the range by half a step more.
  assert np.all(error <= (1.001 if zeros else 0.501) * step)
  assert error.mean() < 0.3 * step.mean()


def test_two_outputs_share_a_byte():
  integers = np.array([[-5, 7], [3, -7], [7, 1], [0, -7]])
  q = quantized.quantize_groups(jnp.asarray(integers, jnp.float32), 2)
  np.testing.assert_array_equal(q.integers(), integers)
  np.testing.assert_array_equal(
      q.values.view(jnp.uint8), [[0x3b, 0x97], [0x07, 0x91]])


def test_groups_and_pairs_must_fit():
  with pytest.raises(ValueError, match="groups of 32"):
    quantized.quantize_groups(normal(2, 48), 32)
  with pytest.raises(ValueError, match="share a byte"):
    quantized.quantize_groups(normal(3, 32), 32)
