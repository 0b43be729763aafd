# SPDX-License-Identifier: Apache-2.0
"""The meaning of `tree_attention`, as einsums."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.words import unpack

# Slots a CPU reads at a time. A block and its scores stay in its caches.
BLOCK = 128


# Traced once for all layers that look alike.
@functools.partial(jax.jit,
                   static_argnames=("scale", "window", "logits_soft_cap",
                                    "across"))
def tree_attention(query, key, value, fresh_key, fresh_value, *,
                   slot_positions, positions, fresh_positions, seen, scale,
                   table, window, logits_soft_cap, key_scale=None,
                   value_scale=None, slot_streams=None, readable=None,
                   across=None):
  """See `pallas_kernels.attention.op.tree_attention`.

  A CPU reads the prefix block by block and stops where no row holds more:
  what it costs goes with the length of the text, not with the capacity. Other
  backends would wait for the host to count such a loop.
  """
  rows, tokens, heads, size = query.shape
  groups, slots = key.shape[1], slot_positions.shape[1]
  # Eight bits are for storage: products are in the dtype of what asks.
  dtype = query.dtype if key.dtype.itemsize == 1 else key.dtype
  q = query.astype(dtype).reshape(rows, tokens, groups, -1, size)
  q = jnp.moveaxis(q, 1, 3)                                    # [B G R T K]
  oldest = None if window is None else positions[..., None] - window

  def add(state, equations, keys, values, visible, scales=None):
    """Attends to some more keys, by an online softmax."""
    top, total, out = state
    if keys.dtype.itemsize == 1:
      keys, values = keys.astype(dtype), values.astype(dtype)
    s = _einsum(equations[0], q, keys) * scale
    if scales is not None:
      s = s * scales[0][:, :, None, None]
    if logits_soft_cap is not None:
      s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    s = jnp.where(visible[:, None, None], s, -jnp.inf)
    new = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
    s, shrink = jnp.exp(s - new), jnp.exp(top - new)
    total = total * shrink + jnp.sum(s, axis=-1, keepdims=True)
    if scales is not None:
      s = s * scales[1][:, :, None, None]
    return (new, total,
            out * shrink + _einsum(equations[1], s.astype(values.dtype),
                                   values))

  def prefix(state, key, value, held, scales, streams):
    visible = (held >= 0)[:, None]                             # [B 1 S]
    if oldest is not None:
      visible = visible & (held[:, None] > oldest)
    if streams is not None:
      of = streams.astype(jnp.uint32)[:, None]
      visible = (visible & (held[:, None] < positions[..., None])
                 & ((readable[None, :, None] >> of) & 1 == 1))
    return add(state, ("bgrtk,bgsk->bgrts", "bgrts,bgsk->bgrtk"), key, value,
               visible, scales)

  def paged(state, key, value, held, table, scales, streams):
    def gather(pool):
      x = pool.at[table].get(mode="promise_in_bounds")       # [B M G page ...]
      x = jnp.moveaxis(x, 2, 1)
      return x.reshape(rows, groups, -1, *x.shape[4:])
    # A zero probability does not hide a NaN that an earlier owner of a page
    # left behind.
    value = jnp.where((held >= 0)[:, None, :, None], gather(value), 0)
    if scales is not None:
      scales = gather(scales[0]), jnp.where((held >= 0)[:, None],
                                            gather(scales[1]), 0)
    return prefix(state, gather(key), value, held, scales, streams)

  def by_block(state, key, value, held, table, scales, streams):
    size = BLOCK if table is None else key.shape[2] * pages
    used = jnp.max(jnp.where(held >= 0, jnp.arange(slots)[None] + 1, 0))

    def body(i, state):
      # The last block may reach back into the one before it.
      start = jnp.minimum(i * size, slots - size)
      at = lax.dynamic_slice_in_dim(held, start, size, axis=1)
      again = start + jnp.arange(size)[None] < i * size
      at = jnp.where(again, -1, at)
      of = streams
      if of is not None:
        of = lax.dynamic_slice_in_dim(of, start, size, axis=1)
      if table is not None:
        some = lax.dynamic_slice_in_dim(table, start // key.shape[2], pages,
                                        axis=1)
        return paged(state, key, value, at, some, scales, of)
      def cut(x):
        return lax.dynamic_slice_in_dim(x, start, size, axis=2)
      return prefix(state, cut(key), cut(value), at, jax.tree.map(cut, scales),
                    of)

    return lax.fori_loop(0, (used + size - 1) // size, body, state)

  def whole(state, key, value, held, table, scales, streams):
    if table is not None:
      return paged(state, key, value, held, table, scales, streams)
    return prefix(state, key, value, held, scales, streams)

  fresh = unpack(seen, fresh_key.shape[1])
  fresh = jnp.broadcast_to(fresh, (rows, *fresh.shape[-2:]))   # [B T N]
  if oldest is not None:
    fresh = fresh & (fresh_positions[:, None] > oldest)
  # A token always sees itself, so that the maximum is finite from here on.
  state = (jnp.full(q.shape[:-1] + (1,), -jnp.inf, jnp.float32),
           jnp.zeros(q.shape[:-1] + (1,), jnp.float32),
           jnp.zeros(q.shape, jnp.float32))
  state = add(state, ("bgrtk,bngk->bgrtn", "bgrtn,bngk->bgrtk"), fresh_key,
              fresh_value, fresh)
  if across is not None:       # what is fresh is on all devices: one counts it
    top, *found = state
    state = (top, *(jnp.where(lax.axis_index(across) == 0, x, 0)
                    for x in found))
  pages = 1 if table is None else min(max(1, BLOCK // key.shape[2]),
                                      table.shape[1])
  scales = None if key_scale is None else (key_scale, value_scale)
  prefix_of = (key, value, slot_positions, table, scales, slot_streams)
  if slots > BLOCK or table is not None:
    state = lax.platform_dependent(state, *prefix_of, cpu=by_block,
                                   default=whole)
  elif slots:
    state = prefix(state, key, value, slot_positions, scales, slot_streams)
  top, total, out = state
  if across is not None:
    # One exchange: of so little, how often counts and not how much.
    parts = lax.all_gather(jnp.concatenate(state, axis=-1), across)
    top, total, out = jnp.split(parts, (1, 2), axis=-1)
    shrink = jnp.exp(top - jnp.max(top, axis=0, keepdims=True))
    total, out = jnp.sum(total * shrink, 0), jnp.sum(out * shrink, 0)
  return jnp.moveaxis(out / total, 3, 1).reshape(query.shape).astype(
      query.dtype)


def _einsum(equation, a, b):
  # Float32 means float32: a TPU would round its inputs to bfloat16.
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.einsum(equation, a, b, precision=precision,
                    preferred_element_type=jnp.float32)
