# SPDX-License-Identifier: Apache-2.0
"""Shapes at which `commit_kv` is compiled, counted and timed.

Buffers are the keys and values of all layers. What is written begins wherever
a text happens to end, so that windows are written in part.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.target import Target
from pallas_kernels.writeback import tpu
from pallas_kernels.writeback.op import commit_kv

# buffers, rows, heads, slots, head size, nodes, longest path, kept, pages
_SHAPES = {
    "smollm2-135m, 3 of 8 nodes": (60, 8, 3, 2048, 64, 8, 5, 3, 0),
    "llama3-8b, 3 of 8 nodes": (64, 8, 8, 4096, 128, 8, 8, 3, 0),
    "llama3-8b, 3 of 8 nodes, int8": (64, 8, 8, 4096, 128, 8, 8, 3, 0),
    "llama3-8b, 3 of 8 nodes, pages": (64, 8, 8, 64, 128, 8, 8, 3, 513),
    "llama3-8b, prompt of 512": (64, 1, 8, 4096, 128, 512, 512, 512, 0),
    "llama3-70b of 8, 3 of 8 nodes": (160, 8, 1, 8192, 128, 8, 5, 3, 0),
}


def cases() -> Iterator[Case]:
  """Those of the models people run."""
  for name, shape in _SHAPES.items():
    yield _case(name, *shape)


def _case(name, count, rows, heads, room, size, nodes, longest, kept, pages):
  quantized = name.endswith("int8")
  dtype = jnp.int8 if quantized else jnp.bfloat16
  whole = (pages or rows, heads, room, size)
  buffers = (jax.ShapeDtypeStruct(whole, dtype),) * count
  fresh = (jax.ShapeDtypeStruct((rows, nodes, heads, size), jnp.bfloat16),
           ) * count
  index = jax.ShapeDtypeStruct((rows, longest), jnp.int32)
  scales = None
  if quantized:
    scales = (jax.ShapeDtypeStruct(whole[:3], jnp.float32),) * count

  def call(buffers, fresh, path, slots, scales, implementation=None):
    return commit_kv(buffers, fresh, path, slots, scales=scales,
                     paged=bool(pages), implementation=implementation)

  most = whole[0] * room if pages else room

  def slots(seed):
    """Consecutive ones; in a pool, each row in pages of its own."""
    rng = np.random.default_rng(seed)
    each = whole[0] // rows * room if pages else room
    start = rng.integers(0, each - kept + 1, rows)
    if kept == longest:
      start = start * 0                # a prompt begins at the beginning
    start = start + (np.arange(rows) * each if pages else 0)
    nth = np.arange(longest)
    return np.where(nth < kept, start[:, None] + nth, most).astype(np.int32)

  def sample(seed):
    rng = np.random.default_rng([seed, 1])

    def normal(shape, dtype):
      x = rng.standard_normal(shape, np.float32)
      return jnp.asarray(x * 30 if dtype == jnp.int8 else x).astype(dtype)

    path = np.sort(np.argsort(rng.random((rows, nodes)), axis=1)[:, :longest])
    return (tuple(normal(whole, dtype) for _ in range(count)),
            tuple(normal(x.shape, x.dtype) for x in fresh),
            jnp.asarray(path, jnp.int32), jnp.asarray(slots(seed)),
            None if scales is None else tuple(
                jnp.ones(x.shape, x.dtype) for x in scales))

  tokens = rows * kept * heads * count
  itemsize = jnp.dtype(dtype).itemsize
  return Case(
      op="commit_kv", name=name, call=call,
      arguments=(buffers, fresh, index, index, scales),
      least_bytes=(tokens * (size * (2 + itemsize) + 4 * quantized)
                   + 8 * rows * longest),
      operations=2 * tokens * size if quantized else 0,
      moved_bytes=tpu.moved_bytes(
          slots(0).tolist(), whole, count, itemsize, 2, longest,
          target=Target("tpu"), paged=bool(pages)),
      donated=(0, 4) if quantized else (0,), sample=sample,
      least_units=_least_units(slots(0), most=most, size=size,
                               itemsize=itemsize, each=heads * count)
      + 8 * rows * longest)


def _least_units(slots, *, most, size, itemsize, each) -> int:
  """Bytes, where a unit of memory that is written in part is read too.

  Heads of 128 lie with slots along sublanes, where those that share a word of
  32 bits are written together; smaller heads lie with slots along lanes, 128
  of them, and so do scales.
  """
  unit = 4 // itemsize if size % 128 == 0 else 128
  moved = 0
  for row in slots:
    row = row[row < most]
    _, held = np.unique(row // unit, return_counts=True)
    moved += len(row) * size * 2                       # from fresh nodes
    moved += sum(unit * size * itemsize * (1 if n == unit else 2)
                 for n in held)
    if itemsize == 1:
      moved += 2 * 128 * 4 * len(np.unique(row // 128))
  return int(moved * each)
