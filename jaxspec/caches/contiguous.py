# SPDX-License-Identifier: Apache-2.0
"""The plain cache: slot s of a row holds position s.

How buffers are kept is decided here for every cache. On a CPU, bfloat16 is kept
as its bits, in uint16: XLA:CPU computes bfloat16 in float32, and to it even a
slice update is a computation, so that each commit would convert the whole
cache, twice (30 layers of 32 rows, a token each: 23 ms, as bits 0.1 ms).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from jaxspec import sharding
from jaxspec.caches.fresh import Fresh, Place, path_nodes
from pallas_kernels import tree_attention

AXES = ("rows", "kv_heads", None, None)


@struct.dataclass
class ContiguousCache:
  """One buffer of `capacity` slots a row and layer."""

  k: tuple[Num[Array, "B G S K"], ...]
  v: tuple[Num[Array, "B G S K"], ...]
  length: Int[Array, "B"]

  @classmethod
  def empty(cls, windows, rows, capacity, kv_heads, head_size, dtype):
    shape = (rows, kv_heads, capacity, head_size)
    def buffers():
      return tuple(zeros(shape, dtype, AXES) for _ in windows)
    return cls(buffers(), buffers(), jnp.zeros(rows, jnp.int32))

  @property
  def dtype(self) -> Any:
    return value_dtype(self.k[0])

  @property
  def capacity(self) -> int:
    return self.k[0].shape[2]

  def attend(self, layer: int, query: Float[Array, "B T H K"], fresh: Fresh,
             at: Place, **options) -> Float[Array, "B T H K"]:
    slots = jnp.arange(self.capacity)[None]
    held = jnp.where(slots < self.length[:, None], slots, -1)
    return tree_attention(
        query, decode(self.k[layer], query), decode(self.v[layer], query),
        fresh.k[layer], fresh.v[layer], slot_positions=held,
        positions=at.tokens, fresh_positions=at.positions, mask=at.mask,
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
    slots = jnp.arange(self.capacity)[None]
    held = slots < prefix.length[:, None]
    spare = max(self.capacity - prefix.capacity, 0)
    def put(buffer, new):
      new = jnp.pad(decode(new), ((0, 0), (0, 0), (0, spare), (0, 0)))
      new = jnp.where(held[:, None, :, None], new[:, :, :self.capacity], 0)
      return set_rows(buffer, rows, new)
    return ContiguousCache(
        tuple(map(put, self.k, prefix.k)), tuple(map(put, self.v, prefix.v)),
        self.length.at[rows].set(prefix.length, mode="drop"))

  def fits(self, lengths: Sequence[int]) -> int:
    return len(lengths)

  def release(self, rows: Bool[Array, "B"]) -> "ContiguousCache":
    return self.replace(v=wipe_rows(self.v, rows, self.length),
                        length=jnp.where(rows, 0, self.length))


def on_cpu() -> bool:
  """Whether what is being traced is meant for a CPU."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else getattr(mesh, "abstract_device", None)
  return getattr(device, "platform", None) == "cpu" if device is not None else (
      jax.default_backend() == "cpu")


def zeros(shape: tuple[int, ...], dtype: Any,
          axes: tuple[str | None, ...]) -> Num[Array, "..."]:
  """A buffer for values of `dtype`."""
  if jnp.dtype(dtype) == jnp.bfloat16 and on_cpu():
    dtype = jnp.uint16
  return sharding.constrain(jnp.zeros(shape, dtype), *axes)


def value_dtype(buffer: Num[Array, "..."]) -> Any:
  """The dtype of the values a buffer holds."""
  bits = buffer.dtype == jnp.uint16
  return jnp.dtype(jnp.bfloat16) if bits else buffer.dtype


def encode(values: Num[Array, "..."],
           buffer: Num[Array, "..."]) -> Num[Array, "..."]:
  """Values as `buffer` keeps them."""
  values = values.astype(value_dtype(buffer))
  if values.dtype == buffer.dtype:
    return values
  return lax.bitcast_convert_type(values, buffer.dtype)


def decode(buffer: Num[Array, "..."],
           after: Float[Array, "..."] | None = None) -> Float[Array, "..."]:
  """The values of a buffer.

  Args:
    after: what must be known first. Reading bits makes a copy; it should be
      made layer by layer, not for all layers at the beginning of a step.
  """
  if buffer.dtype != jnp.uint16:
    return buffer
  if after is not None:
    buffer = buffer ^ zero_after(after).astype(buffer.dtype)
  return lax.bitcast_convert_type(buffer, jnp.bfloat16)


def zero_after(x: Float[Array, "..."]) -> Int[Array, ""]:
  """A zero that is known only when `x` is.

  XLA:CPU starts whatever can be started. A layer's reads depend on the loop's
  state alone, so it would copy every layer first and hold all the copies (an
  optimization barrier is gone before it schedules). Meant for a CPU: on a
  mesh, every device would wait for the one that holds the first element.
  """
  first = x[(0,) * x.ndim].astype(jnp.float32)
  return jnp.minimum(lax.bitcast_convert_type(first, jnp.int32) & 1, 0)


def write_slots(buffer: Num[Array, "B G S K"], values: Float[Array, "B P G K"],
                slots: Int[Array, "B P"]) -> Num[Array, "B G S K"]:
  """`buffer[b, :, slots[b, p]] = values[b, p]`, in place.

  Slots of a row must differ; those of S or more are dropped. A scatter for a
  CPU; elsewhere a slice update for each node, because the TPU compiler keeps
  a cache that is scattered into in another layout, and copies it twice a call.
  """
  values = jnp.moveaxis(encode(values, buffer), 1, 2)            # [B G P K]

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


def set_rows(buffer: Num[Array, "B G S K"], rows: Int[Array, "R"],
             new: Num[Array, "R G S K"]) -> Num[Array, "B G S K"]:
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

  return _by_shard(write, buffer, (rows, encode(new, buffer)),
                   ((None,), (None, *AXES[1:])))


def _by_shard(write, buffer, args, axes):
  """`write(buffer, *args)`, each shard for the rows and heads it holds.

  Left to itself, XLA gathers a buffer that is split over rows, to update a
  slice of it whose row it does not know.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return write(buffer, *args)
  whole = sharding.spec(AXES, buffer.shape, mesh)
  specs = (sharding.spec(names, x.shape, mesh) for names, x in zip(axes, args))
  return jax.shard_map(write, in_specs=(whole, *specs), out_specs=whole,
                       check_vma=False)(buffer, *args)


def _row_axis(buffer):
  """The mesh axis rows are split over, if any."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else sharding.spec(AXES, buffer.shape, mesh)[0]


def wipe_rows(buffers: tuple[Num[Array, "B G _ K"], ...],
              rows: Bool[Array, "B"], length: Int[Array, "B"]
              ) -> tuple[Num[Array, "B G _ K"], ...]:
  """Zeroes the values of rows that are being released.

  A slot without a position has probability zero, which hides any value but a
  NaN or an infinity. Rows that hold nothing cost nothing.
  """
  rows = rows & (length > 0)
  def wipe(buffers):
    return tuple(jnp.where(rows[:, None, None, None], 0, b) for b in buffers)
  return lax.cond(jnp.any(rows), wipe, lambda buffers: buffers, buffers)
