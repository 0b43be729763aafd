# SPDX-License-Identifier: Apache-2.0
"""Laws of the loop over rows: one stream is ordinary decoding, sessions are
independent, speculation changes nothing, input is read as it comes."""

import dataclasses

import numpy as np
import pytest

from jaxspec.caches.paged import PagedCache
from jaxspec.caches.window import WindowCache
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.errors import InputError
from jaxspec.streams import cache, loop
from jaxspec.streams import layout as layouts
from jaxspec.streams.drafting import HeadRows, LookupRows
from jaxspec.streams.layout import Stream, StreamLayout
from jaxspec.streams.model import StreamModel
from tests.jaxspec import batches, cycles
from tests.jaxspec.streams import tables
from tests.jaxspec.streams.tables import GREEDY, SAMPLED

pytestmark = pytest.mark.usefixtures("quick_compiles")

TALK = StreamLayout(
    (Stream("user", written=False), Stream("out", silence_penalty=2.0),
     Stream("think")), silence=1, keep_silence=False)


@pytest.fixture(scope="module")
def model(small):
  return tables.tinted(small)




@pytest.mark.parametrize("options", [batches.GREEDY, batches.SAMPLED],
                         ids=["greedy", "sampled"])
def test_one_stream_is_ordinary_decoding(small, options):
  prompts = batches.prompts(2)
  options = dataclasses.replace(options, logit_bias={})
  plain = batches.run(small, Autoregressive(), prompts, options)
  given = [(np.array(p, np.int32)[:, None], np.ones((len(p), 1), bool))
           for p in prompts]
  model = StreamModel(small)
  batch = tables.begin(model, layouts.single(), given, options)
  batch = tables.finish(model, layouts.single(), batch)
  for session, text in enumerate(batches.texts_of(plain)):
    assert tables.table(batch, session)[:, 0].tolist() == text


@pytest.mark.parametrize("options", [GREEDY, SAMPLED],
                         ids=["greedy", "sampled"])
def test_sessions_are_independent_and_rows_are_refilled(model, options):
  """A session's rows are its own, whoever sits beside it or sat there before;
  and what is read between two calls is as if it had been there before."""
  given = [tables.random_table(TALK, n, seed=n, holes=0.2) for n in (3, 7, 5)]
  words = [[11, 12, 13], [21, 22], [31]]

  def write(batch, sessions):
    for at, who in sessions:
      batch = tables.push(TALK, batch, at, 0, words[who])
    batch = tables.finish(model, TALK, batch, rows_=6)
    for at, _ in sessions:
      batch = tables.push(TALK, batch, at, 0, [41, 42])
    return tables.finish(model, TALK, batch)
  together = write(tables.begin(model, TALK, given, options),
                   [(0, 0), (1, 1), (2, 2)])
  others = write(tables.begin(model, TALK, [given[1], given[2], given[0]],
                              options), [(0, 1), (1, 2), (2, 0)])
  for here, there in ((0, 2), (1, 0), (2, 1)):
    np.testing.assert_array_equal(tables.table(together, here),
                                  tables.table(others, there))
  again = tables.begin(model, TALK, [given[2], given[0], given[1]], options,
                       batch=loop.release(others, np.ones(3, bool)),
                       at=[0, 1, 2])
  again = write(again, [(0, 2), (1, 0), (2, 1)])
  np.testing.assert_array_equal(tables.table(again, 1),
                                tables.table(together, 0))
  # It did read, and it did write.
  rows = tables.table(together, 0)
  assert rows[3:6, 0].tolist() == [11, 12, 13]
  assert rows[9:11, 0].tolist() == [41, 42]
  assert len(rows) > 15 and (rows[3:, 1:] != TALK.silence).any()


@pytest.mark.medium
@pytest.mark.parametrize("silence, keep, positions", [
    (1, True, "rows"), (1, False, "rows"), (None, True, "rows"),
    (None, True, "counters")])
