# SPDX-License-Identifier: Apache-2.0
"""Tables from ordinary data: nothing is said too early, and what is learnt is
what the model writes."""

import dataclasses
import json

import numpy as np
import pytest

from jaxspec.errors import InputError
from jaxspec.streams import conversion
from jaxspec.streams import layout as layouts
from jaxspec.streams.layout import Stream, StreamLayout

TALK = StreamLayout((Stream("user", written=False), Stream("assistant"),
                     Stream("auditor")), silence=1)


def begins(token):
  """Tens begin a word; what is between goes on with it."""
  return token % 10 == 0


QUESTION = [10, 11, 20, 30, 31, 32, 40]          # words of 2, 1, 3, 1 tokens
ANSWER = [50, 60, 61, 70, 80]                    # of 1, 2, 1, 1


def test_each_word_waits_for_the_words_it_needs():
  rows = conversion.aligned(QUESTION, ANSWER, wait=1, begins=begins)
  # Behind 1, 2, 3 and 4 words of the question: from rows 2, 3, 6 and 7 on.
  assert rows == [2, 3, 4, 6, 7]
  assert conversion.aligned(QUESTION, ANSWER, wait=9, begins=begins) == [
      7, 8, 9, 10, 11]
  assert conversion.aligned([], ANSWER, wait=2, begins=begins) == [
      0, 1, 2, 3, 4]


@pytest.mark.parametrize("wait", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("layout", [
    TALK, layouts.auditing(positions="rows")], ids=["silence", "holes"])
def test_a_conversation_side_by_side(layout, wait):
  table = conversion.conversation(
      layout, QUESTION, ANSWER, wait=wait, begins=begins, first=[3, 4],
      audit=[90, 91])
  said = {}
  for at, name in enumerate(layout.names):
    rows = np.flatnonzero(table.live[:, at]
                          & (table.tokens[:, at] != layout.silence))
    said[name] = dict(zip(rows.tolist(), table.tokens[rows, at].tolist()))
  assert list(said["user"].values()) == QUESTION
  assert list(said["assistant"].values()) == [3, 4, *ANSWER]
  assert list(said["auditor"].values()) == [3, 4, 90, 91]
  # What has been read before the row in which a word begins is enough of it.
  word = -1
  for row, token in list(said["assistant"].items())[2:]:
    word += begins(token)
    read = [t for r, t in said["user"].items() if r < row]
    rest = QUESTION[len(read):]
    heard = sum(map(begins, read)) - bool(rest and not begins(rest[0]))
    assert heard >= min(word + wait, 4)
  # The model learns what it writes and was not given.
  assert not table.learnt[:, 0].any()
  at = layout.place("assistant")
  spoken = table.tokens[table.learnt[:, at], at]
  assert spoken[spoken != layout.silence].tolist() == ANSWER


def test_an_answer_must_see_what_it_waited_for():
  def convert(layout):
    return conversion.conversation(layout, QUESTION, ANSWER, wait=1,
                                   begins=begins, first=[3])
  with pytest.raises(InputError, match="begins 3 rows late"):
    convert(layouts.auditing())
  ahead = layouts.auditing()
  ahead = dataclasses.replace(ahead, streams=(
      ahead.streams[0], dataclasses.replace(ahead.streams[1], lead=3),
      ahead.streams[2]))
  np.testing.assert_array_equal(
      convert(ahead).tokens,
      convert(layouts.auditing(positions="rows")).tokens)


def test_targets_are_the_next_of_the_same_stream():
  table = conversion.from_columns(
      layouts.reading(), {"user": [5, 6, 7], "assistant": [8, 9, 10]},
      {"assistant": 1}, given={"assistant": 1})
  wanted, weigh = conversion.targets(layouts.reading(), table)
  assert wanted[weigh].tolist() == [9, 10]
  assert np.argwhere(weigh).tolist() == [[1, 1], [2, 1]]
  table = conversion.from_columns(TALK, {"user": [5, 6], "assistant": [8]},
                                  {"assistant": 1})
  wanted, weigh = conversion.targets(TALK, table)
  assert wanted[0].tolist() == [6, 8, 1]
  assert weigh.tolist() == [[False, True, True], [False] * 3]


def test_tables_written_as_tables(tmp_path):
  def encode(text):
    return [ord(letter) for letter in text]
  rows = [{"user": "ab", "assistant": "x"}, {"auditor": "!"}, {"user": ""}]
  file = tmp_path / "t.jsonl"
  file.write_text(json.dumps(rows) + "\n\n" + json.dumps(rows[:1]) + "\n")
  first, second = conversion.read(file, TALK, encode)
  assert first.tokens.tolist() == [
      [ord("a"), ord("x"), 1], [ord("b"), 1, 1], [1, 1, ord("!")]]
  assert len(second.tokens) == 2
  assert first.learnt.tolist() == [[False] * 3, [False, True, True],
                                   [False, True, True]]
  (holes,) = [conversion.from_json(layouts.auditing(), encode, rows)]
  assert holes.live.tolist() == [[True, True, False], [True, False, False],
                                 [False, False, True]]
  for line, words in (("[", "line 1"), ("{}", "a list of rows"),
                      ("[3]", "row 0"), ('[{"usr": "a"}]', "'user'"),
                      ("[]", "no rows")):
    file.write_text(line)
    with pytest.raises(InputError, match=words):
      conversion.read(file, TALK, encode)
  with pytest.raises(InputError, match="cannot be read"):
    conversion.read(tmp_path / "none", TALK, encode)


def test_packing_leaves_nothing_out_and_fits():
  rng = np.random.default_rng(0)
  tables = [conversion.from_columns(TALK, {"user": range(2, 2 + n)})
            for n in rng.integers(1, 30, 40)]
  blocks = list(conversion.pack(tables, 32, np.random.default_rng(1)))
  assert sorted(at for block in blocks for at in block) == list(range(40))
  heights = [sum(len(tables[at].tokens) for at in block) for block in blocks]
  assert max(heights) <= 32 and np.mean(heights) > 24


def test_words_begin_with_white_space():
  class Tokenizer:
    def decode(self, ids):
      return ["a", " b", "c d", "\n", ""][ids[0]]
  assert conversion.word_beginnings(Tokenizer(), 5).tolist() == [
      False, True, False, True, False]
