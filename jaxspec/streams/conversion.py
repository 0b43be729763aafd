# SPDX-License-Identifier: Apache-2.0
"""Ordinary data as tables of streams, to be learnt from.

A conversation becomes columns: the answer begins `wait` words after the
question, and goes on word by word while the question is still being read
(wait-k, arXiv:1810.08398), so that no word of the answer stands beside, or
before, words of the question it should have waited for. Remarks on the answer
become a stream that follows it in the same way, and a table that was written
as one is taken as it is.

Words begin where a token begins with white space. Between streams the clock is
the row: a word takes as many rows as it has tokens.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxspec.errors import InputError
from jaxspec.streams.layout import StreamLayout


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of tokens.

  Attributes:
    live: cells that hold a token.
    learnt: cells whose token the model should have said, from the rows before.
  """

  tokens: Int[np.ndarray, "n C"]
  live: Bool[np.ndarray, "n C"]
  learnt: Bool[np.ndarray, "n C"]


@dataclasses.dataclass(frozen=True)
class Follow:
  """A stream that keeps some words behind another.

  Attributes:
    leader: the stream it waits for.
    wait: its j-th word, from 0, needs j + `wait` words of the leader.
  """

  leader: str
  wait: int


def side_by_side(layout: StreamLayout, columns: Mapping[str, Sequence[int]],
                 follows: Mapping[str, Follow], *,
                 begins: Callable[[int], bool],
                 pieces: Callable[[Sequence[int]], Set[str]] | None = None,
                 given: Mapping[str, Sequence[int]] | None = None,
                 ends: Set[str] = frozenset()) -> Table:
  """What streams say, in the rows in which they can say it, by `aligned`.

  Where an empty cell is silence, a stream may pause for words it needs; where
  it is no token, it runs on once it began, late enough never to overtake.

  Args:
    columns: the tokens of each stream. Those that follow none begin at once.
    pieces: see `aligned`.
    given: what streams go on from; not learnt. They end in the row before all
      others begin, the first if nothing is given: in a session such rows are
      there before it writes.
    ends: streams that stop behind their last token. What is silent there was
      not said by the model, and is not learnt.

  Returns:
    A table in which the streams that are read are not learnt. Where a layout
    has a silence token, empty cells hold it, and are learnt like any other.

  Raises:
    InputError: streams that follow each other, or one that by the counts of
      the layout would not see what it waited for.
  """
  given = given or {}
  head = max(1, *map(len, given.values())) if given else 1
  rows: dict[str, list[int]] = {}

  def place(name: str, behind: tuple[str, ...] = ()) -> list[int]:
    if name in behind:
      raise InputError(f"streams {', '.join(behind)} follow each other in a "
                       "circle; let one of them follow none")
    if name in rows:
      return rows[name]
    column, follow = columns[name], follows.get(name)
    if follow is None or follow.leader not in columns:
      rows[name] = list(range(head, head + len(column)))
      return rows[name]
    found = aligned(columns[follow.leader], column, wait=follow.wait,
                    begins=begins, start=head, pieces=pieces,
                    rows=place(follow.leader, (*behind, name)))
    if layout.silence is None:
      # No pauses: begin when even the last word will have waited enough.
      start = max((row - at for at, row in enumerate(found)), default=head)
      found = list(range(start, start + len(column)))
      late = start - head - int(layout.leads[layout.place(name)])
      if layout.positions == "counters" and late > 0:
        raise InputError(
            f"stream {name} begins {start - head} rows late, and by its count "
            "it would not see what it waited for; use "
            f"--lead={name}={start - head} or more, or --position_rule=rows")
    rows[name] = found
    return found

  height = max((place(name)[-1] + 1 for name in columns if columns[name]),
               default=head)
  tokens = np.zeros((height, layout.count), np.int32)
  live = np.zeros(tokens.shape, bool)
  learnt = np.zeros(tokens.shape, bool)
  for name, words in given.items():
    at, first = layout.place(name), head - len(words)
    tokens[first:head, at] = words
    live[first:head, at] = True
  for name, column in columns.items():
    at = layout.place(name)
    tokens[rows[name], at] = column
    live[rows[name], at] = learnt[rows[name], at] = True
  if layout.silence is not None:
    silent = ~live
    for name in ends:
      if columns.get(name):
        silent[rows[name][-1]:, layout.place(name)] = False
    tokens = np.where(live, tokens, layout.silence).astype(np.int32)
    learnt |= silent
    live[:] = True
  learnt[:head] = False
  _unlearn(layout, live, learnt)
  return Table(tokens, live, learnt)


