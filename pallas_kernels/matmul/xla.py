# SPDX-License-Identifier: Apache-2.0
"""The meaning of the products of this folder."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.activations import ACTIVATIONS
from pallas_kernels.quantized import GroupedQArray, QArray


def streamed_matmul(x, stack, layer, live):
  """See `pallas_kernels.matmul.op.streamed_matmul`."""
  return _of_live(quantized_matmul(x, _layer_of(stack, layer)), live)


def quantized_matmul(x, weight):
  """See `pallas_kernels.matmul.op.quantized_matmul`. Takes arrays too."""
  if isinstance(weight, QArray):
    return _dot(x, weight.values.astype(x.dtype)) * weight.scale[None]
  if isinstance(weight, GroupedQArray):
    return _dot(x.astype(jnp.float32), weight.dequantize())
  return _dot(x, weight)


def fused_mlp(x, norm, gate, up, down, layer, live, *, eps, activation):
  """See `pallas_kernels.matmul.op.fused_mlp`."""
  norm, gate, up, down = (_layer_of(w, layer) for w in (norm, gate, up, down))
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  y = (y * norm[None]).astype(x.dtype)
  hidden = ACTIVATIONS[activation](quantized_matmul(y, gate))
  hidden = (hidden * quantized_matmul(y, up)).astype(x.dtype)
  return _of_live(quantized_matmul(hidden, down), live)


def _layer_of(stack, layer):
  return jax.tree.map(
      lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False), stack)


def _of_live(y, live):
  return y if live is None else jnp.where(live[:, None], y, 0)


def _dot(x, weight):
  # Float32 means float32: a TPU would round its inputs to bfloat16.
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(x, weight, (((1,), (1,)), ((), ())),
                         precision=precision,
                         preferred_element_type=jnp.float32)
