# SPDX-License-Identifier: Apache-2.0
"""Eight-bit matrices, and the product with one.

A weight is rounded once, with a scale for each output channel; activations are
rounded in every product, with a scale for each row. So both factors are int8,
and the sum is exact, in int32, in whichever order it is taken.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

_MOST = 127                      # of either sign, so that zero stands for zero


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
  """A weight in eight bits, outputs first: `values * scale[..., None]`."""

  values: Int8[Array, "*outer D"]
  scale: Float[Array, "*outer"]

  def __getitem__(self, index: Any) -> "QArray":
    """All of it for `...`, as of an array; it has no other index."""
    if index is not ...:
      raise IndexError(f"an eight-bit matrix is read whole, not at {index!r}")
    return self

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def nbytes(self) -> int:
    return self.values.nbytes + self.scale.nbytes

  def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "*outer D"]:
    """The weight as it was, but for the rounding."""
    return (self.values * self.scale[..., None]).astype(dtype)


@jax.jit
def quantize(weight: Float[Array, "*outer D"]) -> QArray:
  """Rounds a weight to eight bits; the largest of each channel is exact."""
  return QArray(*_round(weight))


def matmul(x: Float[Array, "*batch D"], weight: QArray) -> Float[Array, "..."]:
  """`x` times a weight: `[batch..., outer...]`, in float32.

  Up to D = 133,000 no sum overflows.
  """
  shape = (*x.shape[:-1], *weight.shape[:-1])
  matrix = weight.values.reshape(-1, weight.shape[-1])
  scale = weight.scale.reshape(1, -1)

  def dot(x):
    return lax.dot_general(x, matrix, (((1,), (1,)), ((), ())),
                           preferred_element_type=jnp.int32)

  rows, row_scale = _round(x.reshape(-1, x.shape[-1]))
  if len(rows) == 1:
    # XLA:CPU has no kernel for one row; for two it has a fast one.
    y = lax.platform_dependent(
        rows, cpu=lambda x: dot(jnp.concatenate([x, x]))[:1], default=dot)
  else:
    y = dot(rows)
  y = y.astype(jnp.float32) * row_scale[:, None] * scale
  return y.reshape(shape)


def _round(x):
  """Integers in [-127, 127], and the scale of each row."""
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=-1)
  scale = jnp.where(largest > 0, largest / _MOST, 1.0)
  return jnp.round(x / scale[..., None]).astype(jnp.int8), scale
