# SPDX-License-Identifier: Apache-2.0
"""`commit_kv` for TPUs: transfers of the windows that are written, no more.

A slot is not a unit of memory. Rows of bfloat16 lie two to a word, and those
of int8 four, so that the least that can be written is a window of as many
slots. Where a window is not written whole it is read, merged and written back.
All buffers do so at once, and the next window is on its way while this one is
merged. No two windows in flight overlap, so their order does not matter.
Scales lie along lanes, 128 of a head together: they are read before the first
of a run of windows that shares them, and written after the last.

Heads that are no multiple of 128 wide are kept by XLA with slots along lanes,
because anything else would pad them. Such buffers are looked at the same way,
which costs no copy; a window is 128 slots there.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.target import Target
from pallas_kernels.writeback.rounding import rounded

_LANES = 128
_NODES = 1 << 14                 # of all rows: their plan is in scalar memory
_BUFFERS = 256


def commit_kv(buffers, fresh, path, slots, *, scales, paged, target: Target):
  """See `pallas_kernels.writeback.op.commit_kv`."""
  flipped = check(buffers, fresh, path, scales)
  count, room = len(buffers), buffers[0].shape[2]
  window = _blocks(target, path.shape[1], buffers[0].shape, buffers[0].dtype)
  if not path.size:
    return buffers, scales
  arguments = [*plan(slots, buffers[0].shape, window, paged=paged),
               path.reshape(-1).astype(jnp.int32)]
  firsts = len(arguments) + count
  wide = [jnp.swapaxes(x, 2, 3) for x in buffers] if flipped else list(buffers)
  # (One of each: what an argument of the program is, and is taken over, cannot
  # be said to be in HBM.)
  held = [x[None] for x in (*wide, *(scales or ()))]
  if not target.interpret:
    # Said, because the compiler would bring what fits into VMEM, all of it, for
    # the few slots that are written, and back.
    held = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in held]
  heads, size = fresh[0].shape[2:]
  block = (heads, size, window) if flipped else (heads, window, size)
  # Of a row, a window has no more nodes than are written at all.
  together = min(window, path.shape[1])
  scratch = [
      pltpu.VMEM((2, count, *block), buffers[0].dtype),
      pltpu.VMEM((2, together, count, heads, size), fresh[0].dtype),
      pltpu.SMEM((path.size,), jnp.int32),
      pltpu.SemaphoreType.DMA((2, 2))]
  if scales is not None:
    scratch += [pltpu.VMEM((2, count, heads, _LANES), jnp.float32),
                pltpu.SMEM((path.size,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 2))]
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  out = pl.pallas_call(
      functools.partial(
          _kernel, count=count, window=window, room=room, flipped=flipped,
          quantized=scales is not None, nodes=path.shape[1]),
      # As if each row wrote all it may, from a first slot on.
      cost_estimate=pl.CostEstimate(
          flops=0, transcendentals=0, bytes_accessed=moved_bytes(
              [range(path.shape[1])] * path.shape[0], buffers[0].shape, count,
              buffers[0].dtype.itemsize, fresh[0].dtype.itemsize,
              path.shape[1], target=target, paged=paged)),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in held],
      in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(arguments)
      + [anywhere] * (count + len(held)),
      out_specs=[anywhere] * len(held),
      scratch_shapes=scratch,
      input_output_aliases={firsts + i: i for i in range(len(held))},
      compiler_params=pltpu.CompilerParams(
          has_side_effects=True,
          vmem_limit_bytes=_memory(count, window, together, heads, size)),
      interpret=target.interpret, name="commit_kv")(
          *arguments, *fresh, *held)
  out = [x[0] for x in out]
  out, scales = out[:count], None if scales is None else tuple(out[count:])
  if flipped:
    out = [jnp.swapaxes(x, 2, 3) for x in out]
  return tuple(out), scales


def check(buffers, fresh, path, scales) -> bool:
  """Whether slots lie along lanes.

  Raises:
    NotImplementedError: for what the kernel does not take.
  """
  dtype, room, size = buffers[0].dtype, *buffers[0].shape[2:]
  flipped = size % _LANES != 0
  if dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
    raise NotImplementedError(
        f"buffers must be float32, bfloat16 or int8, got {dtype}; use 'xla'")
  if fresh[0].dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
        f"fresh must be float32 or bfloat16, got {fresh[0].dtype}; cast it, "
        "or use 'xla'")
  least = _LANES if flipped or scales is not None else 4 // dtype.itemsize
  if room % least:
    why = (f"heads of {size} lie with slots along lanes" if flipped else
           "scales lie along lanes" if scales is not None else
           f"{least} rows of {dtype} share a word")
    raise NotImplementedError(
        f"{room} slots (of a row, or of a page): {why}, so make it a multiple "
        f"of {least}, or use 'xla'")
  if path.size > _NODES:
    raise NotImplementedError(
        f"{path.size} nodes of all rows: the plan of a call holds {_NODES}; "
        "split the rows, or use 'xla'")
  if len(buffers) > _BUFFERS:
    raise NotImplementedError(
        f"{len(buffers)} buffers: a call takes {_BUFFERS}; call it for some "
        "layers at a time, or use 'xla'")
  return flipped


def plan(slots, shape, window: int, *, paged: bool):
  """What windows are written, by what.

  Returns:
    For each write its slot among those of all rows or pages, -1 for none. For
    the first of those that share a window, twice the number of the last
    that does, and one more if they are all of it; -1 for the others. Writes
    are numbered through all rows.
  """
  rows, nodes = slots.shape
  slots = slots.astype(jnp.int32)
  if paged:
    at = jnp.where(slots < shape[0] * shape[2], slots, -1)
  else:
    base = jnp.arange(rows, dtype=jnp.int32)[:, None] * shape[2]
    at = jnp.where(slots < shape[2], base + slots, -1)
  mine = jnp.where(at >= 0, at // window, -1)
  nth = jnp.arange(nodes, dtype=jnp.int32)
  same = mine[:, :, None] == mine[:, None]                       # [B P P]
  first = jnp.min(jnp.where(same, nth[None, None], nodes), axis=2)
  last = jnp.max(jnp.where(same, nth[None, None], -1), axis=2)
  whole = jnp.sum(same, axis=2) == window
  last += jnp.arange(rows, dtype=jnp.int32)[:, None] * nodes
  leads = (at >= 0) & (first == nth[None])
  job = jnp.where(leads, 2 * last + whole, -1)
  return at.reshape(-1), job.reshape(-1)


def moved_bytes(slots, shape, count: int, itemsize: int, fresh_itemsize: int,
                nodes: int, *, target: Target, paged: bool = False) -> int:
  """What is moved for given `slots`, a sequence a row."""
  rooms, heads, room, size = shape
  dtype = {1: jnp.int8, 2: jnp.bfloat16, 4: jnp.float32}[itemsize]
  window = _blocks(target, nodes, shape, jnp.dtype(dtype))
  moved = 0
  for b, row in enumerate(slots):
    row = [s if paged else b * room + s for s in row
           if s < (rooms * room if paged else room)]
    groups: dict[int, int] = {}
    for s in row:
      groups[s // window] = groups.get(s // window, 0) + 1
    moved += len(row) * size * fresh_itemsize
    for held in groups.values():
      ways = 1 if held == window else 2
      moved += ways * window * size * itemsize
    if itemsize == 1:
      runs = [at * window // _LANES for at in groups]
      moved += 2 * _LANES * 4 * sum(
          at == 0 or run != runs[at - 1] for at, run in enumerate(runs))
  return moved * heads * count + 3 * 4 * sum(map(len, slots))


def _blocks(target: Target, nodes: int, shape, dtype) -> int:
  """How many slots a window has."""
  del target                       # the least that can be written is the same
  room, size = shape[2:]
  if size % _LANES:
    return _LANES
  # A few nodes: as little as can be. A prompt: whole tiles, which are written
  # whole and need not be read.
  least = 4 // dtype.itemsize
  window = least if nodes <= 16 else 8 * least
  while room % window:
    window //= 2
  return window


def _memory(count: int, window: int, together: int, heads: int, size: int
            ) -> int:
  """VMEM for two of all windows, as if all were float32 and padded."""
  lanes = pl.cdiv(size, _LANES) * _LANES
  held = heads * pl.cdiv(window, 8) + together * pl.cdiv(heads, 8)
  return max(2 * count * held * 8 * lanes * 4, 16 << 20)


def _kernel(at_ref, job_ref, path_ref, *refs, count, window, room, flipped,
            quantized, nodes):
  fresh, refs = refs[:count], refs[count:]
  # (Not `//` and `%`, which look at signs, and at a device for it.)
  # The results are the buffers themselves: there is one of each.
  held = count * (2 if quantized else 1)
  out, refs = [ref.at[0] for ref in refs[held:2 * held]], refs[2 * held:]
  buffers, scales = out[:count], out[count:]
  old_ref, new_ref, jobs_ref, sems, *refs = refs
  scale_ref, runs_ref, scale_sems = refs if quantized else (None,) * 3

  def listed(i, carry):
    found, runs, last = carry
    leads = job_ref[i] >= 0
    here = lax.div(at_ref[i], _LANES)
    runs += (leads & (here != last)).astype(jnp.int32)
    @pl.when(leads)
    def _():
      jobs_ref[found] = i
      if quantized:
        runs_ref[found] = runs - 1
    return (found + leads.astype(jnp.int32), runs,
            jnp.where(leads, here, last))

  total, runs, _ = lax.fori_loop(
      0, job_ref.shape[0], listed,
      (jnp.int32(0), jnp.int32(0), jnp.int32(-1)))

  def place(j, lanes=None):
    """Where window j is in each buffer, or in each scale."""
    slot = at_ref[jobs_ref[j]]
    size = lanes or window
    first = lax.div(slot, room)
    start = lax.div(lax.rem(slot, room), size) * size
    where = pl.ds(pl.multiple_of(start, size), size)
    if lanes:
      return first, slice(None), where
    if flipped:
      return first, slice(None), slice(None), where
    return first, slice(None), where, slice(None)

  def writes(j, act):
    """Acts on each write that goes to a window."""
    first = jobs_ref[j]
    slot = lax.div(at_ref[first], window)

    def each(i, none):
      @pl.when((at_ref[i] >= 0) & (lax.div(at_ref[i], window) == slot))
      def _():
        act(i)
      return none

    lax.fori_loop(first, lax.div(job_ref[first], 2) + 1, each, 0)

  def whole(j):
    return lax.rem(job_ref[jobs_ref[j]], 2) == 1

  def nth(i):
    """Where in `new_ref` a write waits."""
    together = new_ref.shape[1]
    return (lax.rem(at_ref[i], window) if together == window
            else lax.rem(i, nodes))

  def begins(j):
    """Whether window j is the first with its scales."""
    return (j == 0) | (runs_ref[j] != runs_ref[jnp.maximum(j - 1, 0)])

  def ends(j):
    return (j == total - 1) | (
        runs_ref[j] != runs_ref[jnp.minimum(j + 1, total - 1)])

  def wait_scales(turn, way):
    ref = scale_ref.at[turn]
    pltpu.make_async_copy(ref, ref, scale_sems.at[turn, way]).wait()

  def fetch(j):
    """Begins to read what a window needs."""
    turn = lax.rem(j, 2)
    sem = sems.at[turn, 0]

    @pl.when(jnp.logical_not(whole(j)))
    def _():
      here = place(j)
      for n, buffer in enumerate(buffers):
        pltpu.make_async_copy(buffer.at[here], old_ref.at[turn, n],
                              sem).start()

    if quantized:
      @pl.when(begins(j))
      def _():
        run = runs_ref[j]
        at = lax.rem(run, 2)

        @pl.when(run >= 2)               # what was here has to have left
        def _():
          wait_scales(at, 1)

        here = place(j, _LANES)
        for n, scale in enumerate(scales):
          pltpu.make_async_copy(scale.at[here], scale_ref.at[at, n],
                                scale_sems.at[at, 0]).start()

    def nodes_of(i):
      row, node = lax.div(i, nodes), path_ref[i]
      for n, values in enumerate(fresh):
        pltpu.make_async_copy(values.at[row, node],
                              new_ref.at[turn, nth(i), n], sem).start()

    writes(j, nodes_of)

  def arrived(j):
    """Waits for it. A semaphore counts bytes: once for all buffers."""
    turn = lax.rem(j, 2)

    def wait(ref):
      pltpu.make_async_copy(ref, ref, sems.at[turn, 0]).wait()

    @pl.when(jnp.logical_not(whole(j)))
    def _():
      wait(old_ref.at[turn])

    if quantized:
      @pl.when(begins(j))
      def _():
        wait_scales(lax.rem(runs_ref[j], 2), 0)

    writes(j, lambda i: wait(new_ref.at[turn, nth(i)]))

  def leave(j):
    """Begins to write a window back."""
    turn = lax.rem(j, 2)
    sem = sems.at[turn, 1]
    here = place(j)
    for n, buffer in enumerate(buffers):
      pltpu.make_async_copy(old_ref.at[turn, n], buffer.at[here], sem).start()
    if quantized:
      @pl.when(ends(j))
      def _():
        at = lax.rem(runs_ref[j], 2)
        here = place(j, _LANES)
        for n, scale in enumerate(scales):
          pltpu.make_async_copy(scale_ref.at[at, n], scale.at[here],
                                scale_sems.at[at, 1]).start()

  def left(j):
    """Waits until it is written."""
    ref = old_ref.at[lax.rem(j, 2)]
    pltpu.make_async_copy(ref, ref, sems.at[lax.rem(j, 2), 1]).wait()

  def merge(j):
    turn = lax.rem(j, 2)

    def one(n, none):
      def put(i):
        slot = lax.rem(at_ref[i], window)
        new = new_ref[turn, nth(i), n].astype(jnp.float32)       # [G K]
        if quantized:
          new, scale = rounded(new)
          new = new.astype(jnp.float32)
          at = lax.rem(runs_ref[j], 2)
          old = scale_ref[at, n]
          lane = lax.rem(at_ref[i], _LANES)
          scale_ref[at, n] = jnp.where(
              _iota(old.shape, 1) == lane, scale[:, None], old)
        old = _wide(old_ref[turn, n])
        here = _iota(old.shape, 2 if flipped else 1) == slot
        new = new[:, :, None] if flipped else new[:, None]
        old_ref[turn, n] = _narrow(jnp.where(here, new, old), old_ref.dtype)

      writes(j, put)
      return none

    lax.fori_loop(0, count, one, 0)

  # Two windows are under way. Where one was merged the next but one is read,
  # so it must have left.
  def step(j, none):
    @pl.when(j > 0)
    def _():
      left(j - 1)

    @pl.when(j + 1 < total)
    def _():
      fetch(j + 1)

    @pl.when(j >= 0)
    def _():
      arrived(j)
      merge(j)
      leave(j)
    return none

  lax.fori_loop(-1, total, step, 0)

  @pl.when(total > 0)
  def _():
    left(total - 1)

  if quantized:
    for last in (1, 2):
      @pl.when(runs >= last)
      def _(last=last):
        wait_scales(lax.rem(runs - last, 2), 1)


def _wide(x):
  """As float32, which holds all that buffers do."""
  return (x.astype(jnp.int32) if x.dtype == jnp.int8 else x).astype(
      jnp.float32)


def _narrow(x, dtype):
  return (x.astype(jnp.int32) if dtype == jnp.int8 else x).astype(dtype)


def _iota(shape, dimension):
  return lax.broadcasted_iota(jnp.int32, shape, dimension)
