# SPDX-License-Identifier: Apache-2.0
"""The parts of a transformer layer: linear maps, norm, rotary embedding."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import QArray, quantized


@dataclasses.dataclass(frozen=True)
class Rope:
  """A rotary position embedding (arXiv:2104.09864), rotate-half order.

  Attributes:
    kind: "default", "linear" (positions divided by `factor`), or "llama3"
      (only low frequencies divided, with a ramp between).
    low_frequency: wavelengths above `original_context / low_frequency` are
      divided by `factor`.
    high_frequency: wavelengths below `original_context / high_frequency` are
      left alone.
    factors: divisors of each frequency, as some files store them; they take
      the place of `kind`.
  """

  theta: float
  kind: str = "default"
  factor: float = 1.0
  low_frequency: float = 1.0
  high_frequency: float = 4.0
  original_context: int = 8192
  factors: tuple[float, ...] | None = None

  def frequencies(self, head_size: int) -> Float[np.ndarray, "half"]:
    """Radians a position, for each pair of dimensions."""
    exponent = np.arange(0, head_size, 2, dtype=np.float64) / head_size
    frequency = self.theta ** -exponent
    if self.factors is not None:
      frequency = frequency / np.asarray(self.factors, np.float64)
    elif self.kind == "linear":
      frequency = frequency / self.factor
    elif self.kind == "llama3":
      turns = self.original_context * frequency / (2 * math.pi)
      ramp = np.clip((turns - self.low_frequency)
                     / (self.high_frequency - self.low_frequency), 0, 1)
      frequency = frequency * ((1 - ramp) / self.factor + ramp)
    return frequency.astype(np.float32)

  def angles(self, positions: Int[Array, "B T"], head_size: int
             ) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine for each position."""
    angle = positions[..., None] * self.frequencies(head_size)[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T *heads K"],
           angles: tuple[Array, Array]) -> Float[Array, "B T *heads K"]:
  """Turns each head of `x`, in float32."""
  cos, sin = (jnp.expand_dims(a, tuple(range(2, x.ndim - 1))) for a in angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, "D"],
             eps: float) -> Float[Array, "*batch D"]:
  """Root-mean-square norm in float32, returned in the dtype of `x`."""
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  weight = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
  return (y * weight).astype(x.dtype)


def look_up(table: Float[Array, "V D"], index: Int[Array, "*batch"]
            ) -> Float[Array, "*batch D"]:
  """Rows of a table."""
  # XLA:CPU reads rows in float32. If it could tell that the table is the same
  # in every step it would convert all of it, before the first.
  table, index = lax.optimization_barrier((table, index))
  return table[index]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
  """A matrix and a change of low rank, not added up (arXiv:2106.09685).

  Where `up` and `down` are learnt and `weight` is not, a gradient needs no
  matrix of the size of `weight`.
  """

  weight: Float[Array, "*outer D"]
  up: Float[Array, "*outer rank"]
  down: Float[Array, "rank D"]

  def __getitem__(self, index: Any) -> "Adapted":
    """All of it for `...`, as of an array; it has no other index."""
    if index is not ...:
      raise IndexError(f"an adapted matrix is read whole, not at {index!r}")
    return self


def linear(x: Float[Array, "*batch D"],
           weight: Float[Array, "*outer D"] | QArray | Adapted
           ) -> Float[Array, "..."]:
  """`x` times a weight: `[batch..., outer...]`, summed in float32.

  Weights keep their outputs first, the order of checkpoints, which is the
  faster one on XLA:CPU and free elsewhere, and which lets an embedding serve
  as the unembedding.
  """
  if isinstance(weight, QArray):
    return quantized.matmul(x, weight)
  if isinstance(weight, Adapted):
    change = linear(linear(x.astype(jnp.float32), weight.down), weight.up)
    return linear(x, weight.weight) + change
  # A plain matrix product: XLA may want a weight of more dimensions in another
  # layout, and then copies it at every call.
  shape = (*x.shape[:-1], *weight.shape[:-1])
  matrix = weight.reshape(-1, weight.shape[-1])
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

  def dot(x):
    return lax.dot_general(x, matrix, (((1,), (1,)), ((), ())),
                           precision=precision,
                           preferred_element_type=jnp.float32)

  x = x.reshape(-1, x.shape[-1])
  if len(x) == 1 and x.dtype != jnp.float32:
    # XLA:CPU has no one-row kernel for bfloat16: it would convert the whole
    # weight to float32 first. Two rows are many times as fast as one.
    y = lax.platform_dependent(
        x, cpu=lambda x: dot(jnp.concatenate([x, x]))[:1], default=dot)
  else:
    y = dot(x)
  return y.reshape(shape)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
