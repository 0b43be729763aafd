# SPDX-License-Identifier: Apache-2.0
"""Which streams there are, and who may read whom: static data.

Time is rows, and roles are columns (arXiv:2605.12460). A pass takes a row, one
token of each stream, and gives the next token of every stream that is written.
A token sees what stands in earlier rows of the streams it may read, and itself;
never its peers in the same row.

Two layouts were published. In `reading` and `auditing` each stream counts its
own tokens, a stream with nothing to say is simply left out of a row, and a
token sees of other streams only what has a lower count than its own. In
`thoughts` the row is the position of all its tokens, and an empty cell holds
the silence token, which is a token like any other.
"""

import dataclasses
import functools
import json
import math
import pathlib
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt32

from jaxspec.errors import InputError, nearest

# Streams are bits of a word; one of them is the prefix.
MOST = 31
_STOPS = ("stream", "session", "never")
_POSITIONS = ("rows", "counters")


@dataclasses.dataclass(frozen=True)
class Stream:
  """One column.

  Attributes:
    name: a word, as it is called on the command line.
    written: whether the model writes it; else it is fed from outside.
    id: its row in the table of stream embeddings; also what tells its noise
      from that of others. None takes its place among the streams.
    reads: names of the streams it may read beside itself; None for all.
    silence_penalty: taken off the logit of the silence token, while nothing is
      being read that can reach it (see `StreamLayout.ramp`).
    stop: what an end token in it ends: the "stream", the whole "session", or
      "never" anything.
    lead: how far its count is ahead of the others' from the start; for a
      position rule of "counters".
  """

  name: str
  written: bool = True
  id: int | None = None
  reads: tuple[str, ...] | None = None
  silence_penalty: float = 0.0
  stop: str = "stream"
  lead: int = 0


