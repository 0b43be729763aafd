# SPDX-License-Identifier: Apache-2.0
"""What several streams side by side give, and what they cost.

  python -m experiments.streams --questions=gsm8k.jsonl
  python -m experiments.streams --questions=gsm8k.jsonl --every=16 \\
    --taught=FOLDER --output=experiments/results/streams_taught.json

Throughput: C questions are answered in C streams, which see each other
("streams") or themselves alone ("apart"); by C rows of ordinary decoding
("separate"); and one after the other ("sequential"). Apart, separate and
sequential write the same words, up to near ties that other widths round
otherwise: texts that differ are counted. Prompts are read before the clock
starts.

Speculation over rows: apart, with each drafter, on questions that are answered
and on questions that are copied. A drafted row stands only if every stream
says what was guessed, so rows a pass fall with C; what they must be for a
wider pass to pay for itself stands beside them.

Delay: a question comes in a token a row, and the answer is written beside it;
against reading it first, as it comes or at once. In rows and in ms, from the
last word of the question to the first of the answer and to its last; what came
before is negative. A model that was not taught so has a delay, but no answer:
give what train_streams made, and questions that it held out.

Interrupt: words come in from another thread while the model writes. How many
rows and ms it takes until the first stands in the table; up to which row the
output is, bit for bit, that without it; and how long until `interrupt` ends it.
A cell sees no peer in its row: a word that stands in a row is seen by the cells
of the next, and changes what is written behind those.

All methods take turns, and a sample in which something was compiled or others
kept the processor busy is taken again. What is finished is kept beside the
output, and the same command goes on from there.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import machine
from experiments.exactness import Journal
from experiments.stream_figures import plot, summarise, table
from experiments.ttft import digest, padded, undisturbed
from jaxspec import loop as ordinary
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from jaxspec.kernels import on
from jaxspec.options import Options, as_request
from jaxspec.streams import layout as layouts
from jaxspec.streams import loop
from jaxspec.streams.layout import Stream, StreamLayout
from jaxspec.streams.model import StreamModel
from jaxspec.streams.session import Row, Session, Streams

FLAGS = flags.FLAGS
# What is asked for; the second is known word by word.
TASKS = {"answer": "{}", "copy": "Repeat this text word for word: {}"}
WIDTHS = (16, 64, 128, 256, 512)
_STOPS, _BIASES, _QUIET, _WAIT = 16, 64, 10, 8


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string("model", "smollm2-135m", "what is decoded with")
  flags.DEFINE_string("dtype", "bfloat16", "of the weights")
  flags.DEFINE_string(
      "taught", "", "a folder that train_streams made, whose streams are those "
      "of delay and interrupt; its report is kept with the result")
  flags.DEFINE_string(
      "questions", None, "JSON lines with a `question`", required=True)
  flags.DEFINE_integer(
      "every", 1, "takes each so manieth question, from the first on; 16 takes "
      "those that train_streams holds out of such a file")
  flags.DEFINE_string(
      "output", "experiments/results/streams.json",
      "where the result goes; the plot goes beside it")
  flags.DEFINE_list("streams", ["1", "2", "3", "10"], "side by side")
  flags.DEFINE_integer("rows", 32, "written in each sample")
  flags.DEFINE_integer("count", 5, "samples of each number of streams and task")
  flags.DEFINE_integer("prompt_tokens", 120, "a longer prompt is left out")
  flags.DEFINE_multi_string(
      "drafter", ["lookup:length=3", "medusa"],
      "of rows, compared with plain rows; may be repeated; `--drafter=` for "
      "none")
  flags.DEFINE_string(
      "layout", "", "of delay and interrupt, where no --taught says it; by "
      "default reading, by rows")
  flags.DEFINE_integer("delays", 8, "questions whose delay is measured")
  flags.DEFINE_integer("answer_tokens", 64, "of such an answer at most")
  flags.DEFINE_float(
      "silence_penalty", None, "of the stream that answers, in delay and "
      "interrupt; as for the streams command; by default as the layout says")
  flags.DEFINE_integer(
      "wait", None, "words of a question that are there before an answer "
      "begins, where no silence lets the model wait by itself; by default "
      f"{_WAIT}")
  flags.DEFINE_integer("interrupts", 10, "for each stride")
  flags.DEFINE_list("strides", ["1", "4"], "passes between two looks at what "
                    "was pushed, when interrupted")
  flags.DEFINE_integer("retries", 2, "of a sample that was disturbed")
  flags.DEFINE_float(
      "max_foreign", 0.2, "cores that others may keep busy during a sample")


# Throughput and speculation.


def columns(count: int, *, apart: bool) -> StreamLayout:
  """Streams that the model writes.

  Args:
    apart: each reads itself alone and counts its own tokens, so that it says
      what ordinary decoding says; else all read all.
  """
  return StreamLayout(
      tuple(Stream(f"s{n}", reads=() if apart else None)
            for n in range(count)),
      positions="counters" if apart else "rows")


class Rows:
  """Prompts in the streams of one session."""

  def __init__(self, generator: Generator, layout: StreamLayout, room: int,
               drafter: str = ""):
    """Programs are compiled when they are first run."""
    self.streams = Streams.of(generator, layout, room=room, prefix_room=0,
                              drafter=drafter)

  def run(self, prompts: Sequence[Sequence[int]], rows: int) -> dict[str, Any]:
    """Writes so many rows behind prompts, and tells what it took."""
    made = self.streams
    layout = made.layout
    options = Options(max_new_tokens=rows, ignore_eos=True)
    with made.open(given=dict(zip(layout.names, prompts)),
                   options=options) as session, on(made.mesh, made._target):
      no = np.zeros(1, bool)
      batch = jax.block_until_ready(loop.hold(made._batch, no, no))
      start = time.perf_counter()
      batch = loop.decode(made.model, layout, made._drafter, batch,
                          np.int32(2**30), np.int32(rows))
      jax.block_until_ready(batch)
      seconds = time.perf_counter() - start
      made._batch = batch
      text = np.asarray(batch.lines.texts)[session._at]
      texts = [text[n, len(prompt):len(prompt) + rows].tolist()
               for n, prompt in enumerate(prompts)]
      return {"seconds": seconds, "passes": int(batch.passes[session._at]),
              "drafted": int(batch.drafted[session._at]),
              "accepted": int(batch.accepted[session._at]), "texts": texts}


class Plain:
  """Prompts in the rows of a batch of ordinary decoding."""

  def __init__(self, generator: Generator, rows: int, capacity: int):
    self.made = Generator(
        generator.model, rows=rows, capacity=capacity, mesh=generator.mesh)
    self._state: Any = None

  def run(self, prompts: Sequence[Sequence[int]], rows: int) -> dict[str, Any]:
    """Writes so many tokens behind each prompt, one by one in each row."""
    made, each = self.made, self.made.rows
    total: dict[str, Any] = {"seconds": 0.0, "passes": 0, "texts": []}
    for at in range(0, len(prompts), each):
      some = prompts[at:at + each]
      width = next(w for w in WIDTHS if w >= max(map(len, some)))
      tokens, lengths = padded(some, width)
      # The first comes with the prompt, and takes no pass.
      request = as_request(
          [Options(max_new_tokens=rows + 1, ignore_eos=True)] * each,
          lengths.tolist(), (), vocab=made.model.vocab, stops=_STOPS,
          biases=_BIASES)
      with on(made.mesh, made._target):
        state = made._init() if self._state is None else self._state
        prefix = ordinary.prefill(made.model, made.drafter.taps, tokens,
                                  lengths, chunk=512, dtype=made.cache_dtype)
        state = jax.block_until_ready(ordinary.insert(
            made.model, made.drafter, made.verifier, state,
            np.arange(each, dtype=np.int32), prefix, request))
        start = time.perf_counter()
        state = jax.block_until_ready(ordinary.decode(
            made.model, made.drafter, made.verifier, state, np.int32(2**30),
            np.bool_(True)))
        total["seconds"] += time.perf_counter() - start
      self._state = state
      total["passes"] += int(np.max(np.asarray(state.counters.passes)))
      text = np.asarray(state.seq.tokens)
      total["texts"] += [text[row, n:n + rows].tolist()
                         for row, n in enumerate(lengths)]
    return total


def contest(generator: Generator, count: int, room: int,
            drafters: Sequence[str]) -> dict[str, Any]:
  """All that writes the same number of streams, by name."""
  apart = columns(count, apart=True)
  one = Plain(generator, 1, room)
  found: dict[str, Any] = {
      "streams": Rows(generator, columns(count, apart=False), room),
      "apart": Rows(generator, apart, room),
      "separate": one if count == 1 else Plain(generator, count, room),
      "sequential": one}
  return found | {f"apart, {text}": Rows(generator, apart, room, text)
                  for text in drafters}


def in_turns(methods: Mapping[str, Callable[[], dict[str, Any]]], turn: int,
             *, retries: int, max_foreign: float) -> dict[str, Any]:
  """A sample of each; nobody is always first."""
  names = list(methods)
  shift = turn % len(names)
  found = {name: undisturbed(methods[name], retries, max_foreign)
           for name in [*names[shift:], *names[:shift]]}
  return {name: found[name] for name in names}


def race(methods: Mapping[str, Any], task: str,
         prompts: Sequence[Sequence[int]], rows: int, turn: int,
         **settings: Any) -> dict[str, Any]:
  """One sample of everything; of what is copied, of rows alone."""
  jobs = {name: functools.partial(made.run, prompts, rows)
          for name, made in methods.items()
          if task == "answer" or name.startswith("apart")}
  return {"rows": rows, "methods": in_turns(jobs, turn, **settings)}


# Delay and interrupt.


class Talk:
  """A question in one stream, and its answer in another.

  Attributes:
    prefix: the ids that streams share.
    first: the ids that an answer goes on from.
    wait: tokens of a question that are there before the answer may begin;
      none where silence lets the model wait by itself.
  """

  def __init__(self, streams: Streams, prefix: Sequence[int],
               first: Sequence[int], wait: int):
    layout = streams.layout
    if layout.count == len(layout.written):
      raise InputError("delay and interrupt need a layout with a stream that "
                       f"is read; all of {', '.join(layout.names)} are written")
    self.streams = streams
    self.prefix, self.first = list(prefix), list(first)
    self.wait = wait if layout.silence is None else 0
    self.user = next(s.name for s in layout.streams if not s.written)
    self.output = layout.names[layout.written[0]]

  def open(self, words: Sequence[int], options: Options) -> Session:
    """A session that has read some words, and may answer."""
    layout = self.streams.layout
    given = {self.user: words, self.output: self.first}
    if layout.silence is None:       # and so all must have words to go on from
      given |= {layout.names[at]: self.first for at in layout.written}
    return self.streams.open(
        prefix=self.prefix, given={k: v for k, v in given.items() if v},
        options=options)

  def said(self, row: Row, name: str) -> int | None:
    """The token of a stream in a row, unless it is silent."""
    token = row.tokens[self.streams.layout.place(name)]
    return None if token == self.streams.layout.silence else token

  def beside(self, question: Sequence[int], options: Options
             ) -> dict[str, Any]:
    """The answer is written while the question is read."""
    layout, read, wrote, useful = self.streams.layout, [], [], 0
    with self.open(question[:self.wait], options) as session:
      session.push(self.user, question[self.wait:])
      jax.block_until_ready(self.streams._batch)
      start = time.perf_counter()
      for row in session.rows():
        if row.given:
          continue
        now = row.number, time.perf_counter() - start
        if self.said(row, self.user) is not None:
          read.append(now)
        if (token := self.said(row, self.output)) is not None:
          wrote.append((*now, token))
        useful += sum(self.said(row, layout.names[at]) is not None
                      for at in layout.written)
      passes, rows = session.passes, session.count
    if not read or not wrote and layout.silence is None:
      raise InputError(f"of a question of {len(question)} tokens nothing is "
                       "read while its answer is written; make --wait smaller "
                       "or questions longer")
    return delay(read[-1], [w[:2] for w in wrote]) | {
        "passes": passes, "useful": useful, "table_rows": rows,
        "answer": [token for *_, token in wrote]}


def delay(read: tuple[int, float], wrote: Sequence[tuple[int, float]]
          ) -> dict[str, Any]:
  """From the last word of a question to the first and last of its answer.

  None where there is no answer: a model may be silent.
  """
  if not wrote:
    return {"rows": None, "seconds": None}
  return {"rows": [wrote[at][0] - read[0] for at in (0, -1)],
          "seconds": [wrote[at][1] - read[1] for at in (0, -1)]}


def as_it_comes(alone: Streams, prefix: Sequence[int], words: Sequence[int],
                options: Options) -> dict[str, Any]:
  """One stream: a question, a token a row, and then its answer."""
  with alone.open(prefix=prefix, given={"text": words[:1]},
                  options=options) as session:
    session.push("text", words[1:])
    jax.block_until_ready(alone._batch)
    start = time.perf_counter()
    times = [(row.number, time.perf_counter() - start, row.tokens[0])
             for row in session.rows()]
    passes = session.passes
  read, wrote = times[:len(words)], times[len(words):]
  return delay(read[-1][:2], [w[:2] for w in wrote]) | {
      "passes": passes, "useful": len(wrote),
      "answer": [token for *_, token in wrote]}


def at_once(plain: Plain, prompt: Sequence[int], options: Options,
            eos_ids: Sequence[int]) -> dict[str, Any]:
  """A whole question is there and is read, and then its answer is written."""
  made = plain.made
  tokens, lengths = padded(
      [prompt], next(w for w in WIDTHS if w >= len(prompt)))
  request = as_request([options], lengths.tolist(), eos_ids,
                       vocab=made.model.vocab, stops=_STOPS, biases=_BIASES)
  state = made._init() if plain._state is None else plain._state
  jax.block_until_ready(state)
  with on(made.mesh, made._target):
    start = time.perf_counter()
    prefix = ordinary.prefill(made.model, made.drafter.taps, tokens, lengths,
                              chunk=512, dtype=made.cache_dtype)
    state = ordinary.insert(
        made.model, made.drafter, made.verifier, state,
        np.zeros(1, np.int32), prefix, request)
    jax.block_until_ready(state)
    wrote = [(1, time.perf_counter() - start)]
    while not np.asarray(state.done)[0]:
      state = jax.block_until_ready(ordinary.decode(
          made.model, made.drafter, made.verifier, state, np.int32(1),
          np.bool_(True)))
      wrote.append((len(wrote) + 1, time.perf_counter() - start))
  plain._state = state
  end = int(np.asarray(state.seq.length)[0])
  answer = np.asarray(state.seq.tokens)[0, len(prompt):end].tolist()
  return delay((0, 0.0), wrote) | {
      "passes": 1 + int(np.asarray(state.counters.passes)[0]),
      "useful": len(answer), "answer": answer}


def speak_up(talk: Talk, question: Sequence[int], words: Sequence[int],
             options: Options, *, rows: int, at: int, part: float,
             stride: int) -> dict[str, Any]:
  """Words come in while a row is written, and later an interrupt.

  Args:
    rows: that are written at most.
    at: the number of rows after which somebody begins to speak.
    part: of the time of a row, that passes before the words are there.
  """
  options = dataclasses.replace(options, max_new_tokens=rows, logprobs=True)
  layout = talk.streams.layout
  place = layout.place(talk.output)

  def view(row: Row) -> list[Any]:
    return [row.tokens[place], row.logprobs[place]]

  with talk.open(question, options) as session:
    alone, times = [], []
    for row in session.rows(stride):
      times.append(time.perf_counter())
      if not row.given:
        alone.append(row)
  # The first rows came together, and may have had to be compiled.
  each = (times[-1] - times[0]) / max(len(alone) - stride, 1)
  found: dict[str, Any] = {"row_seconds": each}

  def speak() -> None:
    time.sleep(part * each)
    found["held"], start = session.count, time.perf_counter()
    session.push(talk.user, words)
    found["call_seconds"] = time.perf_counter() - start
    found["at"] = start

  def stop() -> None:
    time.sleep(part * each)
    found["stopped_at"] = time.perf_counter()
    session.interrupt()

  with talk.open(question, options) as session:
    spoken, heard, threads = [], None, []
    for row in session.rows(stride):
      now = time.perf_counter()
      if row.given:
        continue
      spoken.append(row)
      if heard is None and talk.said(row, talk.user) is not None:
        heard = row.number, now
      for count, act in ((at, speak), (3 * rows // 4, stop)):
        if len(spoken) == count:
          threads.append(threading.Thread(target=act))
          threads[-1].start()
    ended = time.perf_counter()
    for thread in threads:
      thread.join()
  if heard is None:
    raise InputError(f"nobody spoke in {len(spoken)} rows; the model ended "
                     "before: let it write more, or speak earlier")
  changed = next((b.number for a, b in zip(alone, spoken)
                  if view(a) != view(b)), None)
  return found | {
      "rows_waited": heard[0] - found["held"],
      "seconds": heard[1] - found["at"],
      "changed_after": None if changed is None else changed - heard[0],
      "rows_equal_before": sum(view(a) == view(b) for a, b in zip(
          alone, spoken) if b.number <= heard[0]),
      "rows_before": sum(b.number <= heard[0] for b in spoken),
      # None where all rows were there before.
      "stop_seconds": (ended - found["stopped_at"]
                       if len(spoken) < rows else None)}


# What is run.


def read_questions(path: str) -> list[str]:
  """The questions of JSON lines."""
  lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  return [json.loads(line)["question"] for line in lines if line.strip()]


def chat(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
  """A question as a chat: what comes before it, itself, what comes behind."""
  mark = "\u241f"
  before, _, behind = tokenizer.render(
      [{"role": "user", "content": mark}]).partition(mark)
  parts = [tokenizer.encode(part, special=False) if part else []
           for part in (before, text, behind)]
  return parts[0], parts[1], parts[2]


def prompts_of(tokenizer: Any, questions: Iterable[str], longest: int,
               count: int) -> dict[str, list[list[int]]]:
  """What each task asks of the first questions for which none is too long."""
  asked = ({task: sum(chat(tokenizer, form.format(text)), [])
            for task, form in TASKS.items()} for text in questions)
  fits = list(itertools.islice(
      (one for one in asked if max(map(len, one.values())) <= longest), count))
  return {task: [one[task] for one in fits] for task in TASKS}


def layout_of(folder: str, name: str, tokenizer: Any, *,
              penalty: float | None = None, wait: int | None = None
              ) -> StreamLayout:
  """The streams of delay and interrupt.

  Args:
    folder: that train_streams made; "" for the model as it is.
    name: of a layout, where no folder says it.
    penalty: of the silence of the stream that answers.
    wait: words of a question before its answer, if anybody asked for that.

  Raises:
    InputError: something that the layout has no use for.
  """
  if folder and name:
    raise InputError(f"--layout={name} and --taught={folder} both say it; "
                     "leave one of them out")
  if folder:
    from jaxspec.streams import taught
    layout = taught.layout_of(pathlib.Path(folder) / "streams")
  elif name:
    layout = layouts.parse(name, tokenizer)
  else:
    layout = layouts.reading(positions="rows")
  if layout.silence is None:
    if penalty is not None:
      raise InputError(f"--silence_penalty={penalty} is for streams with a "
                       "silence token, and these have none; leave it out")
    return layout
  if wait is not None:
    raise InputError(f"--wait={wait} is for streams without silence; these "
                     "wait by themselves; leave it out")
  if not layout.quiet:
    # Who has nothing to say would go on to the end of the table.
    layout = dataclasses.replace(layout, quiet=_QUIET)
  if penalty is not None:
    layout = layout.penalized(layout.names[layout.written[0]], str(penalty))
  return layout


def load_talks(base: Generator, folder: str, layout: StreamLayout,
               drafters: Sequence[str], room: int, wait: int
               ) -> dict[str, Talk]:
  """The streams of delay and interrupt, with drafters and without.

  Args:
    folder: that train_streams made; "" for the model as it is, which is asked
      as it is in a chat.
    layout: see `layout_of`.
  """
  before, _, behind = chat(base.tokenizer, "")
  model, prefix, first = StreamModel(base.model), before, behind
  if folder:
    from jaxspec.streams import taught
    model, _ = taught.load(pathlib.Path(folder) / "streams", base.model)
    prefix, first = [], []
  return {
      f"beside, {text}" if text else "beside": Talk(
          Streams(model, layout, base.tokenizer, drafter=text, room=room,
                  eos_ids=base.eos_ids, mesh=base.mesh), prefix, first, wait)
      for text in ("", *drafters)}


def losses(folder: str) -> dict[str, dict[str, float]] | None:
  """The loss of each stream before and after, as train_streams reports it."""
  file = pathlib.Path(folder).expanduser() / "report.json"
  if not folder or not file.exists():
    return None
  report = json.loads(file.read_text(encoding="utf-8"))
  return {when: {name: one["loss"]
                 for name, one in report[when]["streams"].items()}
          for when in ("before", "after")}


def measure_races(base: Generator, journal: Journal,
                  prompts: Mapping[str, Sequence[Sequence[int]]],
                  **settings: Any) -> list[dict[str, Any]]:
  """Throughput and speculation, for each number of streams."""
  records = []
  drafters = [text for text in FLAGS.drafter if text]
  room = FLAGS.prompt_tokens + FLAGS.rows + 8
  made = functools.cache(lambda count: contest(base, count, room, drafters))
  for count in map(int, FLAGS.streams):
    for number, task in itertools.product(range(FLAGS.count), TASKS):
      texts = prompts[task]
      some = [texts[(number * count + n) % len(texts)] for n in range(count)]
      name = {"section": "race", "streams": count, "task": task,
              "number": number}

      def sample(count=count, task=task, some=some, number=number):
        return race(made(count), task, some, FLAGS.rows, number, **settings)

      records.append({**name, **journal.get(
          {**name, "prompts": some, "rows": FLAGS.rows,
           "drafters": drafters}, sample)})
      print(progress(records[-1]), flush=True)
    made.cache_clear()
    jax.clear_caches()             # a process cannot hold programs without end
  return records


def measure_delays(base: Generator, talks: Mapping[str, Talk],
                   journal: Journal, questions: Sequence[str],
                   **settings: Any) -> list[dict[str, Any]]:
  """Delay, for each question.

  Args:
    talks: by name; those with drafters among them.
  """
  first = next(iter(talks.values()))
  options = Options(max_new_tokens=FLAGS.answer_tokens)
  room = first.streams.room
  plain = Plain(base, 1, room + first.streams.prefix_room)
  alone = Streams.of(base, "single", room=room)
  records = []
  for number, question in enumerate(questions):
    before, ids, behind = chat(base.tokenizer, question)

    def sample(ids=ids, before=before, behind=behind, number=number):
      jobs: dict[str, Callable[[], dict[str, Any]]] = {
          "at once": lambda: at_once(plain, [*before, *ids, *behind], options,
                                     base.eos_ids),
          "as it comes": lambda: as_it_comes(alone, before, [*ids, *behind],
                                             options)}
      jobs |= {name: functools.partial(talk.beside, ids, options)
               for name, talk in talks.items()}
      return {"question_tokens": len(ids),
              "methods": in_turns(jobs, number, **settings)}

    name = {"section": "delay", "number": number}
    records.append({**name, **journal.get({**name, "question": ids}, sample)})
    print(progress(records[-1]), flush=True)
  return records


def measure_interrupts(talk: Talk, tokenizer: Any, journal: Journal,
                       question: str, *, retries: int, max_foreign: float
                       ) -> list[dict[str, Any]]:
  """Words that come in at all parts of a row."""
  _, ids, _ = chat(tokenizer, question)
  words = tokenizer.encode(" Wait! Say it in one word.", special=False)
  records = []
  for stride, number in itertools.product(
      map(int, FLAGS.strides), range(FLAGS.interrupts)):
    part = (number + 0.5) / FLAGS.interrupts

    def sample(stride=stride, part=part):
      return speak_up(
          talk, ids, words, Options(ignore_eos=True),
          rows=FLAGS.rows + 8 * stride, at=FLAGS.rows // 4, part=part,
          stride=stride)

    name = {"section": "interrupt", "stride": stride, "number": number}
    records.append({**name, **journal.get(
        {**name, "rows": FLAGS.rows, "part": part},
        functools.partial(undisturbed, sample, retries, max_foreign))})
  return records


def progress(record: Mapping[str, Any]) -> str:
  """A line for whoever waits."""
  if record["section"] == "race":
    return f"{record['streams']} streams, {record['task']}: " + ", ".join(
        f"{name} {1e3 * m['seconds'] / record['rows']:.0f} ms a row"
        for name, m in record["methods"].items())
  return f"question {record['number']}: " + ", ".join(
      f"{name} {m['rows'][0]} rows, {1e3 * m['seconds'][0]:.0f} ms"
      if m["rows"] else f"{name} silent"
      for name, m in record["methods"].items())


def main(argv: list[str]) -> None:
  """Runs what is not yet there, and writes everything."""
  del argv
  settings = dict(retries=FLAGS.retries, max_foreign=FLAGS.max_foreign)
  base = Generator.load(FLAGS.model, dtype=FLAGS.dtype)
  try:
    layout = layout_of(FLAGS.taught, FLAGS.layout, base.tokenizer,
                       penalty=FLAGS.silence_penalty, wait=FLAGS.wait)
  except InputError as e:
    raise app.UsageError(str(e)) from e
  wait = _WAIT if FLAGS.wait is None else FLAGS.wait
  questions = read_questions(FLAGS.questions)[::FLAGS.every]
  prompts = prompts_of(base.tokenizer, questions, FLAGS.prompt_tokens,
                       FLAGS.count * max(map(int, FLAGS.streams)))
  least = max(FLAGS.delays, FLAGS.interrupts > 0)
  short = list(itertools.islice((text for text in questions if wait < len(
      chat(base.tokenizer, text)[1]) <= FLAGS.prompt_tokens), least))
  if not prompts["answer"] or len(short) < least:
    raise app.UsageError(
        f"of {len(questions)} questions {len(short)} have at most "
        f"--prompt_tokens={FLAGS.prompt_tokens} tokens and more than "
        f"--wait={wait}; allow more, or name another file")
  output = pathlib.Path(FLAGS.output)
  journal = Journal(output.with_name(output.name + ".records"), [
      machine.commit(), FLAGS.model, FLAGS.dtype, FLAGS.taught,
      digest(f"{FLAGS.taught}/streams") if FLAGS.taught else "", FLAGS.layout,
      wait, FLAGS.silence_penalty, FLAGS.answer_tokens, settings])
  records = measure_races(base, journal, prompts, **settings)
  # A table holds a question twice, as silence, its answer, and what frames it.
  room = 2 * FLAGS.prompt_tokens + FLAGS.answer_tokens + 64
  talks = load_talks(
      base, FLAGS.taught, layout,
      [text for text in FLAGS.drafter if text.startswith("lookup")], room,
      wait)
  records += measure_delays(base, talks, journal, short[:FLAGS.delays],
                            **settings)
  if FLAGS.interrupts:
    records += measure_interrupts(talks["beside"], base.tokenizer, journal,
                                  short[0], **settings)
  loss, summary = losses(FLAGS.taught), summarise(records)
  machine.write(
      str(output), records, loss=loss, layout=dataclasses.asdict(
          talks["beside"].streams.layout), summary=summary)
  plot(summary, loss, output.with_suffix(".png"))
  journal.path.unlink(missing_ok=True)
  print(table(summary))


if __name__ == "__main__":
  define_flags()
  app.run(main)
