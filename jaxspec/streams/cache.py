# SPDX-License-Identifier: Apache-2.0
"""A cache whose slots know their stream and their position.

Keys of all streams lie in one ordinary cache, in the order in which they came;
beside it stands, for each slot, whose it is and where in its stream.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxspec import stages
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.caches.fresh import Fresh, Place
from jaxspec.caches.paged import PagedCache
from jaxspec.kernels import tree_attention


@struct.dataclass
class StreamPlace(Place):
  """Where tokens of several streams stand.

  Attributes:
    readable: the streams each token of this call may read, one bit each.
  """

  readable: UInt32[Array, "T"] | None = None


@struct.dataclass
class StreamFresh(Fresh):
  """Keys and values in flight, and whose they are.

  Attributes:
    positions: by which later tokens see them or not.
    streams: the places of their streams in the layout; that of the prefix
      comes behind the last.
  """

  positions: Int[Array, "B N"] | None = None
  streams: Int[Array, "B N"] | None = None


@struct.dataclass
class StreamCache:
  """An ordinary cache, and the position and stream of what its slots hold.

  It attends for a `StreamPlace` and commits a `StreamFresh`.
  """

  inner: ContiguousCache | PagedCache
  positions: Int[Array, "B S"]
  streams: Int[Array, "B S"]

  @classmethod
  def empty(cls, windows, rows, capacity, kv_heads, head_size, dtype, *,
            kind: Any = ContiguousCache, **options):
    """See `Cache.empty`.

    Args:
      kind: the class of the ordinary cache, whose options the others are.
    """
    return cls.over(kind.empty(windows, rows, capacity, kv_heads, head_size,
                               dtype, **options))

  @classmethod
  def over(cls, inner: ContiguousCache | PagedCache) -> "StreamCache":
    """An empty one, of an empty cache."""
    shape = (len(inner.length), inner.capacity)
    return cls(inner, jnp.full(shape, -1, jnp.int32),
               jnp.zeros(shape, jnp.int32))

  @property
  def length(self) -> Int[Array, "B"]:
    return self.inner.length

  @property
  def dtype(self) -> Any:
    return self.inner.dtype

  @property
  def capacity(self) -> int:
    return self.inner.capacity

  def attend(self, layer: int, query: Float[Array, "B T H K"], fresh: Fresh,
             at: Place, **options: Any) -> Float[Array, "B T H K"]:
    """Attends to what is before each token, in the streams it may read."""
    inner = self.inner
    slot = jnp.arange(self.capacity)[None]
    held = jnp.where(slot < self.length[:, None], self.positions, -1)
    return tree_attention(
        query, inner.k[layer], inner.v[layer], fresh.k[layer], fresh.v[layer],
        slot_positions=held, positions=at.tokens,
        fresh_positions=at.positions, seen=at.seen,
        table=getattr(inner, "table", None), slot_streams=self.streams,
        readable=at.readable, **options)

  def commit(self, fresh: Fresh, path: Int[Array, "B P"],
             kept: Int[Array, "B"]) -> "StreamCache":
    """Writes nodes `path[:, :kept]`; see `Cache.commit`."""
    inner = self.inner.commit(fresh, path, kept)
    kept = inner.length - self.length          # none where there is no room

    def put(buffer, values):
      return stages.write(buffer, jnp.take_along_axis(values, path, axis=1),
                          self.length, kept)
    return StreamCache(inner, put(self.positions, fresh.positions),
                       put(self.streams, fresh.streams))

  def insert(self, rows: Int[Array, "R"], prefix: "StreamCache",
             reserve: Int[Array, "R"]) -> "StreamCache":
    """Replaces whole rows; see `Cache.insert`."""
    def put(buffer, new):
      new = new[:, :self.capacity]
      new = jnp.pad(new, ((0, 0), (0, self.capacity - new.shape[1])))
      return buffer.at[rows].set(new, mode="drop")
    return StreamCache(self.inner.insert(rows, prefix.inner, reserve),
                       put(self.positions, prefix.positions),
                       put(self.streams, prefix.streams))

  def fits(self, lengths: Sequence[int]) -> int:
    """How many of these there is room for now; see `Cache.fits`."""
    return self.inner.fits(lengths)

  def release(self, rows: Bool[Array, "B"]) -> "StreamCache":
    """Forgets these rows."""
    return self.replace(inner=self.inner.release(rows))