def test_when_it_must_not_see_somebody_speak_changes_nothing(
    model, silence, keep, positions):
  """Neither words nor their times: no draw of it, and no bit of a law."""
  layout = StreamLayout(
      (Stream("user", written=False, reads=()),
       Stream("out", reads=("user",),
              silence_penalty=0.0 if silence is None else 8.0),
       Stream("tool", written=False), Stream("audit")),
      silence=silence, keep_silence=keep, positions=positions)
  tokens, live = tables.random_table(layout, 6, holes=0.3)
  tool = layout.place("tool")
  # Silence is as likely as words, and so it matters when it is penalized.
  options = dataclasses.replace(
      SAMPLED, logprobs=True, max_new_tokens=16, frequency_penalty=0.0,
      logit_bias={} if silence is None else {silence: 7.0})

  def write(holes, words, at):
    cells, there = tokens.copy(), live.copy()
    cells[holes, tool] = 0 if silence is None else silence
    there[holes, tool] = silence is not None
    batch = tables.begin(model, layout, [(cells, there)], options)
    batch = tables.push(layout, batch, 0, 0, [11, 12, 13])
    if words:
      batch = tables.finish(model, layout, batch, rows_=at)
      batch = tables.push(layout, batch, 0, tool, words)
    batch = tables.finish(model, layout, batch)
    found = tables.table(batch)[:, 1]
    return found, np.asarray(batch.lines.logprobs)[0, 1, :len(found)]
  plain = write([], [], 0)
  for other in (write([1, 2, 4], [], 0), write([0, 3], [31, 32, 33], 2),
                write([], [31] * 8, 7)):
    least = min(len(plain[0]), len(other[0]))
    assert least >= 6 + 15
    assert silence is None or silence in plain[0][10:]
    for one, two in zip(plain, other):
      np.testing.assert_array_equal(one[:least], two[:least])


