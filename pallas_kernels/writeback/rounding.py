# SPDX-License-Identifier: Apache-2.0
"""How a key or a value is rounded to eight bits on its way into the cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

MOST = 127                       # of either sign, so that zero stands for zero


def rounded(x: Float[Array, "*outer K"]
            ) -> tuple[Int8[Array, "*outer K"], Float[Array, "*outer"]]:
  """Integers, and the scale of each token and head, one without values 1."""
  x = x.astype(jnp.float32)
  scale = scale_of(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
  return jnp.round(x / scale).astype(jnp.int8), scale[..., 0]


def scale_of(largest: Float[Array, "..."]) -> Float[Array, "..."]:
  """The scale by which a token's largest value becomes `MOST`."""
  return jnp.where(largest > 0, largest / MOST, 1.0)
