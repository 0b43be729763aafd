# SPDX-License-Identifier: Apache-2.0
"""Keys and values in flight, and the contract of the caches they may enter."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxspec import sharding
from pallas_kernels import pack


@struct.dataclass
class Fresh:
  """Keys and values of the nodes in flight, one array a layer.

  Rejected nodes are forgotten with it.
  """

  k: tuple[Float[Array, "B N G K"], ...]
  v: tuple[Float[Array, "B N G K"], ...]

  @classmethod
  def empty(cls, depth: int, rows: int, nodes: int, kv_heads: int,
            head_size: int, dtype: Any) -> "Fresh":
    zeros = jnp.zeros((rows, nodes, kv_heads, head_size), dtype)
    zeros = sharding.constrain(zeros, "rows", None, "kv_heads", None)
    return cls((zeros,) * depth, (zeros,) * depth)

  def write(self, layer: int, start: int, k: Float[Array, "B T G K"],
            v: Float[Array, "B T G K"]) -> "Fresh":
    """Sets nodes `start ...` of one layer."""
    def put(buffers, new):
      old = buffers[layer]
      new = new.astype(old.dtype)
      if new.shape != old.shape:
        new = lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
      return (*buffers[:layer], new, *buffers[layer + 1:])
    return Fresh(put(self.k, k), put(self.v, v))

  def first(self, nodes: int) -> "Fresh":
    """The leading nodes."""
    return Fresh(*(tuple(x[:, :nodes] for x in xs) for xs in (self.k, self.v)))


@struct.dataclass
class Place:
  """Where the tokens of one `extend` call stand.

  Attributes:
    positions: of every fresh node; the tokens of this call are nodes
      `start ... start + T`.
    seen: the fresh nodes each token of this call sees, one bit each (see
      `pallas_kernels.pack`).
  """

  positions: Int[Array, "B N"]
  seen: UInt32[Array, "T W"] | UInt32[Array, "B T W"]
  start: int = struct.field(pytree_node=False, default=0)

  @classmethod
  def of(cls, positions: Int[Array, "B N"],
         mask: Bool[Array, "T N"] | Bool[Array, "B T N"],
         start: int = 0) -> "Place":
    """From a mask with a flag for each node."""
    return cls(positions, pack(mask), start)

  @property
  def tokens(self) -> Int[Array, "B T"]:
    """The positions of this call's tokens."""
    count = self.seen.shape[-2]
    return self.positions[:, self.start:self.start + count]


@runtime_checkable
class Cache(Protocol):
  """What every cache does. All methods are pure.

  Attributes:
    length: how many positions of each row are committed.
  """

  length: Int[Array, "B"]

  @classmethod
  def empty(cls, windows: tuple[int | None, ...], rows: int, capacity: int,
            kv_heads: int, head_size: int, dtype: Any,
            **options: Any) -> "Cache":
    """A cache of `len(windows)` layers that holds `capacity` positions.

    Args:
      options: a cache's own, each by its name; see `caches.parse`.
    """
    ...

  @property
  def dtype(self) -> Any: ...

  def attend(self, layer: int, query: Float[Array, "B T H K"], fresh: Fresh,
             at: Place, **options: Any) -> Float[Array, "B T H K"]:
    """Attends to the committed prefix and to the fresh nodes of one layer."""
    ...

  def commit(self, fresh: Fresh, path: Int[Array, "B P"],
             kept: Int[Array, "B"]) -> "Cache":
    """Writes nodes `path[:, :kept]` of every layer behind the prefix.

    Rows with `kept == 0` are untouched. So is a row for which there is no
    room: its length stands still, and the caller must end its request.
    """
    ...

  def insert(self, rows: Int[Array, "R"], prefix: "Cache",
             reserve: Int[Array, "R"]) -> "Cache":
    """Replaces whole rows by those of a contiguous `prefix`.

    A row for which there is no room becomes empty.

    Args:
      rows: targets; an index of `B` or more is dropped.
      prefix: a `ContiguousCache` of R rows.
      reserve: the longest each row may grow, in positions.
    """
    ...

  def fits(self, lengths: Sequence[int]) -> int:
    """How many of these there is room for now, from the first on.

    The host asks before it inserts; who was let in never lacks room.

    Args:
      lengths: the longest each new row may grow, in positions.
    """
    ...

  def release(self, rows: Bool[Array, "B"]) -> "Cache":
    """Forgets these rows; nothing of them can be read again."""
    ...
