# SPDX-License-Identifier: Apache-2.0
"""`commit_kv` for GPUs (Hopper): a block of threads moves a node of layers.

A GPU writes single slots, so that nothing is read but the nodes and nothing
written but their slots: each node's keys and values of some buffers come to
shared memory in one piece each, and leave it for a slot. Integers and scales
are made by XLA, of the few nodes in flight.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.target import Target
from pallas_kernels.writeback.rounding import rounded

_PIECE = 256                     # of an axis, the most that is copied at once
_ALIGNED = 16                    # bytes
_TOGETHER = 64 << 10             # bytes of shared memory


def commit_kv(buffers, fresh, path, slots, *, scales, paged, target: Target):
  """See `pallas_kernels.writeback.op.commit_kv`."""
  check(buffers, fresh)
  if not path.size:
    return buffers, scales
  first, heads, room, size = buffers[0].shape
  most = first * room if paged else room
  dtype = buffers[0].dtype
  values, sizes = fresh, ()
  if scales is None:
    values = [x.astype(dtype) for x in fresh]
  else:
    values, sizes = zip(*map(rounded, fresh))
    sizes = [x.reshape(-1) for x in sizes]
  rows, kept = path.shape
  nodes = fresh[0].shape[1]
  together = max(1, min(len(buffers), _TOGETHER
                        // (heads * size * dtype.itemsize)))
  parts = -(-len(buffers) // together)
  held = [jax.new_ref(x, memory_space=plgpu.GMEM)
          for x in (*buffers, *(scales or ()))]

  def body(*refs):
    pl.run_scoped(
        functools.partial(
            _kernel, *refs, count=len(buffers), together=together, kept=kept,
            nodes=nodes, most=most, room=room, heads=heads, paged=paged,
            quantized=scales is not None),
        plgpu.SMEM((together, heads, size), dtype),
        *[plgpu.Barrier(num_arrivals=min(together,
                                         len(buffers) - part * together))
          for part in range(parts)])

  # (`plgpu.kernel` takes no references, which are how memory is taken over.)
  pl.kernel(
      body, out_type=(), mesh=plgpu.Mesh(
          grid=(parts, rows, kept), grid_names=("part", "row", "nth")),
      compiler_params=plgpu.CompilerParams(
          lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      interpret=target.interpret, name="commit_kv")(
          path.reshape(-1).astype(jnp.int32),
          slots.reshape(-1).astype(jnp.int32), *values, *sizes, *held)
  out = tuple(jax.freeze(x) for x in held)
  return out[:len(buffers)], out[len(buffers):] if scales is not None else None


def check(buffers, fresh) -> None:
  """Raises NotImplementedError for what the kernel does not take."""
  heads, size = buffers[0].shape[1], buffers[0].shape[3]
  dtype = buffers[0].dtype
  if dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
    raise NotImplementedError(
        f"buffers must be float32, bfloat16 or int8, got {dtype}; use 'xla'")
  if fresh[0].dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
        f"fresh must be float32 or bfloat16, got {fresh[0].dtype}; cast it, "
        "or use 'xla'")
  if size * dtype.itemsize % _ALIGNED or max(size, heads) > _PIECE:
    raise NotImplementedError(
        f"{heads} heads of {size} {dtype}: they are copied by the {_ALIGNED} "
        f"bytes, and at most {_PIECE} at once; use 'xla'")


def _kernel(path_ref, slots_ref, *refs, count, together, kept, nodes, most,
            room, heads, paged, quantized):
  refs = list(refs)

  def take(number):
    taken = refs[:number]
    del refs[:number]
    return taken

  values, sizes = take(count), take(count * quantized)
  buffers, scales = take(count), take(count * quantized)
  (here, *arrived) = refs
  row, nth = lax.axis_index("row"), lax.axis_index("nth")
  at = row * kept + nth
  slot, node = slots_ref[at], path_ref[at]
  place = (lax.div(slot, room), lax.rem(slot, room)) if paged else (row, slot)

  def move(some, barrier):
    for n, buffer in enumerate(some):
      plgpu.copy_gmem_to_smem(values[buffer].at[row, node], here.at[n],
                              barrier)
    for buffer in some if quantized else ():
      for head in range(heads):
        scales[buffer][place[0], head, place[1]] = sizes[buffer][
            (row * nodes + node) * heads + head]
    plgpu.barrier_wait(barrier)
    for n, buffer in enumerate(some):
      plgpu.copy_smem_to_gmem(here.at[n],
                              buffers[buffer].at[place[0], :, place[1]])
    plgpu.wait_smem_to_gmem(0)

  for part, barrier in enumerate(arrived):
    some = range(part * together, min((part + 1) * together, count))
    pl.when((lax.axis_index("part") == part) & (slot < most))(
        functools.partial(move, some, barrier))
