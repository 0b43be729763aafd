# SPDX-License-Identifier: Apache-2.0
"""Streams side by side: what is measured is there, and is counted right."""

import json
import pathlib

import pytest

from experiments import stream_figures, streams
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from jaxspec.options import Options
from jaxspec.streams import layout as layouts
from jaxspec.streams.layout import Stream, StreamLayout
from jaxspec.streams.model import StreamModel
from jaxspec.streams.session import Streams
from tests.jaxspec import cycles

pytestmark = pytest.mark.usefixtures("quick_compiles")
slow = pytest.mark.slow

QUIET = dict(retries=0, max_foreign=99)
ROWS = 8
# All the model ever says stands in each prompt, so that it can be looked up.
PROMPTS = [[5, *cycles.recited([5], 35)], [9, *cycles.recited([9], 37)]]


def talk(model, layout, **options):
  made = Streams(StreamModel(model), layout, room=40, prefix_room=4)
  return streams.Talk(made, [3], [5], **{"wait": 3, **options})


@pytest.fixture(scope="module")
def races(quick_compiles):
  made = streams.contest(Generator(cycles.model(), capacity=64), 2, 64,
                         ["lookup:length=3"])
  return [{"section": "race", "streams": 2, "task": task, "number": 0,
           **streams.race(made, task, PROMPTS, ROWS, number, **QUIET)}
          for number, task in enumerate(streams.TASKS)]


@pytest.fixture(scope="module")
def delays(quick_compiles):
  generator, question = Generator(cycles.model(), capacity=64), [7] * 10
  options = Options(max_new_tokens=6)
  alone = Streams.of(generator, "single", room=40, prefix_room=4)
  plain = streams.Plain(generator, 1, 64)
  beside = talk(cycles.model(), layouts.reading(positions="rows"))
  jobs = {
      "at once": lambda: streams.at_once(plain, [3, *question, 5], options,
                                         ()),
      "as it comes": lambda: streams.as_it_comes(
          alone, [3], [*question, 5], options),
      "beside": lambda: beside.beside(question, options)}
  return [{"section": "delay", "number": 0,
           "methods": streams.in_turns(jobs, 1, **QUIET)}]


@pytest.mark.slow
def test_all_write_the_same(races):
  answer, copy = (r["methods"] for r in races)
  wanted = [cycles.recited([prompt[-1]], ROWS) for prompt in PROMPTS]
  assert all(m["texts"] == wanted for m in [*answer.values(), *copy.values()])
  assert {name: m["passes"] for name, m in answer.items()} == {
      "streams": 8, "apart": 8, "separate": 8, "sequential": 16,
      "apart, lookup:length=3": 2}
  assert list(copy) == ["apart", "apart, lookup:length=3"]
  lines = {x["method"]: x for x in stream_figures.throughput(races)}
  assert {name: x["passes_per_token"] for name, x in lines.items()} == {
      "streams": 0.5, "apart": 0.5, "separate": 0.5, "sequential": 1}
  assert not any(x["texts_that_differ"] for x in lines.values())
  line = stream_figures.speculation(races)[0]
  assert (line["rows_per_pass"], line["accepted"]) == (4, 1)
  assert line["speed"] == pytest.approx(
      line["rows_per_pass"] / line["pays_from_rows_per_pass"], rel=1e-6)


def test_a_text_that_differs_is_seen():
  assert stream_figures.differ([[1, 2], [3]], [[1, 4], [3, 9]]) == 1


@slow
def test_delay_is_from_the_last_word_read(delays):
  found = delays[0]["methods"]
  # Three words are there; of the others each takes a row, as an answer does.
  assert found["beside"]["rows"] == [1 - 7, 6 - 7]
  assert found["as it comes"]["rows"] == found["at once"]["rows"] == [1, 6]
  first, last = found["beside"]["seconds"]
  assert first < 0 and first < last
  first, last = found["at once"]["seconds"]
  assert 0 < first < last
  answer = cycles.recited([5], 6)
  assert all(m["answer"] == answer for m in found.values())
  assert [found[name]["passes"] for name in (
      "beside", "as it comes", "at once")] == [7, 10 + 6, 6]
  lines = {x["method"]: x for x in stream_figures.delays(delays)}
  assert lines["beside"]["passes_per_useful_token"] == pytest.approx(7 / 6)


@slow
def test_silence_is_no_word():
  layout = StreamLayout((Stream("user", written=False), Stream("out")),
                        silence=0)
  found = talk(cycles.model(), layout).beside([7] * 10, Options(
      max_new_tokens=40))
  spoken = cycles.recited([5], 39)            # to the end of the table
  assert spoken.count(0) == 1 and found["table_rows"] == 40
  assert found["answer"] == [token for token in spoken if token]
  assert found["rows"][0] == 1 - 10 and found["useful"] == 38


