# SPDX-License-Identifier: Apache-2.0
"""`proposal_head` for GPUs (Hopper): each block of threads walks some tiles.

Two blocks share a processor, so that one computes what it knows of a tile
while the other's tiles are on their way. The vocabulary is the long side of
the tensor cores' product, and 64 rows its short one however many there are:
both of its factors must be swizzled alike. The norm is XLA's: every block
would have to repeat it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.head.law import Parts, join
from pallas_kernels.head.tpu import check
from pallas_kernels.head.xla import COLDEST, rms_norm
from pallas_kernels.noise import gumbel
from pallas_kernels.target import Target

_TILE, _CHUNK = 128, 64          # of the vocabulary, and of the width
_WIDE = 64                       # rows of x
_AHEAD = 5                       # chunks on their way
_BLOCKS = 2 * 132                # of threads
_EXACT = 2**24                   # columns are kept in float32
_STATS = 4
_COUNT = 8                       # candidates are kept in registers


def proposal_head(x, norm, unembedding, *, eps, count, logits_soft_cap, tokens,
                  allowed, noise, temperature, target: Target):
  """See `pallas_kernels.head.op.proposal_head`."""
  check(x, unembedding, count, _COUNT)
  rows, width = x.shape
  vocab = unembedding.shape[0]
  if x.dtype != jnp.bfloat16:
    raise NotImplementedError(
        "x must be bfloat16, because tensor cores round float32; use 'xla'")
  if width % _CHUNK:
    raise NotImplementedError(
        f"the width must be a multiple of {_CHUNK}, got {width}; use 'xla'")
  if not _TILE <= vocab < _EXACT or vocab % 8:
    raise NotImplementedError(
        f"the vocabulary must be a multiple of 8 from {_TILE} to {_EXACT}, got "
        f"{vocab}; use 'xla'")
  if allowed is not None:
    raise NotImplementedError(
        "bits of `allowed` are not spread over threads here; use 'xla'")
  tiles = pl.cdiv(vocab, _TILE)
  parts = min(tiles, _BLOCKS)
  y = jnp.pad(rms_norm(x, norm, eps), ((0, _WIDE - rows), (0, 0))).T
  arguments = [unembedding, y]
  scratch = [plgpu.SMEM((_STATS + 3 * count, _WIDE), jnp.float32)]
  if noise is not None:
    # Two words and a temperature for each row, all as integers.
    heat = lax.bitcast_convert_type(temperature.astype(jnp.float32), jnp.int32)
    drawn = jnp.concatenate(
        [lax.bitcast_convert_type(noise, jnp.int32).T, heat[None]])
    arguments.append(jnp.pad(drawn, ((0, 0), (0, _WIDE - rows))))
    scratch += [plgpu.SMEM((3, _WIDE), jnp.int32), plgpu.Barrier()]
    if tokens is not None:
      arguments.append(tokens.astype(jnp.int32))
      scratch += [plgpu.SMEM((_TILE,), jnp.int32), plgpu.Barrier()]
  kernel = functools.partial(
      _kernel, vocab=vocab, width=width, count=count, tiles=tiles, parts=parts,
      cap=logits_soft_cap, drawn=noise is not None,
      named=noise is not None and tokens is not None)
  out = plgpu.kernel(
      kernel, grid=(parts,), grid_names=("part",), scratch_types=scratch,
      out_type=jax.ShapeDtypeStruct((parts, _STATS + 3 * count, _WIDE),
                                    jnp.float32),
      compiler_params=plgpu.CompilerParams(
          lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      interpret=target.interpret)(*arguments)
  out = out[:, :, :rows]
  kept = jnp.moveaxis(out[:, _STATS:].reshape(parts, 3, count, rows), -1, 1)
  return join(Parts(*(out[:, n] for n in range(_STATS)), kept[:, :, 0],
                    kept[:, :, 1], kept[:, :, 2].astype(jnp.int32)), tokens)


def _kernel(*refs, vocab, width, count, tiles, parts, cap, drawn,
            named):
  refs = list(refs)
  rows_ref, y_ref = refs[:2]
  del refs[:2]
  drawn_ref = refs.pop(0) if drawn else None
  ids_ref = refs.pop(0) if named else None
  out_ref, kept_ref = refs[:2]
  part = lax.axis_index("part")

  if drawn:
    here_ref, barrier = refs[2:4]
    plgpu.copy_gmem_to_smem(drawn_ref, here_ref, barrier)
    plgpu.barrier_wait(barrier)
    key = [_spread(here_ref[n]) for n in range(2)]
    heat = _spread(lax.bitcast_convert_type(here_ref[2], jnp.float32))

  def full(value):
    return jnp.full((_WIDE,), value, jnp.float32)

  def step(n, state):
    tile = part + n * parts
    # The last tile reaches back into the one before it, not out of bounds.
    start = jnp.minimum(tile * _TILE, vocab - _TILE)
    logits = _product(rows_ref.at[pl.ds(start, _TILE)], y_ref, width)
    if cap is not None:
      logits = cap * jnp.tanh(logits / cap)
    at = start + lax.broadcasted_iota(jnp.int32, (_TILE, _WIDE), 0)
    logits = jnp.where(at >= tile * _TILE, logits, -jnp.inf)
    column = at.astype(jnp.float32)
    scores = logits
    if drawn:
      ids = at
      if named:
        tile_ref, barrier = refs[4:]
        plgpu.copy_gmem_to_smem(ids_ref.at[pl.ds(start, _TILE)], tile_ref,
                                barrier)
        plgpu.barrier_wait(barrier)
        ids = lax.broadcast_in_dim(tile_ref[...], logits.shape, (0,))
      noisy = logits / jnp.maximum(heat, COLDEST) + gumbel(*key, ids)
      scores = jnp.where(heat > 0, noisy, logits)
    stats, kept = state
    return _add(stats, logits, column), _insert(kept, scores, logits, column)

  stats = (full(-jnp.inf), full(-jnp.inf), full(0.0), full(0.0))
  kept = tuple((full(-jnp.inf), full(-jnp.inf), full(float(_EXACT)))
               for _ in range(count))
  steps = (tiles - part + parts - 1) // parts
  stats, kept = lax.fori_loop(0, steps, step, (stats, kept))
  for n, value in enumerate(stats):
    kept_ref[n] = value
  for n, entry in enumerate(kept):
    for what, value in enumerate(entry):
      kept_ref[_STATS + what * count + n] = value
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(kept_ref, out_ref.at[part])
  plgpu.wait_smem_to_gmem(0)


def _product(rows_ref, y_ref, width):
  """A tile of logits, in registers."""
  def scope(acc_ref):
    def body(_, rows_ref, y_ref):
      plgpu.wgmma(acc_ref, rows_ref, y_ref)
      plgpu.wgmma_wait(0)
    plgpu.emit_pipeline(
        body, grid=(width // _CHUNK,), max_concurrent_steps=_AHEAD,
        in_specs=[plgpu.BlockSpec((_TILE, _CHUNK), lambda k: (0, k),
                                  transforms=_tiling(_CHUNK)),
                  plgpu.BlockSpec((_CHUNK, _WIDE), lambda k: (k, 0),
                                  transforms=_tiling(_WIDE))])(rows_ref, y_ref)
    return acc_ref[...]
  return pl.run_scoped(scope, plgpu.ACC((_TILE, _WIDE), jnp.float32))


def _tiling(minor):
  swizzle = plgpu.find_swizzle(minor * 16)
  return (plgpu.TilingTransform((8, swizzle // 2)),
          plgpu.SwizzleTransform(swizzle))


def _add(stats, logits, column):
  """Takes a tile into the sums, `Parts` says of what."""
  top, next_, total, moment = stats
  best, first = _largest(logits, column)
  second = jnp.max(jnp.where(column == _spread(first), -jnp.inf, logits),
                   axis=0)
  # Every tile has a logit, so that this is finite.
  new = jnp.maximum(top, best)
  far = logits - _spread(new)
  mass = jnp.exp(far)
  moved = jnp.where(top > -jnp.inf, top - new, 0.0)
  shrink = jnp.exp(moved)
  return (new,
          jnp.maximum(jnp.minimum(top, best), jnp.maximum(next_, second)),
          total * shrink + jnp.sum(mass, axis=0),
          (moment + total * moved) * shrink
          + jnp.sum(jnp.where(mass > 0, mass * far, 0.0), axis=0))


def _insert(kept, scores, logits, column):
  """Takes a tile into the candidates, which are in order."""
  for _ in range(len(kept)):
    score, at = _largest(scores, column)
    here = column == _spread(at)
    own = jnp.max(jnp.where(here, logits, -jnp.inf), axis=0)
    scores = jnp.where(here, -jnp.inf, scores)
    entry, sorted_ = (score, own, at), []
    for other in kept:
      # Of equally good ones the one that was there came first.
      better = entry[0] > other[0]
      sorted_.append(tuple(jnp.where(better, a, b)
                           for a, b in zip(entry, other)))
      entry = tuple(jnp.where(better, b, a) for a, b in zip(entry, other))
    kept = tuple(sorted_)
  return kept


def _largest(scores, column):
  """The largest of each row, and the first column it stands in."""
  best = jnp.max(scores, axis=0)
  first = jnp.min(jnp.where(scores == _spread(best), column, float(_EXACT)),
                  axis=0)
  return best, first


def _spread(value):
  """One value a row, for each token of a tile."""
  return lax.broadcast_in_dim(value, (_TILE, value.shape[0]), (1,))
