# SPDX-License-Identifier: Apache-2.0
"""Ordinary data as tables of streams, to be learnt from.

A conversation becomes two columns: the answer begins `wait` words after the
question, and goes on word by word while the question is still being read
(wait-k, arXiv:1810.08398), so that no word of the answer stands beside, or
before, words of the question it should have waited for. A column of remarks
becomes an audit stream, and a table that was written as one is taken as it is.

Words begin where a token begins with white space. Between streams the clock is
the row: a word takes as many rows as it has tokens.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def from_columns(layout: StreamLayout, columns: Mapping[str, Sequence[int]],
                 starts: Mapping[str, int] | None = None, *,
                 given: Mapping[str, int] | None = None) -> Table:
  """Puts each stream's tokens below one another.

  Args:
    starts: the row in which each column begins; 0 where nothing is said.
    given: how many of a column's first tokens are not the model's to learn.

  Returns:
    A table in which the streams that are read are not learnt. Where a layout
    has a silence token, empty cells hold it, and are learnt like any other.
  """
  starts, given = starts or {}, given or {}
  places = {layout.place(name): name for name in columns}
  height = max((starts.get(name, 0) + len(column)
                for name, column in columns.items()), default=0)
  tokens = np.zeros((height, layout.count), np.int32)
  live = np.zeros(tokens.shape, bool)
  learnt = np.zeros(tokens.shape, bool)
  for at, name in places.items():
    start, column = starts.get(name, 0), columns[name]
    rows = slice(start, start + len(column))
    tokens[rows, at] = column
    live[rows, at] = True
    learnt[start + given.get(name, 0):start + len(column), at] = True
  if layout.silence is not None:
    tokens = np.where(live, tokens, layout.silence).astype(np.int32)
    learnt |= ~live
    live[:] = True
  learnt[:1] = False                    # nothing comes before it
  if layout.silence is None:
    # What a stream says first is drawn from nothing: it must be given.
    for at in range(layout.count):
      learnt[np.flatnonzero(live[:, at])[:1], at] = False
  read = [at for at in range(layout.count) if at not in layout.written]
  learnt[:, read] = False
  return Table(tokens, live, learnt)


def aligned(question: Sequence[int], answer: Sequence[int], *, wait: int,
            begins: Callable[[int], bool]) -> list[int]:
  """The row of each token of an answer that keeps `wait` words behind.

  The j-th word of the answer begins when `j + wait` words of the question have
  been read, and not before the word in front of it is said.
  """
  heads = [at for at, token in enumerate(question) if at == 0 or begins(token)]
  ends = [*heads[1:], len(question)] if heads else []
  rows, word, free = [], -1, 0
  for at, token in enumerate(answer):
    if at == 0 or begins(token):
      word += 1
      needed = min(word + wait, len(ends))
      free = max(free, ends[needed - 1] if needed else 0)
    rows.append(free)
    free += 1
  return rows


def conversation(layout: StreamLayout, question: Sequence[int],
                 answer: Sequence[int], *, wait: int,
                 begins: Callable[[int], bool],
                 first: Sequence[int] = (), audit: Sequence[int] = (),
                 user: str = "user", assistant: str = "assistant",
                 auditor: str = "auditor") -> Table:
  """A question and its answer side by side, by `aligned`.

  Where an empty cell is silence, an answer may pause for words it needs; where
  it is no token, it runs on once it began, late enough never to overtake.

  Args:
    first: what the answer goes on from, and the audit likewise; not learnt.
      It stands in the rows before the answer begins to wait.
    audit: remarks that begin one row behind the answer.

  Raises:
    InputError: by the counts of the layout the answer would not see what it
      waited for.
  """
  rows = aligned(question, answer, wait=wait, begins=begins)
  lead = len(first)
  if layout.silence is None:
    # No pauses: begin when even the last word will have waited enough.
    start = max((row - at for at, row in enumerate(rows)), default=0)
    rows = [start + at for at in range(len(answer))]
  start = rows[0] if rows else 0
  ahead = int(layout.leads[layout.place(assistant)])
  if layout.positions == "counters" and start > ahead:
    raise InputError(
        f"an answer that begins {start} rows late sees of its question only "
        f"what has a lower count, and its count is {ahead} ahead; use "
        "positions of rows, or a larger lead")
  column = _spread(answer, rows, start, layout.silence)
  columns = {user: question, assistant: [*first, *column]}
  starts = {user: lead, assistant: start}
  given = {assistant: lead}
  if audit:
    columns[auditor] = [*first, *audit]
    starts[auditor] = start + 1
    given[auditor] = lead
  return from_columns(layout, columns, starts, given=given)


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
  learnt[:1] = False
  for at in range(layout.count):
    if at not in layout.written:
      learnt[:, at] = False
    if layout.silence is None:
      learnt[np.flatnonzero(live[:, at])[:1], at] = False
  return Table(tokens, live, learnt)


def read(path: str | pathlib.Path, layout: StreamLayout,
         encode: Callable[[str], Sequence[int]]) -> list[Table]:
  """Reads tables, one JSON list of rows a line.

  Raises:
    InputError: the file cannot be read; the message names the line.
  """
  file, tables = pathlib.Path(path).expanduser(), []
  try:
    lines = file.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(f"{file} cannot be read ({e}); name a JSONL file of "
                     "tables") from e
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      rows = json.loads(line)
      if not isinstance(rows, list):
        raise InputError("it must be a list of rows")
      tables.append(from_json(layout, encode, rows))
    except ValueError as e:
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


def pack(tables: Sequence[Table], height: int, order: Any = None
         ) -> Iterator[list[int]]:
  """Which tables share a block of `height` rows; first fit, tallest first.

  What shares a block must be told apart by a mask. A table that is taller
  comes alone, and is cut by whoever lays it out.

  Args:
    order: by which blocks are given; None for the order they were made in.
  """
  blocks: list[tuple[int, list[int]]] = []
  heights = [len(t.tokens) for t in tables]
  for at in sorted(range(len(tables)), key=lambda at: -heights[at]):
    for number, (used, members) in enumerate(blocks):
      if used + heights[at] <= height:
        blocks[number] = (used + heights[at], [*members, at])
        break
    else:
      blocks.append((heights[at], [at]))
  numbers = range(len(blocks)) if order is None else order.permutation(
      len(blocks))
  for number in numbers:
    yield blocks[number][1]


def _spread(answer: Sequence[int], rows: Sequence[int], start: int,
            silence: int | None) -> list[int]:
  """A column with the answer's tokens in their rows, silence between."""
  if not rows:
    return []
  column = [0 if silence is None else silence] * (rows[-1] + 1 - start)
  for token, row in zip(answer, rows):
    column[row - start] = token
  return column


def word_beginnings(tokenizer: Any, vocab: int) -> Bool[np.ndarray, "V"]:
  """Which tokens begin a word: their text begins with white space."""
  texts = (tokenizer.decode([token]) for token in range(vocab))
  return np.array([text[:1].isspace() for text in texts])
