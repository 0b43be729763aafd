# SPDX-License-Identifier: Apache-2.0
"""How long after the last word it read a stream says its first.

Counted in rows. In the ordinary order, read and then write, the least is 1:
the first token stands in the row behind the last that was read. A stream that
writes while it reads begins earlier, by as many rows as the number is lower.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxspec.options import Options
from jaxspec.streams.conversion import Table
from jaxspec.streams.layout import StreamLayout
from jaxspec.streams.session import Row, Session, Streams, Words


def delays(layout: StreamLayout, table: Table, given: int = 1
           ) -> dict[str, int | None]:
  """Rows from the last token that was read to the first of each stream.

  Args:
    given: rows that were there before the model wrote any.

  Returns:
    By the name of each stream that is written; None for one that says nothing,
    and for all if nothing was read.
  """
  spoken = said(layout, table)
  read = np.flatnonzero(spoken[:, ~layout.writes].any(axis=1))
  found: dict[str, int | None] = {}
  for at in layout.written:
    first = np.flatnonzero(spoken[given:, at]) + given
    found[layout.names[at]] = (int(first[0] - read[-1])
                               if len(first) and len(read) else None)
  return found


def said(layout: StreamLayout, table: Table) -> Bool[np.ndarray, "n C"]:
  """Cells that hold a token other than silence."""
  if layout.silence is None:
    return table.live
  return table.live & (table.tokens != layout.silence)


def summary(found: Sequence[Mapping[str, int | None]]
            ) -> dict[str, dict[str, float | int | None]]:
  """By stream: the `mean` and `median` delay; how often it began before all
  was read (`early`); how many of `tables` it spoke in (`spoke`)."""
  result = {}
  for name in found[0] if found else ():
    rows = [one[name] for one in found]
    spoke: list[int] = [row for row in rows if row is not None]
    result[name] = {
        "mean": float(np.mean(spoke)) if spoke else None,
        "median": float(np.median(spoke)) if spoke else None,
        "early": float(np.mean(np.array(spoke) < 1)) if spoke else None,
        "spoke": len(spoke), "tables": len(rows)}
  return result


def converse(streams: Streams, asked: Sequence[Mapping[str, Words]],
             options: Options, stride: int = 8,
             given: Mapping[str, Words] | None = None) -> list[Table]:
  """What the model says while it reads, as many at a time as there is room.

  Args:
    asked: for each table, the words of the streams that are read.
    given: the first words of streams, in all of them.
  """
  tables = []
  for at in range(0, len(asked), streams.sessions):
    sessions: list[Session] = []
    for words in asked[at:at + streams.sessions]:
      session = streams.open(given=given, options=options)
      for name, text in words.items():
        session.push(name, text)
      sessions.append(session)
    rows: list[list[Row]] = [[] for _ in sessions]
    writing = {n: session.rows(stride) for n, session in enumerate(sessions)}
    while writing:
      for number in list(writing):
        row = next(writing[number], None)
        if row is None:
          del writing[number]
        else:
          rows[number].append(row)
    tables += [_table(streams.layout, some) for some in rows]
    for session in sessions:
      session.close()
  return tables


def _table(layout: StreamLayout, rows: Sequence[Row]) -> Table:
  cells = [[-1 if t is None else t for t in row.tokens] for row in rows]
  tokens: Int[np.ndarray, "n C"] = np.array(cells, np.int32).reshape(
      len(rows), layout.count)
  live = tokens >= 0
  return Table(np.maximum(tokens, 0), live, np.zeros_like(live))