def test_who_says_nothing_is_counted():
  silent = streams.delay((3, 0.5), []) | {
      "passes": 4, "useful": 0, "answer": [], "quiet": True}
  spoke = streams.delay((3, 0.5), [(2, 0.4), (5, 0.9)]) | {
      "passes": 5, "useful": 2, "answer": [1, 2], "quiet": True}
  records = [{"section": "delay", "number": n, "methods": {"beside": one}}
             for n, one in enumerate((silent, spoke))]
  (line,) = stream_figures.delays(records)
  assert (line["questions"], line["answered"]) == (2, 1)
  assert line["first_rows"] == -1 and line["passes"] == 5
  assert not stream_figures.delays(records[:1])
  assert streams.progress(records[0]) == "question 0: beside silent"


def test_a_layout_must_be_spoken_to():
  with pytest.raises(InputError, match="a stream that is read"):
    talk(cycles.model(), layouts.single())


def test_what_a_layout_has_no_use_for_is_refused(tmp_path):
  found = streams.layout_of("", "", None, wait=3)
  assert found == layouts.reading(positions="rows")
  silent = streams.layout_of("", "thoughts", None, penalty=2.5)
  assert silent.penalties[1] == 2.5 and silent.quiet == 10
  for words, given in (
      ("both say it", dict(folder="x", name="reading")),
      ("wait by themselves", dict(folder="", name="thoughts", wait=3)),
      ("these have none", dict(folder="", name="reading", penalty=1.0))):
    with pytest.raises(InputError, match=words):
      streams.layout_of(tokenizer=None, **given)


@slow
def test_words_that_come_in_change_what_follows(small):
  one = talk(small, layouts.reading(positions="rows"))
  found = streams.undisturbed(lambda: streams.speak_up(
      one, [4, 9, 2], [17, 33], Options(), rows=35, at=4, part=0.5, stride=1),
      **QUIET)
  # The cells of the next row see it, and what is drawn behind them is changed.
  assert found["changed_after"] == 2
  assert found["rows_equal_before"] == found["rows_before"] >= 5
  # In the next row, or behind the one that was being written.
  assert found["rows_waited"] in (0, 1)
  assert found["call_seconds"] < found["seconds"]
  assert found["stop_seconds"] > 0
  record = {"section": "interrupt", "stride": 1, "quiet": True, **found}
  (line,) = stream_figures.interrupts([record])
  assert line["changed_after"] == {"2": 1} and line["equal_before"] == 1


@pytest.mark.slow
def test_the_whole_is_written(races, tmp_path):
  delay = {"rows": [-6, 3], "seconds": [-0.3, 0.1], "passes": 9, "useful": 6,
           "answer": [1] * 6, "quiet": True}
  summary = stream_figures.summarise([*races, {
      "section": "delay", "methods": {"beside": delay}}])
  text = stream_figures.table(summary)
  assert "| 2 | separate |" in text
  assert "| beside | 1 | 1 | -6 | -300.0 | 3 | 100.0 | 6 | 1.50 |" in text
  loss = {"before": {"a": 3.0}, "after": {"a": 2.0}}
  for number, given in enumerate((None, loss)):
    stream_figures.plot(summary, given, tmp_path / f"{number}.png")
    assert (tmp_path / f"{number}.png").stat().st_size > 1000


class Words:
  """A token a word."""

  def render(self, messages):
    return f"begin {messages[0]['content']} end"

  def encode(self, text, special=True):
    return [len(word) for word in text.split()]


def test_questions_as_chats(tmp_path):
  assert streams.chat(Words(), "a bc") == ([5], [1, 2], [3])
  found = streams.prompts_of(Words(), ["a", "a a a a", "bb"], 9, 5)
  assert found["answer"] == [[5, 1, 3], [5, 2, 3]]
  assert found["copy"][0][-2:] == [1, 3]
  file = pathlib.Path(tmp_path / "x.jsonl")
  file.write_text('{"question": "a"}\n\n{"question": "b"}\n')
  assert streams.read_questions(str(file)) == ["a", "b"]


def test_a_report_gives_the_loss_of_each_stream(tmp_path):
  report = {when: {"streams": {"out": {"loss": loss}}}
            for when, loss in (("before", 3.0), ("after", 2.5))}
  assert streams.losses("") is streams.losses(str(tmp_path)) is None
  (tmp_path / "report.json").write_text(json.dumps(report))
  assert streams.losses(str(tmp_path)) == {
      "before": {"out": 3.0}, "after": {"out": 2.5}}
