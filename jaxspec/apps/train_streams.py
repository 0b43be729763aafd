# SPDX-License-Identifier: Apache-2.0
"""Teaches a model to read, think and write in several streams at once.

  python -m jaxspec train_streams --layout=reading --silence='<filename>' \\
    --data=chats.jsonl --output=folder
  python -m jaxspec streams --taught=folder/streams --push='user=Why is it so?'

Lines of --data hold a text for each stream, under its name; or `question` and
`answer`; or `messages`; or a table, as a list of rows. Streams wait for each
other as --follow says, and what they do not say is silence. The model learns
by an adapter of low rank, or with --adapter_rank=0 as a whole, and with it a
vector for each stream.

All of a run lies in --output. One that was killed, or ended by --minutes, goes
on with --resume. In the end a report says how well each stream of texts that
were held out is foretold, before and after, and how long after its user's last
word the model says its first.
"""

import json
import pathlib
import statistics
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxspec import naming
from jaxspec.apps import launch, runs
from jaxspec.errors import InputError

if TYPE_CHECKING:
  from jaxspec.generator import Generator
  from jaxspec.streams.conversion import Follow, Table
  from jaxspec.streams.layout import StreamLayout
  from jaxspec.streams.model import StreamModel
else:  # Imported when needed, so that --help loads no jax.
  Generator = Follow = Table = StreamLayout = StreamModel = Any

# Every so many-th table is not learnt from, but judged by.
_HELD_OUT = 16
# Steps between checkpoints.
_EVERY = 20
_SESSIONS = 4
# What may change between a run and its continuation.
_MAY_CHANGE = ("resume", "compilation_cache_dir", "output", "minutes",
               "silence_penalty")
