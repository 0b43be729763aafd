# SPDX-License-Identifier: Apache-2.0
"""`proposal_head` for TPUs: an online softmax over tiles of the vocabulary.

Each tile of the unembedding comes in once, by the pipeline of `pallas_call`,
and is used as it lies, by all rows. What is kept of a tile are sums for the
softmax and its entropy, the two largest logits, and K candidates; a tile
without a candidate for any row, as most are behind the first few, is passed by
after one maximum.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import choose
from pallas_kernels.head.law import Parts, join
from pallas_kernels.head.xla import COLDEST, rms_norm
from pallas_kernels.noise import gumbel
from pallas_kernels.target import Target

# Published trees of heads have up to ten tokens beside each other.
_ROWS, _COUNT = 64, 16
_FAR = 2**30                     # beyond all columns
_STATS = 4
_WORDS = 128                     # of bits, in a vector
_SPAN = 32 * _WORDS
_DRAWN = 128                     # lanes that get their noise at once


def proposal_head(x, norm, unembedding, *, eps, count, logits_soft_cap, tokens,
                  allowed, noise, temperature, target: Target):
  """See `pallas_kernels.head.op.proposal_head`."""
  check(x, unembedding, count)
  rows, width = x.shape
  vocab = unembedding.shape[0]
  tile, parts = _blocks(target, rows, vocab, width, x.dtype.itemsize)
  tiles = pl.cdiv(vocab, tile)
  each = pl.cdiv(tiles, parts)

  def at(part, step):
    # A part that has fewer tiles stays at the last, and counts none of it.
    return jnp.minimum(part * each + step, tiles - 1)

  def whole(*shape):
    return pl.BlockSpec(shape, lambda part, step: (0,) * len(shape))

  turned = _turned(vocab, width)
  arguments = [x, norm.reshape(1, -1), unembedding.T if turned else unembedding]
  specs = [whole(rows, width), whole(1, width),
           pl.BlockSpec((width, tile), lambda p, i: (0, at(p, i))) if turned
           else pl.BlockSpec((tile, width), lambda p, i: (at(p, i), 0))]
  if allowed is not None:
    # A vector of words serves some tiles, each of which divides it.
    arguments.append(lax.bitcast_convert_type(allowed, jnp.int32))
    specs.append(pl.BlockSpec((rows, min(_WORDS, allowed.shape[1])),
                              lambda p, i: (0, at(p, i) * tile // _SPAN)))
  if noise is not None:
    arguments += [lax.bitcast_convert_type(noise, jnp.int32),
                  temperature.reshape(-1, 1).astype(jnp.float32)]
    specs += [whole(rows, 2), whole(rows, 1)]
    if tokens is not None:
      arguments.append(tokens.reshape(1, -1).astype(jnp.int32))
      specs.append(pl.BlockSpec((1, tile), lambda p, i: (0, at(p, i))))
  kernel = functools.partial(
      _kernel, eps=eps, cap=logits_soft_cap, vocab=vocab, tile=tile, each=each,
      turned=turned, masked=allowed is not None, drawn=noise is not None,
      named=noise is not None and tokens is not None)
  wide = [(jnp.float32, _STATS), (jnp.float32, count), (jnp.float32, count),
          (jnp.int32, count)]
  stats, scores, logits, columns = pl.pallas_call(
      kernel, grid=(parts, each), in_specs=specs,
      out_specs=[pl.BlockSpec((1, rows, size), lambda p, i: (p, 0, 0))
                 for _, size in wide],
      out_shape=[jax.ShapeDtypeStruct((parts, rows, size), dtype)
                 for dtype, size in wide],
      scratch_shapes=[pltpu.VMEM((rows, width), x.dtype),
                      pltpu.VMEM((rows, tile), jnp.float32),
                      pltpu.VMEM((rows, tile), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=_memory(rows, width, tile, x.dtype.itemsize)),
      cost_estimate=pl.CostEstimate(
          flops=2 * rows * vocab * width, transcendentals=rows * vocab,
          bytes_accessed=moved_bytes(
              rows, width, vocab, x.dtype.itemsize, count, target=target,
              masked=allowed is not None, drawn=noise is not None,
              named=noise is not None and tokens is not None)),
      interpret=target.interpret, name="proposal_head")(*arguments)
  return join(Parts(*jnp.moveaxis(stats, -1, 0), scores, logits, columns),
              tokens)


def moved_bytes(rows: int, width: int, vocab: int, itemsize: int, count: int,
                *, target: Target, masked: bool = False, drawn: bool = False,
                named: bool = False) -> int:
  """What the blocks move; rows of results are as wide as a vector is."""
  _, parts = _blocks(target, rows, vocab, width, itemsize)
  moved = vocab * width * itemsize
  # Both parts read what they have in common, if there are two.
  moved += parts * (rows * width * itemsize + width * 4)
  if masked:
    moved += pl.cdiv(vocab, 32) * rows * 4
  if drawn:
    moved += parts * rows * 12
  if named:
    moved += vocab * 4
  return moved + parts * rows * (_STATS + 3 * count) * 4


def check(x, unembedding, count, most=_COUNT) -> None:
  """Raises NotImplementedError for what no kernel takes."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
        f"x must be bfloat16 or float32, got {x.dtype}; cast it, or use 'xla'")
  if unembedding.dtype != x.dtype:
    raise NotImplementedError(
        f"x and unembedding must be of one dtype, got {x.dtype} and "
        f"{unembedding.dtype}; cast x, or use 'xla'")
  if not 1 <= x.shape[0] <= _ROWS:
    raise NotImplementedError(
        f"{x.shape[0]} rows: a tile serves 1 to {_ROWS}; split them, or use "
        "'xla'")
  if count > most:
    raise NotImplementedError(
        f"count={count}: candidates are kept for up to {most}; use 'xla'")


