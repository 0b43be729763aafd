# SPDX-License-Identifier: Apache-2.0
"""Inputs of a head, and what can be asked of it."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import pack


def made(seed, rows, width, vocab, dtype=jnp.float32):
  """A stream, a norm, and an unembedding."""
  draw = np.random.default_rng(seed)
  return (jnp.asarray(3 * draw.standard_normal((rows, width)), dtype),
          jnp.asarray(draw.uniform(0.5, 2, width), jnp.float32),
          jnp.asarray(draw.standard_normal((vocab, width)), dtype))


def asked(seed, rows, vocab, *, trimmed=False, masked=False, drawn=False):
  """Keyword arguments of `proposal_head`."""
  draw = np.random.default_rng(seed)
  wanted = {}
  if trimmed:
    wanted["tokens"] = jnp.asarray(
        np.sort(draw.permutation(9 * vocab)[:vocab]), jnp.int32)
  if masked:
    flags = draw.random((rows, vocab)) < 0.3
    flags[0] = draw.permutation(vocab) < 2         # fewer than are wanted
    wanted["allowed"] = pack(flags)
  if drawn:
    wanted["noise"] = jax.random.key_data(
        jax.vmap(jax.random.key)(jnp.arange(rows)))
    wanted["temperature"] = jnp.asarray(
        draw.choice([0.0, 0.5, 1.0], rows), jnp.float32)
  return wanted