def _unlearn(layout: StreamLayout, live: Bool[np.ndarray, "n C"],
             learnt: Bool[np.ndarray, "n C"]) -> None:
  """Takes off what no model says: streams that are read, and beginnings."""
  learnt[:1] = False                    # nothing comes before it
  for at in range(layout.count):
    if at not in layout.written:
      learnt[:, at] = False
    if layout.silence is None:
      # What a stream says first is drawn from nothing: it must be given.
      learnt[np.flatnonzero(live[:, at])[:1], at] = False


def aligned(leader: Sequence[int], column: Sequence[int], *, wait: int,
            begins: Callable[[int], bool], rows: Sequence[int] | None = None,
            start: int = 0,
            pieces: Callable[[Sequence[int]], Set[str]] | None = None
            ) -> list[int]:
  """The row of each token of a column that keeps `wait` words behind another.

  Its j-th word begins when `j + wait` words of the leader have been read, and
  not before the word in front of it is said.

  Args:
    rows: of the leader's tokens; by default one behind the other.
    start: the first row there is for it.
    pieces: what a word is made of. A word waits for those of its pieces that
      the leader says as well: what is taken from it comes after it.
  """
  if rows is None:
    rows = range(start, start + len(leader))
  words = _words(leader, begins)
  ends = [rows[last - 1] + 1 for _, last in words]
  said: dict[str, int] = {}
  if pieces is not None:
    for number, (first, last) in enumerate(words, 1):
      for piece in pieces(leader[first:last]):
        said.setdefault(piece, number)
  found, free = [], start
  for number, (first, last) in enumerate(_words(column, begins)):
    needed = number + wait
    if pieces is not None:
      needed = max([needed, *(said[piece]
                              for piece in pieces(column[first:last])
                              if piece in said)])
    needed = min(needed, len(ends))
    free = max(free, ends[needed - 1] if needed else start)
    found += range(free, free + last - first)
    free += last - first
  return found


def _words(tokens: Sequence[int], begins: Callable[[int], bool]
           ) -> list[tuple[int, int]]:
  """Where words begin and end."""
  heads = [at for at, token in enumerate(tokens) if at == 0 or begins(token)]
  return list(zip(heads, [*heads[1:], len(tokens)])) if heads else []


# Numbers, and words that say something.
_PIECES = re.compile(r"\d[\d,]*(?:\.\d+)?|[^\W\d]{4,}")


def telling(text: str) -> frozenset[str]:
  """The numbers and the longer words of a text, in one spelling."""
  return frozenset(piece.replace(",", "").lower()
                   for piece in _PIECES.findall(text))


def from_json(layout: StreamLayout, encode: Callable[[str], Sequence[int]],
              rows: Sequence[Any]) -> Table:
  """A table that was written as one: objects with a cell for each stream.

  A cell of several tokens makes its row as high as the longest of its cells.
  An empty one, or none, is silence.

  Raises:
    InputError: a row that is no object, or a stream that is not there.
  """
  columns: list[list[int | None]] = [[] for _ in layout.streams]
  for number, row in enumerate(rows):
    if not isinstance(row, Mapping):
      raise InputError(f"row {number} of a table must be an object with words "
                       f"for {', '.join(layout.names)}, got {row!r}")
    cells = {layout.place(name): list(encode(text)) if text else []
             for name, text in row.items()}
    height = max(map(len, cells.values()), default=0)
    for at, column in enumerate(columns):
      cell = cells.get(at, [])
      column.extend([*cell, *[None] * (height - len(cell))])
  tokens = np.array([[0 if t is None else t for t in column]
                     for column in columns], np.int32).T
  live = np.array([[t is not None for t in column] for column in columns]).T
  if not len(tokens):
    raise InputError("a table has no rows; leave it out")
  learnt = live.copy()
  if layout.silence is not None:
    tokens = np.where(live, tokens, layout.silence).astype(np.int32)
    live, learnt = np.ones_like(live), np.ones_like(live)
  _unlearn(layout, live, learnt)
  return Table(tokens, live, learnt)


