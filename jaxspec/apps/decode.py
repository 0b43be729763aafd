# SPDX-License-Identifier: Apache-2.0
"""Decodes prompts with a model, plainly or with speculation.

  python -m jaxspec decode --model=smollm2-135m --chat --prompt="Why is it?"
  python -m jaxspec decode --prompts=in.jsonl --output=out.jsonl --rows=8

The answer to one prompt streams to stdout; --prompts and --output read and
write one JSON object a prompt. What speculation gave goes to stderr.

Started on every host of a slice or cluster with --distributed=auto, the
processes decode together over one --mesh; the first reads, writes and prints.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxspec.apps import journal, launch
from jaxspec.errors import InputError

if TYPE_CHECKING:
  from jaxspec.generator import Completion, Generator, Options, TextEvent
else:  # Imported when needed, so that --help loads no jax.
  Completion = Generator = Options = TextEvent = Any

# A string, token ids, or a conversation of {"role", "content"}.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


# Results: to a file, or to stdout.


class Results:
  """Where completions go: nowhere, for one prompt without --output.

  Attributes:
    finished: the records that are there, by the index of their prompt.
  """

  def __init__(self, finished: dict[int, dict[str, Any]] | None = None):
    """Starts from the records of an earlier run, if any."""
    self.finished = {} if finished is None else finished

  def add(self, index: int, completion: Completion) -> None:
    """Takes a completion as soon as it is there."""

  def finish(self) -> None:
    """All completions are there."""

  def stop(self) -> None:
    """No more completions will come."""


class _Lines(Results):
  """Prints records to stdout in order, each as soon as those before it."""

  def __init__(self):
    super().__init__()
    self._printed = 0

  def add(self, index: int, completion: Completion) -> None:
    self.finished[index] = as_record(completion)
    while self._printed in self.finished:
      line = json.dumps(self.finished[self._printed], ensure_ascii=False)
      print(line, flush=True)
      self._printed += 1


class _File(Results):
  """Writes records to --output, through a journal."""

  def __init__(self, kept: journal.Journal, count: int):
    super().__init__(kept.finished)
    self._journal = kept
    self._count = count

  def add(self, index: int, completion: Completion) -> None:
    self._journal.add(index, as_record(completion))

  def finish(self) -> None:
    self._journal.finish()

  def stop(self) -> None:
    self._journal.close()
    if self.finished:
      launch.say(
        f"{len(self.finished)} of {self._count} results are in "
        f"{self._journal.partial}; the same command with --resume goes on"
      )


# The events of one prompt: on a terminal, as text, or as JSON lines.


def _shower(settings: types.SimpleNamespace) -> Callable[[TextEvent], None]:
  """Returns what shows an event the way that was asked for."""
  if settings.emit == "jsonl":
    return _show_json
  if sys.stdout.isatty():
    return Terminal().show
  return lambda event: print(event.text, end="", flush=True)


def _holds(settings: types.SimpleNamespace) -> bool:
  """Whether settled text alone is shown."""
  # What was printed cannot be taken back.
  printed = settings.emit == "text" and not sys.stdout.isatty()
  return settings.hold_until_settled or printed


def _show_json(event: TextEvent) -> None:
  line: dict[str, Any] = {
    "text": event.text,
    "settled": event.settled,
    "replaces": event.replaces,
  }
  if event.completion is not None:
    line["completion"] = as_record(event.completion)
  print(json.dumps(line, ensure_ascii=False), flush=True)


class Terminal:
  """Shows provisional text dim, and what is settled in its place.

  Of provisional text only what fits into the line is shown: what a terminal
  has wrapped or scrolled cannot be taken back.
  """

  def __init__(self):
    self._column = 0  # of the cursor behind the settled text, in cells
    self._dim = 0  # cells of provisional text behind it

  def show(self, event: TextEvent) -> None:
    from rich.cells import cell_len, set_cell_size

    out = sys.stdout
    if self._dim:
      out.write(f"\x1b[{self._dim}D\x1b[K")
      self._dim = 0
    width = shutil.get_terminal_size().columns
    if event.settled:
      out.write(event.text)
      line = event.text.rpartition("\n")
      self._column = cell_len(line[2]) + (0 if line[1] else self._column)
      # Behind a full line the cursor stands in the next.
      self._column %= width
    else:
      text = event.text.split("\n")[0].replace("\t", " ")
      room = width - self._column - 1
      if cell_len(text) > room:
        text = set_cell_size(text, max(room, 0)).rstrip()
      if text.isprintable() and text:
        out.write(f"\x1b[2m{text}\x1b[0m")
        self._dim = cell_len(text)
    out.flush()


def _count(stats: Any, compiles: Any) -> None:
  stats.compiles, stats.compiles_cached = compiles.count, compiles.from_cache


def as_record(completion: Completion) -> dict[str, Any]:
  """Returns the JSON object of one completion."""
  record = {
    "prompt": completion.prompt,
    "text": completion.text,
    "token_ids": completion.token_ids,
    "finish_reason": completion.finish_reason,
    "stats": completion.stats.as_dict(),
  }
  if completion.logprobs is not None:
    record["logprobs"] = completion.logprobs
  return record


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string(
    "prompt", None, "the prompt; - reads it from stdin", flag_values=values
  )
  flags.DEFINE_string(
    "prompts",
    None,
    "a JSONL file of objects with prompt, messages or turns (its first turn), "
    "and perhaps a task or category, by which acceptance is told apart",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "chat",
    False,
    "a prompt is the user's message, put into the model's chat template",
    flag_values=values,
  )
  flags.DEFINE_string(
    "output",
    None,
    "a JSONL file for the results, in the order of the prompts",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "resume",
    False,
    "go on from the results an interrupted run left beside --output",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "emit",
    "text",
    ["text", "jsonl"],
    "how the answer to one prompt is shown: as text, on a terminal with "
    "provisional text dim until it is settled; or every event as a JSON "
    "object, where provisional text is not settled and the next event takes "
    "the place of as many characters as it replaces",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "hold_until_settled",
    False,
    "show no provisional text",
    flag_values=values,
  )
  launch.define_generator_flags(values)
  launch.define_sampling_flags(values)
  launch.define_hosts_flags(values)


def main(settings: types.SimpleNamespace) -> None:
  """Decodes what the settings ask for."""
  prompts, tasks = launch.agree(settings, lambda: read_prompts(settings))
  results = _open_results(settings, prompts)
  if results is None:
    if launch.is_first(settings):
      launch.say(f"{settings.output} is complete: nothing to do")
    return
  try:
    generator = launch.load_generator(settings)
    options = launch.sampling_options(generator, settings)
    if launch.is_first(settings):
      _say_defaults(options, settings)
    if settings.prompts is None:
      _decode_one(generator, prompts[0], options, settings, results)
    else:
      _decode_many(generator, prompts, tasks, options, settings, results)
  except BaseException:
    results.stop()
    raise


def read_prompts(
  settings: types.SimpleNamespace,
) -> tuple[list[Prompt], list[str]]:
  """Returns the prompts of --prompt or --prompts, and the task of each."""
  if (settings.prompt is None) == (settings.prompts is None):
    raise InputError("pass one of --prompt=TEXT and --prompts=FILE.jsonl")
  if settings.emit == "jsonl" and settings.prompt is None:
    raise InputError("--emit=jsonl is for one --prompt; the results of "
                     "--prompts are JSON lines anyway")
  if settings.resume and settings.output is None:
    raise InputError("--resume needs the --output=FILE.jsonl to go on with")
  if settings.prompt == "-":
    return [sys.stdin.read()], [""]
  if settings.prompt is not None:
    return [settings.prompt], [""]
  path = os.path.expanduser(settings.prompts)
  try:
    with open(path, encoding="utf-8") as file:
      lines = file.read().split("\n")
  except OSError as e:
    raise InputError(f"--prompts={path}: {e.strerror}") from e
  except UnicodeDecodeError as e:
    raise InputError(
      f"--prompts={path}: byte {e.start} is not UTF-8; save the file as UTF-8"
    ) from e
  found = [
    _read_prompt(line, f"{path}:{number}")
    for number, line in enumerate(lines, 1)
    if line.strip()
  ]
  if not found:
    raise InputError(f"--prompts={path} holds no prompt")
  prompts, tasks = zip(*found)
  return list(prompts), list(tasks)


def _read_prompt(line: str, where: str) -> tuple[Prompt, str]:
  try:
    item = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise InputError(f"{where} is not JSON: {e}") from e
  known = ("prompt", "messages", "turns")
  found = [key for key in known if isinstance(item, dict) and key in item]
  if len(found) != 1:
    raise InputError(
      f"{where} must be an object with one of prompt, messages and turns, and "
      f"has {', '.join(found) or 'none'}"
    )
  key = found[0]
  value = item[key]
  task = item.get("task", item.get("category", ""))
  if not isinstance(task, str):
    raise InputError(f"{where}: task must be text, got {task!r:.60}")
  if key == "messages":
    return _read_messages(value, where), task
  if key == "turns":
    if not isinstance(value, list) or not value:
      raise InputError(f"{where}: turns must be a list of at least one string")
    value = value[0]
  is_ids = isinstance(value, list) and all(type(i) is int for i in value)
  if not isinstance(value, str) and not (key == "prompt" and is_ids):
    raise InputError(f"{where}: {key} must hold text, got {value!r:.60}")
  return value, task


def _read_messages(value: Any, where: str) -> list[dict[str, str]]:
  if not isinstance(value, list) or not value:
    raise InputError(f"{where}: messages must be a list of at least one")
  for at, message in enumerate(value):
    for key in ("role", "content"):
      is_text = isinstance(message, dict) and isinstance(message.get(key), str)
      if not is_text:
        raise InputError(f"{where}: messages[{at}] needs {key!r}, as text")
  return value


def _say_defaults(options: Options, settings: types.SimpleNamespace) -> None:
  """Names the sampling settings that came from the checkpoint."""
  taken = [
    f"{field.name}={getattr(options, field.name)}"
    for field in dataclasses.fields(options)
    if getattr(settings, field.name, None) is None
    and field.default is not dataclasses.MISSING
    and getattr(options, field.name) != field.default
  ]
  if taken:
    launch.say("the checkpoint's generation_config sets " + ", ".join(taken))


def _decode_one(
  generator: Generator,
  prompt: Prompt,
  options: Options,
  settings: types.SimpleNamespace,
  results: Results,
) -> None:
  from jaxspec import profiling

  show = _shower(settings)
  # A terminal decides which programs run.
  held = launch.agree(settings, lambda: _holds(settings))
  completion = None
  try:
    with (
      profiling.trace(settings.profile_dir),
      profiling.count_compiles() as compiles,
    ):
      for event in generator.stream(
        prompt, options, chat=settings.chat, hold_until_settled=held
      ):
        show(event)
        completion = event.completion or completion
  finally:
    if settings.emit == "text":
      print(flush=True)
  if completion is None:
    raise AssertionError("the stream ended without a completion")
  _count(completion.stats, compiles)
  results.add(0, completion)
  results.finish()
  if launch.is_first(settings):
    print(completion.stats.line(), file=sys.stderr, flush=True)


def _decode_many(
  generator: Generator,
  prompts: Sequence[Prompt],
  tasks: Sequence[str],
  options: Options,
  settings: types.SimpleNamespace,
  results: Results,
) -> None:
  from jaxspec import metrics, profiling

  waiting = [i for i in range(len(prompts)) if i not in results.finished]
  with launch.progress("decoding") as on_progress:
    done = 0

    def on_completion(at: int, completion: Completion) -> None:
      nonlocal done
      results.add(waiting[at], completion)
      done += 1
      if on_progress is not None:
        on_progress("", done, len(waiting))

    start = time.perf_counter()
    with (
      profiling.trace(settings.profile_dir),
      profiling.count_compiles() as compiles,
    ):
      completions = generator.generate(
        [prompts[i] for i in waiting],
        [dataclasses.replace(options, task=tasks[i]) for i in waiting],
        chat=settings.chat,
        on_completion=on_completion,
      )
    wall = time.perf_counter() - start
  results.finish()
  whole = metrics.total([c.stats for c in completions], wall_seconds=wall)
  _count(whole, compiles)
  if not launch.is_first(settings):
    return
  print(whole.line(), file=sys.stderr, flush=True)
  if any(tasks) or generator.drift.alarms:
    for line in generator.drift.lines():
      print(line, file=sys.stderr, flush=True)


# Settings that change neither text nor statistics worth comparing.
_NOT_IDENTITY = (
  "output",
  "resume",
  "rows",
  "profile_dir",
  "compilation_cache_dir",
  "executables",
  "prompts",
  "distributed",
  "coordinator",
  "processes",
  "process",
  "emit",
  "hold_until_settled",
  "first_tokens",
  "first_token_share",
)


def _open_results(
  settings: types.SimpleNamespace, prompts: Sequence[Prompt]
) -> Results | None:
  """Returns where results go, or None where all of them are there already.

  Only the first process keeps any; the others know which there are.
  """
  if not launch.is_first(settings):
    finished = launch.agree(settings, lambda: None)
    return None if finished is None else Results(dict.fromkeys(finished, {}))
  results = _open_own_results(settings, prompts)
  launch.agree(settings, lambda: results and list(results.finished))
  return results


def _open_own_results(
  settings: types.SimpleNamespace, prompts: Sequence[Prompt]
) -> Results | None:
  if settings.output is None:
    return Results() if settings.prompts is None else _Lines()
  count = len(prompts)
  partial = os.path.realpath(os.path.expanduser(settings.output)) + ".partial"
  if settings.resume and not os.path.exists(partial):
    if journal.complete(settings.output, count) is not None:
      return None
  chosen = {k: v for k, v in vars(settings).items() if k not in _NOT_IDENTITY}
  kept = journal.Journal(
    settings.output,
    count=count,
    identity=[chosen, prompts],
    resume=settings.resume,
  )
  return _File(kept, count)
