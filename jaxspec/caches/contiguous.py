# SPDX-License-Identifier: Apache-2.0
"""The plain cache: slot s of a row holds position s."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxspec import sharding
from jaxspec.caches.fresh import Fresh, Place
from jaxspec.kernels import tree_attention
from pallas_kernels import commit_kv

AXES = ("rows", "kv_heads", "slots", None)


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
        split=True, **options)

  def commit(self, fresh: Fresh, path: Int[Array, "B P"],
             kept: Int[Array, "B"]) -> "ContiguousCache":
    nth = jnp.arange(path.shape[1])[None]
    slots = jnp.where(nth < kept[:, None], self.length[:, None] + nth,
                      self.capacity)
    return ContiguousCache(*write_path(self.k, self.v, fresh, path, slots),
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


def write_path(k: tuple[Float[Array, "..."], ...],
               v: tuple[Float[Array, "..."], ...], fresh: Fresh,
               path: Int[Array, "B P"], slots: Int[Array, "B P"], *,
               axes: tuple[str | None, ...] = AXES, paged: bool = False
               ) -> tuple[tuple[Float[Array, "..."], ...],
                          tuple[Float[Array, "..."], ...]]:
  """Writes the path into layers that are alike, see `commit_kv`.

  Each shard writes the rows, heads and slots it holds. Any page may hold any
  row, so that of a pool each holds all.

  Args:
    axes: the names of the buffers' dimensions, see `jaxspec.sharding`.
  """
  if not k:
    return k, v
  rows, mesh = axes[0], sharding.current()
  split = None if mesh is None else sharding.spec(axes, k[0].shape, mesh)[2]

  def write(buffers, fresh, path, slots):
    if split:
      held = buffers[0].shape[2]
      slots = slots - lax.axis_index(split) * held
      slots = jnp.where(slots < 0, held, slots)
    return commit_kv(buffers, fresh, path, slots, paged=paged)[0]

  out = by_shard(write, (*k, *v), ((*fresh.k, *fresh.v), path, slots), axes,
                 ((rows, None, "kv_heads", None), (rows, None), (rows, None)))
  return out[:len(k)], out[len(k):]


# What is done for each layer is traced once for all that look alike.


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


@functools.partial(jax.jit, static_argnames="axes")
def set_rows(buffer: Float[Array, "B G S K"], rows: Int[Array, "R"],
             new: Float[Array, "R G S K"], *,
             axes: tuple[str | None, ...] = AXES) -> Float[Array, "B G S K"]:
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

  return by_shard(write, buffer, (rows, new.astype(buffer.dtype)), axes,
                  ((None,), (None, *axes[1:])))


def by_shard(write: Callable[..., Any], buffers: Any, args: tuple[Any, ...],
             axes: tuple[str | None, ...],
             args_axes: tuple[tuple[str | None, ...], ...]) -> Any:
  """`write(buffers, *args)`, each shard for what it holds of them.

  Left to itself, XLA gathers a buffer that is split over rows, to update a
  slice of it whose row it does not know; and a kernel it cannot split at all.

  Args:
    axes: of the buffers, which come back as they are; names of dimensions,
      see `jaxspec.sharding`.
    args_axes: of each argument, which may be a tuple of arrays alike.
  """
  mesh = sharding.current()
  if mesh is None:
    return write(buffers, *args)

  def specs(names, arrays):
    return jax.tree.map(lambda x: sharding.spec(names, x.shape, mesh), arrays)

  whole = specs(axes, buffers)
  return jax.shard_map(
      write, in_specs=(whole, *map(specs, args_axes, args)), out_specs=whole,
      check_vma=False)(buffers, *args)


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
