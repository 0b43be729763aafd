# SPDX-License-Identifier: Apache-2.0
"""Sessions from the host: words in at any time, rows out as they are written.

  streams = Streams.of(Generator.load("folder"), "reading")
  session = streams.open(prefix="Answer briefly.", given={"assistant": "A:"})
  session.push("user", "What is two and two?")
  for row in session.rows():
    print(row)
    if enough:
      session.interrupt()
  session.push("user", "Louder!")        # and `rows` goes on
"""

import dataclasses
import functools
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxspec import caches, sharding
from jaxspec.base import Request
from jaxspec.errors import InputError
from jaxspec.kernels import choose, on
from jaxspec.options import Options, as_request
from jaxspec.streams import drafting, loop, state
from jaxspec.streams import layout as layouts
from jaxspec.streams import model as models
from jaxspec.streams.cache import empty
from jaxspec.streams.layout import StreamLayout
from jaxspec.streams.model import StreamModel

Words = str | Sequence[int]

_STOPS, _BIASES = 16, 64
_CHUNK, _QUEUE, _PUSH = 256, 256, 32


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a table.

  Attributes:
    number: from 0 on, those that were given included.
    names: of the streams.
    tokens: of each stream; None where it had nothing to say.
    texts: what each token adds to the text of its stream. Half a character
      waits for the rest of it, and silence is no text.
    logprobs: of each token the model drew, where it was asked for.
    given: whether the row was there before the model wrote any.
  """

  number: int
  names: tuple[str, ...]
  tokens: tuple[int | None, ...]
  texts: tuple[str, ...]
  logprobs: tuple[float | None, ...]
  given: bool = False

  def __getitem__(self, name: str) -> str:
    return self.texts[self.names.index(name)]


class Streams:
  """A model, a layout, and room for some sessions side by side.

  All of them share the passes of the model, and those whose rows nobody asks
  for are held back.

  Attributes:
    layout: the streams there are.
    sessions: how many there can be at a time.
    room: most rows of a table.
  """

  def __init__(self, model: StreamModel, layout: StreamLayout | str,
               tokenizer: Any = None, *, drafter: str | Any = "",
               sessions: int = 1, room: int | None = None,
               prefix_room: int = 256, cache: str = "contiguous",
               cache_dtype: str | None = None, eos_ids: Sequence[int] = (),
               mesh: jax.sharding.Mesh | None = None,
               kernels: str | None = None,
               defaults: Options | None = None):
    """Makes room; nothing is compiled yet.

    Args:
      layout: one, or the name of one (`layout.parse`).
      tokenizer: None takes and gives token ids alone.
      drafter: text for `drafting.parse`, a `drafting.RowDrafter`, or "" for
        none. The rows are the same whatever it guesses.
      room: None takes 512, or what the model's context leaves of it.
      prefix_room: most tokens of a prefix.
      cache: `contiguous`, `paged` or, where positions are those of rows,
        `window`; with options as for a `Generator`.
      kernels: see `jaxspec.kernels.choose`; `of` takes the generator's.
      defaults: how streams are written where nothing else is said.

    Raises:
      InputError: a name that does not exist, or a size that does not fit.
    """
    if isinstance(layout, str):
      layout = layouts.parse(layout, tokenizer)
    context = model.backbone.config.context
    if room is None:
      room = min(512, context - prefix_room)
    for name, value, low in (("sessions", sessions, 1), ("room", room, 2),
                             ("prefix_room", prefix_room, 0)):
      if value < low:
        raise InputError(f"{name} must be at least {low}, got {value}")
    if prefix_room + room > context:
      raise InputError(
          f"room={room} rows and prefix_room={prefix_room} tokens are more "
          f"than the model's context of {context}; make one of them smaller")
    model.check(layout)
    self.model, self.layout, self.tokenizer = model, layout, tokenizer
    self.sessions, self.room, self.prefix_room = sessions, room, prefix_room
    self.eos_ids = tuple(eos_ids)
    self.defaults = Options() if defaults is None else defaults
    self.mesh = sharding.make_mesh() if mesh is None else mesh
    self._target = choose(kernels, self.mesh)
    self._drafter = (drafting.parse(drafter, model)
                     if isinstance(drafter, str) else drafter)
    self._dtype = caches.stored_in(
        self.mesh, model.backbone.embedding[...].dtype, cache_dtype)
    kind, options = caches.parse(cache)
    slots = prefix_room + room * layout.count
    make = functools.partial(empty, model.backbone, layout, kind, sessions,
                             slots, self._dtype, **options)
    jax.eval_shape(lambda: jax.tree.leaves(make()))   # refuses bad sizes
    self._init = jax.jit(lambda: loop.init(
        model, layout, make(), room=room, queue=_QUEUE, stops=_STOPS,
        biases=_BIASES))
    self._batch: state.StreamState | None = None
    self._open: list[Session | None] = [None] * sessions
    self._lock = threading.RLock()
    # Held for moments alone, so that whoever speaks waits for no row.
    self._mail = threading.Lock()

  @classmethod
  def of(cls, generator: Any, layout: StreamLayout | str, *,
         embedding: str | Any = None, model: StreamModel | None = None,
         **options: Any) -> "Streams":
    """Takes model, tokenizer and mesh over from a `Generator`.

    Args:
      embedding: a table of stream embeddings, or a folder that holds one.
      model: what its model has become, as `taught.load` gives it; no
        `embedding` then.
      **options: see `__init__`.
    """
    options = dict(kernels=generator.kernels) | options
    if isinstance(embedding, str):
      folder = embedding
      embedding = models.load(folder, generator.model)
      if embedding is None:
        raise InputError(f"{folder} holds no table of stream embeddings, which "
                         f"is called {' or '.join(models.NAMES)}; name another "
                         "folder, or none")
    options = dict(eos_ids=generator.eos_ids, mesh=generator.mesh,
                   defaults=generator.default_options()) | options
    if model is None:
      model = StreamModel(generator.model, embedding)
    return cls(model, layout,
               generator.tokenizer, **options)

  def open(self, *, prefix: Words = "",
           given: Mapping[str, Words] | None = None,
           options: Options | Mapping[str, Options] | None = None
           ) -> "Session":
    """Begins a session, which writes when its rows are asked for.

    Args:
      prefix: the text all streams share.
      given: the first words of streams, on whose last ones the model goes on.
        They end in the same row. A stream without any begins with silence.
      options: for all streams, or by the name of each that is written.
        `max_new_tokens` is for each stream, from the last words on that were
        pushed and can reach it; silence uses none of them.

    Raises:
      InputError: no session is free, or something that cannot be served.
    """
    with self._lock:
      if None not in self._open:
        raise InputError(f"all {self.sessions} sessions are open; close one, "
                         "or make room for more")
      at = self._open.index(None)
      base = self._ids(prefix)
      if len(base) > self.prefix_room:
        raise InputError(f"the prefix has {len(base)} tokens, and there is "
                         f"room for {self.prefix_room}; make it shorter, or "
                         "prefix_room larger")
      tokens, live = self._table(given or {})
      request = self._request(options, live)
      open_ = self.layout.writes[None]
      height = _bucket(len(tokens), max(_CHUNK // self.layout.count, 1))
      width = _bucket(len(base), _CHUNK) if base else 0
      padded = np.zeros((1, width), np.int32)
      padded[0, :len(base)] = base

      def below(x):
        return np.pad(x, ((0, height - len(x)), (0, 0)))[None]
      with on(self.mesh, self._target):
        batch = self._init() if self._batch is None else self._batch
        self._batch = batch
        reading = loop.prefill(
            self.model, self.layout, padded,
            np.array([len(base)], np.int32), below(tokens), below(live),
            np.array([len(tokens)], np.int32), chunk=_CHUNK,
            dtype=self._dtype)
        reserve = len(base) + self.room * self.layout.count
        if not batch.cache.fits([reserve]):
          raise InputError("the cache has no room for another session; close "
                           "one, or give it more pages")
        self._batch = loop.insert(
            self.layout, batch, np.array([at], np.int32), reading,
            request, open_, np.array([reserve], np.int32))
      session = Session(self, at, len(tokens))
      self._open[at] = session
      return session

  def _ids(self, words: Words, by_word: bool = False) -> list[int]:
    if not isinstance(words, str):
      ids = [int(i) for i in words]
    elif not words:
      return []
    elif self.tokenizer is None:
      raise InputError("the model has no tokenizer; pass token ids")
    elif by_word:
      ids = [i for word in words.split()
             for i in self.tokenizer.encode(" " + word, special=False)]
    else:
      ids = self.tokenizer.encode(words, special=False)
    vocab = self.model.backbone.vocab
    for token in ids:
      if not 0 <= token < vocab:
        raise InputError(f"token {token} is beyond the model's {vocab}; pass "
                         f"ids from 0 to {vocab - 1}")
    return ids

  def _table(self, given: Mapping[str, Words]
             ) -> tuple[np.ndarray, np.ndarray]:
    """The given words as rows, all columns ending in the last."""
    columns: list[list[int]] = [[] for _ in self.layout.streams]
    for name, words in given.items():
      columns[self.layout.place(name)] = self._ids(words, self.layout.by_word)
    height = max(1, *map(len, columns))
    if height + 1 > self.room:
      raise InputError(f"the given words fill {height} rows, and there is room "
                       f"for {self.room}; give fewer, or make room larger")
    tokens = np.zeros((height, self.layout.count), np.int32)
    live = np.zeros(tokens.shape, bool)
    for at, column in enumerate(columns):
      if column:
        tokens[-len(column):, at] = column
        live[-len(column):, at] = True
      elif self.layout.silence is None and self.layout.streams[at].written:
        name = self.layout.names[at]
        raise InputError(f"stream {name} has nothing to go on from, and there "
                         f"is no silence; give it its first words, "
                         f"given={{{name!r}: ...}}")
    if self.layout.silence is not None:
      tokens = np.where(live, tokens, self.layout.silence).astype(np.int32)
      live[:] = True
    return tokens, live

  def _request(self, options, live: np.ndarray) -> Request:
    names = self.layout.names
    if options is None:
      options = self.defaults
    if isinstance(options, Mapping):
      for name in options:
        self.layout.place(name)
      each = [options.get(name, self.defaults) for name in names]
    else:
      each = [options] * len(names)
    for name, own in zip(names, each):
      if own.stop:
        raise InputError(f"stream {name}: stop texts are not looked for in "
                         "streams; use stop_token_ids")
    return as_request(each, live.sum(axis=0).tolist(), self.eos_ids,
                      vocab=self.model.backbone.vocab, stops=_STOPS,
                      biases=_BIASES)

  def _advance(self, session: "Session", stride: int) -> bool:
    """Writes some rows for whoever asks; tells whether there may be more."""
    with self._lock, on(self.mesh, self._target):
      if session._closed:
        return False
      everyone = [s for s in self._open if s is not None]
      drop = np.zeros(self.sessions, bool)
      paused = np.array([s is None or not s._asked for s in self._open])
      # Until it comes back the batch is nobody's: who is interrupted meanwhile
      # has lost it, and with it every session.
      batch, self._batch = self._batch, None
      try:
        with self._mail:
          for one in everyone:
            drop[one._at], one._drop = one._drop, False
          batch = loop.hold(batch, paused, drop)
          for one in everyone:
            batch = one._feed(batch)
          known = min(one._known() for one in everyone if one._asked)
        batch = loop.decode(
            self.model, self.layout, self._drafter, batch, np.int32(stride),
            np.int32(known))
        seen = jax.device_get(_view(self.layout, batch))
      except BaseException:
        self._open = [None] * self.sessions
        for one in everyone:
          one._closed = True
        raise
      self._batch = batch
      for one in everyone:
        one._take(seen)
      return bool(seen["going"][session._at]) or (
          any(session._waiting) and not session.over)

  def _close(self, session: "Session") -> None:
    with self._lock, on(self.mesh, self._target):
      if not session._closed:
        session._closed = True
        self._open[session._at] = None
        which = np.arange(self.sessions) == session._at
        self._batch = loop.release(self._batch, which)


class Session:
  """One table: words go in, rows come out.

  `push` and `interrupt` may be called from another thread than the one that
  takes rows, and return at once; what they change is there from the next row
  on.

  Attributes:
    passes: passes of the model so far.
    accepted: rows that were drafted, and stood.
    over: whether nothing can be read or written any more.
  """

  def __init__(self, streams: Streams, at: int, given: int):
    self._streams, self._at, self._given = streams, at, given
    self._asked = self._closed = self._drop = False
    # Held until something is pushed; and how often, for rows being taken.
    self._halted, self._interrupts = False, 0
    self._waiting: list[list[int]] = [[] for _ in streams.layout.streams]
    self._anew = np.zeros(streams.layout.count, bool)
    self._pushed = np.zeros(streams.layout.count, int)
    self._head = np.zeros(streams.layout.count, int)
    self._unseen: deque[Row] = deque()
    self._counts = np.zeros(streams.layout.count, int)
    self._rows = 0
    self._texts = [""] * streams.layout.count
    tokenizer = streams.tokenizer
    self._readers = (None if tokenizer is None else
                     [tokenizer.stream() for _ in streams.layout.streams])
    self.passes = self.accepted = 0
    self.over = False

  @property
  def count(self) -> int:
    """Rows that are there so far."""
    return self._rows

  def push(self, stream: str, words: Words) -> None:
    """Gives a stream something to read, a token a row.

    Streams that have ended and that it can reach are written again, and all of
    them may say `max_new_tokens` anew. Words for a stream that is written are
    put into the model's mouth.

    Raises:
      InputError: the session is closed, or over.
    """
    streams = self._streams
    at = streams.layout.place(stream)
    ids = streams._ids(words, streams.layout.by_word)
    if self._closed:
      raise InputError("the session is closed; open another")
    if self.over:
      raise InputError(
          f"the session is over after {self._rows} rows: its table is full, or "
          "a stream has ended it; open another, or give Streams more room")
    if ids:
      with streams._mail:
        self._waiting[at] += ids
        self._anew[at], self._halted = True, False

  def interrupt(self) -> None:
    """Stops the rows after the one being written; what waits is forgotten.

    The table stays as it is, and `rows` gives none until something is pushed,
    or `resume` is called.
    """
    with self._streams._mail:
      self._interrupts += 1
      self._halted = self._drop = True
      self._waiting = [[] for _ in self._waiting]
      self._anew[:] = False

  def resume(self) -> None:
    """Lets `rows` go on behind an interrupt as if there had been none."""
    with self._streams._mail:
      self._halted = False

  def rows(self, stride: int = 1) -> Iterator[Row]:
    """Yields rows, those that were given first, and writes more of them.

    It ends when nothing is left to be read or written, or at an interrupt, and
    may be called again when something is pushed.

    Args:
      stride: passes at most between two looks at what was pushed.
    """
    self._asked, interrupts = True, self._interrupts

    def stopped() -> bool:
      return self._halted or self._interrupts != interrupts
    try:
      while not self._closed:
        while self._unseen and not stopped():
          yield self._unseen.popleft()
        if stopped():
          return
        more = self._streams._advance(self, stride)
        if not more and not self._unseen:
          return
    finally:
      self._asked = False

  def text(self, stream: str) -> str:
    """What a stream has said so far, silence left out."""
    return self._texts[self._streams.layout.place(stream)]

  def close(self) -> None:
    """Makes room for another session."""
    self._streams._close(self)

  def __enter__(self) -> "Session":
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def _feed(self, batch: state.StreamState) -> state.StreamState:
    """Moves what waits to the device, as much as there is room for."""
    for stream, ids in enumerate(self._waiting):
      while some := ids[:min(_PUSH, self._room(stream))]:
        padded = np.zeros(_PUSH, np.int32)
        padded[:len(some)] = some
        batch = loop.push(
            self._streams.layout, batch, np.int32(self._at), np.int32(stream),
            padded, np.int32(len(some)), self._anew[stream])
        self._anew[stream] = False
        self._pushed[stream] += len(some)
        del ids[:len(some)]
    return batch

  def _room(self, stream: int) -> int:
    return _QUEUE - int(self._pushed[stream] - self._head[stream])

  def _known(self) -> int:
    """Rows that can be written before more has to come from the host.

    One less than words there are, so that none seems to be the last.
    """
    return min((_QUEUE - self._room(stream) - 1
                for stream, ids in enumerate(self._waiting) if ids),
               default=2**30)

  def _take(self, seen: Mapping[str, np.ndarray]) -> None:
    """Reads the rows that are new."""
    at, layout_ = self._at, self._streams.layout
    self.passes = int(seen["passes"][at])
    self.accepted = int(seen["accepted"][at])
    self.over = bool(seen["over"][at])
    self._head = seen["head"][at].astype(int)
    for number in range(self._rows, int(seen["row"][at]) + 1):
      tokens, texts, logprobs = [], [], []
      for stream in range(layout_.count):
        token, logprob = None, None
        if seen["filled"][at, number, stream]:
          place = self._counts[stream]
          token = int(seen["texts"][at, stream, place])
          noted = float(seen["logprobs"][at, stream, place])
          logprob = None if math.isnan(noted) else noted
          self._counts[stream] += 1
        tokens.append(token)
        logprobs.append(logprob)
        texts.append(self._read(stream, token))
      self._unseen.append(Row(number, layout_.names, tuple(tokens),
                              tuple(texts), tuple(logprobs),
                              number < self._given))
    self._rows = int(seen["row"][at]) + 1

  def _read(self, stream: int, token: int | None) -> str:
    if token is None or token == self._streams.layout.silence:
      return ""
    if self._readers is None:
      return ""
    text = self._readers[stream].push(token)
    self._texts[stream] += text
    return text


@functools.partial(jax.jit, static_argnames="layout")
def _view(layout, batch):
  """What the host reads of a batch, in one transfer."""
  lines = batch.lines
  return dict(
      texts=lines.texts, filled=lines.filled, row=lines.row,
      logprobs=lines.logprobs, head=lines.queue.head,
      going=state.going(layout, lines), over=state.over(lines),
      passes=batch.passes, accepted=batch.accepted)


def _bucket(length: int, chunk: int) -> int:
  """A size that programs are compiled for: small, or a multiple of `chunk`."""
  size = 1
  while size < min(length, chunk):
    size *= 4
  size = min(size, chunk)
  while size < length:
    size *= 2
  return size
