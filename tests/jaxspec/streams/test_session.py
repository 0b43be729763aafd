# SPDX-License-Identifier: Apache-2.0
"""Sessions from the host: what is pushed is read from the next row on, an
interrupt stops the rows, several sessions share a batch."""

import dataclasses
import threading

import pytest

from jaxspec.errors import InputError
from jaxspec.options import Options
from jaxspec.streams import session as session_
from jaxspec.streams.layout import Stream, StreamLayout
from jaxspec.streams.model import StreamModel
from jaxspec.streams.session import Streams
from tests.jaxspec import cycles
from tests.jaxspec.streams import tables

pytestmark = pytest.mark.usefixtures("quick_compiles")

# The model recites: each stream says what follows its own last word.
TALK = StreamLayout((Stream("user", written=False), Stream("out")), silence=0)
OPTIONS = Options(max_new_tokens=12)


# For a model that attends. What is given at once stands in other rows, and so
# none hears more than its own count would let it hear in any rows.
_TALK = (Stream("user", written=False, reads=()),
         Stream("out", reads=("user",)), Stream("aside", reads=("out",)))
LAYOUTS = {"counters": StreamLayout(_TALK, positions="counters"),
           "rows": StreamLayout(_TALK),
           "silence": StreamLayout(_TALK, silence=1)}
GIVEN = {"user": [4, 9, 2, 28, 37, 15, 8, 46],
         "out": [11, 30, 52, 7, 18, 40, 21, 33],
         "aside": [8, 50, 12, 6]}


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
    assert read[:6] == [0, 0, 0, 7, 8, 0]
    assert wrote == [5, *cycles.recited([5], 2 + 12)]
    assert session.text("user") == "HI"
    assert session.text("out").startswith("F" + spoken(3))
    assert session.count == 15 and session.passes == 14
    assert not list(session.rows())               # nothing is left to say
    session.push("out", [9])                      # a word in its mouth
    assert [row.tokens for row in session.rows()] == [
        (0, token) for token in [9, *cycles.recited([9], 12)]]


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
    # Three words, twelve anew, and a silence, which is none.
    assert wrote == [5, *cycles.recited([5], 3 + 12 + 1)] and 0 in wrote


def test_an_interrupt_holds_until_something_is_pushed(streams):
  """Also where the rows were not yet asked for, and by a later call."""
  with streams.open(given={"out": [5]}) as session:
    rows = session.rows()
    session.interrupt()
    assert not list(rows) and not list(session.rows())
    session.push("user", "A")
    assert [row.number for _, row in zip(range(4), session.rows())] == [
        0, 1, 2, 3]
    session.interrupt()
    assert not list(session.rows())
    session.resume()
    rows = list(session.rows())
    assert [row.number for row in rows][:2] == [4, 5] and len(rows) > 5


def test_words_that_come_at_once_end_no_interrupt(streams):
  """The rows that were being taken end; the next that are asked for go on."""
  with streams.open(given={"out": [5]}) as session:
    rows = session.rows()
    next(rows)
    session.interrupt()
    session.push("user", "Z")
    assert not list(rows)
    read, _ = columns(session.rows())
    assert read[:2] == [0, 25]        # a row was there already


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
    read, wrote = columns(session.rows(stride=50))
    assert read == [0, *[2] * 30, 3]
    # All of them are one turn.
    assert wrote == [5, *cycles.recited([5], 12), *[0] * 19]


def test_a_full_table_reads_no_more(streams):
  """Rows end though words wait, on the device and on the host; more of them
  are refused, where they would be read by nobody."""
  with streams.open(given={"out": [5]}) as session:
    session.push("user", [2] * 60)
    assert not session.over
    read, _ = columns(session.rows(stride=50))
    assert read == [0, *[2] * 39] and session.over
    with pytest.raises(InputError, match="over after 40 rows: its table"):
      session.push("user", [3])


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


@pytest.fixture(scope="module")
def talks(small):
  """Streams of a model that attends, by the name of their layout."""
  return {name: Streams(tables.tinted(small), layout, room=60, prefix_room=4,
                        defaults=dataclasses.replace(
                            tables.SAMPLED, max_new_tokens=9, seed=1,
                            frequency_penalty=0.0))
          for name, layout in LAYOUTS.items()}


def tokens(rows):
  return [row.tokens for row in rows]


def column(rows, at):
  return [row[at] for row in rows if row[at] is not None]


