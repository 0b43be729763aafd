# SPDX-License-Identifier: Apache-2.0
"""What is on display before it is settled is counted, token by token."""

import types

import numpy as np
import pytest

from jaxspec import answers
from jaxspec.answers import Answer
from jaxspec.options import Options

END = 9


class Letters:
  """A tokenizer in which token n is the n-th letter."""

  def decode(self, ids):
    return "".join(chr(97 + i) for i in ids)

  def stream(self):
    return types.SimpleNamespace(push=lambda i: chr(97 + i),
                                 finish=lambda: "")


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until it is told."""
  watch = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(answers, "time", types.SimpleNamespace(
      perf_counter=lambda: watch.now))
  return watch


def answer(tokenizer=None):
  return Answer(0, "", [1, 2], Options(), tokenizer, (END,), draft_length=2,
                verifier="exact", drafter="x")


def view(ids, done=False):
  zeros = np.zeros((1, 2), np.int32)
  return types.SimpleNamespace(
      tokens=np.array([[1, 2, *ids]]), prompt_length=[2], length=[2 + len(ids)],
      done=[done], logprobs=np.zeros((1, 2 + len(ids))),
      counters=types.SimpleNamespace(
          passes=[0], drafted=zeros, accepted=zeros, nodes=[0],
          used=np.zeros((1, 3), np.int32), scored=[0]))


def test_what_is_taken_back_is_counted_with_its_time(clock):
  one = answer(Letters())
  told = []

  def guess(*ids):
    told.extend(one.guess(ids))

  guess(3)
  clock.now = 1.0
  guess(3, 4)                      # one more
  clock.now = 2.0
  guess(3, 5, 6)                   # the second was there for one second
  clock.now = 5.0
  told += one.take(view([3, 5]), 0)          # the third for three
  guess(7, 8)
  clock.now = 6.0
  told += one.take(view([3, 5, 8, END], done=True), 0)   # both for one
  assert [(e.text, e.settled, e.replaces) for e in told] == [
      ("d", False, 0), ("de", False, 1), ("dfg", False, 2), ("df", True, 3),
      ("hi", False, 0), ("i", True, 2)]
  stats = one.completion.stats
  assert (stats.shown, stats.retracted) == (6, 4)
  assert stats.retracted_seconds == pytest.approx(1 + 3 + 1 + 1)


def test_what_stands_was_not_taken_back(clock):
  one = answer(Letters())
  list(one.guess([3, 4]))
  list(one.take(view([3, 4, 5]), 0))
  list(one.guess([6, END]))        # an end has no text
  (last,) = one.take(view([3, 4, 5, 6, END], done=True), 0)
  assert last.completion.text == "defg" and last.replaces == 1
  assert (last.completion.stats.shown, last.completion.stats.retracted) == (
      4, 0)


def test_what_cannot_be_read_is_not_shown(clock):
  one = answer()
  assert list(one.guess([3])) == []
  (last,) = one.take(view([4, END], done=True), 0)
  assert last.completion.stats.shown == 0
