# SPDX-License-Identifier: Apache-2.0
"""What `tree_attention` is, in float64 and one head at a time, and arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import pack

ROWS = 4


def reference(query, key, value, fresh_key, fresh_value, *, slot_positions,
              positions, fresh_positions, mask, scale, window=None,
              logits_soft_cap=None, slot_streams=None, readable=None):
  """The definition: for each token and head, a softmax over what it sees."""
  rows, tokens, heads, _ = query.shape
  groups = key.shape[1]
  mask = np.broadcast_to(mask, (rows, *mask.shape[-2:]))
  out = np.zeros(query.shape)
  for b, t, h in np.ndindex(rows, tokens, heads):
    g = h // (heads // groups)
    first = -1 if window is None else positions[b, t] - window
    held = slot_positions[b]
    seen = (held >= 0) & (held > first)
    if slot_streams is not None:
      seen &= (held < positions[b, t]) & (
          readable[t] >> slot_streams[b].astype(np.uint32) & 1 == 1)
    fresh = mask[b, t] & (fresh_positions[b] > first)
    keys = np.concatenate([key[b, g][seen], fresh_key[b, :, g][fresh]])
    values = np.concatenate([value[b, g][seen], fresh_value[b, :, g][fresh]])
    scores = keys.astype(np.float64) @ query[b, t, h].astype(np.float64)
    scores *= scale
    if logits_soft_cap is not None:
      scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights / weights.sum() @ values.astype(np.float64)
  return out


# Of each node the one before it: what is decoded, drafted and verified at once.
TREES = {"root": (-1,), "chain of 8": tuple(range(-1, 7)),
         "tree of 63": tuple((n + 1) // 2 - 1 for n in range(63))}


def case(slots, lengths=None, *, heads=4, groups=2, start=1, by_row=False,
         ring=False, seed=0, tokens=3, nodes=5, size=8, tree=None):
  """Arrays for tokens `start ... start + tokens` of `nodes` fresh ones.

  Args:
    by_row: a mask for each row.
    ring: whether slots hold their positions in another order.
    tree: of `TREES`, all of whose nodes are the tokens, instead of any mask.
  """
  if tree is not None:
    start, tokens = 0, len(TREES[tree])
    nodes = tokens
  rng = np.random.default_rng([seed, slots])

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  if lengths is None:
    lengths = [0, slots // 2, max(slots - 1, 0), slots]
  lengths = np.array(lengths)
  held = np.where(np.arange(slots)[None] < lengths[:, None],
                  np.arange(slots)[None], -1)
  if ring:
    held = rng.permuted(held, axis=1)
  key, value = normal(ROWS, groups, slots, size), normal(
      ROWS, groups, slots, size)
  # What stands in free slots is left over from others, and large.
  for x in (key, value):
    x[np.broadcast_to((held < 0)[:, None], x.shape[:3])] = 1e4
  depths = (np.arange(nodes) + 1) // 2
  mask = rng.random((ROWS, nodes, nodes)) < 0.5
  mask |= np.eye(nodes, dtype=bool)
  if tree is not None:
    mask = np.broadcast_to(np.eye(nodes, dtype=bool), mask.shape).copy()
    for node, parent in enumerate(TREES[tree]):
      if parent >= 0:
        mask[:, node] |= mask[:, parent]
    depths = mask[0].sum(axis=1) - 1
  fresh_positions = lengths[:, None] + depths[None]
  mask = mask if by_row else mask[0]
  arrays = (normal(ROWS, tokens, heads, size) * 2, key, value,
            normal(ROWS, nodes, groups, size),
            normal(ROWS, nodes, groups, size))
  places = dict(
      slot_positions=held.astype(np.int32),
      positions=fresh_positions[:, start:start + tokens].astype(np.int32),
      fresh_positions=fresh_positions.astype(np.int32),
      mask=mask[..., start:start + tokens, :])
  return arrays, places


def streamed(places, seed):
  """The same, but slots and tokens stand anywhere, in four streams.

  Several streams have a token at the same position, some behind the token.
  """
  rng = np.random.default_rng(seed)
  rows, slots = places["slot_positions"].shape
  shape = places["positions"].shape
  return places | dict(
      slot_positions=np.where(places["slot_positions"] >= 0, rng.integers(
          0, slots, (rows, slots)), -1).astype(np.int32),
      positions=rng.integers(0, slots, shape).astype(np.int32),
      fresh_positions=np.full_like(places["fresh_positions"], slots),
      slot_streams=rng.integers(0, 4, (rows, slots)).astype(np.int32),
      readable=rng.permutation(np.resize(np.array(
          [0b1011, 0b0100, 0], np.uint32), shape[1])))


def packed(places):
  """As the op wants them: masks as bits."""
  places = jax.tree.map(jnp.asarray, places)
  seen = pack(places.pop("mask"))
  return {**places, "seen": seen}


def paged(arrays, places, page, rng):
  """The same prefix in a pool of pages, in an order of its own."""
  query, key, value, *fresh = arrays
  held = places["slot_positions"]
  rows, groups, slots, size = key.shape
  each = slots // page
  numbers = rng.permutation(rows * each)
  pools = []
  for x in (key, value):
    # Whatever earlier owners left behind, a NaN included.
    free = np.nan if x.dtype == np.float32 else 100
    x = np.where((held >= 0)[:, None, :, None], x, free).astype(x.dtype)
    x = x.reshape(rows, groups, each, page, size).transpose(0, 2, 1, 3, 4)
    pool = np.full((rows * each + 1, groups, page, size), free, x.dtype)
    pool[numbers] = x.reshape(-1, groups, page, size)
    pools.append(pool)
  return (query, *pools, *fresh), numbers.reshape(rows, each).astype(np.int32)


def eight_bits(arrays, rng, dtype=jnp.int8):
  """Keys and values in eight bits: what is stored, its scales, its meaning."""
  query, *stored, fresh_key, fresh_value = arrays
  found, scales, meant = [], [], []
  for x in stored:
    scale = rng.uniform(0.002, 0.02, x.shape[:-1]).astype(np.float32)
    if dtype == jnp.int8:
      number = rng.integers(-127, 128, x.shape).astype(np.int8)
    else:
      number = np.asarray(jnp.asarray(100 * rng.standard_normal(x.shape),
                                      dtype))
    found.append(number)
    scales.append(jnp.asarray(scale))
    meant.append(number.astype(np.float64) * scale[..., None])
  return ((query, *found, fresh_key, fresh_value),
          dict(zip(("key_scale", "value_scale"), scales)),
          (query, *meant, fresh_key, fresh_value))
