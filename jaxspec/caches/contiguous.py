# SPDX-License-Identifier: Apache-2.0
"""The plain cache: slot s of a row holds position s."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxspec import sharding
from jaxspec.caches.fresh import Fresh, Place, path_nodes
from jaxspec.kernels import tree_attention

AXES = ("rows", "kv_heads", None, None)


@struct.dataclass
class ContiguousCache:
  """One buffer of `capacity` slots a row and layer."""

  k: tuple[Float[Array, "B G S K"], ...]
  v: tuple[Float[Array, "B G S K"], ...]
  length: Int[Array, "B"]

  @classmethod
  def empty(cls, windows, rows, capacity, kv_heads, head_size, dtype):
    shape = (rows, kv_heads, capacity, head_size)
    def buffers():
      return tuple(zeros(shape, dtype, AXES) for _ in windows)
    return cls(buffers(), buffers(), jnp.zeros(rows, jnp.int32))

  @property
  def dtype(self) -> Any:
    return self.k[0].dtype

  @property
  def capacity(self) -> int:
    return self.k[0].shape[2]

  def attend(self, layer: int, query: Float[Array, "B T H K"], fresh: Fresh,
             at: Place, **options) -> Float[Array, "B T H K"]:
    slots = jnp.arange(self.capacity)[None]
    held = jnp.where(slots < self.length[:, None], slots, -1)
    return tree_attention(
        query, self.k[layer], self.v[layer], fresh.k[layer], fresh.v[layer],
        slot_positions=held,
        positions=at.tokens, fresh_positions=at.positions, seen=at.seen,
        **options)

  def commit(self, fresh: Fresh, path: Int[Array, "B P"],
             kept: Int[Array, "B"]) -> "ContiguousCache":
    nth = jnp.arange(path.shape[1])[None]
    slots = jnp.where(nth < kept[:, None], self.length[:, None] + nth,
                      self.capacity)
    def put(buffer, values):
      return write_slots(buffer, path_nodes(values, path), slots)
    return ContiguousCache(
        tuple(map(put, self.k, fresh.k)), tuple(map(put, self.v, fresh.v)),
        self.length + kept)

  def insert(self, rows: Int[Array, "R"], prefix: "ContiguousCache",
             reserve: Int[Array, "R"]) -> "ContiguousCache":
    # The row is written whole: what an earlier request left there, even a
    # NaN, which a zero probability would not hide, is gone.
    def put(buffer, new):
      return _begin_rows(buffer, rows, new, prefix.length)
    return ContiguousCache(
        tuple(map(put, self.k, prefix.k)), tuple(map(put, self.v, prefix.v)),
        self.length.at[rows].set(prefix.length, mode="drop"))

  def fits(self, lengths: Sequence[int]) -> int:
    return len(lengths)

  def release(self, rows: Bool[Array, "B"]) -> "ContiguousCache":
    return self.replace(v=wipe_rows(self.v, rows, self.length),
                        length=jnp.where(rows, 0, self.length))


def zeros(shape: tuple[int, ...], dtype: Any,
          axes: tuple[str | None, ...]) -> Float[Array, "..."]:
  """An empty buffer, split as its `axes` ask for."""
  return sharding.constrain(jnp.zeros(shape, dtype), *axes)


# What caches do for each layer is traced once for all that look alike.


@jax.jit
def _begin_rows(buffer: Float[Array, "B G S K"], rows: Int[Array, "R"],
                new: Float[Array, "R G _ K"], length: Int[Array, "R"]
                ) -> Float[Array, "B G S K"]:
  """Rows that hold the first `length` positions of `new`, and nothing else."""
  slots = buffer.shape[2]
  new = jnp.pad(new, ((0, 0), (0, 0), (0, max(slots - new.shape[2], 0)),
                      (0, 0)))
  held = jnp.arange(slots)[None] < length[:, None]
  return set_rows(buffer, rows, jnp.where(held[:, None, :, None],
                                          new[:, :, :slots], 0))


@jax.jit
def write_slots(buffer: Float[Array, "B G S K"],
                values: Float[Array, "B P G K"], slots: Int[Array, "B P"]
                ) -> Float[Array, "B G S K"]:
  """`buffer[b, :, slots[b, p]] = values[b, p]`, in place.

  Slots of a row must differ; those of S or more are dropped. A scatter for a
  CPU; elsewhere a slice update for each node, because the TPU compiler keeps
  a cache that is scattered into in another layout, and copies it twice a call.
  """
  values = jnp.moveaxis(values.astype(buffer.dtype), 1, 2)       # [B G P K]

  def scatter(buffer, values, slots):
    return jax.vmap(lambda b, v, s: b.at[:, s].set(v, mode="drop"))(
        buffer, values, slots)

  def slices(buffer, values, slots):
    room, count = buffer.shape[2], slots.shape[1]

    def row(b, buffer):
      def node(p, buffer):
        at = (b, 0, jnp.minimum(slots[b, p], room - 1), 0)
        new = lax.dynamic_slice(values, (b, 0, p, 0),
                                (1, values.shape[1], 1, values.shape[3]))
        old = lax.dynamic_slice(buffer, at, new.shape)
        new = jnp.where(slots[b, p] < room, new, old)
        return lax.dynamic_update_slice(buffer, new, at)
      # A chunk of a prompt has hundreds of nodes: not all unrolled.
      return lax.fori_loop(0, count, node, buffer, unroll=min(count, 8) or 1)

    return lax.fori_loop(0, buffer.shape[0], row, buffer)

  def write(buffer, values, slots):
    return lax.platform_dependent(buffer, values, slots, cpu=scatter,
                                  default=slices)

  return _by_shard(write, buffer, (values, slots), (AXES, AXES[:1] + (None,)))


@jax.jit
def set_rows(buffer: Float[Array, "B G S K"], rows: Int[Array, "R"],
             new: Float[Array, "R G S K"]) -> Float[Array, "B G S K"]:
  """`buffer[rows] = new`, in place; rows beyond the buffer are dropped."""
  split = _row_axis(buffer)

  def write(buffer, rows, new):
    count = len(buffer)
    if split:
      rows = rows - lax.axis_index(split) * count
      rows = jnp.where(rows < 0, count, rows)
    if len(rows) == 1:     # a slice update, which every backend does in place
      return lax.cond(
          rows[0] < count,
          lambda b: lax.dynamic_update_slice_in_dim(b, new, rows[0], axis=0),
          lambda b: b, buffer)
    return buffer.at[rows].set(new, mode="drop")

  return _by_shard(write, buffer, (rows, new.astype(buffer.dtype)),
                   ((None,), (None, *AXES[1:])))


def _by_shard(write, buffer, args, axes):
  """`write(buffer, *args)`, each shard for the rows and heads it holds.

  Left to itself, XLA gathers a buffer that is split over rows, to update a
  slice of it whose row it does not know.
  """
  mesh = sharding.current()
  if mesh is None:
    return write(buffer, *args)
  whole = sharding.spec(AXES, buffer.shape, mesh)
  specs = (sharding.spec(names, x.shape, mesh) for names, x in zip(axes, args))
  return jax.shard_map(write, in_specs=(whole, *specs), out_specs=whole,
                       check_vma=False)(buffer, *args)


def _row_axis(buffer):
  """The mesh axis rows are split over, if any."""
  mesh = sharding.current()
  return None if mesh is None else sharding.spec(AXES, buffer.shape, mesh)[0]


def wipe_rows(buffers: tuple[Float[Array, "B G _ K"], ...],
              rows: Bool[Array, "B"], length: Int[Array, "B"]
              ) -> tuple[Float[Array, "B G _ K"], ...]:
  """Zeroes the values of rows that are being released.

  A slot without a position has probability zero, which hides any value but a
  NaN or an infinity. Rows that hold nothing cost nothing.
  """
  rows = rows & (length > 0)
  def wipe(buffers):
    return tuple(jnp.where(rows[:, None, None, None], 0, b) for b in buffers)
  return lax.cond(jnp.any(rows), wipe, lambda buffers: buffers, buffers)