@dataclasses.dataclass(frozen=True)
class StreamLayout:
  """The columns of a table, and its rules.

  Attributes:
    positions: "rows", all tokens of a row stand at its number; or "counters",
      each at the number of tokens its own stream had before.
    silence: the token of an empty cell; None where an empty cell is no token.
    keep_silence: whether keys of silent cells are kept. Those that are not are
      seen by no later token, and take no room in a cache (but see `apart`).
    ramp: rows without input after which silence penalties are at their full
      weight; they grow from nothing.
    quiet: rows of nothing but silence, with nothing left to be read, after
      which a session waits for more; 0 for never.
    prefix_id: the row in the table of stream embeddings for the text that all
      streams share before they begin; None adds nothing.
    by_word: whether text is read word by word, a space before each, as it was
      where the model learnt from cells.
  """

  streams: tuple[Stream, ...]
  positions: str = "rows"
  silence: int | None = None
  keep_silence: bool = True
  ramp: int = 5
  quiet: int = 0
  prefix_id: int | None = None
  by_word: bool = False

  def __post_init__(self):
    names = self.names
    if not 1 <= len(names) <= MOST:
      raise InputError(f"a layout has 1 to {MOST} streams, got {len(names)}")
    if len(set(names)) < len(names):
      raise InputError(f"streams need names of their own, got "
                       f"{', '.join(names)}")
    if not any(s.written for s in self.streams):
      raise InputError("a layout needs a stream that is written; all of "
                       f"{', '.join(names)} are read")
    _one_of("positions", self.positions, _POSITIONS)
    if self.silence is None and not self.keep_silence:
      raise InputError("keep_silence=False is for layouts with a silence "
                       "token; name one, or leave it out")
    for name in ("ramp", "quiet"):
      if getattr(self, name) < 0:
        raise InputError(f"{name} must be at least 0, got "
                         f"{getattr(self, name)}")
    for stream in self.streams:
      _one_of(f"stop of stream {stream.name}", stream.stop, _STOPS)
      for name in stream.reads or ():
        if name not in names:
          raise InputError(f"stream {stream.name} reads {name!r}, and there "
                           f"are only {', '.join(names)}."
                           + nearest(name, names))
      if stream.lead and self.positions != "counters":
        raise InputError(f"stream {stream.name} has a lead, and positions are "
                         "rows, which are the same for all; use counters")
      if stream.silence_penalty and self.silence is None:
        raise InputError(f"stream {stream.name} has a silence penalty, and "
                         "the layout has no silence token; name one")

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(s.name for s in self.streams)

  @property
  def count(self) -> int:
    """How many streams there are (C)."""
    return len(self.streams)

  @functools.cached_property
  def ids(self) -> Int[np.ndarray, "C"]:
    return np.array([at if s.id is None else s.id
                     for at, s in enumerate(self.streams)], np.int32)

  @functools.cached_property
  def written(self) -> tuple[int, ...]:
    """The places of the streams that the model writes."""
    return tuple(at for at, s in enumerate(self.streams) if s.written)

  @functools.cached_property
  def writes(self) -> Bool[np.ndarray, "C"]:
    """Whether the model writes each stream."""
    return np.array([s.written for s in self.streams])

  @functools.cached_property
  def leads(self) -> Int[np.ndarray, "C"]:
    return np.array([s.lead for s in self.streams], np.int32)

  @functools.cached_property
  def penalties(self) -> Float[np.ndarray, "C"]:
    return np.array([s.silence_penalty for s in self.streams], np.float32)

  @functools.cached_property
  def visible(self) -> Bool[np.ndarray, "X X"]:
    """Whether a reader (row) may see a stream (column); the prefix is last.

    All read the prefix, which reads nothing but itself.
    """
    seen = np.eye(self.count + 1, dtype=bool)
    seen[:, -1] = True
    for at, stream in enumerate(self.streams):
      for name in self.names if stream.reads is None else stream.reads:
        seen[at, self.names.index(name)] = True
    return seen

  @functools.cached_property
  def words(self) -> UInt32[np.ndarray, "X"]:
    """`visible`, the streams of each reader as bits of a word."""
    bits = np.uint32(1) << np.arange(self.count + 1, dtype=np.uint32)
    return (self.visible * bits[None]).sum(axis=1).astype(np.uint32)

  @functools.cached_property
  def reaches(self) -> Bool[np.ndarray, "X X"]:
    """Whether a stream (column) can have any effect on a reader (row).

    What a reader may not see can still reach it through a stream that sees it
    and that it sees. Where this is False, nothing does.
    """
    seen = self.visible
    for middle in range(len(seen)):
      seen = seen | (seen[:, middle:middle + 1] & seen[middle:middle + 1])
    return seen

  @functools.cached_property
  def apart(self) -> bool:
    """Whether there is a stream that must have no effect on another."""
    return not self.reaches[:-1, :-1].all()

  def place(self, name: str) -> int:
    """Which column is called so.

    Raises:
      InputError: none is.
    """
    if name not in self.names:
      raise InputError(f"there is no stream {name!r}, only "
                       f"{', '.join(self.names)}." + nearest(name, self.names))
    return self.names.index(name)

  def permuted(self, order: Sequence[int]) -> "StreamLayout":
    """The same streams, with their ids, in another order."""
    return dataclasses.replace(self, streams=tuple(
        dataclasses.replace(self.streams[at], id=int(self.ids[at]))
        for at in order))

  def without(self, reader: str, *hidden: str) -> "StreamLayout":
    """The same, but that `reader` may not see the `hidden` streams."""
    at = self.place(reader)
    for name in hidden:
      if self.place(name) == at:
        raise InputError(f"stream {reader} cannot be hidden from itself")
    reads = self.streams[at].reads
    allowed = self.names if reads is None else reads
    return self._changed(at, reads=tuple(
        name for name in allowed if name not in (*hidden, reader)))

  def penalized(self, name: str, text: str) -> "StreamLayout":
    """The same, with another silence penalty of a stream, as flags give it."""
    at = self.place(name)
    try:
      penalty = float(text)
    except ValueError:
      penalty = math.nan
    if not 0 <= penalty < math.inf:
      raise InputError(f"the silence penalty of stream {name} must be a number "
                       f"from 0 on, got {text!r}")
    return self._changed(at, silence_penalty=penalty)

  def leading(self, name: str, text: str) -> "StreamLayout":
    """The same, with another lead of a stream, as flags give it."""
    at = self.place(name)
    if not text.isdecimal():
      raise InputError(f"the lead of stream {name} must be a whole number from "
                       f"0 on, got {text!r}")
    return self._changed(at, lead=int(text))

  def _changed(self, at: int, **fields: Any) -> "StreamLayout":
    new = dataclasses.replace(self.streams[at], **fields)
    return dataclasses.replace(self, streams=(
        *self.streams[:at], new, *self.streams[at + 1:]))


def single() -> StreamLayout:
  """One stream that is written: ordinary decoding."""
  return StreamLayout((Stream("text"),))


