# SPDX-License-Identifier: Apache-2.0
"""Sessions from the host: what is pushed is read from the next row on, an
interrupt stops the rows, several sessions share a batch."""

import dataclasses

import pytest

from jaxspec.errors import InputError
from jaxspec.options import Options
from jaxspec.streams import session as session_
from jaxspec.streams.layout import Stream, StreamLayout
from jaxspec.streams.model import StreamModel
from jaxspec.streams.session import Streams
from tests.jaxspec import cycles

pytestmark = pytest.mark.usefixtures("quick_compiles")

# The model recites: each stream says what follows its own last word.
TALK = StreamLayout((Stream("user", written=False), Stream("out")), silence=0)
OPTIONS = Options(max_new_tokens=12)


class Letters:
  """A token a letter."""

  def encode(self, text, special=True):
    return [ord(letter) - ord("A") for letter in text]

  def stream(self, skip_special=True):
    return self

  def push(self, token):
    return chr(token + ord("A"))


@pytest.fixture(scope="module")
def streams():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(session_, "_QUEUE", 12)
    patch.setattr(session_, "_PUSH", 8)
    yield Streams(StreamModel(cycles.model()), TALK, Letters(), sessions=2,
                  room=40, prefix_room=4, defaults=OPTIONS)


def spoken(count, start=5):
  return "".join(chr(t + ord("A")) for t in cycles.recited([start], count))


def columns(rows):
  rows = list(rows)
  return [[row.tokens[at] for row in rows] for at in range(2)]


@pytest.mark.medium
def test_words_are_read_while_the_model_writes(streams):
  with streams.open(given={"out": [5]}, prefix=[3]) as session:
    rows = session.rows()
    said = [next(rows) for _ in range(3)]
    assert [row.given for row in said] == [True, False, False]
    session.push("user", "HI")
    said += [next(rows)]
    read, wrote = columns([*said, *rows])
    # A row was there already when the words came.
    assert read[:6] == [0, 0, 0, 7, 8, 0] or read[:6] == [0, 0, 7, 8, 0, 0]
    assert wrote == [5, *cycles.recited([5], 12)]
    assert session.text("user") == "HI"
    assert session.text("out").startswith("F" + spoken(3))
    assert session.count == 13 and session.passes == 12
    assert not list(session.rows())               # nothing is left to say
    session.push("out", [9])                      # a word in its mouth
    assert [row.tokens for row in session.rows()] == [(0, 9)]


def test_an_interrupt_stops_the_rows_and_forgets_what_waits(streams):
  with streams.open(given={"out": [5]}) as session:
    session.push("user", "ABCDEFGHIJ")
    rows = session.rows()
    seen = [next(rows) for _ in range(4)]
    session.interrupt()
    seen += list(rows)
    assert len(seen) == 4
    session.push("user", "Z")
    read, wrote = columns([*seen, *session.rows()])
    assert read[:4] == [0, 0, 1, 2] and read[4:6] == [25, 0]
    assert not any(read[6:])
    assert wrote == [5, *cycles.recited([5], 12)]


def test_sessions_share_a_batch_and_wait_for_each_other(streams):
  one = streams.open(given={"out": [5]})
  other = streams.open(given={"out": [6]},
                       options={"out": Options(max_new_tokens=3)})
  with pytest.raises(InputError, match="all 2 sessions are open"):
    streams.open()
  first = list(zip(range(4), one.rows(stride=2)))
  assert other.count == 1                         # nobody asked for its rows
  _, wrote = columns(other.rows())
  assert wrote == [6, *cycles.recited([6], 3)]
  other.close()
  third = streams.open(given={"out": [7]})
  _, wrote = columns(third.rows())
  assert wrote == [7, *cycles.recited([7], 12)]
  _, wrote = columns([*(row for _, row in first), *one.rows()])
  assert wrote == [5, *cycles.recited([5], 12)]
  one.close()
  third.close()
  with pytest.raises(InputError, match="closed"):
    one.push("user", "A")


def test_more_words_than_the_device_holds_wait_on_the_host(streams):
  with streams.open(given={"out": [5]}) as session:
    session.push("user", [2] * 30 + [3])
    read, _ = columns(session.rows(stride=50))
    assert read == [0, *[2] * 30, 3]


def test_log_probabilities_where_they_are_asked_for(streams):
  options = dataclasses.replace(OPTIONS, logprobs=True, max_new_tokens=2)
  with streams.open(given={"out": [5]}, options={"out": options}) as session:
    rows = list(session.rows())
  assert rows[0].logprobs == (None, None)
  assert rows[1].logprobs[0] is None and rows[1].logprobs[1] <= 0
  with streams.open(given={"out": [5]}) as session:
    assert next(session.rows()).logprobs == (None, None)


@pytest.mark.parametrize("make, words", [
    (dict(room=1), "room must be at least 2"),
    (dict(sessions=0), "sessions must be at least 1"),
    (dict(room=2000), "context of 1024"),
    (dict(cache="wimdow"), "Did you mean 'window'?"),
    (dict(drafter="lookip"), "Did you mean 'lookup'?"),
    (dict(drafter="lookup:all=3"), "all must be True or False"),
])
def test_sizes_that_do_not_fit(make, words):
  with pytest.raises(InputError, match=words[:30]):
    Streams(StreamModel(cycles.model()), TALK, **make)


@pytest.mark.parametrize("given, words", [
    (dict(given={"oud": "A"}), "Did you mean 'out'?"),
    (dict(given={"out": [99]}), "token 99 is beyond"),
    (dict(given={"out": [1] * 40}), "fill 40 rows"),
    (dict(prefix=[1] * 5), "the prefix has 5 tokens"),
    (dict(options={"oud": OPTIONS}), "Did you mean 'out'?"),
    (dict(options=Options(stop=("x",))), "stop texts"),
])
def test_what_a_session_cannot_begin_with(streams, given, words):
  with pytest.raises(InputError) as e:
    streams.open(**given)
  assert words in str(e.value)


def test_a_stream_without_silence_needs_first_words():
  layout = dataclasses.replace(TALK, silence=None)
  streams = Streams(StreamModel(cycles.model()), layout, room=8)
  with pytest.raises(InputError, match="out has nothing to go on from"):
    streams.open()


def test_who_is_killed_within_a_pass_says_no_more_of_it(streams, monkeypatch):
  """The batch is lost, closing asks for none of it, and there is a new one."""
  def killed(*_):
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch, \
      streams.open(given={"out": [5]}) as session:
    patch.setattr(session_.loop, "decode", killed)
    list(session.rows())
  assert not list(session.rows())
  with streams.open(given={"out": [5]}) as session:
    _, wrote = columns(session.rows())
    assert wrote == [5, *cycles.recited([5], 12)]
