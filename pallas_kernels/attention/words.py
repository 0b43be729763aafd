# SPDX-License-Identifier: Apache-2.0
"""Masks of a few nodes as bits: 8 bytes a token for 64 nodes in flight."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32


def pack(mask: Bool[Array | np.ndarray, "*T N"]) -> UInt32[Array, "*T W"]:
  """Flags as bits, 32 a word: bit `n % 32` of word `n // 32` is flag n."""
  spare = -mask.shape[-1] % 32
  mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, spare)])
  bits = mask.reshape(*mask.shape[:-1], -1, 32).astype(jnp.uint32)
  shifts = jnp.arange(32, dtype=jnp.uint32)
  shifts = shifts.reshape((1,) * (bits.ndim - 1) + (32,))
  return jnp.sum(bits << shifts, axis=-1, dtype=jnp.uint32)


def unpack(words: UInt32[Array, "*T W"], count: int) -> Bool[Array, "*T N"]:
  """The first `count` flags that `pack` made words of."""
  shifts = jnp.arange(32, dtype=jnp.uint32)
  shifts = shifts.reshape((1,) * words.ndim + (32,))
  bits = (words[..., None] >> shifts) & 1
  return bits.reshape(*words.shape[:-1], -1)[..., :count] == 1
