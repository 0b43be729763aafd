# SPDX-License-Identifier: Apache-2.0
"""Layouts: who may see whom, and what is refused."""

import json

import numpy as np
import pytest

from jaxspec.errors import InputError
from jaxspec.streams import layout as layouts
from jaxspec.streams.layout import Stream, StreamLayout


def test_the_published_layouts():
  reading, thoughts = layouts.reading(), layouts.thoughts()
  assert reading.names == ("user", "assistant") and reading.written == (1,)
  assert reading.ids.tolist() == [1, 2] and reading.prefix_id == 0
  assert reading.visible.all(axis=1)[:2].all()
  assert thoughts.count == 10 and thoughts.silence == 481
  assert thoughts.written == tuple(range(1, 10))
  assert thoughts.words[0] == 2**11 - 1


def test_silence_is_penalized_by_name():
  layout = layouts.thoughts().penalized("void", "2.5").penalized("output", "0")
  assert layout.penalties.tolist() == [0, 0, 0, 0, 0, 0, 0, 2.5, 0, 0]
  for name, text, words in (("vod", "1", "Did you mean 'void'"),
                            ("void", "-1", "from 0 on"),
                            ("void", "x", "from 0 on")):
    with pytest.raises(InputError, match=words):
      layout.penalized(name, text)


def test_an_auditor_is_read_by_none():
  layout = layouts.auditing()
  auditor = layout.place("auditor")
  assert layout.visible[auditor].all()
  assert layout.visible[:, auditor].sum() == 1
  assert not layout.reaches[:auditor, auditor].any()
  # The prefix reads itself alone.
  assert layout.words[-1] == 1 << 3


def test_what_is_not_seen_may_be_heard_of():
  """Through a third stream; `reaches` knows."""
  layout = StreamLayout((
      Stream("tool", written=False), Stream("out", reads=("guard",)),
      Stream("guard")))
  out, tool = layout.place("out"), layout.place("tool")
  assert not layout.visible[out, tool] and layout.reaches[out, tool]
  closed = layout.without("guard", "tool")
  assert not closed.reaches[out, tool]
  assert closed.visible[closed.place("guard"), out]


def test_permuted_streams_keep_their_ids():
  layout = layouts.auditing().permuted([2, 0, 1])
  assert layout.names == ("auditor", "user", "assistant")
  assert layout.ids.tolist() == [3, 1, 2]
  assert hash(layout) == hash(layouts.auditing().permuted([2, 0, 1]))


@pytest.mark.parametrize("make, words", [
    (lambda: StreamLayout(()), "1 to 31 streams"),
    (lambda: StreamLayout((Stream("a"), Stream("a"))), "names of their own"),
    (lambda: StreamLayout((Stream("a", written=False),)), "that is written"),
    (lambda: StreamLayout((Stream("a"),), positions="row"),
     "Did you mean 'rows'?"),
    (lambda: StreamLayout((Stream("a", reads=("b",)),)), "reads 'b'"),
    (lambda: StreamLayout((Stream("a", stop="end"),)), "stop of stream a"),
    (lambda: StreamLayout((Stream("a", lead=2),)), "has a lead"),
    (lambda: StreamLayout((Stream("a", silence_penalty=1.0),)),
     "no silence token"),
    (lambda: StreamLayout((Stream("a"),), keep_silence=False), "keep_silence"),
    (lambda: StreamLayout((Stream("a"),), ramp=-1), "ramp must be"),
    (lambda: layouts.reading().place("usr"), "Did you mean 'user'?"),
    (lambda: layouts.reading().without("user", "user"), "from itself"),
    (lambda: layouts.parse("readin"), "Did you mean 'reading'?"),
    (lambda: layouts.parse("nowhere.json"), "nowhere.json cannot be read"),
])
def test_what_is_wrong_is_one_sentence(make, words):
  with pytest.raises(InputError) as e:
    make()
  assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("fields, words", [
    ({"streams": [{"name": "a", "written": 3}]}, "written must be bool"),
    ({"streams": [{"nam": "a"}]}, "Did you mean 'name'?"),
    ({"streams": [{"name": "a"}], "silence": "x"}, "silence must be"),
    ({"streams": [{"name": "a"}], "silence": True}, "silence must be"),
    ([1], "must be an object"),
    ({}, "must be an object"),
])
def test_a_file_that_is_no_layout(fields, words, tmp_path):
  (tmp_path / "x.json").write_text(json.dumps(fields))
  with pytest.raises(InputError, match=words[:20]) as e:
    layouts.parse(str(tmp_path / "x.json"))
  assert words in str(e.value)


def test_a_file_is_a_layout(tmp_path):
  (tmp_path / "x.json").write_text(json.dumps({
      "streams": [{"name": "u", "written": False, "reads": []},
                  {"name": "o", "silence_penalty": 3}], "silence": 7}))
  layout = layouts.parse(str(tmp_path / "x.json"))
  assert layout == StreamLayout(
      (Stream("u", written=False, reads=()), Stream("o", silence_penalty=3)),
      silence=7)
  np.testing.assert_array_equal(layout.visible[0], [True, False, True])


def test_silence_is_the_tokenizer_s_own():
  class Tokenizer:
    def encode(self, text, special):
      return list(range(len(text) + shift))

  shift = -1
  assert layouts.parse("thoughts", Tokenizer()).silence == 0
  shift = 0
  with pytest.raises(InputError, match="makes 2 of it"):
    layouts.parse("thoughts", Tokenizer())