# What a line of data calls what is read first, and what is written first.
_READ = ("question", "prompt", "user")
_WRITTEN = ("answer", "completion", "assistant")


def texts_of(layout: StreamLayout, item: Any,
             render: Mapping[str, Callable[[Mapping[str, Any]], str]]
             ) -> list[dict[str, str]]:
  """What the streams say, of an object of ordinary data.

  Args:
    item: has a text under the names of streams; or `question` (or `prompt`)
      for the first that is read, and `answer` (or `completion`) for the first
      that is written; or a chat in `messages`, each exchange of which becomes
      a conversation of its own.
    render: makes the text of some streams of what the object holds.

  Raises:
    InputError: it has nothing for a stream.
  """
  if not isinstance(item, Mapping):
    raise InputError("it must be an object, or a list of rows")
  if "messages" in item:
    turns = item["messages"]
    try:
      pairs = [(a["content"], b["content"]) for a, b in zip(turns, turns[1:])
               if (a["role"], b["role"]) == ("user", "assistant")]
    except (KeyError, TypeError) as e:
      raise InputError("messages must be objects with role and content") from e
    if not pairs:
      raise InputError("its messages hold no user's with an assistant's answer")
    rest = {name: value for name, value in item.items() if name != "messages"}
    return [one for question, answer in pairs for one in texts_of(
        layout, rest | {"question": question, "answer": answer}, render)]
  first_read = next((s.name for s in layout.streams if not s.written), None)
  first_written = layout.names[layout.written[0]]
  found = {}
  for name in layout.names:
    keys = [name, *(_READ if name == first_read else ()),
            *(_WRITTEN if name == first_written else ())]
    key = next((key for key in keys if key in item), None)
    if name in render:
      found[name] = render[name](item)
    elif key is not None and isinstance(item[key], str):
      found[name] = item[key]
    else:
      raise InputError(f"it must have a text for stream {name}, called "
                       f"{' or '.join(dict.fromkeys(keys))}, and has "
                       f"{', '.join(item) or 'none'}")
  return [found]


def read(path: str | pathlib.Path,
         convert: Callable[[Any], Sequence[Table]]) -> list[Table]:
  """Reads a JSONL file, line by line.

  Args:
    convert: makes tables of what a line holds.

  Raises:
    InputError: the file cannot be read; the message names the line.
  """
  file, tables = pathlib.Path(path).expanduser(), []
  try:
    lines = file.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(f"{file} cannot be read ({e}); name a JSONL file") from e
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      tables += convert(json.loads(line))
    except (ValueError, RecursionError) as e:
      raise InputError(f"{file}, line {number}: {e}") from e
  return tables


def targets(layout: StreamLayout, table: Table
            ) -> tuple[Int[np.ndarray, "n C"], Bool[np.ndarray, "n C"]]:
  """What each cell should say: the next token of its stream.

  Returns:
    The targets, and for which cells there is one to be learnt. With silence it
    stands in the next row; without, where the stream goes on.
  """
  wanted = np.zeros_like(table.tokens)
  weigh = np.zeros(table.tokens.shape, bool)
  for at in range(layout.count):
    rows = np.flatnonzero(table.live[:, at])
    wanted[rows[:-1], at] = table.tokens[rows[1:], at]
    weigh[rows[:-1], at] = table.learnt[rows[1:], at]
  return wanted, weigh


def pack(sizes: Sequence[int], room: int) -> list[list[int]]:
  """Which things share a block of `room`; first fit, the largest first.

  What shares a block must be told apart by a mask. What is larger comes alone,
  and is cut by whoever lays it out.
  """
  blocks: list[tuple[int, list[int]]] = []
  for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
    for number, (used, members) in enumerate(blocks):
      if used + sizes[at] <= room:
        blocks[number] = (used + sizes[at], [*members, at])
        break
    else:
      blocks.append((sizes[at], [at]))
  return [members for _, members in blocks]


def word_beginnings(tokenizer: Any, vocab: int) -> Bool[np.ndarray, "V"]:
  """Which tokens begin a word: their text begins with white space."""
  texts = (tokenizer.decode([token]) for token in range(vocab))
  return np.array([text[:1].isspace() for text in texts])
