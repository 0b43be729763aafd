# SPDX-License-Identifier: Apache-2.0
"""What a batch of multi-stream sessions carries, and how a row follows another.

The invariant is that of ordinary decoding: the last row is the next to be fed,
and its keys are not yet written.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxspec import sampling
from jaxspec.base import Request
from jaxspec.sampling import Sampling
from jaxspec.streams.cache import StreamCache
from jaxspec.streams.layout import StreamLayout

# Folded into a key before the id of a stream; no position is so large.
_STREAM = 2**32 - 3


@struct.dataclass
class Queue:
  """What is still to be read, a ring of I tokens a stream."""

  tokens: Int[Array, "B C I"]
  head: Int[Array, "B C"]
  tail: Int[Array, "B C"]

  @property
  def next(self) -> Int[Array, "B C"]:
    at = self.head % self.tokens.shape[2]
    return jnp.take_along_axis(self.tokens, at[..., None], axis=2)[..., 0]

  @property
  def waits(self) -> Bool[Array, "B C"]:
    return self.head < self.tail


@struct.dataclass
class Lines:
  """All of a session but its cache: what a row follows from.

  Attributes:
    texts: the tokens of each stream, one behind the other.
    filled: for each row and stream, whether the cell holds a token. With
      `texts` this is the table.
    counts: tokens of each stream, those of the last row included.
    given: how many of them were there before the first row was written.
    row: the number of the last row.
    open: streams that the model goes on writing.
    spent: words it wrote in each since it was last spoken to (`loop.push`).
    heard: whether anything was read yet that can reach the stream.
    silent: rows since then in which no such thing was, for the penalties.
    hush: rows of nothing but silence, up to the last.
    ended: sessions that will not go on, whatever is read.
    logprobs: of each token that was drawn, under the model itself, before any
      warp; NaN where no request wants it, and of what was not drawn.
  """

  texts: Int[Array, "B C R"]
  filled: Bool[Array, "B R C"]
  counts: Int[Array, "B C"]
  given: Int[Array, "B C"]
  row: Int[Array, "B"]
  open: Bool[Array, "B C"]
  spent: Int[Array, "B C"]
  queue: Queue
  heard: Bool[Array, "B C"]
  silent: Int[Array, "B C"]
  hush: Int[Array, "B"]
  ended: Bool[Array, "B"]
  logprobs: Float[Array, "B C R"]

  @property
  def room(self) -> int:
    """Rows a table can have."""
    return self.filled.shape[1]

  @property
  def pending(self) -> tuple[Int[Array, "B C"], Bool[Array, "B C"]]:
    """The last row: its tokens, and which of its cells hold one."""
    last = jnp.maximum(self.counts - 1, 0)
    tokens = jnp.take_along_axis(self.texts, last[..., None], axis=2)[..., 0]
    live = jnp.take_along_axis(self.filled, self.row[:, None, None], axis=1)
    return tokens, live[:, 0]


@struct.dataclass
class StreamState:
  """Everything the loop carries.

  Attributes:
    request: what was asked for, stream by stream: each is to it what a row is
      in ordinary decoding (B C, flattened).
    base: tokens of each session's prefix.
    last: the top of the residual stream at the last row that was fed, for
      heads that look ahead.
    paused: sessions the host holds back.
    passes: passes of the model each session took part in.
    drafted: rows that were drafted in them.
    accepted: drafted rows that stand.
  """

  lines: Lines
  cache: StreamCache
  request: Request
  base: Int[Array, "B"]
  last: Float[Array, "B C D"]
  paused: Bool[Array, "B"]
  passes: Int[Array, "B"]
  drafted: Int[Array, "B"]
  accepted: Int[Array, "B"]


def going(layout: StreamLayout, lines: Lines) -> Bool[Array, "B"]:
  """Sessions that have something to read or to write, and room for it."""
  busy = jnp.any(lines.open & layout.writes[None], axis=1)
  if layout.quiet:
    busy &= lines.hush < layout.quiet
  busy |= jnp.any(lines.queue.waits, axis=1)
  return busy & ~over(lines)


def over(lines: Lines) -> Bool[Array, "B"]:
  """Sessions that nothing can be read in any more: ended, or without room."""
  return lines.ended | (lines.row + 1 >= lines.room)


def advance(layout: StreamLayout, lines: Lines, request: Request,
            drawn: Int[Array, "B C"], logprobs: Float[Array, "B C"]) -> Lines:
  """The row that follows, if the model has drawn these tokens.

  What waits to be read comes first, in whatever stream: words for a stream
  that is written are put into the model's mouth. Words open what has ended of
  the streams they can reach: with silence at once, for such a stream may say
  nothing until it knows enough; without behind the last of them. A pure
  function of what there is, so that it serves drafted rows as well as real
  ones.
  """
  sessions, streams = lines.counts.shape
  queue = lines.queue
  written = jnp.asarray(layout.writes)
  reads = queue.waits
  writes = lines.open & written[None] & ~reads
  tokens = jnp.where(reads, queue.next, drawn)
  live = reads | writes
  if layout.silence is not None:
    tokens = jnp.where(live, tokens, layout.silence)
    live = jnp.ones_like(live)
    quiet = tokens == layout.silence
  else:
    quiet = ~live

  def by_stream(x):
    return x.reshape(sessions, streams, *x.shape[1:])
  counts = lines.counts + live
  # Limits go for what the model itself says, and silence uses none of them.
  spent = lines.spent + (writes & ~quiet)
  limit = by_stream(request.limit) - lines.given
  ends = writes & jnp.any(
      tokens[..., None] == by_stream(request.stops), axis=-1)
  stops = jnp.array([s.stop != "never" for s in layout.streams])
  whole = jnp.array([s.stop == "session" for s in layout.streams])
  woken = reaching(layout, reads)
  if layout.silence is None:
    left = queue.replace(head=queue.head + reads)
    woken &= ~reaching(layout, left.waits) | reads
  open_ = (lines.open | (woken & written[None])) & ~(ends & stops[None])
  open_ &= spent < limit

  row = lines.row + 1
  session = jnp.arange(sessions)[:, None]
  stream = jnp.arange(streams)[None]
  at = jnp.where(live, lines.counts, lines.texts.shape[2])
  texts = lines.texts.at[session, stream, at].set(tokens, mode="drop")
  noted = lines.logprobs.at[session, stream, at].set(
      jnp.where(writes, logprobs, jnp.nan), mode="drop")
  heard = reaching(layout, reads & ~written[None])
  return lines.replace(
      texts=texts, logprobs=noted, counts=counts, row=row, open=open_,
      spent=spent,
      filled=lines.filled.at[jnp.arange(sessions), row].set(live, mode="drop"),
      queue=queue.replace(head=queue.head + reads),
      heard=lines.heard | heard,
      silent=jnp.where(heard, 0, lines.silent + (lines.heard | heard)),
      hush=jnp.where(jnp.all(quiet, axis=1), lines.hush + 1, 0),
      ended=lines.ended | jnp.any(ends & whole[None], axis=1))


def reaching(layout: StreamLayout, streams: Bool[Array, "B C"]
             ) -> Bool[Array, "B C"]:
  """Which streams any of these can have an effect on."""
  reaches = jnp.asarray(layout.reaches[:-1, :-1])
  return jnp.any(streams[:, None] & reaches[None], axis=2)


def draw(layout: StreamLayout, lines: Lines, request: Request,
         logits: Float[Array, "B W V"], positions: Int[Array, "B C"]
         ) -> tuple[Int[Array, "B C"], Float[Array, "B C"]]:
  """Samples behind the last row, one for each stream that is written.

  Each stream is to the sampler what a row of a batch is in ordinary decoding:
  it has its own history, its own settings and its own noise.

  Args:
    logits: of the streams that are written (W).
    positions: of the cells of the last row.

  Returns:
    Tokens, and their log-probabilities before any warp; 0 where nothing is
    written.
  """
  sessions, streams = lines.counts.shape
  written = jnp.array(layout.written)

  def flat(x):
    return x[:, written].reshape(-1, *x.shape[2:])

  def chosen(x):
    return flat(x.reshape(sessions, streams, *x.shape[1:]))
  settings = jax.tree.map(chosen, request.sampling)
  raw = logits.reshape(-1, 1, logits.shape[-1])
  warped = raw
  if layout.silence is not None and layout.penalties.any():
    ramp = jnp.minimum(1.0, lines.silent / max(layout.ramp, 1))
    penalty = ramp * jnp.asarray(layout.penalties)[None]
    warped = raw.at[:, 0, layout.silence].add(-flat(penalty))
  tail, _ = lines.pending
  history = sampling.History(
      flat(lines.texts), flat(lines.given), flat(lines.counts),
      flat(tail)[:, None], jnp.ones((raw.shape[0], 1, 1), bool))
  laws = sampling.Laws(warped, settings, history,
                       flat(positions)[:, None] + 1)
  zero = jnp.zeros(len(raw), jnp.int32)
  tokens = laws.draw(zero)
  logprobs = jax.lax.cond(
      jnp.any(request.wants_logprobs),
      lambda: sampling.log_probability(raw, zero[:, None], tokens[:, None]),
      lambda: jnp.full((len(raw), 1), jnp.nan))

  def spread(x):
    x = x.reshape(sessions, len(layout.written))
    return jnp.zeros((sessions, streams), x.dtype).at[:, written].set(x)
  return spread(tokens), spread(logprobs[:, 0])


def noise_keys(layout: StreamLayout, sampling_: Sampling) -> Sampling:
  """Gives each stream of a session noise of its own, by its id.

  That of id 0 is the session's own: one stream is ordinary decoding.
  """
  keys = sampling_.key.reshape(-1, layout.count)

  def own(key, id_):
    apart = jax.random.fold_in(jax.random.fold_in(
        key, jnp.uint32(_STREAM)), id_)
    return jax.random.wrap_key_data(jnp.where(
        id_ == 0, jax.random.key_data(key), jax.random.key_data(apart)))
  keys = jax.vmap(jax.vmap(own), (0, None))(keys, jnp.asarray(layout.ids))
  return sampling_.replace(key=keys.reshape(-1))


def choose(keep: Bool[Array, "B"], new: Lines, old: Lines) -> Lines:
  """`new` where a session goes on, `old` elsewhere."""
  def pick(a, b):
    return jnp.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b)
  return jax.tree.map(pick, new, old)

