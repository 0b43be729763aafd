# SPDX-License-Identifier: Apache-2.0
"""The meaning of `commit_kv`, buffer by buffer."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Num

from pallas_kernels.writeback.rounding import rounded

# What is done for each buffer is traced once for all that look alike.


def commit_kv(buffers, fresh, path, slots, *, scales, paged):
  """See `pallas_kernels.writeback.op.commit_kv`."""
  write = write_pages if paged else write_slots
  kept = [path_nodes(x, path) for x in fresh]
  if scales is None:
    return tuple(write(b, x, slots) for b, x in zip(buffers, kept)), None
  pairs = [rounded(x) for x in kept]
  return (tuple(write(b, x, slots) for b, (x, _) in zip(buffers, pairs)),
          tuple(write(s[..., None], x[..., None], slots)[..., 0]
                for s, (_, x) in zip(scales, pairs)))


def path_nodes(values: Num[Array, "B N G K"],
               path: Int[Array, "B P"]) -> Num[Array, "B P G K"]:
  """The nodes of each row's path, in order."""
  return jnp.take_along_axis(values, path[:, :, None, None], axis=1)


@jax.jit
def write_slots(buffer: Num[Array, "B G S K"],
                values: Num[Array, "B P G K"], slots: Int[Array, "B P"]
                ) -> Num[Array, "B G S K"]:
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

  return lax.platform_dependent(buffer, values, slots, cpu=scatter,
                                default=slices)


@jax.jit
def write_pages(pool: Num[Array, "X G page K"],
                values: Num[Array, "B P G K"], slots: Int[Array, "B P"]
                ) -> Num[Array, "X G page K"]:
  """`pool[slot // page, :, slot % page] = values[b, p]`, in place."""
  page = pool.shape[2]
  return pool.at[slots // page, :, slots % page].set(
      values.astype(pool.dtype), mode="drop")