@pytest.mark.medium
def test_pages_hold_what_one_buffer_holds(model):
  """And a session for which there are none is over before it begins."""
  given = [tables.random_table(TALK, 7, seed=n, holes=0.2) for n in range(2)]
  plain = tables.finish(model, TALK, tables.begin(model, TALK, given))
  needed = -(-(16 + tables.ROOM * TALK.count) // 8)
  paged = tables.begin(model, TALK, given, kind=PagedCache, page=8,
                       pages=needed + 1)
  paged = tables.finish(model, TALK, paged)
  np.testing.assert_array_equal(tables.table(paged), tables.table(plain))
  assert len(tables.table(paged)) > 15
  assert paged.lines.ended.tolist() == [False, True]
  assert int(paged.passes[1]) == 0


@pytest.mark.medium
def test_a_window_of_rows_is_enough(model):
  """One layer sees eight positions, and keeps a key a stream of each."""
  given = [tables.random_table(TALK, n, seed=n, holes=0.2) for n in (7, 15)]
  plain = tables.finish(model, TALK, tables.begin(
      model, TALK, given, SAMPLED, prefix=[3, 4]))
  told = tables.Told.of([tables.table(plain, n) for n in range(2)])
  window = tables.finish(model, TALK, tables.begin(
      model, TALK, given, SAMPLED, prefix=[3, 4], kind=WindowCache), told)
  for session in range(2):
    np.testing.assert_array_equal(tables.table(window, session),
                                  tables.table(plain, session))
  assert len(tables.table(window)) > 20 and int(window.accepted.sum()) > 5
  assert [k.shape[2] for k in window.cache.inner.k] == [
      8 * TALK.count, window.cache.capacity]


def test_what_counts_for_itself_is_not_forgotten_with_the_others(small):
  layout = dataclasses.replace(TALK, positions="counters")
  with pytest.raises(InputError, match="use contiguous or paged"):
    cache.empty(small, layout, WindowCache, 1, 40, np.float32)


@pytest.mark.medium
@pytest.mark.parametrize("name, options", [
    ("reading", SAMPLED),
    pytest.param("table", GREEDY, marks=pytest.mark.slow),
    pytest.param("reading", GREEDY, marks=pytest.mark.slow),
    pytest.param("table", SAMPLED, marks=pytest.mark.slow)],
                         ids=["reading-sampled", "table-greedy",
                              "reading-greedy", "table-sampled"])
def test_drafted_rows_are_the_plain_ones(name, options):
  """A model that recites: what it wrote before, it writes again."""
  layout = layouts.reading() if name == "reading" else StreamLayout(
      (Stream("user", written=False), Stream("out"), Stream("think")),
      silence=0)
  model = StreamModel(cycles.model())
  options = dataclasses.replace(
      options, max_new_tokens=30, repetition_penalty=1.0,
      frequency_penalty=0.0, temperature=0.4 * (options.temperature > 0))
  starts = [5, 9]
  given = []
  for start in starts:
    column = np.array([start, *cycles.recited([start], 35)], np.int32)
    # The last words were said before, at the other end of the cycle.
    given.append((np.stack([column] * layout.count, axis=1),
                  np.ones((36, layout.count), bool)))

  def write(drafter):
    batch = tables.begin(model, layout, given, options, room=70)
    for session in range(2):
      batch = tables.push(layout, batch, session, 0, [7, 8, 9])
    return tables.finish(model, layout, batch, drafter)
  plain = write(None)
  for drafter in (LookupRows(length=3), HeadRows(cycles.medusa_heads(3))):
    drafted = write(drafter)
    for session in range(2):
      np.testing.assert_array_equal(tables.table(plain, session),
                                    tables.table(drafted, session))
    assert int(drafted.accepted.sum()) > 20
    assert int(drafted.passes.sum()) < int(plain.passes.sum()) - 20


@pytest.mark.medium
@pytest.mark.parametrize("name", ["silent", "counters"])
def test_drafted_rows_of_a_model_that_attends(model, name):
  """Two turns of two sessions, in which streams end and are opened again."""
  layout = TALK if name == "silent" else StreamLayout(
      (Stream("user", written=False, reads=()), Stream("out"),
       Stream("think", reads=("out",))), positions="counters")
  given = [tables.random_table(layout, n, seed=n, holes=0.2) for n in (6, 9)]
  assert layout.apart == (name == "counters")       # even holes have a place
  # Each says again what it said: there is something to be looked up.
  given = [(np.concatenate([t, t]), np.concatenate([v, v])) for t, v in given]
  sampled = dataclasses.replace(
      SAMPLED, repetition_penalty=1.0, frequency_penalty=0.0)

  def write(options, drafter=None):
    batch = tables.begin(model, layout, given, options, room=60)
    for words in ([7, 8, 9], [11, 12]):
      for session in range(2):
        batch = tables.push(layout, batch, session, 0, words)
      batch = tables.finish(model, layout, batch, drafter, rows_=14)
    return batch
  for options in (GREEDY, sampled):
    options = dataclasses.replace(options, max_new_tokens=10)
    free = write(options)
    ends = int(tables.table(free)[len(given[0][0]) + 3, 1])
    options = dataclasses.replace(options, stop_token_ids=(ends,))
    plain = write(options)
    known = [tables.table(plain, n) for n in range(2)]
    for drafter in (tables.Told.of(known, room=60),
                    LookupRows(length=3, all=False)):
      drafted = write(options, drafter)
      for session in range(2):
        np.testing.assert_array_equal(
            tables.table(drafted, session), known[session])
      assert int(drafted.accepted.sum()) > 0
      assert int(drafted.passes.sum()) < int(plain.passes.sum())


def test_end_tokens_and_words_put_into_a_mouth():
  """A stream ends by its own rule; words for it open it again."""
  model = StreamModel(cycles.model())
  layout = StreamLayout(
      (Stream("user", written=False), Stream("a"),
       Stream("b", stop="session")), positions="counters")
  a = [3, *cycles.recited([3], 15)]
  b = a[4:] + cycles.recited(a[-1:], 4)          # four words ahead
  first = np.array([[3, a[0], b[0]]], np.int32)

  def write(stop, words=()):
    batch = tables.begin(
        model, layout, [(first, np.ones((1, 3), bool))],
        [dataclasses.replace(GREEDY, max_new_tokens=15,
                             stop_token_ids=(stop,))])
    if words:
      batch = tables.finish(model, layout, batch, rows_=5)
      batch = tables.push(layout, batch, 0, 1, words)
    return tables.table(tables.finish(model, layout, batch)).T.tolist()
  holes = [-1] * 40
  # What ends b ends all of it, and a is cut short.
  assert write(b[9]) == [[3, *holes[:9]], a[:10], b[:10]]
  # a ends alone, with its last word in the table, and b goes on.
  assert write(a[3]) == [[3, *holes[:15]], a[:4] + holes[:12], b]
  said = cycles.recited([21], 8)
  # Both may say as much anew.
  assert write(a[3], [20, 21]) == [
      [3, *holes[:20]], [*a[:4], -1, -1, 20, 21, *said, *holes[:5]],
      b + cycles.recited(b[-1:], 5)]
