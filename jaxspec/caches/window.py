# SPDX-License-Identifier: Apache-2.0
"""A cache whose layers keep no more than their window.

A layer that sees `window` positions keeps a ring of as many slots, a global
layer keeps all `capacity`. Slot s holds the latest committed position p with
p % ring == s, so that positions follow from the length and nothing has to be
recorded. As many slots as the window has positions suffice because nothing is
written before it is committed: a rejected node never pushes out an old one.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxspec.caches.contiguous import (
    ContiguousCache,
    set_rows,
    wipe_rows,
    write_path,
    zeros,
)
from jaxspec.caches.fresh import Fresh, Place
from jaxspec.kernels import tree_attention

# A ring is small: every device holds the slots of all positions.
AXES = ("rows", "kv_heads", None, None)


@struct.dataclass
class WindowCache:
  """A ring of slots a row and layer; rings differ in size (S)."""

  k: tuple[Float[Array, "B G _ K"], ...]
  v: tuple[Float[Array, "B G _ K"], ...]
  length: Int[Array, "B"]

  @classmethod
  def empty(cls, windows, rows, capacity, kv_heads, head_size, dtype):
    def buffers():
      return tuple(
          zeros((rows, kv_heads, min(window or capacity, capacity), head_size),
                dtype, AXES) for window in windows)
    return cls(buffers(), buffers(), jnp.zeros(rows, jnp.int32))

  @property
  def dtype(self) -> Any:
    return self.k[0].dtype

  def attend(self, layer: int, query: Float[Array, "B T H K"], fresh: Fresh,
             at: Place, **options) -> Float[Array, "B T H K"]:
    key, value = self.k[layer], self.v[layer]
    return tree_attention(
        query, key, value, fresh.k[layer], fresh.v[layer],
        slot_positions=held(self.length, key.shape[2]), positions=at.tokens,
        fresh_positions=at.positions, seen=at.seen, **options)

  def commit(self, fresh: Fresh, path: Int[Array, "B P"],
             kept: Int[Array, "B"]) -> "WindowCache":
    nth = jnp.arange(path.shape[1])[None]
    k, v = list(self.k), list(self.v)
    for ring in sorted({x.shape[2] for x in k}):
      layers = [n for n, x in enumerate(k) if x.shape[2] == ring]

      def some(xs, layers=layers):
        return tuple(xs[n] for n in layers)

      # Of more tokens than slots only the last are written: no slot twice.
      written = (nth < kept[:, None]) & (nth >= kept[:, None] - ring)
      slots = jnp.where(written, (self.length[:, None] + nth) % ring, ring)
      new = write_path(some(k), some(v), Fresh(some(fresh.k), some(fresh.v)),
                       path, slots, axes=AXES)
      for n, new_k, new_v in zip(layers, *new):
        k[n], v[n] = new_k, new_v
    return WindowCache(tuple(k), tuple(v), self.length + kept)

  def insert(self, rows: Int[Array, "R"], prefix: ContiguousCache,
             reserve: Int[Array, "R"]) -> "WindowCache":
    def put(buffer, new):
      # The row is written whole, as in `ContiguousCache`.
      at = held(prefix.length, buffer.shape[2])[:, None, :, None]
      new = jnp.take_along_axis(
          new, jnp.clip(at, 0, prefix.capacity - 1), axis=2)
      return set_rows(buffer, rows, jnp.where(at >= 0, new, 0), axes=AXES)
    return WindowCache(
        tuple(map(put, self.k, prefix.k)), tuple(map(put, self.v, prefix.v)),
        self.length.at[rows].set(prefix.length, mode="drop"))

  def fits(self, lengths: Sequence[int]) -> int:
    return len(lengths)

  def release(self, rows: Bool[Array, "B"]) -> "WindowCache":
    return self.replace(v=wipe_rows(self.v, rows, self.length),
                        length=jnp.where(rows, 0, self.length))


def held(length: Int[Array, "B"], ring: int) -> Int[Array, "B {ring}"]:
  """The position each slot of a ring holds, -1 where it holds none."""
  last = length[:, None] - 1
  position = last - (last - jnp.arange(ring)[None]) % ring
  return jnp.maximum(position, -1)
