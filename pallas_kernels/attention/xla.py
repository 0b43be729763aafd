# SPDX-License-Identifier: Apache-2.0
"""The meaning of `tree_attention`, as einsums."""

import jax.numpy as jnp
from jax import lax


def tree_attention(query, key, value, fresh_key, fresh_value, *,
                   slot_positions, positions, fresh_positions, mask, scale,
                   window, logits_soft_cap):
  """See `pallas_kernels.attention.op.tree_attention`."""
  rows, tokens, heads, size = query.shape
  groups = key.shape[1]
  q = query.astype(key.dtype).reshape(rows, tokens, groups, -1, size)
  q = jnp.moveaxis(q, 1, 3)                                    # [B G R T K]

  committed = (slot_positions >= 0)[:, None]                   # [B 1 S]
  fresh = jnp.broadcast_to(mask, (rows, *mask.shape[-2:]))     # [B T N]
  if window is not None:
    oldest = positions[..., None] - window                     # [B T 1]
    committed = committed & (slot_positions[:, None] > oldest)
    fresh = fresh & (fresh_positions[:, None] > oldest)

  def scores(equation, keys, visible):
    s = _einsum(equation, q, keys) * scale
    if logits_soft_cap is not None:
      s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    return jnp.where(visible[:, None, None], s, -jnp.inf)

  old = scores("bgrtk,bgsk->bgrts", key, committed)
  new = scores("bgrtk,bngk->bgrtn", fresh_key, fresh)
  # A token always sees itself, so the maximum is finite.
  top = jnp.max(new, axis=-1, keepdims=True)
  if old.shape[-1]:
    top = jnp.maximum(top, jnp.max(old, axis=-1, keepdims=True))
  old, new = jnp.exp(old - top), jnp.exp(new - top)
  total = (jnp.sum(old, axis=-1, keepdims=True)
           + jnp.sum(new, axis=-1, keepdims=True))
  out = (_einsum("bgrts,bgsk->bgrtk", old.astype(value.dtype), value)
         + _einsum("bgrtn,bngk->bgrtk", new.astype(fresh_value.dtype),
                   fresh_value)) / total
  return jnp.moveaxis(out, 3, 1).reshape(query.shape).astype(query.dtype)


def _einsum(equation, a, b):
  # Float32 means float32: a TPU would round its inputs to bfloat16.
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.einsum(equation, a, b, precision=precision,
                    preferred_element_type=jnp.float32)
