# SPDX-License-Identifier: Apache-2.0
"""The meaning of `accept_nodes`."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.noise import gumbel

# Below this good tokens would all become infinite, and alike.
COLDEST = 1e-30


def accept_nodes(logits, *, temperature, noise, first, draft, drafted):
  """See `pallas_kernels.acceptance.op.accept_nodes`."""
  logits = logits.astype(jnp.float32)
  vocab = logits.shape[-1]
  warm = temperature[:, None, None] > 0
  warped = logits / jnp.where(warm, jnp.maximum(
      temperature[:, None, None], COLDEST), 1)

  def noisy(warped):
    index = jnp.arange(vocab, dtype=jnp.int32)[None, None]
    if first is not None:
      index = index + first
    return warped + jnp.where(
        warm, gumbel(noise[..., :1], noise[..., 1:], index), 0)

  scores = lax.cond(jnp.any(temperature > 0), noisy, lambda x: x, warped)
  token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
  at = token[..., None]
  parts = (token, jnp.max(scores, axis=-1), _take(logits, at),
           jax.nn.logsumexp(logits, axis=-1))
  if draft is None:
    return parts
  law = jnp.where(warm, jax.nn.softmax(warped, axis=-1),
                  jax.nn.one_hot(token, vocab))
  excess = jnp.sum(jnp.maximum(law - draft.astype(jnp.float32), 0), axis=-1)
  return (*parts, _take(law, drafted[..., None]), excess)


def _take(x, at):
  return jnp.take_along_axis(x, at, axis=-1)[..., 0]
