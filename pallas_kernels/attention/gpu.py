# SPDX-License-Identifier: Apache-2.0
"""`tree_attention` for GPUs (Hopper): the prefix split over thread blocks.

Each thread block attends, for 64 rows of one key/value head, to a share of the
blocks that a row of the batch holds, by an online softmax, while those to come
are copied ahead. XLA attends to the fresh nodes and joins the shares.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.words import unpack
from pallas_kernels.blocks import choose
from pallas_kernels.target import Target, shared_memory

_BLOCK, _HEIGHT = 64, 64         # slots; rows, which are tokens by their heads
_PROCESSORS = 132
# Of a head, what is summed at once: more would not fit into registers.
_PART = 128
# Bytes of shared memory that Pallas takes besides: to sum over threads, for
# barriers, and between what is aligned.
_BESIDES = 4 << 10
# Finite, so that a row which has seen nothing yet has no NaN.
_LEAST = -0.7 * float(jnp.finfo(jnp.float32).max)


def tree_attention(query, key, value, fresh_key, fresh_value, *,
                   slot_positions, positions, fresh_positions, seen, scale,
                   table, window, logits_soft_cap, target: Target,
                   key_scale=None, value_scale=None):
  """See `pallas_kernels.attention.op.tree_attention`."""
  size, slots = query.shape[3], slot_positions.shape[1]
  for name, x in (("key", key), ("value", value), ("fresh_key", fresh_key),
                  ("fresh_value", fresh_value)):
    if x.dtype != jnp.bfloat16:
      raise NotImplementedError(f"{name} is {x.dtype}: tensor cores are fed "
                                "bfloat16 here; use 'xla'")
  if key_scale is not None:
    raise NotImplementedError("scales of keys and values; use 'xla'")
  if size not in (64, 128, 256):
    raise NotImplementedError(f"head size {size}: it must be 64, 128 or 256; "
                              "use 'xla'")
  if table is not None and key.shape[2] % _BLOCK:
    raise NotImplementedError(f"pages of {key.shape[2]} slots: they must be a "
                              f"multiple of {_BLOCK}; use 'xla'")
  if slots == 0 or slots % _BLOCK:
    raise NotImplementedError(f"{slots} slots: they must be a multiple of "
                              f"{_BLOCK}; use 'xla', or such a capacity")
  ahead, splits = _plan(query.shape, key.shape[1], slots, target)
  return _attend(query, key, value, fresh_key, fresh_value, slot_positions,
                 positions, fresh_positions, seen, table, scale=scale,
                 window=window, cap=logits_soft_cap, ahead=ahead,
                 splits=splits, interpret=target.interpret)


def _plan(query_shape, groups, slots, target):
  """Blocks on their way, and shares of a prefix."""
  rows, tokens, heads, size = query_shape
  blocks, tiles = slots // _BLOCK, -(-tokens * heads // groups // _HEIGHT)

  def guess():
    # Enough to keep all processors busy, each with some blocks in a row.
    splits = min(_PROCESSORS // (rows * groups * tiles), blocks // 4)
    return 2 if size == 256 else 4, max(1, splits)

  ahead, splits = choose("tree_attention", target,
                         (rows, tokens, heads, groups, size, slots), guess)
  splits = min(splits, blocks)
  needed = _BESIDES + 2 * _HEIGHT * (size + _BLOCK) + ahead * _BLOCK * (
      2 * 2 * size + 4) + 4 * _HEIGHT * (min(size, _PART) + 3)
  if needed > shared_memory(target):
    raise NotImplementedError(
        f"{ahead} blocks of heads of {size} on their way take {needed >> 10} "
        "KiB of shared memory; use 'xla', or tune again")
  return ahead, splits


@functools.partial(jax.jit, static_argnames=("scale", "window", "cap", "ahead",
                                             "splits", "interpret"))
def _attend(query, key, value, fresh_key, fresh_value, slot_positions,
            positions, fresh_positions, seen, table, *, scale, window, cap,
            ahead, splits, interpret):
  rows, tokens, heads, size = query.shape
  groups, slots = key.shape[1], slot_positions.shape[1]
  share = heads // groups
  q = query.astype(key.dtype).reshape(rows, tokens, groups, share, size)
  q = jnp.moveaxis(q, 2, 1).reshape(rows, groups, tokens * share, size)
  fresh = unpack(seen, fresh_key.shape[1])
  fresh = jnp.broadcast_to(fresh, (rows, *fresh.shape[-2:]))
  held = slot_positions >= 0
  wanted, oldest = held, None
  if window is not None:
    oldest = positions - window                                # [B T]
    fresh = fresh & (fresh_positions[:, None] > oldest[..., None])
    wanted = held & (slot_positions > jnp.min(oldest, axis=1, keepdims=True))
    oldest = jnp.repeat(oldest.astype(jnp.int32), share, axis=1)
  fresh = jnp.repeat(fresh, share, axis=1)[:, None]            # [B 1 T*R N]

  slot = lax.broadcasted_iota(jnp.int32, held.shape, 1)
  end = (jnp.max(jnp.where(wanted, slot + 1, 0), axis=1) + _BLOCK - 1) // _BLOCK
  begin = jnp.minimum(
      jnp.min(jnp.where(wanted, slot, slots), axis=1) // _BLOCK, end)
  whole = jnp.min(jnp.where(held, slots, slot), axis=1) // _BLOCK
  spans = jnp.concatenate([begin, end, whole]).astype(jnp.int32)

  height = -(-tokens * share // _HEIGHT) * _HEIGHT
  spare = height - tokens * share
  tiles = height // _HEIGHT
  inputs = [spans, jnp.pad(q, ((0, 0), (0, 0), (0, spare), (0, 0))), key,
            value, slot_positions.astype(jnp.int32)]
  if table is not None:
    inputs.append(table.astype(jnp.int32))
  if window is not None:
    inputs.append(jnp.pad(oldest, ((0, 0), (0, spare))))
  tiled = _tiling(size)
  scratch = [
      plgpu.SMEM((_HEIGHT, size), key.dtype, transforms=tiled),
      plgpu.SMEM((ahead, _BLOCK, size), key.dtype, transforms=tiled),
      plgpu.SMEM((ahead, _BLOCK, size), key.dtype, transforms=tiled),
      plgpu.SMEM((ahead, _BLOCK), jnp.int32),
      plgpu.SMEM((_HEIGHT, _BLOCK), key.dtype, transforms=_tiling(_BLOCK)),
      plgpu.SMEM((_HEIGHT,), jnp.int32),
      plgpu.SMEM((_HEIGHT, min(size, _PART)), jnp.float32),
      plgpu.SMEM((2, _HEIGHT), jnp.float32),
      plgpu.Barrier(num_arrivals=1 if window is None else 2),
      plgpu.Barrier(num_arrivals=2, num_barriers=ahead),
      plgpu.Barrier(num_barriers=ahead)]
  sums, stats = plgpu.kernel(
      functools.partial(_kernel, rows=rows, splits=splits, ahead=ahead,
                        scale=scale, cap=cap, paged=table is not None,
                        windowed=window is not None, size=size),
      grid=(rows, groups, tiles, splits),
      grid_names=("row", "group", "tile", "split"), scratch_types=scratch,
      out_type=[
          jax.ShapeDtypeStruct((splits, rows, groups, height, size),
                               jnp.float32),
          jax.ShapeDtypeStruct((splits, rows, groups, 2, height),
                               jnp.float32)],
      compiler_params=plgpu.CompilerParams(
          lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      interpret=interpret)(*inputs)
  sums = sums[..., :tokens * share, :]
  top, total = (stats[..., n, :tokens * share, None] for n in range(2))

  s = jnp.einsum("bgtk,bngk->bgtn", q, fresh_key,
                 preferred_element_type=jnp.float32) * scale
  if cap is not None:
    s = cap * jnp.tanh(s / cap)
  s = jnp.where(fresh, s, _LEAST)
  # A token always sees itself, so that this is a score.
  new = jnp.maximum(jnp.max(s, axis=-1, keepdims=True), jnp.max(top, axis=0))
  s, shrink = jnp.exp(s - new), jnp.exp(top - new[None])
  total = jnp.sum(s, axis=-1, keepdims=True) + jnp.sum(total * shrink, axis=0)
  out = jnp.einsum("bgtn,bngk->bgtk", s.astype(key.dtype), fresh_value,
                   preferred_element_type=jnp.float32)
  out = (out + jnp.sum(sums * shrink, axis=0)) / total
  out = out.reshape(rows, groups, tokens, share, size)
  return jnp.moveaxis(out, 1, 2).reshape(query.shape).astype(query.dtype)


def _kernel(*refs, rows, splits, ahead, scale, cap, paged, windowed, size):
  spans, queries, keys, values, helds = refs[:5]
  table = refs[5] if paged else None
  oldests = refs[5 + paged] if windowed else None
  (sums_out, stats_out, query, key, value, held, weights, oldest, sums_here,
   stats_here, begun, keys_there, values_there) = refs[5 + paged + windowed:]
  row, group = lax.axis_index("row"), lax.axis_index("group")
  tile, split = lax.axis_index("tile"), lax.axis_index("split")
  begin, end, whole = (spans[row + n * rows] for n in range(3))
  each = (end - begin + splits - 1) // splits
  first = begin + split * each
  count = jnp.clip(end - first, 0, each)
  height = pl.ds(tile * _HEIGHT, _HEIGHT)

  def fetch(n, place):
    """Asks for a block."""
    some = pl.ds((first + n) * _BLOCK, _BLOCK)
    at = row, group, some
    if paged:
      each_page = keys.shape[2] // _BLOCK
      at = (table[row, (first + n) // each_page], group,
            pl.ds((first + n) % each_page * _BLOCK, _BLOCK))
    plgpu.copy_gmem_to_smem(keys.at[at], key.at[place], keys_there.at[place])
    plgpu.copy_gmem_to_smem(helds.at[row, some], held.at[place],
                            keys_there.at[place])
    plgpu.copy_gmem_to_smem(values.at[at], value.at[place],
                            values_there.at[place])

  for n in range(ahead):
    pl.when(n < count)(functools.partial(fetch, n, n))
  plgpu.copy_gmem_to_smem(queries.at[row, group, height], query, begun)
  if windowed:
    plgpu.copy_gmem_to_smem(oldests.at[row, height], oldest, begun)
  plgpu.barrier_wait(begun)

  def product(shape, a, b):
    def scope(acc):
      plgpu.wgmma(acc, a, b)
      return acc[...]
    return pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))

  def spread(x, shape, axis):
    return lax.broadcast_in_dim(x, shape, (axis,))

  width = min(size, _PART)
  parts = [pl.ds(at, width) for at in range(0, size, width)]

  def step(n, state):
    top, total, sums = state
    place = lax.rem(n, ahead)
    plgpu.barrier_wait(keys_there.at[place])
    shape = (_HEIGHT, _BLOCK)
    s = product(shape, query, plgpu.transpose_ref(key.at[place], (1, 0)))
    s = s * scale
    if cap is not None:
      s = cap * jnp.tanh(s / cap)
    at = spread(held[place], shape, 1)
    visible = at >= 0
    if windowed:
      visible = visible & (at > spread(oldest[...], shape, 0))
    s = jnp.where(visible, s, _LEAST)
    new = jnp.maximum(top, jnp.max(s, axis=1))
    # Where nothing was seen yet, what is not seen would count for one.
    s = jnp.where(visible, jnp.exp(s - spread(new, shape, 0)), 0.0)
    shrink = jnp.exp(top - new)
    weights[...] = s.astype(weights.dtype)
    plgpu.barrier_wait(values_there.at[place])

    @pl.when(first + n >= whole)
    def _():
      # A zero probability does not hide a NaN that lay there before.
      there = spread(held[place], (_BLOCK, width), 0) >= 0
      for part in parts:
        at = place, slice(None), part
        value[at] = jnp.where(there, value[at].astype(jnp.float32),
                              0.0).astype(value.dtype)

    plgpu.commit_smem()
    shape = (_HEIGHT, width)
    sums = [old * spread(shrink, shape, 0)
            + product(shape, weights, value.at[place, :, part])
            for old, part in zip(sums, parts, strict=True)]
    pl.when(n + ahead < count)(lambda: fetch(n + ahead, place))
    return new, total * shrink + jnp.sum(s, axis=1), sums

  top, total, sums = lax.fori_loop(0, count, step, (
      jnp.full((_HEIGHT,), _LEAST, jnp.float32),
      jnp.zeros((_HEIGHT,), jnp.float32),
      [jnp.zeros((_HEIGHT, width), jnp.float32)] * len(parts)))
  stats_here[0] = top
  stats_here[1] = total
  for part, some in zip(parts, sums, strict=True):
    # One after another, by way of the same shared memory.
    plgpu.wait_smem_to_gmem(0)
    sums_here[...] = some
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
        sums_here, sums_out.at[split, row, group, height, part])
  for n in range(2):
    plgpu.copy_smem_to_gmem(stats_here.at[n],
                            stats_out.at[split, row, group, n, height])
  plgpu.wait_smem_to_gmem(0)


def _tiling(minor):
  swizzle = plgpu.find_swizzle(minor * 16)
  return (plgpu.TilingTransform((8, swizzle // 2)),
          plgpu.SwizzleTransform(swizzle))