# Words behind the leader: of an answer, and of remarks on it.
_WAIT, _REMARK = 5, 1
# Rows of silence after which a session that is taught so waits for more words.
_QUIET = 10
# Two vectors nearer than this are one to the model.
_APART = 0.05


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this command."""
  launch.define_model_flags(values)
  launch.define_place_flags(values)
  text = lambda *args: flags.DEFINE_string(*args, flag_values=values)
  many = lambda *args: flags.DEFINE_multi_string(*args, flag_values=values)
  number = lambda *args: flags.DEFINE_integer(*args, flag_values=values)
  real = lambda *args: flags.DEFINE_float(*args, flag_values=values)
  switch = lambda *args: flags.DEFINE_boolean(*args, flag_values=values)
  text("layout", "reading", "the streams: reading, auditing, thoughts, single, "
       "or a JSON file of the fields of jaxspec.streams.StreamLayout")
  text("silence", None, "the text of the one token that stands in empty cells, "
       "and by its row in the table is the place of each token; by default as "
       "the layout has it")
  text("position_rule", None, "without --silence: counters, the place of a "
       "token is how many its stream had before; or rows, its row; by default "
       "as the layout has it")
  many("lead", None, "STREAM=NUMBER, without --silence: how far the count of a "
       "stream is ahead, so that it sees what came so many rows before it; may "
       "be repeated")
  many("given", None, "STREAM=WORDS, a stream's first words, on which the "
       "model goes on; in use they are given as well; may be repeated")
  switch("keep_silence", False, "with --silence: later tokens see silence too")
  many("silence_penalty", None, "STREAM=NUMBER, in use taken off the logit of "
       "the stream's silence, more and more in the rows behind the last that "
       "was read; changes nothing of what is learnt, and may be given anew "
       "with --resume; may be repeated")
  many("data", None, "a JSONL file, or the hub id of a data set that has such "
       "files; may be repeated")
  many("column", None, "STREAM=TEMPLATE, Jinja for what a stream says, of what "
       "a line of --data holds, called row: audit={{ row.verdict }}; may be "
       "repeated")
  many("follow", None, "STREAM=LEADER:WAIT, a stream whose words begin so many "
       "words behind its leader's; may be repeated. By default the first that "
       f"is written follows the first that is read, {_WAIT} words behind, and "
       f"others follow it, {_REMARK} behind")
  switch("wait_for_copies", True, "numbers and longer words wait until their "
         "leader has said them, if it says them at all")
  text("output", None, "the folder of this run")
  switch("resume", False, "go on with the run in --output")
  number("adapter_rank", 16, "of the change of each matrix; 0 changes all "
         "weights of all layers")
  real("adapter_alpha", None, "changes are multiplied by this over the rank; "
       "by default twice the rank")
  number("steps", 300, "batches to learn from")
  real("minutes", None, "end after so long, wherever it stands, as if it had "
       "been killed behind a step")
  real("rate", None, "highest learning rate; by default 1e-3, and 3e-5 for a "
       "whole model")
  number("blocks", 1, "blocks of cells in a batch")
  number("cells", 512, "of a block; a table that has more is cut")
  number("positions", 320, "cells of a batch that are learnt from at most")
  real("silence_share", 0.3, "of the silences, how many are learnt from")
  number("judged", 32, "held-out tables to judge by, at most")
  number("asked", 8, "of these, how many conversations the model goes through "
         "before and after")
  number("seed", 0, "of the adapter and of the order of tables")


def main(settings: types.SimpleNamespace) -> None:
  """Teaches what the settings ask for."""
  began = time.monotonic()
  _check(settings)
  import jax

  if settings.dtype is None and jax.default_backend() == "cpu":
    settings.dtype = "float32"  # It has no fast products of bfloat16.
  folder = runs.open_folder(settings, _MAY_CHANGE)
  generator = launch.load_model(settings)
  from jaxspec import training, tuning
  from jaxspec.streams import teaching
  from jaxspec.streams.model import StreamModel

  model = generator.model
  layout = _layout(settings, generator)
  with jax.set_mesh(generator.mesh):
    tables = _tables(settings, generator, layout)
    held = tables[::_HELD_OUT][:max(settings.judged, settings.asked, 1)]
    learnt = [t for n, t in enumerate(tables) if n % _HELD_OUT]
    if not learnt:
      raise InputError(f"--data gives {len(tables)} tables; pass more")
    recipe = teaching.Recipe(
      layout=layout, steps=settings.steps, rate=settings.rate,
      blocks=settings.blocks, width=settings.cells, seed=settings.seed,
      positions=settings.positions, silence=settings.silence_share)
    tints = teaching.Tints.init(model, layout)
    body = tuning.Whole(model)
    if settings.adapter_rank:
      from jaxspec import adapters

      body = tuning.LowRank(model, adapters.Adapter.init(
        model, rank=settings.adapter_rank, alpha=settings.adapter_alpha,
        seed=settings.seed))
    order = teaching.Order(learnt, recipe)
    launch.say(f"{len(learnt)} tables in {len(order.blocks)} blocks, "
               f"{100 * order.filled:.0f} % full; {len(held)} held out")
    runs.begin(folder, settings, _MAY_CHANGE)
    judge = lambda taught: _judge(settings, generator, taught, layout, held,
                                  recipe)
    file = folder / "before.json"
    if not file.exists():
      runs.write(file, judge(StreamModel(
        model, tints.embedding.astype(model.embedding[...].dtype))))
    before = json.loads(file.read_text(encoding="utf-8"))
    _tell("before", before)
    timed: list[float] = [time.monotonic()]
    with launch.progress("learning") as on_progress:

      def on_step(step: int, marks: Mapping[str, Any]) -> None:
        timed.append(time.monotonic())
        losses = {name: float(m.loss) for name, m in marks.items()}
        words = " ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
        if on_progress is not None:
          on_progress(words, step, recipe.steps)
        elif step % 10 == 0:
          launch.say(f"step {step} of {recipe.steps}: loss {words}, "
                     f"{_pace(timed):.2f} s a step")

      minutes = settings.minutes
      taught = training.fit(
        model, {teaching.MODEL: body, teaching.STREAMS: tints}, learnt, recipe,
        folder, every=_EVERY, on_step=on_step, course=teaching,
        until=lambda: (minutes is not None
                       and time.monotonic() - began > 60 * minutes))
    steps = len(training.read_curve(folder))
    _save(folder, taught, generator, layout)
    after = judge(taught.model)
  seconds = _pace(timed)
  if seconds is None and (folder / "report.json").exists():
    # Judged anew, and not taught.
    seconds = json.loads((folder / "report.json").read_text(
      encoding="utf-8"))["seconds_a_step"]
  runs.write(folder / "report.json", {
    "before": before, "after": after, "steps": steps,
    "seconds_a_step": seconds, "cells_a_step": recipe.blocks * recipe.width,
    "filled": order.filled, "tables": len(learnt),
    "delay_of_data": _delays_of(layout, held)})
  runs.draw(folder, "likeliest token right, %")
  _tell("after", after)
  if seconds is not None:
    print(f"{steps} steps of {recipe.blocks * recipe.width} cells, "
          f"{seconds:.2f} s each, "
          f"{recipe.blocks * recipe.width * order.filled / seconds:.0f} "
          "tokens/s", flush=True)
  if steps < recipe.steps:
    launch.say(f"ended by --minutes at step {steps} of {recipe.steps}; "
               "--resume goes on")
  launch.say(f"wrote {settings.output}")


def _pace(timed: Sequence[float]) -> float | None:
  """Median seconds between steps, the first left out: it compiles."""
  gaps = [b - a for a, b in zip(timed[1:], timed[2:])]
  return statistics.median(gaps) if gaps else None


def _check(settings: types.SimpleNamespace) -> None:
  for name in ("data", "output"):
    if not getattr(settings, name):
      raise InputError(f"--{name} is missing; see --help")
  rank = settings.adapter_rank
  for name, low, high in (
    ("adapter_rank", 0, 1024), ("steps", 1, 1 << 30), ("blocks", 1, 1 << 16),
    ("cells", 16, 1 << 20), ("positions", 1, 1 << 20), ("judged", 1, 1 << 20),
    ("asked", 0, 1 << 20), ("seed", 0, 2**32 - 1),
  ):
    naming.whole("train_streams", name, getattr(settings, name), low, high)
  if not rank and settings.adapter_alpha is not None:
    raise InputError("--adapter_alpha is for an adapter, and --adapter_rank=0 "
                     "asks for none; leave one out")
  if settings.silence is None and settings.keep_silence:
    raise InputError("--keep_silence is for --silence, and there is none; name "
                     "the token, or leave it out")
  for name in ("position_rule", "lead"):
    if settings.silence is not None and getattr(settings, name):
      raise InputError(f"--{name} is for streams without --silence, by which "
                       "positions are those of rows; leave one of them out")
  if settings.rate is None:
    settings.rate = 1e-3 if rank else 3e-5
  naming.number("train_streams", "rate", settings.rate, 0, 1)
  naming.number("train_streams", "silence_share", settings.silence_share,
                0, 1)
  if settings.minutes is not None:
    naming.number("train_streams", "minutes", settings.minutes, 0, 1e6)


# What is learnt from.


def _layout(settings: types.SimpleNamespace, generator: Generator
            ) -> StreamLayout:
  """The layout, silent by the token of --silence."""
  import dataclasses

  import jax.numpy as jnp

  from jaxspec.streams import layout as layouts

  tokenizer = generator.tokenizer
  if tokenizer is None:
    raise InputError("the checkpoint has no tokenizer, and words have to be "
                     "told apart; use a model that has one")
  layout = layouts.parse(settings.layout, tokenizer)
  if settings.silence is not None:
    ids = tokenizer.encode(settings.silence, special=False)
    if len(ids) != 1:
      raise InputError(f"--silence={settings.silence!r} is {len(ids)} tokens; "
                       "name one")
    layout = dataclasses.replace(
      layout, positions="rows", silence=ids[0], quiet=_QUIET,
      keep_silence=settings.keep_silence,
      streams=tuple(dataclasses.replace(s, lead=0) for s in layout.streams))
  if settings.position_rule is not None:
    layout = dataclasses.replace(layout, positions=settings.position_rule)
  for name, lead in launch.by_stream("lead", "NUMBER", settings.lead, layout):
    layout = layout.leading(name, lead)
  for name, penalty in launch.by_stream(
    "silence_penalty", "NUMBER", settings.silence_penalty, layout
  ):
    layout = layout.penalized(name, penalty)
  if layout.silence is not None:
    if layout.silence in generator.eos_ids:
      raise InputError(f"the silence token {layout.silence} ends a text; name "
                       "another")
    rows = generator.model.unembedding.astype(jnp.float32)
    far = jnp.linalg.norm(rows - rows[layout.silence][None], axis=1)
    other = int(jnp.argmin(far.at[layout.silence].set(jnp.inf)))
    if far[other] < _APART:
      raise InputError(
        f"to the model the silence token {layout.silence} is the same as token "
        f"{other} ({tokenizer.decode([other], skip_special=False)!r}), so that "
        "it cannot learn to say the one alone; name another")
  return layout


def _tables(settings: types.SimpleNamespace, generator: Generator,
            layout: StreamLayout) -> list[Table]:
  """Everything that --data holds, as tables."""
  from jaxspec.checkpoint import chat
  from jaxspec.streams import conversion

  tokenizer = generator.tokenizer

  def template(name: str, source: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda item: chat.render(
      source, [], row=item, source_name=f"--column={name}")

  render = {name: template(name, source) for name, source in launch.by_stream(
    "column", "TEMPLATE", settings.column, layout)}
  follows = _follows(settings, layout)
  beginnings = conversion.word_beginnings(tokenizer, generator.model.vocab)
  pieces = None
  if settings.wait_for_copies:
    pieces = lambda ids: conversion.telling(tokenizer.decode(ids))
  end = list(generator.eos_ids[:1])
  written = {s.name for s in layout.streams if s.written}

  encode = _encoder(tokenizer, layout)
  given = _given(settings, tokenizer, layout)

  def convert(item: Any) -> list[Table]:
    if isinstance(item, list):
      return [conversion.from_json(layout, encode, item)]
    found = []
    for texts in conversion.texts_of(layout, item, render):
      columns = {name: encode(words) + (end if name in written else [])
                 for name, words in texts.items()}
      for name, ids in columns.items():
        if layout.silence in ids:
          raise InputError(f"the text of stream {name} holds the silence token "
                           f"{layout.silence}; name another by --silence")
      found.append(conversion.side_by_side(
        layout, columns, follows, begins=lambda token: bool(beginnings[token]),
        pieces=pieces, given=given, ends=written if end else frozenset()))
    return found

  return [table for data in settings.data for file in runs.files(data)
          for table in conversion.read(file, convert)]


def _encoder(tokenizer: Any, layout: StreamLayout
             ) -> Callable[[str], list[int]]:
  """Text as a session of the layout reads it."""
  if not layout.by_word:
    return lambda words: tokenizer.encode(words, special=False)
  return lambda words: [i for word in words.split() for i in tokenizer.encode(
    " " + word, special=False)]


def _given(settings: types.SimpleNamespace, tokenizer: Any,
           layout: StreamLayout) -> dict[str, list[int]]:
  """What streams go on from, by --given."""
  encode = _encoder(tokenizer, layout)
  return {name: encode(words) for name, words in launch.by_stream(
    "given", "WORDS", settings.given, layout)}


def _follows(settings: types.SimpleNamespace, layout: StreamLayout
             ) -> dict[str, Follow]:
  """Who waits for whom."""
  from jaxspec.streams.conversion import Follow

  written = [s.name for s in layout.streams if s.written]
  read = [s.name for s in layout.streams if not s.written]
  follows = {name: Follow(written[0], _REMARK) for name in written[1:]}
  if read:
    follows[written[0]] = Follow(read[0], _WAIT)
  for name, text in launch.by_stream(
    "follow", "LEADER:WAIT", settings.follow, layout
  ):
    leader, _, wait = text.partition(":")
    layout.place(leader)
    if not wait.isdecimal():
      raise InputError(f"--follow={name}={text} must end with a number of "
                       "words, as in assistant=user:5")
    follows[name] = Follow(leader, int(wait))
  return follows


# What came of it.


def _judge(settings: types.SimpleNamespace, generator: Generator,
           taught: StreamModel, layout: StreamLayout, held: Sequence[Table],
           recipe: Any) -> dict[str, Any]:
  """Loss by stream, and delays in conversations that the model goes through."""
  import numpy as np

  from jaxspec.streams import delay, teaching
  from jaxspec.streams.session import Streams

  found: dict[str, Any] = {
    "streams": teaching.examine(taught, held[:settings.judged], recipe)}
  read = [at for at, s in enumerate(layout.streams) if not s.written]
  if not settings.asked or not read or layout.silence is None:
    return found        # Without silence a stream cannot begin by itself.
  some = held[:settings.asked]
  asked = []
  for table in some:
    said = delay.said(layout, table)
    asked.append({layout.names[at]: table.tokens[said[:, at], at].tolist()
                  for at in read})
  room = min(2 * max(len(t.tokens) for t in some) + 2,
             generator.model.config.context)
  streams = Streams(
    taught, layout, generator.tokenizer, sessions=min(_SESSIONS, len(some)),
    room=room, prefix_room=0, eos_ids=generator.eos_ids, mesh=generator.mesh)
  options = generator.default_options(temperature=0.0, max_new_tokens=room)
  tables = delay.converse(
    streams, asked, options,
    given=_given(settings, generator.tokenizer, layout))
  decode = lambda table, at: generator.tokenizer.decode(
    table.tokens[delay.said(layout, table)[:, at], at].tolist())
  found["delay"] = delay.summary([delay.delays(layout, t) for t in tables])
  found["rows"] = float(np.mean([len(t.tokens) for t in tables]))
  found["samples"] = [
    {name: decode(table, at) for at, name in enumerate(layout.names)}
    for table in tables]
  return found


def _delays_of(layout: StreamLayout, tables: Sequence[Table]) -> Any:
  from jaxspec.streams import delay

  return delay.summary([delay.delays(layout, t) for t in tables])


def _tell(when: str, found: Mapping[str, Any]) -> None:
  for name, one in found["streams"].items():
    line = f"{when}: {name} says nothing that is held out"
    if one["words"]:
      line = (f"{when}: {name} loss {one['loss']:.3f}, right "
              f"{100 * one['right']:.1f} % of {one['words']} tokens")
    if one["silence"]:
      line += (f"; silence loss {one['silence_loss']:.3f}, right "
               f"{100 * one['silence_right']:.1f} % of {one['silence']}")
    late = found.get("delay", {}).get(name)
    if late is not None:
      line += (f"; begins {late['mean']:.1f} rows behind the last word read, "
               f"{100 * late['early']:.0f} % before it"
               if late["spoke"] else "; says nothing")
      line += f" ({late['spoke']} of {late['tables']} conversations)"
    print(line, flush=True)


def _save(folder: pathlib.Path, found: Any, generator: Generator,
          layout: StreamLayout) -> None:
  """Writes what `streams --taught` reads, and a model that learnt as a whole.
  """
  import numpy as np

  from jaxspec.checkpoint import hf
  from jaxspec.models.transformer import source_of
  from jaxspec.streams import taught

  backbone = found.model.backbone
  if found.adapter is None:
    weight = source_of(backbone)
    hf.write(folder / "model", backbone.config,
             lambda path: np.asarray(weight(path, None, None)),
             tokenizer=generator.tokenizer, generation=generator.defaults)
  taught.save(folder / "streams",
              generator.model if found.adapter is not None else backbone,
              layout, found.model.embedding, found.adapter)
