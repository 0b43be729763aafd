# SPDX-License-Identifier: Apache-2.0
"""The loop over rows: read tables, begin sessions, feed them, write rows.

What `jaxspec.loop` is for one stream. `decode` writes many rows in one
`lax.while_loop`; what is to be read meanwhile lies in a queue on the device,
which the host fills between calls (`push`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxspec import sampling
from jaxspec.base import Request
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.streams import rows, state
from jaxspec.streams.cache import StreamCache
from jaxspec.streams.drafting import RowDrafter
from jaxspec.streams.layout import StreamLayout
from jaxspec.streams.model import StreamModel
from jaxspec.streams.state import Lines, Queue, StreamState


@struct.dataclass
class Reading:
  """Tables that have been read but for their last row.

  Attributes:
    tokens: what each cell holds; meaningless where it is not `live`.
    count: rows of each table, at least 1.
    base: tokens of each prefix.
  """

  tokens: Int[Array, "R n C"]
  live: Bool[Array, "R n C"]
  count: Int[Array, "R"]
  base: Int[Array, "R"]
  cache: StreamCache


def init(model: StreamModel, layout: StreamLayout, cache: StreamCache, *,
         room: int, queue: int, stops: int, biases: int) -> StreamState:
  """A batch without sessions.

  Args:
    cache: an empty one that holds the prefix and all cells of a table.
    room: most rows of a table.
    queue: most tokens that wait in a stream.
  """
  batch, streams = len(cache.length), layout.count
  # Given the model, so that it may be shapes alone.
  x = jax.eval_shape(lambda backbone, tokens: backbone.embed(tokens),
                     model.backbone, jnp.zeros((batch, streams), jnp.int32))

  def zeros(*shape, dtype=jnp.int32):
    return jnp.zeros((batch, *shape), dtype)

  lines = Lines(
      zeros(streams, room), zeros(room, streams, dtype=bool), zeros(streams),
      zeros(streams), zeros(), zeros(streams, dtype=bool), zeros(streams),
      Queue(zeros(streams, queue), zeros(streams), zeros(streams)),
      zeros(streams, dtype=bool), zeros(streams), zeros(),
      ~zeros(dtype=bool),
      jnp.full((batch, streams, room), jnp.nan))
  request = Request(
      sampling.defaults(batch * streams, biases),
      jnp.zeros(batch * streams, jnp.int32),
      jnp.full((batch * streams, stops), -1, jnp.int32),
      jnp.zeros(batch * streams, bool))
  return StreamState(
      lines, cache, request, zeros(),
      jnp.zeros(x.shape, x.dtype), ~zeros(dtype=bool), zeros(), zeros(),
      zeros())


@functools.partial(jax.jit, static_argnames=("layout", "chunk", "dtype"))
def prefill(model: StreamModel, layout: StreamLayout,
            prefix: Int[Array, "R P"], base: Int[Array, "R"],
            tokens: Int[Array, "R n C"], live: Bool[Array, "R n C"],
            count: Int[Array, "R"], *, chunk: int, dtype: Any) -> Reading:
  """Reads prefixes, then tables, some rows of cells in each pass.

  Args:
    prefix: padded; above `chunk` tokens, P is a multiple of it.
    tokens: tables, padded below; above `chunk // C` rows, n is a multiple of
      that.
    chunk: about how many cells a pass takes.
  """
  sessions, height, streams = tokens.shape
  cache = StreamCache.over(model.backbone.init_cache(
      ContiguousCache, sessions, prefix.shape[1] + height * streams, dtype))
  everything = jnp.arange(prefix.shape[1])[None] < base[:, None]

  def part(x, i, size):
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=1)

  def read(cache, block, left):
    _, fresh = rows.extend(model, layout, cache, block)
    return rows.commit(cache, block, fresh, left)

  if prefix.shape[1]:
    width = min(chunk, prefix.shape[1])

    def read_prefix(i, cache):
      return read(cache, rows.prefix_block(
          layout, part(prefix, i, width), part(everything, i, width),
          i * width), base - i * width)
    cache = lax.fori_loop(0, (jnp.max(base) + width - 1) // width,
                          read_prefix, cache)

  some = min(max(chunk // streams, 1), height)
  # The last row is what is fed next.
  past = jnp.arange(height)[None] < count[:, None] - 1
  known = live & past[..., None]

  def read_table(i, carry):
    cache, counts = carry
    cells = part(known, i, some)
    block = rows.table_block(
        layout, part(tokens, i, some), cells,
        jnp.full(sessions, i * some, jnp.int32), counts, base)
    return (read(cache, block, count - 1 - i * some),
            counts + jnp.sum(cells, axis=1, dtype=jnp.int32))
  cache, _ = lax.fori_loop(
      0, (jnp.max(count) - 1 + some - 1) // some, read_table,
      (cache, jnp.zeros((sessions, streams), jnp.int32)))
  return Reading(tokens, live, count, base, cache)


@functools.partial(jax.jit, static_argnames=("layout",),
                   donate_argnames=("batch",))
def insert(layout: StreamLayout, batch: StreamState, at: Int[Array, "R"],
           reading: Reading, request: Request,
           open_: Bool[Array, "R C"], reserve: Int[Array, "R"]
           ) -> StreamState:
  """Begins sessions, held back until the host lets them go.

  Args:
    at: the rows of the batch they take; one of B or more is dropped.
    open_: the streams that the model goes on writing.
    reserve: the most slots each may fill.
  """
  old, room = batch.lines, batch.lines.room
  sessions, height, streams = reading.tokens.shape
  index = jnp.arange(height)[None]
  live = reading.live & (index < reading.count[:, None])[..., None]
  nth = jnp.cumsum(live, axis=1, dtype=jnp.int32) - 1             # [R n C]
  place = jnp.where(live, nth, room)
  texts = jnp.zeros((sessions, streams, room), jnp.int32).at[
      jnp.arange(sessions)[:, None, None], jnp.arange(streams)[None, None],
      place].set(reading.tokens, mode="drop")
  filled = live[:, :room]
  filled = jnp.pad(filled, ((0, 0), (0, room - filled.shape[1]), (0, 0)))
  counts = jnp.sum(live, axis=1, dtype=jnp.int32)
  zero = jnp.zeros(sessions, jnp.int32)
  empty = jnp.zeros((sessions, streams), jnp.int32)
  lines = Lines(
      texts, filled, counts, counts, reading.count - 1, open_, empty,
      Queue(jnp.zeros((sessions, *old.queue.tokens.shape[1:]), jnp.int32),
            empty, empty),
      empty > 0, empty, zero, zero > 0,
      jnp.full(texts.shape, jnp.nan))
  request = request.replace(
      sampling=state.noise_keys(layout, request.sampling))

  def put(whole, new):
    return jax.tree.map(lambda w, n: w.at[at].set(n, mode="drop"), whole, new)

  def put_streams(whole, new):
    def by_session(x):
      return x.reshape(-1, streams, *x.shape[1:])
    return jax.tree.map(
        lambda w, n: by_session(w).at[at].set(by_session(n), mode="drop")
        .reshape(w.shape), whole, new)
  cache = batch.cache.insert(at, reading.cache, reserve)
  # A cache that has no room for a session leaves its row empty.
  held = cache.length.at[at].get(mode="fill", fill_value=0)
  lines = lines.replace(ended=held < reading.cache.length)
  return StreamState(
      put(old, lines), cache, put_streams(batch.request, request),
      put(batch.base, reading.base), batch.last, put(batch.paused, zero == 0),
      put(batch.passes, zero), put(batch.drafted, zero),
      put(batch.accepted, zero))


@functools.partial(jax.jit, donate_argnames=("batch",))
def release(batch: StreamState, which: Bool[Array, "B"]) -> StreamState:
  """Ends these sessions and frees what their caches hold."""
  lines = batch.lines
  return batch.replace(
      cache=batch.cache.release(which),
      lines=lines.replace(ended=lines.ended | which))


@functools.partial(jax.jit, static_argnames=("layout",),
                   donate_argnames=("batch",))
def push(layout: StreamLayout, batch: StreamState, session: Int[Array, ""],
         stream: Int[Array, ""], tokens: Int[Array, "T"],
         count: Int[Array, ""], anew: Bool[Array, ""]) -> StreamState:
  """Appends `tokens[:count]` to what a stream has to read.

  Whoever calls sees to it that there is room.

  Args:
    anew: whether these begin something new, so that the streams they can reach
      may say as much as at first.
  """
  queue = batch.lines.queue
  size = queue.tokens.shape[2]
  index = jnp.arange(len(tokens))
  at = jnp.where(index < count, (queue.tail[session, stream] + index) % size,
                 size)
  queue = queue.replace(
      tokens=queue.tokens.at[session, stream, at].set(tokens, mode="drop"),
      tail=queue.tail.at[session, stream].add(count))
  spoken = jnp.arange(layout.count) == stream
  reached = state.reaching(layout, spoken[None])[0] & anew
  spent = batch.lines.spent.at[session].multiply(~reached)
  return batch.replace(lines=batch.lines.replace(queue=queue, spent=spent))


@functools.partial(jax.jit, donate_argnames=("batch",))
def hold(batch: StreamState, which: Bool[Array, "B"], drop: Bool[Array, "B"]
         ) -> StreamState:
  """Holds these sessions back, and lets the others go.

  Args:
    drop: sessions that forget what they have still to read.
  """
  queue = batch.lines.queue
  head = jnp.where(drop[:, None], queue.tail, queue.head)
  return batch.replace(paused=which, lines=batch.lines.replace(
      queue=queue.replace(head=head)))


@functools.partial(jax.jit, static_argnames=("layout",),
                   donate_argnames=("batch",))
def decode(model: StreamModel, layout: StreamLayout,
           drafter: RowDrafter | None, batch: StreamState,
           passes: Int[Array, ""], rows_: Int[Array, ""]) -> StreamState:
  """Writes rows until every session waits, has ended or is held back.

  Args:
    drafter: guesses rows, which one pass verifies together; None for one row
      a pass. Whatever it guesses, the rows are the same.
    passes: passes of the model at most.
    rows_: rows a session may get at most.
  """
  target = batch.lines.row + rows_

  def which(batch):
    return (state.going(layout, batch.lines) & ~batch.paused
            & (batch.lines.row < target))

  def more(carry):
    done, batch = carry
    return (done < passes) & jnp.any(which(batch))

  def body(carry):
    done, batch = carry
    return done + 1, step(model, layout, drafter, batch, which(batch), target)
  return lax.while_loop(more, body, (jnp.zeros((), jnp.int32), batch))[1]


def step(model: StreamModel, layout: StreamLayout, drafter: RowDrafter | None,
         batch: StreamState, active: Bool[Array, "B"],
         target: Int[Array, "B"]) -> StreamState:
  """One pass over the last row, and over drafted ones behind it."""
  if drafter is None:
    return settle(model, layout, batch, active, None, target)
  guesses, found = drafter.propose(model, layout, batch)
  return lax.cond(
      jnp.any(found & active),
      lambda: settle(model, layout, batch, active, guesses, target),
      lambda: settle(model, layout, batch, active, None, target))


def settle(model: StreamModel, layout: StreamLayout, batch: StreamState,
           active: Bool[Array, "B"], guesses: Int[Array, "B K C"] | None,
           target: Int[Array, "B"]) -> StreamState:
  """Scores rows, samples behind each that stands, and keeps those.

  Rows are drafted by the function that makes real ones, from guesses in the
  place of samples. A drafted row stands if the real one is the same in every
  cell: only then do the logits behind it mean anything.

  Args:
    target: the last row that each session may get.
  """
  lines, request = batch.lines, batch.request
  guessed = () if guesses is None else jnp.unstack(guesses, axis=1)
  drafts = len(guessed)
  with jax.named_scope("propose"):
    chain = [lines.pending]
    ahead = lines
    for guess in guessed:
      ahead = state.advance(layout, ahead, request, guess,
                            jnp.zeros(lines.counts.shape))
      chain.append(ahead.pending)
    tokens, live = (jnp.stack(x, axis=1) for x in zip(*chain))
  with jax.named_scope("score"):
    _, last = lines.pending
    block = rows.table_block(layout, tokens, live, lines.row,
                             lines.counts - last, batch.base)
    x, fresh = rows.extend(model, layout, batch.cache, block)
    written = x[:, :, jnp.array(layout.written)]         # [B n W D]
    logits = model.backbone.unembed(
        written.reshape(len(x), -1, x.shape[-1])).reshape(
            *written.shape[:-1], -1)
  with jax.named_scope("verify"):
    def at(values, depth):
      return lax.dynamic_index_in_dim(values, depth, axis=1, keepdims=False)

    def more(carry):
      depth, _, stands, _ = carry
      return (depth <= drafts) & jnp.any(stands)

    def verify(carry):
      depth, lines, stands, taken = carry
      drawn, logprobs = state.draw(layout, lines, request, at(logits, depth),
                                   at(block.positions, depth))
      lines = state.choose(stands, state.advance(
          layout, lines, request, drawn, logprobs), lines)
      taken += stands
      nxt = jnp.minimum(depth + 1, drafts)
      real, there = lines.pending
      guess, held = at(tokens, nxt), at(live, nxt)
      same = jnp.all((there == held) & (~there | (real == guess)), axis=1)
      goes_on = state.going(layout, lines) & (lines.row < target)
      return depth + 1, lines, stands & same & goes_on, taken
    zero = jnp.zeros_like(batch.passes)
    _, new, _, taken = lax.while_loop(
        more, verify, (jnp.zeros((), jnp.int32), lines, active, zero))
  with jax.named_scope("commit"):
    cache = rows.commit(batch.cache, block, fresh, taken)
    added = cache.length - batch.cache.length
    wanted = jnp.sum(block.flat(block.placed & (
        jnp.arange(drafts + 1)[None, :, None] < taken[:, None, None])),
        axis=1, dtype=jnp.int32)
    # A session whose keys found no room ends where it was.
    fits = added == wanted
    lines = state.choose(fits, new, lines)
    lines = lines.replace(ended=lines.ended | ~fits)
  fed = jnp.take_along_axis(
      x, jnp.maximum(taken - 1, 0)[:, None, None, None], axis=1)[:, 0]
  last = jnp.where((taken > 0)[:, None, None], fed, batch.last)
  return batch.replace(
      lines=lines, cache=cache, last=last, passes=batch.passes + active,
      drafted=batch.drafted + drafts * active,
      accepted=batch.accepted + jnp.maximum(taken - 1, 0) * fits)