@pytest.mark.medium
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_second_turn_is_answered(talks, name):
  """Behind an end token, and as by a session that was given all of it."""
  made, words = talks[name], [17, 33, 5, 44]
  silence = made.layout.silence
  with made.open(given=GIVEN, prefix=[3]) as session:
    free = tokens(session.rows())
  end = len(GIVEN["out"]) + 1                     # with its first word
  options = {"out": dataclasses.replace(
      made.defaults, stop_token_ids=(free[end - 1][1],))}
  with made.open(given=GIVEN, prefix=[3], options=options) as session:
    first = tokens(session.rows())
    assert first[:end] == free[:end] and len(first) > end
    assert {row[1] for row in first[end:]} == {silence}
    session.push("user", words)
    second = tokens(session.rows())
  assert [row[0] for row in second[:4]] == words
  # With silence it may answer behind the first word, else behind the last.
  begins = 1 if silence is not None else 4
  assert {row[1] for row in second[:begins]} == {silence}
  answer = column(second[begins:], 1)
  assert answer[0] not in (None, silence)
  assert any(t not in (None, silence) for t in column(second, 2))
  if name == "rows":        # the end token itself stays where it stood
    return
  whole = {n: column(first + second[:begins], at)
           for at, n in enumerate(made.layout.names)}
  with made.open(given=whole, prefix=[3], options=options) as session:
    session.push("user", words[begins:])
    again = tokens(session.rows())[max(map(len, whole.values())):]
  found = column(again, 1)
  assert found[:len(answer)] == answer[:len(found)] and len(found) > 2


@pytest.mark.medium
def test_silence_does_not_use_up_an_answer(talks):
  """And a session of nothing but silence waits for more."""
  layout = dataclasses.replace(
      LAYOUTS["silence"], streams=LAYOUTS["silence"].streams[:2], quiet=6)
  made = Streams(talks["silence"].model, layout, room=60, prefix_room=4)
  mute = Options(max_new_tokens=4, logit_bias={1: 1e4})
  with made.open(given={"out": [5]}, options=mute) as session:
    assert len(tokens(session.rows())) == 1 + 6
    session.push("user", [7])
    assert len(tokens(session.rows())) == 1 + 6
  # Silent by its law for as long as it takes, and then it has its four words.
  spoken = Options(max_new_tokens=4, logit_bias={1: -1e4})
  with made.open(given={"out": [5]}, options=spoken) as session:
    session.push("user", [7, *[1] * 20])
    assert sum(row[1] != 1 for row in tokens(session.rows())[1:]) == 4


@pytest.mark.medium
@pytest.mark.parametrize("name", ["rows", "silence"])
def test_a_push_changes_what_is_written_behind_the_next_row(talks, name):
  """By a model that attends: bit for bit the same up to there."""
  options = Options(max_new_tokens=12, logprobs=True)

  def write(after=None):
    with talks[name].open(given=GIVEN, prefix=[3], options=options) as session:
      found = []
      for row in session.rows():
        found.append((row.tokens[1:], row.logprobs[1:]))
        if row.number == after:
          session.push("user", [17, 33])
          held.append(session.count)
    return found
  held: list[int] = []
  plain = write()
  spoken = write(after=11)
  assert held == [12]
  # The word stands in row 12, is seen by the cells of 13, and so in row 14.
  assert spoken[:14] == plain[:14]
  assert spoken[14][1][0] != plain[14][1][0]


@pytest.mark.medium
def test_somebody_else_pushes_while_rows_are_taken(talks):
  """And only what is written behind the words is another."""
  made, words = talks["silence"], [17, 33, 5]
  with made.open(given=GIVEN, prefix=[3]) as session:
    plain = tokens(session.rows())
  ready = threading.Event()
  with made.open(given=GIVEN, prefix=[3]) as session:
    def speak():
      ready.wait()
      session.push("user", words)
    thread = threading.Thread(target=speak)
    thread.start()
    found, heard = [], 0
    while not heard:                  # however late the other is
      for row in session.rows():
        found.append(row.tokens)
        if row.number == 9:
          ready.set()
      heard = sum(row[0] in words for row in found[8:])
      thread.join()
    assert not list(session.rows())
  read = [n for n, row in enumerate(found) if n > 9 and row[0] != 1]
  assert [found[n][0] for n in read] == words
  assert read == list(range(read[0], read[0] + 3))
  same = min(read[0] + 2, len(plain))
  assert [row[1:] for row in found[:same]] == [row[1:] for row in plain[:same]]
  assert len(found) > read[-1] + 2
