# SPDX-License-Identifier: Apache-2.0
"""Calls of `commit_kv`, and what they mean, slot by slot in NumPy."""

import jax.numpy as jnp
import numpy as np

KINDS = {
    "float32": dict(dtype="float32"),
    "bfloat16": dict(dtype="bfloat16"),
    "rounded to bfloat16": dict(dtype="bfloat16", fresh="float32"),
    "narrow": dict(dtype="bfloat16", room=128, size=64),
    "pages": dict(dtype="bfloat16", room=16, pages=7),
    "int8": dict(dtype="int8", room=128),
    "narrow int8 pages": dict(dtype="int8", room=128, size=64, pages=7),
}


def call(dtype, *, fresh=None, room=32, size=128, pages=0, count=2, rows=3,
         heads=3, nodes=7, longest=5, start=None, kept=None, seed=0):
  """Arguments: buffers, fresh nodes, path, slots, scales.

  Rows keep nothing, some and all of their path. Nodes that are not kept are
  poisoned, and so is a share of what is in the buffers already, and all of the
  page that belongs to nobody.
  """
  rng = np.random.default_rng(seed)
  first = pages or rows
  whole = (first, heads, room, size)
  if dtype == "int8":
    buffers = [rng.integers(-127, 128, whole).astype(np.int8)
               for _ in range(count)]
    scales = [rng.random(whole[:3], np.float32) for _ in range(count)]
  else:
    buffers = [rng.standard_normal(whole, np.float32) for _ in range(count)]
    scales = None
  for x in scales or buffers:
    x[rng.random(x.shape) < 0.2] = np.nan
    if pages:
      x[0] = np.nan
  new = [rng.standard_normal((rows, nodes, heads, size), np.float32)
         for _ in range(count)]
  new[0][:, 2] = 0                             # whose scale is none
  path = np.sort(np.argsort(rng.random((rows, nodes)))[:, :longest])
  kept = np.array([0, longest // 2, longest] if kept is None else kept)
  if start is None:
    start = rng.integers(0, room - longest + 1, rows)
  nth = np.arange(longest)
  slots = np.array(start)[:, None] + nth
  if pages:
    # Paths that go from a page to another, which need not be the next.
    table = 1 + rng.permutation(pages - 1)[:rows * 2].reshape(rows, 2)
    slots = slots + room // 2
    slots = table[np.arange(rows)[:, None], slots // room] * room + slots % room
  slots = np.where(nth < kept[:, None], slots, first * room if pages else room)
  for b in range(rows):
    gone = np.setdiff1d(np.arange(nodes), path[b, :kept[b]])
    for x in new:
      x[b, gone] = np.nan
  fresh = fresh or ("float32" if dtype == "float32" else "bfloat16")
  return (tuple(jnp.asarray(x).astype(dtype) for x in buffers),
          tuple(jnp.asarray(x).astype(fresh) for x in new),
          jnp.asarray(path, jnp.int32), jnp.asarray(slots, jnp.int32),
          None if scales is None else tuple(map(jnp.asarray, scales)))


def meaning(buffers, fresh, path, slots, scales, *, paged=False):
  """The definition, one slot at a time."""
  out = [np.array(x) for x in buffers]
  sizes = None if scales is None else [np.array(x) for x in scales]
  first, _, room, _ = out[0].shape
  for n, values in enumerate(fresh):
    values = np.asarray(values.astype(jnp.float32))
    for b, p in np.ndindex(path.shape):
      slot = int(slots[b, p])
      if slot >= (first * room if paged else room):
        continue
      at = divmod(slot, room) if paged else (b, slot)
      for g in range(values.shape[2]):
        x = values[b, int(path[b, p]), g]
        if sizes is not None:
          largest = np.abs(x).max()
          scale = largest / np.float32(127) if largest else np.float32(1)
          sizes[n][at[0], g, at[1]] = scale
          x = np.round(x / scale)
        out[n][at[0], g, at[1]] = x.astype(out[n].dtype)
  return out, sizes


def same(found, wanted):
  """Asserts equality; the last bit of a scale may tip a few halves over."""
  for x, y in zip(found[0], wanted[0], strict=True):
    if y.dtype == np.int8:
      apart = np.abs(np.asarray(x, np.int32) - y)
      assert apart.max() <= 1
      assert np.sum(apart) <= 20
    else:
      # (As float32, because a NaN of bfloat16 is not like itself to NumPy.)
      np.testing.assert_array_equal(np.asarray(x, np.float32),
                                    y.astype(np.float32))
  for x, y in zip(found[1] or (), wanted[1] or (), strict=True):
    np.testing.assert_allclose(np.asarray(x), y, rtol=2e-7)
