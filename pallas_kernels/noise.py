# SPDX-License-Identifier: Apache-2.0
"""Noise that is a function of a key and an index: no state, no order.

`gumbel(jax.random.key_data(key), index)` has the very bits of
`jax.random.gumbel(key, (V,))[index]`, wherever `index` comes from. (For jax's
own `threefry2x32` keys, with `jax_threefry_partitionable` on and 32-bit words,
all of which is what jax does unless told otherwise.) It is made of integer
operations that every backend's kernels have, so that a kernel draws for a tile
of the vocabulary without ever having read noise from memory.

The bits are the same everywhere; the two logarithms are those of whoever
computes them, and a TPU's kernels may round them otherwise than XLA does.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Integer

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_TINY = float(np.finfo(np.float32).tiny)


def bits(first: Integer[Array, "*#shape"], second: Integer[Array, "*#shape"],
         index: Integer[Array, "*#shape"]) -> Int32[Array, "*shape"]:
  """The 32 random bits of a key at an index, as an int32.

  Threefry-2x32 of 20 rounds (Salmon et al., SC 2011) with the counter
  (0, index); the two words it gives are combined by exclusive or.

  Args:
    first: the key's first word, int32 or uint32, of a shape that broadcasts.
    second: its second word.
    index: a counter below 2**32.
  """
  keys = [_signed(first), _signed(second)]
  keys.append(keys[0] ^ keys[1] ^ jnp.int32(_PARITY))
  a, b = keys[0], keys[1] + _signed(index)
  for turn in range(5):
    for amount in _ROTATIONS[turn % 2]:
      a = a + b
      b = a ^ ((b << amount) | lax.shift_right_logical(
          b, jnp.full_like(b, 32 - amount)))
    a = a + keys[(turn + 1) % 3]
    b = b + keys[(turn + 2) % 3] + jnp.int32(turn + 1)
  return a ^ b


def gumbel(first: Integer[Array, "*#shape"], second: Integer[Array, "*#shape"],
           index: Integer[Array, "*#shape"]) -> Float[Array, "*shape"]:
  """Gumbel noise of a key at an index; see `bits` for the arguments."""
  mantissa = bits(first, second, index)
  mantissa = lax.shift_right_logical(mantissa, jnp.full_like(mantissa, 9))
  uniform = lax.bitcast_convert_type(mantissa | jnp.int32(0x3F800000),
                                     jnp.float32) - 1.0
  # Zero has no logarithm.
  return -jnp.log(-jnp.log(jnp.maximum(uniform, _TINY)))


def _signed(x):
  """As int32, of which all backends have every operation; it wraps alike."""
  return x if x.dtype == jnp.int32 else x.astype(jnp.int32)
