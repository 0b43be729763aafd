# SPDX-License-Identifier: Apache-2.0
"""Rows and weights of every kind, and what their products are in float64."""

import jax.numpy as jnp
import numpy as np
from scipy import special

from pallas_kernels import GroupedQArray, QArray, quantized

KINDS = ("plain", "int8", "int4 of 32", "int4 of 64 with zeros", "int4 of 128")


def normal(*shape, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), dtype)


def weight(kind, *shape, seed=1, dtype=jnp.float32):
  """A weight of that kind, of variance one over its inputs."""
  w = normal(*shape, seed=seed) / np.sqrt(shape[-1])
  if kind == "plain":
    return w.astype(dtype)
  if kind == "int8":
    return quantized.quantize(w)
  return quantized.quantize_groups(w + 0.02, int(kind.split()[2]),
                                   zeros=kind.endswith("zeros"))


def wide(w):
  """The weight in float64, from what is stored."""
  if isinstance(w, QArray):
    return np.float64(w.values) * np.float64(w.scale)[..., None]
  if not isinstance(w, GroupedQArray):
    return np.float64(w)
  low = (np.int8(w.values) << 4).astype(np.int8) >> 4
  q = np.float64(np.stack([low, np.int8(w.values) >> 4], -2)).reshape(w.shape)
  group = np.arange(w.shape[-1]) // w.group
  spread = lambda x: np.swapaxes(np.float64(x), -1, -2)[..., group]
  return (q - (0 if w.zero is None else spread(w.zero))) * spread(w.scale)


def mlp(x, norm, gate, up, down, *, eps, activation, dtype):
  """The block in float64, but for the two roundings it is defined with."""
  rounded = lambda x: np.float64(jnp.asarray(x, dtype))
  x = np.float64(x)
  y = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
  y = rounded(y * np.float64(norm))
  g = y @ wide(gate).T
  if activation == "silu":
    g = g * special.expit(g)
  elif activation == "gelu":
    g = g * special.ndtr(g)
  else:
    g = g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g ** 3)))
  return rounded(g * (y @ wide(up).T)) @ wide(down).T
