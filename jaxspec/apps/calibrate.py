# SPDX-License-Identifier: Apache-2.0
"""Finds from which confidence on a head's tokens may be shown unsettled.

  python -m jaxspec calibrate --heads=FOLDER --data=questions.jsonl --risk=0.1

The prompts of --data, which the head must not have learnt from, are answered
greedily by the model; conversations that end with an answer are taken as they
are. The lowest thresholds at which no more than --risk of what is shown is
taken back, with --confidence, are written beside the head, where
--drafter=early_exit:heads=FOLDER finds them. What is guaranteed, and what is
not, is said in jaxspec/calibration.py.
"""

import json
import math
import pathlib
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxspec.apps import journal, launch
from jaxspec.errors import InputError

if TYPE_CHECKING:
  from jaxspec.corpus import Text
  from jaxspec.generator import Generator
else:  # Imported when needed, so that --help loads no jax.
  Text = Generator = Any

_MEASURES = ("top", "margin", "entropy", "learned")


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this command."""
  launch.define_model_flags(values)
  launch.define_place_flags(values)
  text = lambda *args: flags.DEFINE_string(*args, flag_values=values)
  number = lambda *args: flags.DEFINE_integer(*args, flag_values=values)
  share = lambda *args: flags.DEFINE_float(*args, flag_values=values)
  flags.DEFINE_multi_string(
    "heads",
    None,
    "a folder of an exit head; may be repeated: all are judged by the same "
    "answers",
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    "data",
    None,
    "a JSONL file of objects with prompt, messages, question or turns; may be "
    "repeated",
    flag_values=values,
  )
  share("risk", 0.1, "the share of what is shown that may be taken back")
  share("confidence", 0.95, "the probability with which it is no more")
  flags.DEFINE_enum(
    "measure", "top", _MEASURES, "of confidence", flag_values=values
  )
  number("length", 4, "drafts of a pass, as for early_exit")
  number("answer_tokens", 128, "length of an answer at most")
  number("answer_rows", 8, "prompts answered side by side")
  number("longest", 512, "tokens of a prompt at most; longer ones are left out")
  number("seed", 0, "by which the texts are parted")
  text("answers", None, "a JSONL file that keeps the answers for another run")
  text("output", None, "a JSON file for all that was found")
  text(
    "first_tokens",
    None,
    "a file for a table of what answers begin with, for decode "
    "--first_tokens=FILE",
  )


def main(settings: types.SimpleNamespace) -> None:
  """Calibrates what the settings name."""
  _check(settings)
  from jaxspec import corpus

  items = [item for path in settings.data for item in corpus.read(path)]
  if any(isinstance(item, str) for item in items):
    raise InputError("--data holds a text that is no answer to a prompt; pass "
                     "prompts, or conversations that end with an answer")
  generator = launch.load_model(
    settings,
    rows=settings.answer_rows,
    capacity=settings.longest + settings.answer_tokens,
  )
  import jax

  from jaxspec import calibration, heads

  model = generator.model
  # Refused before there are answers.
  loaded = {path: heads.load(path, model, "exit").heads
            for path in settings.heads}
  texts = _texts(generator, items, settings)
  needed = 2 * _least(settings)
  if len(texts) < needed:
    raise InputError(
      f"--data gives {len(texts)} answers, and nothing can be said with "
      f"--risk={settings.risk:g} and --confidence={settings.confidence:g} by "
      f"fewer than {needed}; pass more"
    )
  if settings.first_tokens:
    _learn_first_tokens(texts, model.vocab, settings)
  report = {}
  for path, head in loaded.items():
    with launch.progress("judging") as on_progress, jax.set_mesh(
      generator.mesh
    ):
      seen = calibration.see(
        model, head, texts, launch.counting(on_progress)
      )
    found = calibration.calibrate(
      seen,
      measure=settings.measure,
      risk=settings.risk,
      confidence=settings.confidence,
      length=settings.length,
      seed=settings.seed,
    )
    heads.note(path, found.calibration)
    report[path] = calibration.as_dict(found) | {"layer": head.layer}
    _show(path, head, found)
  if settings.output:
    file = pathlib.Path(settings.output).expanduser()
    launch.write(file, json.dumps(report, indent=2) + "\n")


def _check(settings: types.SimpleNamespace) -> None:
  for name in ("heads", "data"):
    if not getattr(settings, name):
      raise InputError(f"--{name} is missing; see --help")
  for name in ("risk", "confidence"):
    if not 0 < getattr(settings, name) < 1:
      raise InputError(f"--{name} must be between 0 and 1, got "
                       f"{getattr(settings, name):g}")
  for name, low, high in (("length", 1, 64), ("answer_tokens", 2, 2**20),
                          ("answer_rows", 1, 2**20), ("longest", 1, 2**20),
                          ("seed", 0, 2**32 - 1)):
    value = getattr(settings, name)
    if not low <= value <= high:
      raise InputError(f"--{name} must be in [{low}, {high}], got {value}")


def _least(settings: types.SimpleNamespace) -> int:
  """Samples with which something can be said, if nothing is taken back."""
  return math.ceil(
    math.log(1 - settings.confidence) / math.log(1 - settings.risk)
  )


def _texts(
  generator: Generator, items: Sequence[Any], settings: types.SimpleNamespace
) -> list[Text]:
  """Prompts and their answers, as tokens."""
  from jaxspec import corpus
  from jaxspec.generator import Options

  if generator.tokenizer is None:
    raise InputError(f"--model={settings.model} has no tokenizer, so that it "
                     "cannot read --data; pass a checkpoint with one")
  texts = [corpus.encode(generator.tokenizer, item) for item in items]
  texts = [
    corpus.Text(
      text.tokens[:text.prompt_length + settings.answer_tokens],
      text.prompt_length,
    )
    for text in texts
    if 0 < text.prompt_length <= settings.longest
  ]
  prompts = [n for n, t in enumerate(texts) if len(t.tokens) == t.prompt_length]
  known: dict[int, Any] = {}
  kept = None
  if settings.answers:
    if (done := journal.complete(settings.answers, len(prompts))) is not None:
      known = dict(enumerate(done))
    else:
      kept = journal.Journal(
        settings.answers, count=len(prompts), resume=True,
        identity=[settings.model, settings.dtype, settings.answer_tokens,
                  [list(texts[n].tokens) for n in prompts]],
      )
      known = kept.finished
  waiting = [at for at in range(len(prompts)) if at not in known]
  # Rows of a batch wait for the longest of them.
  waiting.sort(key=lambda at: len(texts[prompts[at]].tokens))
  with launch.progress("answering") as on_progress:

    def on_completion(index: int, completion: Any) -> None:
      record = {"token_ids": completion.token_ids}
      known[waiting[index]] = record
      if kept is not None:
        kept.add(waiting[index], record)
      if on_progress is not None:
        on_progress("", len(known), len(prompts))

    try:
      generator.generate(
        [texts[prompts[at]].tokens for at in waiting],
        Options(max_new_tokens=settings.answer_tokens),
        on_completion=on_completion,
      )
    except BaseException:
      if kept is not None:
        kept.close()
      raise
  if kept is not None:
    kept.finish()
  for at, n in enumerate(prompts):
    text = texts[n]
    texts[n] = corpus.Text(
      [*text.tokens, *known[at]["token_ids"]], text.prompt_length
    )
  return texts


def _learn_first_tokens(
  texts: Sequence[Text], vocab: int, settings: types.SimpleNamespace
) -> None:
  from jaxspec import first_tokens

  pairs = [(t.tokens[t.prompt_length - 1], t.tokens[t.prompt_length])
           for t in texts]
  table = first_tokens.learn(pairs, vocab)
  table.save(settings.first_tokens)
  if table.overall:
    print(f"{100 * table.overall[1]:.1f} % of {len(texts)} answers begin with "
          f"token {table.overall[0]}", flush=True)


def _show(path: str, head: Any, found: Any) -> None:
  """Prints what was found, every few thresholds."""
  c = found.calibration
  print(f"{path}: layer {head.layer}, measure {c.measure}, {found.texts} texts")
  tables = (("first tokens", found.first, c.first),
            ("later tokens, in chains", found.later, c.later),
            ("later tokens, each by itself", found.alone, None))
  for title, rows, chosen in tables:
    print(f"  {title}")
    print("    threshold   shown  taken back  95 % interval   texts      p")
    for row in rows:
      tenth = round(row.threshold * 1000) % 100 == 0
      if not (tenth or row.threshold in (0.99, chosen)):
        continue
      mark = " <" if row.threshold == chosen else ""
      print(
        f"    {row.threshold:9.3f}  {100 * row.shown:5.1f}%  "
        f"{100 * row.retracted:9.1f}%  {100 * row.low:5.1f} - "
        f"{100 * row.high:5.1f}%  {row.texts:6d}  {row.p:5.3f}{mark}"
      )
    if chosen is None:
      continue
    if chosen > 1:
      print(f"    never shown: by no threshold is it certain enough that at "
            f"most {100 * c.risk:g} % is taken back")
    else:
      print(f"    shown from {chosen:g} on: at most {100 * c.risk:g} % is "
            f"taken back, with {100 * c.confidence:g} % confidence")
  print(end="", flush=True)
