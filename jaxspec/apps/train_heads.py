# SPDX-License-Identifier: Apache-2.0
"""Teaches heads to foretell what a model says, from the model's own answers.

  python -m jaxspec train_heads --heads=exit:layer=10,tokens=8192 \\
    --data=self:2000 --data=questions.jsonl --output=folder

The prompts of --data are answered by the model; texts, and conversations that
end with an answer, are taken as they are.
All of a run lies in --output: prompts, answers, checkpoints, the curve of
learning, a report on held-out text, and a folder for each of the --heads. A
run that was killed goes on with --resume, and ends in the same weights.
"""

import dataclasses
import json
import os
import pathlib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxspec.apps import journal, launch
from jaxspec.errors import InputError

if TYPE_CHECKING:
  from jaxspec.corpus import Text
  from jaxspec.generator import Generator
else:  # Imported when needed, so that --help loads no jax.
  Text = Generator = Any

_SETTINGS = "run.json"
_SELF = re.compile(r"self:[1-9]\d*")
# Every so many-th text is not learnt from, but judged by.
_HELD_OUT = 16
_EVERY = 50
# Tokens of an answer that must fit into a text, or the prompt is left out.
_LEAST = 8
# What may change between a run and its continuation.
_NOT_IDENTITY = ("resume", "compilation_cache_dir", "answer_rows", "output")


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this command."""
  launch.define_model_flags(values)
  launch.define_place_flags(values)
  flags.DEFINE_multi_string(
    "heads",
    None,
    "heads to teach, as exit:layer=10,attention=True,tokens=8192, "
    "medusa:heads=4, hydra:heads=4,rank=128 or eagle:tokens=8192; may be "
    "repeated: all learn from the same passes",
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    "data",
    None,
    "self:N for N prompts that the model writes itself; a JSONL file of "
    "objects with prompt, messages, question, turns or text; or the hub id of "
    "a data set that has such files; may be repeated",
    flag_values=values,
  )
  flags.DEFINE_string(
    "output", None, "the folder of this run", flag_values=values
  )
  flags.DEFINE_boolean(
    "resume", False, "go on with the run in --output", flag_values=values
  )
  number = lambda *args: flags.DEFINE_integer(*args, flag_values=values)
  number("answer_tokens", 256, "length of an answer at most")
  number("answer_rows", 8, "prompts answered side by side")
  number("longest", 512, "tokens of a text at most; longer ones are cut")
  number("steps", 1000, "batches to learn from")
  number("batch_tokens", 2048, "tokens of a batch, padding included")
  number("positions", 1024, "of a batch that heads learn from at each step, "
         "drawn by what they count; 0 for all")
  number("seed", 0, "of the prompts, the answers and the order of texts")
  flags.DEFINE_float("rate", 1e-3, "highest learning rate", flag_values=values)


def main(settings: types.SimpleNamespace) -> None:
  """Teaches what the settings ask for."""
  for name in ("heads", "data", "output"):
    if not getattr(settings, name):
      raise InputError(f"--{name} is missing; see --help")
  folder = _open_folder(settings)
  launch.use_compilation_cache(settings.compilation_cache_dir)
  import jax

  from jaxspec import distillation, heads, training
  from jaxspec.generator import Generator

  with launch.progress("loading") as on_progress:
    generator = Generator.load(
      settings.model,
      dtype=settings.dtype,
      mesh=settings.mesh,
      rows=settings.answer_rows,
      capacity=settings.longest + settings.answer_tokens,
      on_progress=on_progress,
    )
  model = generator.model
  # Refused before hours of work, with any tokens.
  for text in settings.heads:
    heads.parse(text, model, range)
  with jax.set_mesh(generator.mesh):
    texts = _texts(generator, _prompts(generator, settings, folder), settings,
                   folder)
    held = texts[::_HELD_OUT]
    learnt = [t for n, t in enumerate(texts) if n % _HELD_OUT]
    if not learnt:
      raise InputError(f"--data gives {len(texts)} texts; pass more")
    recipe = distillation.Recipe(
      steps=settings.steps,
      tokens=settings.batch_tokens,
      widths=_widths(settings.longest),
      rate=settings.rate,
      positions=settings.positions,
      seed=settings.seed,
    )
    pupils = {}
    for text in settings.heads:
      head = heads.parse(
        text,
        model,
        lambda count: distillation.frequent(
          learnt, count, model.vocab).tolist(),
      )
      pupils[_name(head, pupils)] = head
    with launch.progress("learning") as on_progress:

      def on_step(step: int, marks: Mapping[str, Any]) -> None:
        if on_progress is not None:
          loss = sum(float(m.loss) for m in marks.values()) / len(marks)
          on_progress(f"loss {loss:.2f}", step, recipe.steps)

      taught = training.fit(
        model, pupils, learnt, recipe, folder, every=_EVERY, on_step=on_step
      )
    report = _report(model, pupils, taught, held, learnt, recipe)
    for name, head in taught.items():
      heads.save(folder / name, head, model, **report[name].pop("extra"))
  _write(folder / "report.json", report)
  _draw(folder)
  for name, found in report.items():
    shares = " ".join(f"{100 * x:.1f}" for x in found["agreement"])
    plain = " ".join(f"{100 * x:.1f}" for x in found["untrained"])
    print(f"{name}: {shares} % agreement, {plain} % untrained, "
          f"{found['tokens']} held-out tokens", flush=True)
  launch.say(f"wrote {settings.output}")


def _open_folder(settings: types.SimpleNamespace) -> pathlib.Path:
  """The folder: of this run, or one that can become it."""
  folder = pathlib.Path(settings.output).expanduser().absolute()
  file, chosen = folder / _SETTINGS, _identity(settings)
  if file.exists():
    if not settings.resume:
      raise InputError(
        f"--output={settings.output} holds a run; pass --resume to go on with "
        "it, or name another folder"
      )
    try:
      found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
      raise InputError(f"{file} cannot be read; name another folder") from e
    for name in chosen:
      if found.get(name) != json.loads(json.dumps(chosen[name])):
        raise InputError(
          f"{settings.output} is a run with --{name}={found.get(name)}, and "
          f"{chosen[name]} is asked for; give what it was begun with, or name "
          "another folder"
        )
    return folder
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"--output={settings.output} is not empty; name another")
  return folder


def _identity(settings: types.SimpleNamespace) -> dict[str, Any]:
  return {k: v for k, v in vars(settings).items() if k not in _NOT_IDENTITY}


def _name(head: Any, taken: Mapping[str, Any]) -> str:
  """What the folder of a head is called."""
  layer = getattr(head, "layer", None)
  name = head.kind if layer is None else f"{head.kind}_{layer}"
  return name if name not in taken else f"{name}_{len(taken)}"


def _widths(longest: int) -> tuple[int, ...]:
  """Widths of batches: halves of the longest, down to 128."""
  widths = [longest]
  while widths[0] >= 256:
    widths.insert(0, widths[0] // 2)
  return tuple(widths)


# Text.


def _prompts(
  generator: Generator, settings: types.SimpleNamespace, folder: pathlib.Path
) -> list[Any]:
  """What --data names: texts, and conversations to be answered."""
  from jaxspec import corpus

  file = folder / "prompts.jsonl"
  if file.exists():
    return corpus.read(file)
  # What is refused is refused before there is a run.
  parts = {
    data: [item for path in _files(data) for item in corpus.read(path)]
    for data in settings.data
    if not _SELF.fullmatch(data)
  }
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / _SETTINGS, _identity(settings))
  except OSError as e:
    raise InputError(f"cannot write {folder}: {e.strerror}") from e
  found = []
  for data in settings.data:
    if data in parts:
      found += parts[data]
      continue
    with launch.progress("writing prompts") as on_progress:
      found += corpus.invent(
        generator,
        int(data.removeprefix("self:")),
        seed=settings.seed,
        on_progress=_counting(on_progress),
      )
  _write_lines(file, [
    {"text": item} if isinstance(item, str) else {"messages": item}
    for item in found
  ])
  return found


def _files(data: str) -> Sequence[str | os.PathLike]:
  """A file, or the JSONL files of a data set on the hub."""
  if os.path.exists(os.path.expanduser(data)) or not re.fullmatch(
    r"[\w.-]+/[\w.-]+", data
  ):
    return [data]
  import huggingface_hub

  try:
    place = huggingface_hub.snapshot_download(
      data, repo_type="dataset", allow_patterns=["*.jsonl"]
    )
  except Exception as e:  # The hub has no one class of errors.
    reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e)
    raise InputError(
      f"--data={data} is no file here, and cannot be had as a data set of the "
      f"hub ({reason:.200})"
    ) from e
  files = sorted(pathlib.Path(place).rglob("*.jsonl"))
  if not files:
    raise InputError(f"--data={data} is a data set without JSONL files; save "
                     "it as one, and pass the file")
  return files


def _texts(
  generator: Generator,
  items: Sequence[Any],
  settings: types.SimpleNamespace,
  folder: pathlib.Path,
) -> list[Text]:
  """Texts as tokens; prompts are answered, half of them greedily."""
  from jaxspec import corpus

  texts, prompts = {}, {}
  for at, item in enumerate(items):
    text = corpus.encode(generator.tokenizer, item)
    if corpus.answered(item):
      texts[at] = text
    elif len(text.tokens) + _LEAST <= settings.longest:
      prompts[at] = text.tokens
  # Rows of a batch wait for the longest of them.
  order = sorted(prompts, key=lambda at: len(prompts[at]))
  output = str(folder / "answers.jsonl")
  if not os.path.exists(output):
    kept = journal.Journal(
      output, count=len(order), identity=[vars(settings)["seed"], items],
      resume=True,
    )
    _answer(generator, prompts, order, settings, kept)
    kept.finish()
  records = journal.complete(output, len(order))
  if records is None:
    raise InputError(f"{output} is not whole; remove it to answer again")
  for at, record in zip(order, records):
    prompt = prompts[at]
    texts[at] = corpus.Text([*prompt, *record["token_ids"]], len(prompt))
  return [texts[at] for at in sorted(texts)]


def _answer(
  generator: Generator,
  prompts: Mapping[int, Sequence[int]],
  order: Sequence[int],
  settings: types.SimpleNamespace,
  kept: journal.Journal,
) -> None:
  waiting = [n for n in range(len(order)) if n not in kept.finished]
  if not waiting:
    return
  with launch.progress("answering") as on_progress:

    def on_completion(index: int, completion: Any) -> None:
      kept.add(waiting[index], {"token_ids": completion.token_ids})
      if on_progress is not None:
        on_progress("", len(kept.finished), len(order))

    options = generator.default_options(max_new_tokens=settings.answer_tokens)
    try:
      generator.generate(
        [prompts[order[n]] for n in waiting],
        [
          dataclasses.replace(
            options,
            temperature=0.7 * (order[n] % 2),
            seed=(settings.seed + order[n]) % 2**32,
          )
          for n in waiting
        ],
        on_completion=on_completion,
      )
    except BaseException:
      kept.close()
      raise


# What came of it.


def _report(
  model: Any,
  pupils: Mapping[str, Any],
  taught: Mapping[str, Any],
  held: Sequence[Text],
  learnt: Sequence[Text],
  recipe: Any,
) -> dict[str, Any]:
  """How heads agree with the model on text they have not seen."""
  from jaxspec import distillation, training
  from jaxspec.drafters import medusa
  from jaxspec.heads import HydraHeads, MedusaHeads
  from jaxspec.tree import best_choices

  with launch.progress("judging") as on_progress:
    tell = _counting(on_progress)
    after = training.examine(model, taught, held, recipe, tell)
    before = training.examine(model, pupils, held, recipe, tell)
  report = {}
  for name, head in taught.items():
    extra = {}
    if isinstance(head, MedusaHeads | HydraHeads):
      batch = distillation.batch_of(held, recipe.widths[-1])
      accuracy = medusa.measure(model, head, batch.tokens, batch.length)
      extra = {"accuracy": accuracy, "choices": best_choices(accuracy, 63)}
    report[name] = {
      "agreement": training.share(after[name]).tolist(),
      "untrained": training.share(before[name]).tolist(),
      "by_place": (after[name].agreed / after[name].asked.clip(1)).tolist(),
      "tokens": int(after[name].asked[0].sum()),
      "loss": float(after[name].loss),
      "learnt_texts": len(learnt),
      "learnt_tokens": sum(len(t.tokens) for t in learnt),
      "extra": extra,
    }
  return report


def _counting(
  on_progress: Callable[[str, int, int], None] | None,
) -> Callable[[int, int], None] | None:
  """The same for work whose parts have no names."""
  if on_progress is None:
    return None
  return lambda done, total: on_progress("", done, total)


def _draw(folder: pathlib.Path) -> None:
  """The curve of learning as a picture, where matplotlib is installed."""
  try:
    import matplotlib
  except ImportError:
    launch.say("no picture of the curve: pip install 'jaxspec[plot]'")
    return
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  from jaxspec import training

  lines = training.read_curve(folder)
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
  size = max(len(lines) // 50, 1)
  for name in lines[0]["heads"]:
    for axis, pick in (
      (axes[0], lambda h: h["loss"]),
      (axes[1], lambda h: 100 * h["agreement"][0]),
    ):
      values = [pick(line["heads"][name]) for line in lines]
      means = [
        sum(values[at:at + size]) / len(values[at:at + size])
        for at in range(0, len(values), size)
      ]
      axis.plot([size * (n + 0.5) for n in range(len(means))], means,
                label=name)
  axes[0].set(xlabel="step", ylabel="loss, nats")
  axes[1].set(xlabel="step", ylabel="agreement with the model, %")
  axes[1].legend()
  figure.savefig(folder / "curve.png", dpi=120)
  plt.close(figure)


def _write(file: pathlib.Path, content: Any) -> None:
  new = file.with_name(file.name + ".new")
  new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
  new.replace(file)


def _write_lines(file: pathlib.Path, items: Sequence[Any]) -> None:
  new = file.with_name(file.name + ".new")
  with open(new, "w", encoding="utf-8") as out:
    for item in items:
      out.write(json.dumps(item, ensure_ascii=False) + "\n")
  new.replace(file)
