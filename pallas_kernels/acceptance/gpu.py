# SPDX-License-Identifier: Apache-2.0
"""`accept_nodes` for GPUs (Hopper): a node's vocabulary split over blocks.

Each block of threads walks some tiles of one node's logits, copied ahead, and
every thread keeps the best score and the sums of what it has seen. XLA joins
the blocks, a few numbers each. For the ratio test, whose sums need the law and
so the whole, it goes over logits and draft once more.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.acceptance.xla import COLDEST
from pallas_kernels.noise import gumbel
from pallas_kernels.target import Target

_TILE, _PIECE = 1024, 256        # tokens; those of one copy
_AHEAD = 4                       # tiles on their way
_BLOCKS = 4 * 132                # of threads
_EXACT = 2**24                   # columns are kept in float32
_LANES = 128                     # what a block says is one row of these
_SCORE, _COLUMN, _LOGIT, _TOP, _TOTAL, _WARM_TOP, _WARM_TOTAL = range(7)


def accept_nodes(logits, *, temperature, noise, first, draft, drafted,
                 target: Target):
  """See `pallas_kernels.acceptance.op.accept_nodes`."""
  check(logits, draft)
  rows, nodes, vocab = logits.shape
  count = rows * nodes
  if not count:
    return (jnp.zeros((rows, nodes), jnp.int32),
            *[jnp.zeros((rows, nodes))] * (3 if draft is None else 5))
  tiles = pl.cdiv(vocab, _TILE)
  splits = max(1, min(tiles, _BLOCKS // count))
  first = jnp.int32(0) if first is None else first.astype(jnp.int32)
  heat = jnp.broadcast_to(temperature.astype(jnp.float32)[:, None],
                          (rows, nodes)).reshape(count)
  words = lax.bitcast_convert_type(noise, jnp.int32).reshape(-1)
  out = plgpu.kernel(
      functools.partial(_kernel, vocab=vocab, tiles=tiles, splits=splits,
                        judged=draft is not None),
      grid=(count, splits), grid_names=("node", "split"),
      scratch_types=[
          plgpu.SMEM((_AHEAD, _TILE), logits.dtype),
          plgpu.SMEM((_LANES,), jnp.float32),
          plgpu.Barrier(num_arrivals=_TILE // _PIECE, num_barriers=_AHEAD)],
      out_type=jax.ShapeDtypeStruct((count, splits, _LANES), jnp.float32),
      compiler_params=plgpu.CompilerParams(
          lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      interpret=target.interpret)(
          first.reshape(1), words, heat, logits.reshape(count, vocab))
  out = out.reshape(rows, nodes, splits, _LANES)
  score = jnp.max(out[..., _SCORE], axis=-1)
  best = out[..., _SCORE] == score[..., None]
  column = jnp.min(jnp.where(best, out[..., _COLUMN], float(_EXACT)), axis=-1)
  mine = best & (out[..., _COLUMN] == column[..., None])
  token = column.astype(jnp.int32)
  logit = jnp.max(jnp.where(mine, out[..., _LOGIT], -jnp.inf), axis=-1)
  parts = (token, score, logit, _joined(out[..., _TOP], out[..., _TOTAL]))
  if draft is None:
    return parts
  warm = temperature[:, None, None] > 0
  warped = logits.astype(jnp.float32) / jnp.maximum(
      temperature[:, None, None], COLDEST)
  total = _joined(out[..., _WARM_TOP], out[..., _WARM_TOTAL])[..., None]
  index = lax.broadcasted_iota(jnp.int32, logits.shape, 2)
  law = jnp.where(warm, jnp.exp(warped - total),
                  (index == token[..., None]).astype(jnp.float32))
  chance = jnp.sum(jnp.where(index == drafted[..., None], law, 0), axis=-1)
  excess = jnp.sum(jnp.maximum(law - draft.astype(jnp.float32), 0), axis=-1)
  return (*parts, chance, excess)


def check(logits, draft) -> None:
  """Raises NotImplementedError for what the kernel does not take."""
  for name, x in (("logits", logits), ("draft", draft)):
    if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
      raise NotImplementedError(
          f"{name} must be float32 or bfloat16, got {x.dtype}; cast it, or "
          "use 'xla'")
  vocab, least = logits.shape[-1], 16 // logits.dtype.itemsize
  if not _TILE <= vocab < _EXACT or vocab % least:
    raise NotImplementedError(
        f"the vocabulary must be a multiple of {least} from {_TILE} to "
        f"{_EXACT}, got {vocab}; use 'xla'")


def _joined(top, total):
  """The log-sum-exp of parts along the last axis."""
  most = jnp.max(top, axis=-1, keepdims=True)
  base = jnp.where(most > -jnp.inf, most, 0.0)
  some = jnp.sum(total * jnp.exp(top - base), axis=-1)
  return base[..., 0] + jnp.log(some)


def _kernel(first_ref, words_ref, heat_ref, logits_ref, out_ref, tile_ref,
            said_ref, arrived, *, vocab, tiles, splits, judged):
  node, split = lax.axis_index("node"), lax.axis_index("split")
  steps = lax.div(tiles - split + splits - 1, splits)
  lane = lax.broadcasted_iota(jnp.int32, (_TILE,), 0)

  def start(n):
    # The last tile reaches back into the one before it, not out of bounds.
    return jnp.minimum((split + n * splits) * _TILE, vocab - _TILE)

  def fetch(n, place):
    for piece in range(0, _TILE, _PIECE):
      plgpu.copy_gmem_to_smem(
          logits_ref.at[node, pl.ds(start(n) + piece, _PIECE)],
          tile_ref.at[place, pl.ds(piece, _PIECE)], arrived.at[place])

  for n in range(_AHEAD):
    pl.when(n < steps)(functools.partial(fetch, n, n))

  def full(value):
    return jnp.full((_TILE,), value, jnp.float32)

  warmth = heat_ref[node]
  heat = full(jnp.maximum(warmth, COLDEST))
  warm = full(warmth) > 0
  keys = [jnp.full((_TILE,), words_ref[2 * node + n], jnp.int32)
          for n in range(2)]
  base = first_ref[0]

  def add(x, top, total):
    """Takes some more logits into a log-sum-exp."""
    new = jnp.maximum(top, x)
    safe = jnp.where(new > -jnp.inf, new, 0.0)
    return new, total * jnp.exp(top - safe) + jnp.exp(x - safe)

  def step(n, state):
    place = lax.rem(n, _AHEAD)
    plgpu.barrier_wait(arrived.at[place])
    logits = tile_ref[place].astype(jnp.float32)
    plgpu.commit_smem()                  # all have read it
    pl.when(n + _AHEAD < steps)(lambda: fetch(n + _AHEAD, place))
    column = start(n) + lane
    logits = jnp.where(column >= (split + n * splits) * _TILE, logits,
                       -jnp.inf)
    warped = logits / heat
    scores = jnp.where(warm, warped + gumbel(*keys, base + column), logits)
    best, where, own, *sums = state
    better = scores > best               # of equal ones the first stays
    state = (jnp.where(better, scores, best),
             jnp.where(better, column.astype(jnp.float32), where),
             jnp.where(better, logits, own), *add(logits, *sums[:2]))
    return (*state, *add(warped, *sums[2:])) if judged else state

  lowest = full(-jnp.inf)
  state = (lowest, (start(0) + lane).astype(jnp.float32), lowest,
           *(lowest, full(0.0)) * (2 if judged else 1))
  best, where, own, *sums = lax.fori_loop(0, steps, step, state)

  score = jnp.max(best)
  column = jnp.min(jnp.where(best == full(score), where, float(_EXACT)))
  mine = (best == full(score)) & (where == full(column))
  said = [score, column, jnp.max(jnp.where(mine, own, -jnp.inf))]
  for top, total in zip(sums[::2], sums[1::2]):
    most = jnp.max(top)
    safe = jnp.where(most > -jnp.inf, most, 0.0)
    said += [most, jnp.sum(total * jnp.exp(top - full(safe)))]
  here = lax.broadcasted_iota(jnp.int32, (_LANES,), 0)
  row = jnp.zeros((_LANES,), jnp.float32)
  for n, value in enumerate(said):
    row = jnp.where(here == n, jnp.full((_LANES,), value, jnp.float32), row)
  said_ref[...] = row
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(said_ref, out_ref.at[node, split])
  plgpu.wait_smem_to_gmem(0)
