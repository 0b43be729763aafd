# SPDX-License-Identifier: Apache-2.0
"""`accept_nodes` for TPUs: one walk over tiles of the vocabulary.

Nodes of all rows are rows of one matrix. A tile of logits comes in once and
leaves a few sums behind; noise is made where it is used and never in memory.
With draft probabilities there is a second walk, over those: what the logits
were is then in VMEM, because the sums need the law, and the law the whole.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.acceptance.xla import COLDEST
from pallas_kernels.blocks import choose
from pallas_kernels.noise import gumbel
from pallas_kernels.target import Target

_FAR = 2**30                     # beyond all columns
# Columns of the numbers that are kept of each node.
_SCORE, _LOGIT, _TOP, _TOTAL, _WARM_TOP, _WARM_TOTAL, _CHANCE, _EXCESS = range(
    8)
_CHUNK = 512                     # tokens that are in registers at a time
_HELD = 64 << 20                 # of VMEM, for the logits of one block


def accept_nodes(logits, *, temperature, noise, first, draft, drafted,
                 target: Target):
  """See `pallas_kernels.acceptance.op.accept_nodes`."""
  check(logits, draft, target)
  rows, nodes, vocab = logits.shape
  count = rows * nodes
  # A number of nodes that eight does not divide XLA keeps outside of rows,
  # and would have to move all logits to bring it inside.
  turned = nodes % 8 != 0 and rows % 8 == 0

  def flat(x):
    x = jnp.swapaxes(x, 0, 1) if turned else x
    return x.reshape(count, *x.shape[2:])

  if not count:
    return _result(jnp.zeros((0, 8)), jnp.zeros((0, 1), jnp.int32),
                   (rows, nodes), draft is not None, turned)
  block, tile = _blocks(target, count, vocab, draft is not None)
  tiles = pl.cdiv(vocab, tile)
  phases = 1 if draft is None else 2
  chunk = math.gcd(tile, _CHUNK)

  def node(i, phase, j, first):
    return i, 0

  def law(i, phase, j, first):
    # In the second walk the last tile stays, and nothing is read.
    return i, jnp.where(phase == 0, j, tiles - 1)

  def other(i, phase, j, first):
    return i, jnp.where(phase == 0, 0, j)

  temperature = jnp.broadcast_to(
      temperature.astype(jnp.float32)[:, None, None], (rows, nodes, 1))
  arguments = [flat(logits), flat(temperature),
               flat(lax.bitcast_convert_type(noise, jnp.int32))]
  specs = [pl.BlockSpec((block, tile), law), pl.BlockSpec((block, 1), node),
           pl.BlockSpec((block, 2), node)]
  scratch = [pltpu.VMEM((block, chunk), jnp.int32),
             pltpu.VMEM((phases * 2 + 2, block, chunk), jnp.float32)]
  if draft is not None:
    arguments += [flat(draft), flat(drafted.astype(jnp.int32)[..., None])]
    specs += [pl.BlockSpec((block, tile), other),
              pl.BlockSpec((block, 1), node)]
    scratch.append(pltpu.VMEM((tiles, block, tile), jnp.float32))
  first = jnp.zeros((), jnp.int32) if first is None else first
  numbers, tokens = pl.pallas_call(
      functools.partial(_kernel, vocab=vocab, tile=tile,
                        judged=draft is not None),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(pl.cdiv(count, block), phases, tiles),
          in_specs=specs,
          out_specs=[pl.BlockSpec((block, 8), node),
                     pl.BlockSpec((block, 1), node)],
          scratch_shapes=scratch),
      out_shape=[jax.ShapeDtypeStruct((count, 8), jnp.float32),
                 jax.ShapeDtypeStruct((count, 1), jnp.int32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary", "arbitrary"),
          vmem_limit_bytes=_memory(block, tile, vocab, draft is not None)),
      cost_estimate=pl.CostEstimate(
          flops=8 * count * vocab, transcendentals=3 * count * vocab,
          bytes_accessed=moved_bytes(
              count, vocab, logits.dtype.itemsize,
              0 if draft is None else draft.dtype.itemsize, target=target)),
      interpret=target.interpret, name="accept_nodes")(
          first.reshape(1).astype(jnp.int32), *arguments)
  return _result(numbers, tokens, (rows, nodes), draft is not None, turned)


def check(logits, draft, target) -> None:
  """Raises NotImplementedError for what the kernel does not take."""
  for name, x in (("logits", logits), ("draft", draft)):
    if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
      raise NotImplementedError(
          f"{name} must be float32 or bfloat16, got {x.dtype}; cast it, or "
          "use 'xla'")
  vocab = logits.shape[-1]
  if not 0 < vocab < _FAR:
    raise NotImplementedError(f"{vocab} tokens; use 'xla'")
  if draft is not None and _law_bytes(8, vocab) > _fast(target):
    raise NotImplementedError(
        f"the ratio test of {vocab} tokens needs the laws of eight nodes in "
        f"{_fast(target) >> 20} MiB of VMEM; use 'xla'")


def moved_bytes(count: int, vocab: int, itemsize: int, draft_itemsize: int = 0,
                *, target: Target) -> int:
  """What the blocks move."""
  del target                       # however it is cut, each is read once
  per_node = vocab * (itemsize + draft_itemsize) + 4 + 8 + 32 + 4
  return count * (per_node + (4 if draft_itemsize else 0)) + 4


def _blocks(target: Target, count: int, vocab: int, judged: bool
            ) -> tuple[int, int]:
  """Nodes in a block, and tokens in a tile."""
  return choose("accept_nodes", target, (count, vocab, int(judged)),
                lambda: _guess(target, count, vocab, judged))


def _guess(target, count, vocab, judged):
  # Work on a block is in vectors of eight nodes. Few at a time, for the sake
  # of registers; a wide tile, for the sake of long transfers.
  block = count if count < 8 else 8 if judged or count < 16 else 16
  while judged and _law_bytes(block, vocab) > _fast(target):
    block //= 2
  tile = (1 << 20) // (4 * max(block, 8))
  # Two tiles or more, that transfers and work overlap.
  tile = min(tile, vocab // 4)
  unit = _CHUNK if tile >= _CHUNK else 128
  return block, max(128, tile // unit * unit)


def _law_bytes(block: int, vocab: int) -> int:
  return pl.cdiv(block, 8) * 8 * vocab * 4


def _fast(target: Target) -> int:
  return _HELD if target.kind in ("TPU v5 lite", "TPU v6 lite") else _HELD // 2


def _memory(block: int, tile: int, vocab: int, judged: bool) -> int:
  held = 8 * pl.cdiv(block, 16) * 16 * tile * 4
  if judged:
    held += _law_bytes(block, vocab + tile)
  return max(held, 16 << 20)


def _result(numbers, tokens, shape, judged, turned):
  def spread(x):
    return x.reshape(shape[::-1]).T if turned else x.reshape(shape)

  def column(n):
    return spread(numbers[:, n])

  parts = (spread(tokens), column(_SCORE), column(_LOGIT),
           column(_TOP) + jnp.log(column(_TOTAL)))
  return (*parts, column(_CHANCE), column(_EXCESS)) if judged else parts


def _kernel(first_ref, logits_ref, temperature_ref, noise_ref, *refs, vocab,
            tile, judged):
  draft_ref, drafted_ref = refs[:2] if judged else (None, None)
  numbers_ref, token_ref, column_ref, lanes_ref, *kept = (
      refs[2:] if judged else refs)
  phase, j = pl.program_id(1), pl.program_id(2)
  last = j == pl.num_programs(2) - 1
  temperature = temperature_ref[...]
  warm = temperature > 0
  # (A block may reach beyond the last node.)
  drawn = jnp.max(jnp.where(warm, 1.0, 0.0)) > 0
  chunk = lanes_ref.shape[-1]
  lane = lax.broadcasted_iota(jnp.int32, lanes_ref.shape[1:], 1)

  @pl.when((phase == 0) & (j == 0))
  def _():
    for n in range(len(lanes_ref)):
      lowest = -jnp.inf if n in (_SCORE, _LOGIT, _TOP, _WARM_TOP) else 0.0
      lanes_ref[n] = jnp.full(lane.shape, lowest, jnp.float32)
    column_ref[...] = lane

  # Each lane keeps what it has seen; lanes are joined in the end.
  def add(x, top, total):
    """Takes some more logits into a log-sum-exp."""
    new = jnp.maximum(top, x)
    base = jnp.where(new > -jnp.inf, new, 0.0)
    return new, total * jnp.exp(top - base) + jnp.exp(x - base)

  def walk(noisy):
    def some(c, state):
      column = j * tile + c * chunk + lane
      # Beyond the vocabulary stands what happened to be in memory.
      logits = jnp.where(
          column < vocab, logits_ref[:, pl.ds(c * chunk, chunk)].astype(
              jnp.float32), -jnp.inf)
      warped = logits / jnp.where(warm, jnp.maximum(temperature, COLDEST), 1.0)
      scores = warped
      if noisy:
        noise = gumbel(noise_ref[:, :1], noise_ref[:, 1:],
                       first_ref[0] + column)
        scores = warped + jnp.where(warm, noise, 0.0)
      at, score, logit, top, total, *rest = state
      better = scores > score
      if judged:
        kept[0][j, :, pl.ds(c * chunk, chunk)] = warped
        rest = add(warped, *rest)
      return (jnp.where(better, column, at), jnp.where(better, scores, score),
              jnp.where(better, logits, logit), *add(logits, top, total),
              *rest)

    state = [column_ref[...], *(lanes_ref[n] for n in range(len(lanes_ref)))]
    at, *state = lax.fori_loop(0, tile // chunk, some, tuple(state))
    column_ref[...] = at
    for n, x in enumerate(state):
      lanes_ref[n] = x

  @pl.when((phase == 0) & drawn)
  def _():
    walk(True)

  @pl.when((phase == 0) & jnp.logical_not(drawn))
  def _():
    walk(False)

  def put(n, x):
    numbers_ref[:, n:n + 1] = x

  @pl.when((phase == 0) & last)
  def _():
    score = jnp.max(lanes_ref[_SCORE], axis=1, keepdims=True)
    best = lanes_ref[_SCORE] == score
    token = jnp.min(jnp.where(best, column_ref[...], _FAR), axis=1,
                    keepdims=True)
    best = best & (column_ref[...] == token)
    token_ref[...] = jnp.where(token == _FAR, 0, token)
    put(_SCORE, score)
    put(_LOGIT, jnp.max(jnp.where(best, lanes_ref[_LOGIT], -jnp.inf), axis=1,
                        keepdims=True))
    for n in (_TOP, _WARM_TOP)[:2 if judged else 1]:
      top = jnp.max(lanes_ref[n], axis=1, keepdims=True)
      base = jnp.where(top > -jnp.inf, top, 0.0)
      put(n, top)
      put(n + 1, jnp.sum(lanes_ref[n + 1] * jnp.exp(lanes_ref[n] - base),
                         axis=1, keepdims=True))
    if judged:
      put(_CHANCE, jnp.zeros_like(score))
      put(_EXCESS, jnp.zeros_like(score))

  if judged:
    @pl.when(phase == 1)
    def _():
      top = numbers_ref[:, _WARM_TOP:_WARM_TOP + 1]
      total = numbers_ref[:, _WARM_TOTAL:_WARM_TOTAL + 1]

      def some(c, sums):
        column = j * tile + c * chunk + lane
        where = pl.ds(c * chunk, chunk)
        law = jnp.exp(kept[0][j, :, where] - top) / total
        law = jnp.where(warm, law,
                        jnp.where(column == token_ref[...], 1.0, 0.0))
        more = jnp.maximum(law - draft_ref[:, where].astype(jnp.float32), 0.0)
        chance, excess = sums
        return (chance + jnp.where(column == drafted_ref[...], law, 0.0),
                excess + jnp.where(column < vocab, more, 0.0))

      zeros = jnp.zeros(lane.shape, jnp.float32)
      sums = lax.fori_loop(0, tile // chunk, some, (zeros, zeros))
      for n, x in zip((_CHANCE, _EXCESS), sums):
        put(n, numbers_ref[:, n:n + 1] + jnp.sum(x, axis=1, keepdims=True))
