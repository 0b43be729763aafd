# SPDX-License-Identifier: Apache-2.0
"""The meaning of `tree_attention`, as einsums."""

import jax.numpy as jnp
from jax import lax

# Slots a CPU reads at a time. A block and its scores stay in its caches.
BLOCK = 128


def tree_attention(query, key, value, fresh_key, fresh_value, *,
                   slot_positions, positions, fresh_positions, mask, scale,
                   window, logits_soft_cap):
  """See `pallas_kernels.attention.op.tree_attention`.

  A CPU reads the prefix block by block and stops where no row holds more:
  what it costs goes with the length of the text, not with the capacity. Other
  backends would wait for the host to count such a loop.
  """
  rows, tokens, heads, size = query.shape
  groups, slots = key.shape[1:3]
  q = query.astype(key.dtype).reshape(rows, tokens, groups, -1, size)
  q = jnp.moveaxis(q, 1, 3)                                    # [B G R T K]
  oldest = None if window is None else positions[..., None] - window

  def scores(equation, keys, visible):
    s = _einsum(equation, q, keys) * scale
    if logits_soft_cap is not None:
      s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    return jnp.where(visible[:, None, None], s, -jnp.inf)

  def add(state, equations, keys, values, visible):
    """One more block of keys, by an online softmax."""
    top, total, out = state
    s = scores(equations[0], keys, visible)
    new = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
    s, shrink = jnp.exp(s - new), jnp.exp(top - new)
    return (new, total * shrink + jnp.sum(s, axis=-1, keepdims=True),
            out * shrink + _einsum(equations[1], s.astype(values.dtype),
                                   values))

  def prefix(state, key, value, held):
    visible = (held >= 0)[:, None]                             # [B 1 S]
    if oldest is not None:
      visible = visible & (held[:, None] > oldest)
    return add(state, ("bgrtk,bgsk->bgrts", "bgrts,bgsk->bgrtk"), key, value,
               visible)

  def blocks(state, key, value, held):
    def body(i, state):
      # The last block may reach back into the one before it.
      start = jnp.minimum(i * BLOCK, slots - BLOCK)
      k, v = (lax.dynamic_slice_in_dim(x, start, BLOCK, axis=2)
              for x in (key, value))
      at = lax.dynamic_slice_in_dim(held, start, BLOCK, axis=1)
      again = start + jnp.arange(BLOCK)[None] < i * BLOCK
      return prefix(state, k, v, jnp.where(again, -1, at))
    used = jnp.max(jnp.where(held >= 0, jnp.arange(slots)[None] + 1, 0))
    return lax.fori_loop(0, (used + BLOCK - 1) // BLOCK, body, state)

  fresh = jnp.broadcast_to(mask, (rows, *mask.shape[-2:]))     # [B T N]
  if oldest is not None:
    fresh = fresh & (fresh_positions[:, None] > oldest)
  # A token always sees itself, so that the maximum is finite from here on.
  state = (jnp.full(q.shape[:-1] + (1,), -jnp.inf, jnp.float32),
           jnp.zeros(q.shape[:-1] + (1,), jnp.float32),
           jnp.zeros(q.shape, jnp.float32))
  state = add(state, ("bgrtk,bngk->bgrtn", "bgrtn,bngk->bgrtk"), fresh_key,
              fresh_value, fresh)
  if slots > BLOCK:
    state = lax.platform_dependent(state, key, value, slot_positions,
                                   cpu=blocks, default=prefix)
  elif slots:
    state = prefix(state, key, value, slot_positions)
  _, total, out = state
  return jnp.moveaxis(out / total, 3, 1).reshape(query.shape).astype(
      query.dtype)


def _einsum(equation, a, b):
  # Float32 means float32: a TPU would round its inputs to bfloat16.
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.einsum(equation, a, b, precision=precision,
                    preferred_element_type=jnp.float32)