def _blocks(target: Target, rows: int, vocab: int, width: int, itemsize: int
            ) -> tuple[int, int]:
  """Rows of the unembedding in a tile, and parts of the vocabulary."""
  return choose("proposal_head", target, (rows, vocab, width, itemsize),
                lambda: _guess(target, rows, vocab, width, itemsize))


def _guess(target, rows, vocab, width, itemsize):
  # A transfer is worth its start from a few megabytes on; two must fit, and a
  # small vocabulary still wants a few steps to overlap.
  tile = min((4 << 20) // (width * itemsize), (128 << 10) // max(rows, 16),
             vocab // 4, _SPAN)
  tile = 1 << max(7, tile.bit_length() - 1)
  return tile, min(target.cores, pl.cdiv(vocab, tile))


def _turned(vocab: int, width: int) -> bool:
  """Whether the unembedding lies in memory with the vocabulary in lanes.

  XLA lays an argument out so that padding to tiles of 8 by 128 makes it least;
  turning it is then free, and not turning it a copy.
  """
  def padded(sublanes, lanes):
    return pl.cdiv(sublanes, 8) * 8 * pl.cdiv(lanes, 128) * 128
  return padded(width, vocab) < padded(vocab, width)


def _memory(rows: int, width: int, tile: int, itemsize: int) -> int:
  """VMEM for two tiles, rows, logits and what is computed of them."""
  lanes = pl.cdiv(width, 128) * 128
  rows = pl.cdiv(rows, 16) * 16
  held = (2 * tile * lanes * itemsize + 4 * rows * lanes * 4
          + 12 * rows * tile * 4)
  if itemsize == 4:
    held += 2 * tile * lanes * itemsize      # split for products in float32
  return max(held * 5 // 4, 16 << 20)


def _kernel(x_ref, norm_ref, rows_ref, *refs, eps, cap, vocab, tile, each,
            turned, masked, drawn, named):
  refs = list(refs)
  words_ref = refs.pop(0) if masked else None
  key_ref = refs.pop(0) if drawn else None
  temperature_ref = refs.pop(0) if drawn else None
  ids_ref = refs.pop(0) if named else None
  (stats_ref, scores_ref, logits_ref, columns_ref,
   y_ref, law_ref, left_ref) = refs
  part, step = pl.program_id(0), pl.program_id(1)
  start = (part * each + step) * tile

  @pl.when(step == 0)
  def _():
    y_ref[...] = rms_norm(x_ref[...], norm_ref[0], eps)
    stats_ref[0, :, :2] = jnp.full(stats_ref[0, :, :2].shape, -jnp.inf)
    stats_ref[0, :, 2:] = jnp.zeros(stats_ref[0, :, 2:].shape, jnp.float32)
    scores_ref[0] = jnp.full(scores_ref.shape[1:], -jnp.inf)
    logits_ref[0] = jnp.full(logits_ref.shape[1:], -jnp.inf)
    # No two alike, so that one of them can be told.
    columns_ref[0] = _FAR + _iota(columns_ref.shape[1:])

  y = y_ref[...]
  logits = lax.dot_general(
      y, rows_ref[...], (((1,), (0 if turned else 1,)), ((), ())),
      precision=lax.Precision.HIGHEST if y.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32)                        # [B tile]
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  lane = _iota(logits.shape)
  column = start + lane
  # Beyond the vocabulary stands what happened to be in memory.
  live = column < vocab
  if masked:
    live &= _bits(words_ref[...], start % _SPAN, tile) != 0
  logits = jnp.where(live, logits, -jnp.inf)
  best, first = _largest(logits, column)
  _add(stats_ref, logits, column, best, first)

  left_ref[...] = logits
  if drawn:
    law_ref[...] = logits
    temperature = temperature_ref[...]

    @pl.when(jnp.max(temperature) > 0)
    def _():
      def draw(some, none):
        at = pl.ds(pl.multiple_of(some * _DRAWN, _DRAWN), _DRAWN)
        logits = law_ref[:, at]
        ids = start + some * _DRAWN + _iota(logits.shape)
        if named:
          ids = jnp.broadcast_to(ids_ref[:, at], logits.shape)
        noise = gumbel(key_ref[:, :1], key_ref[:, 1:], ids)
        noisy = logits / jnp.maximum(temperature, COLDEST) + noise
        left_ref[:, at] = jnp.where(temperature > 0, noisy, logits)
        return none
      # A few at a time: a hundred operations on each fill no registers.
      lax.fori_loop(0, tile // _DRAWN, draw, 0)

    best = jnp.max(left_ref[...], axis=1, keepdims=True)

  worst = jnp.min(scores_ref[0], axis=1, keepdims=True)

  @pl.when(jnp.max(jnp.where(best > worst, 1, 0)) > 0)
  def _():
    def insert(_, none):
      left = left_ref[...]
      score, at = _largest(left, column)
      kept, columns = scores_ref[0], columns_ref[0]
      worst = jnp.min(kept, axis=1, keepdims=True)
      # Of equally bad ones the last goes; of equally good ones the first came.
      last = jnp.max(jnp.where(kept == worst, columns, -1), axis=1,
                     keepdims=True)
      slot = (columns == last) & (score > worst)
      scores_ref[0] = jnp.where(slot, score, kept)
      columns_ref[0] = jnp.where(slot, at, columns)
      if drawn:
        here = jnp.where(column == at, law_ref[...], -jnp.inf)
        score = jnp.max(here, axis=1, keepdims=True)
      logits_ref[0] = jnp.where(slot, score, logits_ref[0])
      left_ref[...] = jnp.where(column == at, -jnp.inf, left)
      return none
    lax.fori_loop(0, scores_ref.shape[-1], insert, 0)


def _add(stats_ref, logits, column, best, first):
  """Takes a tile into the sums, `Parts` says of what."""
  second = jnp.max(jnp.where(column == first, -jnp.inf, logits), axis=1,
                   keepdims=True)
  top, next_, total, moment = (stats_ref[0, :, n:n + 1] for n in range(_STATS))
  new = jnp.maximum(top, best)
  # Nothing seen yet must not become inf - inf.
  base = jnp.where(new > -jnp.inf, new, 0.0)
  far = logits - base
  mass = jnp.exp(far)
  moved = jnp.where(top > -jnp.inf, top - base, 0.0)
  shrink = jnp.exp(moved)
  stats_ref[0, :, 0:1] = new
  stats_ref[0, :, 1:2] = jnp.maximum(jnp.minimum(top, best),
                                     jnp.maximum(next_, second))
  stats_ref[0, :, 2:3] = total * shrink + jnp.sum(mass, axis=1, keepdims=True)
  stats_ref[0, :, 3:4] = (moment + total * moved) * shrink + jnp.sum(
      jnp.where(mass > 0, mass * far, 0.0), axis=1, keepdims=True)


def _largest(scores, column):
  """The largest of each row, and the first column it stands in."""
  best = jnp.max(scores, axis=1, keepdims=True)
  first = jnp.min(jnp.where(scores == best, column, 2 * _FAR - 1), axis=1,
                  keepdims=True)
  return best, first


def _bits(words, start, tile):
  """The bits of a tile that starts so many bits into a vector of words.

  A word has to reach 32 lanes. The matrix unit brings it there, byte by byte,
  since a product with zeros and ones is exact.
  """
  lane = start + _iota((words.shape[1], tile))
  spread = jnp.where(lane >> 5 == _iota(lane.shape, 0), 1.0, 0.0)
  lane = _iota((words.shape[0], tile))
  bits = jnp.zeros(lane.shape, jnp.int32)
  for byte in range(4):
    some = (words >> (8 * byte)) & 255
    some = jnp.dot(some.astype(jnp.float32).astype(jnp.bfloat16),
                   spread.astype(jnp.bfloat16),
                   preferred_element_type=jnp.float32).astype(jnp.int32)
    bits = jnp.where((lane >> 3) & 3 == byte, some, bits)
  return (bits >> (lane & 7)) & 1


def _iota(shape, dimension=1):
  return lax.broadcasted_iota(jnp.int32, shape, dimension)
