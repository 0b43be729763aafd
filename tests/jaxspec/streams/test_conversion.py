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
from jaxspec.streams.conversion import Follow
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
  assert conversion.aligned([], ANSWER, wait=2, begins=begins, start=3) == [
      3, 4, 5, 6, 7]


def test_what_is_taken_from_the_leader_waits_for_it():
  pieces = {(10, 11): {"a"}, (30, 31, 32): {"c"}, (50,): {"c", "x"},
            (80,): {"a"}}
  rows = conversion.aligned(
      QUESTION, ANSWER, wait=0, begins=begins,
      pieces=lambda word: pieces.get(tuple(word), set()))
  assert rows == [6, 7, 8, 9, 10]
  assert conversion.telling("Ann's 1,250 x 2.5 = $3125. Then") == {
      "1250", "2.5", "3125", "then"}


def heard(said, row):
  """How many words of a stream were over before a row."""
  before = [t for r, t in said.items() if r < row]
  rest = list(said.values())[len(before):]
  return sum(map(begins, before)) - bool(rest and not begins(rest[0]))


@pytest.mark.parametrize("wait", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("layout", [
    TALK, layouts.auditing(positions="rows")], ids=["silence", "holes"])
def test_no_word_comes_before_what_it_waits_for(layout, wait):
  audit = [90, 91, 100]
  columns = {"user": QUESTION, "assistant": ANSWER, "auditor": audit}
  first = [3, 4] if layout.silence is None else []
  given = {"assistant": first, "auditor": first}
  table = conversion.side_by_side(
      layout, columns, {"assistant": Follow("user", wait),
                        "auditor": Follow("assistant", 2)},
      begins=begins, given=given)
  said = {}
  for at, name in enumerate(layout.names):
    rows = np.flatnonzero(table.live[:, at]
                          & (table.tokens[:, at] != layout.silence))
    said[name] = dict(zip(rows.tolist(), table.tokens[rows, at].tolist()))
  # The text of each stream comes back from the table.
  assert list(said["user"].values()) == QUESTION
  assert list(said["assistant"].values()) == [*first, *ANSWER]
  assert list(said["auditor"].values()) == [*first, *audit]
  for name, leader, behind, most in (("assistant", "user", wait, 4),
                                     ("auditor", "assistant", 2, 4)):
    word = -1
    source = dict(list(said[leader].items())[
        len(first) if leader == "assistant" else 0:])
    for row, token in list(said[name].items())[len(first):]:
      word += begins(token)
      assert heard(source, row) >= min(word + behind, most)
  # The model learns what it writes and was not given.
  assert not table.learnt[:, 0].any()
  at = layout.place("assistant")
  spoken = table.tokens[table.learnt[:, at], at]
  assert spoken[spoken != layout.silence].tolist() == ANSWER


def test_what_is_silent_behind_an_end_was_not_said():
  def learnt(ends):
    return conversion.side_by_side(
        TALK, {"user": [5, 6], "assistant": [8], "auditor": [9] * 4}, {},
        begins=begins, ends=ends).learnt.tolist()
  no = [False] * 3
  both = [False, True, True]
  assert learnt(frozenset()) == [no, both, both, both, both]
  assert learnt({"assistant", "auditor"}) == [
      no, both, *[[False, False, True]] * 3]


def test_an_answer_must_see_what_it_waited_for():
  def convert(layout):
    return conversion.side_by_side(
        layout, {"user": QUESTION, "assistant": ANSWER},
        {"assistant": Follow("user", 1)}, begins=begins,
        given={"assistant": [3]})
  with pytest.raises(InputError, match="begins 3 rows late"):
    convert(layouts.auditing())
  ahead = layouts.auditing()
  ahead = dataclasses.replace(ahead, streams=(
      ahead.streams[0], dataclasses.replace(ahead.streams[1], lead=3),
      ahead.streams[2]))
  np.testing.assert_array_equal(
      convert(ahead).tokens,
      convert(layouts.auditing(positions="rows")).tokens)
  with pytest.raises(InputError, match="in a circle"):
    conversion.side_by_side(
        TALK, {"assistant": ANSWER, "auditor": ANSWER},
        {"assistant": Follow("auditor", 1), "auditor": Follow("assistant", 1)},
        begins=begins)


def test_targets_are_the_next_of_the_same_stream():
  table = conversion.side_by_side(
      layouts.reading(), {"user": [5, 6, 7], "assistant": [9, 10]}, {},
      begins=begins, given={"assistant": [8]})
  wanted, weigh = conversion.targets(layouts.reading(), table)
  assert wanted[weigh].tolist() == [9, 10]
  assert np.argwhere(weigh).tolist() == [[0, 1], [1, 1]]
  table = conversion.side_by_side(TALK, {"user": [5, 6], "assistant": [8]}, {},
                                  begins=begins)
  wanted, weigh = conversion.targets(TALK, table)
  assert wanted.tolist() == [[5, 8, 1], [6, 1, 1], [0, 0, 0]]
  assert weigh.tolist() == [[False, True, True]] * 2 + [[False] * 3]


def test_ordinary_data_has_a_text_for_each_stream():
  def texts(item, **render):
    return conversion.texts_of(TALK, item, render)
  assert texts({"question": "q", "answer": "a", "auditor": "x"}) == [
      {"user": "q", "assistant": "a", "auditor": "x"}]
  assert texts({"prompt": "q", "assistant": "a"},
               auditor=lambda row: row["prompt"] * 2) == [
      {"user": "q", "assistant": "a", "auditor": "qq"}]
  turns = [("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"),
           ("assistant", "4")]
  chat = {"messages": [{"role": r, "content": c} for r, c in turns],
          "auditor": "x"}
  assert [t["assistant"] for t in texts(chat)] == ["2", "4"]
  for item, words in ((3, "an object"), ({"question": "q"}, "assistant"),
                      ({"messages": [{"content": "x"}] * 2}, "role and"),
                      ({"messages": []}, "hold no")):
    with pytest.raises(InputError, match=words):
      texts(item)


def test_tables_written_as_tables(tmp_path):
  def encode(text):
    return [ord(letter) for letter in text]

  def convert(item):
    return [conversion.from_json(TALK, encode, item)]
  rows = [{"user": "ab", "assistant": "x"}, {"auditor": "!"}, {"user": ""}]
  file = tmp_path / "t.jsonl"
  file.write_text(json.dumps(rows) + "\n\n" + json.dumps(rows[:1]) + "\n")
  first, second = conversion.read(file, convert)
  assert first.tokens.tolist() == [
      [ord("a"), ord("x"), 1], [ord("b"), 1, 1], [1, 1, ord("!")]]
  assert len(second.tokens) == 2
  assert first.learnt.tolist() == [[False] * 3, [False, True, True],
                                   [False, True, True]]
  holes = conversion.from_json(layouts.auditing(), encode, rows)
  assert holes.live.tolist() == [[True, True, False], [True, False, False],
                                 [False, False, True]]
  for line, words in (("[", "line 1"), ("[3]", "row 0"),
                      ('[{"usr": "a"}]', "'user'"), ("[]", "no rows")):
    file.write_text(line)
    with pytest.raises(InputError, match=words):
      conversion.read(file, convert)
  with pytest.raises(InputError, match="cannot be read"):
    conversion.read(tmp_path / "none", convert)


def test_packing_leaves_nothing_out_and_fits():
  sizes = np.random.default_rng(0).integers(1, 30, 40).tolist()
  blocks = conversion.pack([*sizes, 50], 32)
  assert [40] in blocks
  blocks.remove([40])
  assert sorted(at for block in blocks for at in block) == list(range(40))
  fills = [sum(sizes[at] for at in block) for block in blocks]
  assert max(fills) <= 32 and np.mean(fills) > 24


def test_words_begin_with_white_space():
  class Tokenizer:
    def decode(self, ids):
      return ["a", " b", "c d", "\n", ""][ids[0]]
  assert conversion.word_beginnings(Tokenizer(), 5).tolist() == [
      False, True, False, True, False]