def reading(*, positions: str = "counters") -> StreamLayout:
  """Solving while reading (sections 5 and 6 of the paper): two streams.

  Args:
    positions: "counters", as published; by "rows" an answer that begins late
      sees all that was read before it.
  """
  return StreamLayout(
      (Stream("user", written=False, id=1), Stream("assistant", id=2)),
      positions=positions, prefix_id=0)


def auditing(*, positions: str = "counters") -> StreamLayout:
  """Auditing while solving: a third stream reads both, and is read by none."""
  return StreamLayout(
      (Stream("user", written=False, id=1, reads=("assistant",)),
       Stream("assistant", id=2, reads=("user",)), Stream("auditor", id=3)),
      positions=positions, prefix_id=0)


def thoughts(silence: int = 481, *, keep_silence: bool = True
             ) -> StreamLayout:
  """Ten streams (section 7): a user, an output and eight that think aloud.

  Args:
    silence: the id of " -"; 481 in the tokenizer of Qwen3.
  """
  aloud = ("analytical", "skeptical", "intuitive", "between", "curious",
           "void", "instinct", "synthesis")
  return StreamLayout(
      (Stream("user", written=False),
       Stream("output", silence_penalty=10.0, stop="never"),
       *(Stream(name, stop="never") for name in aloud)),
      silence=silence, keep_silence=keep_silence, quiet=10, by_word=True)


def parse(text: str, tokenizer: Any = None) -> StreamLayout:
  """Finds the layout that `text` names: a published one, `single`, or a file.

  A file holds the fields of a `StreamLayout` as JSON. The silence of `thoughts`
  is the tokenizer's own token for " -".

  Raises:
    InputError: there is no such layout, or no such token.
  """
  if text.endswith(".json"):
    return _read(pathlib.Path(text).expanduser())
  known = dict(reading=reading, auditing=auditing, single=single)
  if text in known:
    return known[text]()
  if text != "thoughts":
    raise InputError(f"layout {text!r} is unknown; there are "
                     f"{', '.join(known)}, thoughts, and files that end in "
                     f".json.{nearest(text, [*known, 'thoughts'])}")
  if tokenizer is None:
    return thoughts()
  ids = tokenizer.encode(" -", special=False)
  if len(ids) != 1:
    raise InputError("layout thoughts is silent by the token ' -', and this "
                     f"tokenizer makes {len(ids)} of it; use a model that was "
                     "trained for it")
  return thoughts(ids[0])


def _read(path: pathlib.Path) -> StreamLayout:
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as e:
    raise InputError(f"layout {path} cannot be read ({e}); it must be JSON"
                     ) from e
  return from_fields(fields, str(path))


def fields_of(layout: StreamLayout) -> dict[str, Any]:
  """The layout as `from_fields` and JSON files have it."""
  return dataclasses.asdict(layout)


def from_fields(fields: Any, path: str) -> StreamLayout:
  """The layout of these fields.

  Args:
    path: where they come from, for errors.

  Raises:
    InputError: a field is missing, unknown or of another kind.
  """
  try:
    fields = dict(fields)
    streams = tuple(
        Stream(**_fields(path, Stream, s)) for s in fields.pop("streams"))
    return StreamLayout(streams, **_fields(path, StreamLayout, fields))
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise InputError(f"layout {path} must be an object with a list of streams, "
                     f"each with a name ({e})") from e


def _fields(path: str, kind: Any, given: Any) -> dict[str, Any]:
  """The fields of a dataclass, as JSON gives them."""
  known = {f.name: f for f in dataclasses.fields(kind)}
  for name in given:
    if name not in known:
      raise InputError(f"layout {path}: {kind.__name__} has no field {name!r}."
                       + nearest(name, known))
  fields = {name: tuple(v) if isinstance(v, list) else v
            for name, v in given.items()}
  for name, value in fields.items():
    wanted = typing.get_type_hints(kind)[name]
    plain = typing.get_args(wanted) or (wanted,)
    if typing.get_origin(wanted) is tuple:
      plain = (tuple,)
    kinds = tuple(typing.get_origin(k) or k for k in plain)
    fits = isinstance(value, kinds) or (float in kinds
                                        and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in kinds):
      raise InputError(f"layout {path}: {name} must be "
                       f"{getattr(wanted, '__name__', wanted)}, got {value!r}")
  return fields


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise InputError(f"{name} must be {' or '.join(known)}, got {value!r}."
                     + nearest(value, known))
