# SPDX-License-Identifier: Apache-2.0
"""A cache whose slots know their stream and their position.

Keys of all streams lie in one ordinary cache, in the order in which they came;
beside it stands, for each of them, whose it is and where in its stream.
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
from jaxspec.caches.window import WindowCache, held
from jaxspec.errors import InputError
from jaxspec.kernels import tree_attention
from jaxspec.models.transformer import Transformer
from jaxspec.streams.layout import StreamLayout


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
  """An ordinary cache, and the position and stream of each key, as they came.

  It attends for a `StreamPlace` and commits a `StreamFresh`. Where layers keep
  no more than a window, positions may not fall from one key to the next.
  """

  inner: ContiguousCache | PagedCache | WindowCache
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
                               dtype, **options), capacity)

  @classmethod
  def over(cls, inner: ContiguousCache | PagedCache | WindowCache,
           capacity: int | None = None) -> "StreamCache":
    """An empty one, of an empty cache.

    Args:
      capacity: keys of a row; None for what the cache tells of itself.
    """
    if capacity is None:
      capacity = inner.capacity  # pyright: ignore[reportAttributeAccessIssue]
    shape = (len(inner.length), capacity)
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
    return self.positions.shape[1]

  def attend(self, layer: int, query: Float[Array, "B T H K"], fresh: Fresh,
             at: Place, **options: Any) -> Float[Array, "B T H K"]:
    """Attends to what is before each token, in the streams it may read."""
    inner, streams = self.inner, self.streams
    slot = jnp.arange(self.capacity)[None]
    places = jnp.where(slot < self.length[:, None], self.positions, -1)
    if isinstance(inner, WindowCache):
      slot = held(self.length, inner.k[layer].shape[2])
      known = jnp.maximum(slot, 0)
      places = jnp.where(
          slot >= 0, jnp.take_along_axis(places, known, axis=1), -1)
      streams = jnp.take_along_axis(streams, known, axis=1)
    return tree_attention(
        query, inner.k[layer], inner.v[layer], fresh.k[layer], fresh.v[layer],
        slot_positions=places, positions=at.tokens,
        fresh_positions=at.positions, seen=at.seen,
        table=getattr(inner, "table", None), slot_streams=streams,
        readable=at.readable, split=isinstance(inner, ContiguousCache),
        **options)

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


def empty(backbone: Transformer, layout: StreamLayout, kind: Any, rows: int,
          capacity: int, dtype: Any, **options: Any) -> StreamCache:
  """A cache for the streams of a layout.

  Args:
    kind: the class of the ordinary cache, whose options the others are. A
      window of positions is one of rows, each of a key a stream.

  Raises:
    InputError: it forgets what is behind a window, and positions are counters.
  """
  c, windows = backbone.config, backbone.config.windows
  if kind is WindowCache:
    if layout.positions != "rows":
      raise InputError(
          "cache window forgets what came long ago, and by their own counts a "
          "stream that was silent is not long ago; use contiguous or paged, or "
          "a layout with positions of rows")
    windows = tuple(w and w * layout.count for w in windows)
  return StreamCache.empty(windows, rows, capacity, c.kv_heads, c.head_size,
                           dtype, kind=kind, **options)
