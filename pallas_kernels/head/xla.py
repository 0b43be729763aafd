# SPDX-License-Identifier: Apache-2.0
"""The meaning of `proposal_head`."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.words import unpack
from pallas_kernels.head.law import Forecast, name
from pallas_kernels.noise import gumbel


def proposal_head(x, norm, unembedding, *, eps, count, logits_soft_cap, tokens,
                  allowed, noise, temperature):
  """See `pallas_kernels.head.op.proposal_head`."""
  y = rms_norm(x, norm, eps)
  # Float32 means float32: a TPU would round its inputs to bfloat16.
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  logits = jnp.einsum("bd,vd->bv", y, unembedding, precision=precision,
                      preferred_element_type=jnp.float32)
  if logits_soft_cap is not None:
    logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
  if allowed is not None:
    logits = jnp.where(unpack(allowed, logits.shape[1]), logits, -jnp.inf)
  total = jax.nn.logsumexp(logits, axis=-1)                      # [B]
  some = total > -jnp.inf
  log_p = logits - jnp.where(some, total, 0.0)[:, None]
  p = jnp.exp(log_p)
  most = lax.top_k(p, min(2, p.shape[1]))[0]
  next_ = most[:, 1] if p.shape[1] > 1 else jnp.zeros_like(total)
  scores = logits
  if noise is not None:
    ids = name(jnp.arange(logits.shape[1]), tokens)
    drawn = (logits / jnp.maximum(temperature, COLDEST)[:, None]
             + gumbel(noise[:, :1], noise[:, 1:], ids[None]))
    scores = jnp.where(temperature[:, None] > 0, drawn, logits)
  scores, columns = lax.top_k(scores, count)
  there = scores > -jnp.inf
  return Forecast(
      tokens=jnp.where(there, name(columns, tokens), -1),
      logits=jnp.where(there, jnp.take_along_axis(logits, columns, axis=1),
                       -jnp.inf),
      log_sum_exp=total, top=most[:, 0], margin=most[:, 0] - next_,
      entropy=-jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1))


# Below it good tokens would all become infinite, and alike.
COLDEST = 1e-30


def rms_norm(x, norm, eps):
  """In float32, returned in the dtype of `x`."""
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * norm[None].astype(jnp.float32)).astype(x.dtype)
