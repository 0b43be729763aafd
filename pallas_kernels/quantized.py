# SPDX-License-Identifier: Apache-2.0
"""Matrices in eight and in four bits, and the product with an eight-bit one.

A weight is rounded once: to eight bits with a scale for each output channel,
or to four with a scale for each group of inputs. In `matmul` activations are
rounded in every product, with a scale for each row. So both factors are int8,
and the sum is exact, in int32, in whichever order it is taken. (Products that
leave activations alone: `pallas_kernels.quantized_matmul`.)
"""

import dataclasses
import functools
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
  def ndim(self) -> int:
    return self.values.ndim

  @property
  def nbytes(self) -> int:
    return self.values.nbytes + self.scale.nbytes

  def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "*outer D"]:
    """The weight as it was, but for the rounding."""
    return (self.values * self.scale[..., None]).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedQArray:
  """A weight in four bits, outputs first, with a scale for a group of inputs.

  Input d of output f is `(q[f, d] - zero[d // group, f]) * scale[...]`. Scales
  have outputs last, unlike values, so that they fill a TPU's lanes: `[F, 32]`
  would take the memory of `[F, 128]`.

  Attributes:
    values: two integers in [-8, 7] a byte: that of output 2r in the low four
      bits of row r, that of output 2r + 1 in the high ones.
    scale: of each group and output.
    zero: the integer that stands for zero; None where it is 0 everywhere.
  """

  values: Int8[Array, "*outer half_F D"]
  scale: Float[Array, "*outer groups F"]
  zero: Int8[Array, "*outer groups F"] | None = None

  def __getitem__(self, index: Any) -> "GroupedQArray":
    """All of it for `...`, as of an array; it has no other index."""
    if index is not ...:
      raise IndexError(f"a four-bit matrix is read whole, not at {index!r}")
    return self

  @property
  def shape(self) -> tuple[int, ...]:
    *outer, half, size = self.values.shape
    return (*outer, 2 * half, size)

  @property
  def ndim(self) -> int:
    return self.values.ndim

  @property
  def group(self) -> int:
    """Inputs that share a scale."""
    return self.values.shape[-1] // self.scale.shape[-2]

  @property
  def nbytes(self) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(self))

  def integers(self) -> Int8[Array, "*outer F D"]:
    """The values, a byte each."""
    # Shifted up and down again, the low four bits have their sign.
    low, high = jnp.left_shift(self.values, 4) >> 4, self.values >> 4
    return jnp.stack([low, high], axis=-2).reshape(self.shape)

  def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "*outer F D"]:
    """The weight as it was, but for the rounding."""
    def inputs(x):
      """One for each group, spread over its inputs."""
      return jnp.repeat(jnp.swapaxes(x, -1, -2), self.group, axis=-1)
    values = self.integers().astype(jnp.float32)
    if self.zero is not None:
      values = values - inputs(self.zero).astype(jnp.float32)
    return (values * inputs(self.scale)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("group", "zeros"))
def quantize_groups(weight: Float[Array, "*outer F D"], group: int = 128, *,
                    zeros: bool = False) -> GroupedQArray:
  """Rounds a weight to four bits.

  Args:
    group: inputs that share a scale; the fewer, the closer.
    zeros: give each group the integer that stands for zero, so that its 16
      levels span from its least value to its largest; without, they span
      seven sixteenths of either sign, and zero.

  Raises:
    ValueError: inputs do not fall into groups, or outputs into pairs.
  """
  *outer, outputs, inputs = weight.shape
  if inputs % group:
    raise ValueError(f"{inputs} inputs do not fall into groups of {group}")
  if outputs % 2:
    raise ValueError(f"two outputs share a byte, so that {outputs} need one "
                     "more")
  x = weight.astype(jnp.float32).reshape(*outer, outputs, -1, group)
  if zeros:
    least = jnp.minimum(jnp.min(x, axis=-1), 0)
    most = jnp.maximum(jnp.max(x, axis=-1), 0)
    scale = (most - least) / 15
  else:
    scale = jnp.max(jnp.abs(x), axis=-1) / 7
  scale = jnp.where(scale > 0, scale, 1.0)
  zero = -8 - jnp.round(least / scale) if zeros else jnp.zeros_like(scale)
  q = jnp.round(x / scale[..., None]) + zero[..., None]
  q = jnp.clip(q, -8, 7).astype(jnp.int8).reshape(*outer, outputs // 2, 2,
                                                  inputs)
  values = (q[..., 0, :] & 15) | jnp.left_shift(q[..., 1, :], 4)
  return GroupedQArray(
      values, jnp.swapaxes(scale, -1, -2),
      jnp.swapaxes(zero, -1, -2).astype(jnp.int8) if zeros else None)


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
