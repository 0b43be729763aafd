# SPDX-License-Identifier: Apache-2.0
"""Delays of tables made by hand, and of what a session wrote."""

import numpy as np
import pytest

from jaxspec.options import Options
from jaxspec.streams import delay
from jaxspec.streams import layout as layouts
from jaxspec.streams.conversion import Table
from jaxspec.streams.layout import Stream, StreamLayout
from jaxspec.streams.session import Streams
from tests.jaxspec.streams.tables import tinted

TALK = StreamLayout((Stream("user", written=False), Stream("out"),
                     Stream("think")), silence=1)


def table(*columns):
  tokens = np.array(columns, np.int32).T
  return Table(np.maximum(tokens, 0), tokens >= 0, tokens < -1)


def test_rows_from_the_last_word_read_to_the_first_said():
  made = table([1, 5, 6, 7, 1, 1], [1, 1, 8, 9, 9, 9], [1, 1, 1, 1, 1, 4])
  assert delay.delays(TALK, made) == {"out": -1, "think": 2}
  # What was given is nothing the model said, and silence says nothing.
  made = table([1, 5, 1, 1], [3, 1, 1, 1], [3, 1, 4, 1])
  assert delay.delays(TALK, made) == {"out": None, "think": 1}
  assert delay.delays(TALK, made, given=0) == {"out": -1, "think": -1}
  nothing = table([1, 1], [1, 4], [1, 1])
  assert delay.delays(TALK, nothing) == {"out": None, "think": None}
  holes = table([5, 6, -1, -1], [3, -1, 4, 4])
  assert delay.delays(layouts.reading(), holes) == {"assistant": 1}
  assert delay.summary([{"out": -1}, {"out": 4}, {"out": None}]) == {
      "out": dict(mean=1.5, median=1.5, early=0.5, spoke=2, tables=3)}


@pytest.mark.medium
@pytest.mark.usefixtures("quick_compiles")
def test_sessions_side_by_side_are_sessions_alone(small):
  asked = [{"user": [5, 6, 7]}, {"user": [9]}, {"user": [30, 31, 32, 33]}]
  options = Options(max_new_tokens=9)

  def converse(sessions):
    streams = Streams(tinted(small), TALK, sessions=sessions, room=24,
                      prefix_room=0)
    return delay.converse(streams, asked, options, stride=3)
  pair = converse(2)
  for one, other, words in zip(pair, converse(1), asked):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    read = one.tokens[:, 0]
    assert read[read != 1].tolist() == words["user"]
  assert len({len(t.tokens) for t in pair}) == 1      # 9 rows each, and given
  assert np.any(pair[0].tokens[:, 1:] != 1)
