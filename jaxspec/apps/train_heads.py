# SPDX-License-Identifier: Apache-2.0
"""Teaches heads to foretell what a model says, from the model's own answers.

  python -m jaxspec train_heads --heads=exit:layer=10,tokens=8192 \\
    --data=self:2000 --data=questions.jsonl --output=folder

The prompts of --data are answered by the model; texts, and conversations that
end with an answer, are taken as they are.
All of a run lies in --output: prompts, answers, checkpoints, the curve of
learning, a report on held-out text, and a folder for each of the --heads. A
run that was killed goes on with --resume, and ends in the same weights.

Other recipes teach a model. --recipe=layerskip also tunes the layers below the
heads (LayerSkip, arXiv:2404.16710) by an adapter, which --adapter merges, or
with --adapter_rank=0 as a whole; what it says in the end is held to what it
said before. --recipe=draft_model makes its first --draft_layers a model for
--drafter=draft_model:model=[FOLDER/draft], and needs no --heads.
"""

import dataclasses
import os
import pathlib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxspec import naming
from jaxspec.apps import journal, launch, runs
from jaxspec.errors import InputError

if TYPE_CHECKING:
  from jaxspec.corpus import Text
  from jaxspec.generator import Generator
else:  # Imported when needed, so that --help loads no jax.
  Text = Generator = Any

_SELF = re.compile(r"self:[1-9]\d*")
# Every so many-th text is not learnt from, but judged by.
_HELD_OUT = 16
_EVERY = 50
# Tokens of an answer that must fit into a text, or the prompt is left out.
_LEAST = 8
# What may change between a run and its continuation.
_NOT_IDENTITY = ("resume", "compilation_cache_dir", "answer_rows", "output")
# What older runs do not mention.
_ONCE = {"recipe": "heads"}
# The flags of each recipe beside those of all, and what they are if not given;
# None is told by others.
_RECIPES: dict[str, dict[str, Any]] = {
  "heads": {},
  "layerskip": {
    "adapter_rank": 16,
    "adapter_alpha": None,
    "adapter_targets": None,
    "adapter_layers": None,
    "model_rate": None,
    "layer_dropout": 0.1,
    "exit_scale": 0.2,
    "curriculum": "rotational:every=2",
  },
  "draft_model": {"draft_layers": None, "model_rate": None},
}


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this command."""
  launch.define_model_flags(values)
  launch.define_place_flags(values)
  flags.DEFINE_multi_string(
    "heads",
    None,
    "heads to teach, as exit:layer=10,attention=True,tokens=8192, "
    "medusa:heads=4, hydra:heads=4,rank=128 or eagle:tokens=8192, or a folder "
    "of heads that learn on; may be repeated: all learn from the same passes",
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
  _define_recipe_flags(values)


def _define_recipe_flags(values: flags.FlagValues) -> None:
  """Defines the flags that choose what is taught besides heads."""
  launch.define_adapter_flag(values)
  flags.DEFINE_enum(
    "recipe",
    "heads",
    list(_RECIPES),
    "teach heads alone; the layers below them too; or a draft model",
    flag_values=values,
  )
  number = lambda *args: flags.DEFINE_integer(*args, flag_values=values)
  real = lambda *args: flags.DEFINE_float(*args, flag_values=values)
  text = lambda *args: flags.DEFINE_string(*args, flag_values=values)
  number("adapter_rank", None, "layerskip: of each change, by default 16; 0 "
         "changes all weights of all layers")
  real("adapter_alpha", None, "layerskip: changes are multiplied by this over "
       "the rank; by default twice the rank")
  text("adapter_targets", None, "layerskip: matrices to change, as qkv,out; by "
       "default qkv,out,gate,up,down")
  text("adapter_layers", None, "layerskip: layers to change, as 0-9+12; by "
       "default all")
  real("model_rate", None, "layerskip, draft_model: highest learning rate of "
       "the model; by default 3e-4, and 3e-5 for a whole model of its own")
  real("layer_dropout", None, "layerskip: how often a text passes by the last "
       "layer, lower ones less often; by default 0.1")
  real("exit_scale", None, "layerskip: what exits count beside the top; by "
       "default 0.2")
  text("curriculum", None, "layerskip: which exits are taught at a step: all; "
       "rotational:every=2, the default, every second by turns; or gradual, "
       "from the top down over the first half of the steps")
  number("draft_layers", None, "draft_model: of the model's layers, how many "
         "the draft model begins with; by default a fifth")


def main(settings: types.SimpleNamespace) -> None:
  """Teaches what the settings ask for."""
  course, made = _check(settings)
  folder = runs.open_folder(settings, _NOT_IDENTITY, _ONCE)
  generator = launch.load_model(
    settings,
    adapter=settings.adapter,
    rows=settings.answer_rows,
    capacity=settings.longest + settings.answer_tokens,
  )
  import jax

  from jaxspec import distillation, heads, training, tuning

  model = generator.model
  # Refused before hours of work, with any tokens.
  for text in settings.heads or ():
    _refuse_unknown(text, _head(text, model, range), settings)
  body = _body(settings, model, generator)
  with jax.set_mesh(generator.mesh):
    texts = _texts(generator, _prompts(generator, settings, folder), settings,
                   folder)
    held = texts[::_HELD_OUT]
    learnt = [t for n, t in enumerate(texts) if n % _HELD_OUT]
    if not learnt:
      raise InputError(f"--data gives {len(texts)} texts; pass more")
    recipe = course.Recipe(
      **made,
      steps=settings.steps,
      tokens=settings.batch_tokens,
      widths=_widths(settings.longest),
      rate=settings.rate,
      positions=settings.positions,
      seed=settings.seed,
    )
    pupils = {} if body is None else {tuning.MODEL: body}
    for text in settings.heads or ():
      head = _head(
        text,
        model,
        lambda count: distillation.frequent(
          learnt, count, model.vocab).tolist(),
      )
      pupils[_name(head, pupils)] = head
    with launch.progress("learning") as on_progress:

      def on_step(step: int, marks: Mapping[str, Any]) -> None:
        if on_progress is not None:
          # Exits that had no turn have none.
          losses = [float(m.loss) for m in marks.values()]
          losses = [loss for loss in losses if loss == loss]
          loss = sum(losses) / len(losses)
          on_progress(f"loss {loss:.2f}", step, recipe.steps)

      taught = training.fit(
        model, pupils, learnt, recipe, folder, every=_EVERY, on_step=on_step,
        course=course,
      )
    tuned = taught.pop(tuning.MODEL, None)
    speaker = model if tuned is None else tuned.model
    report = _report(model, pupils, speaker, taught, held, learnt, recipe)
    for name, head in taught.items():
      heads.save(folder / name, head, speaker, **report[name].pop("extra"))
    if tuned is not None:
      _save(folder, tuned, generator, settings)
  runs.write(folder / "report.json", report)
  runs.draw(folder, "agreement with the model, %")
  if tuned is not None:
    _tell(report[tuning.MODEL])
  for name in taught:
    found = report[name]
    shares = " ".join(f"{100 * x:.1f}" for x in found["agreement"])
    plain = " ".join(f"{100 * x:.1f}" for x in found["untrained"])
    print(f"{name}: {shares} % agreement, {plain} % untrained, "
          f"{found['tokens']} held-out tokens", flush=True)
  launch.say(f"wrote {settings.output}")


def _check(settings: types.SimpleNamespace) -> tuple[Any, dict[str, Any]]:
  """What teaches, and what its recipe has besides that of heads.

  Flags of the recipe that were not given get their values.
  """
  chosen = _RECIPES[settings.recipe]
  for name in sorted({name for of in _RECIPES.values() for name in of}):
    if name not in chosen and getattr(settings, name) is not None:
      owners = [of for of in _RECIPES if name in _RECIPES[of]]
      raise InputError(f"--{name} is for --recipe={' or '.join(owners)}, and "
                       f"this is {settings.recipe}; leave it out")
  for name, value in chosen.items():
    if getattr(settings, name) is None:
      setattr(settings, name, value)
  for name in ("heads", "data", "output"):
    if not getattr(settings, name) and not (
      name == "heads" and settings.recipe == "draft_model"
    ):
      raise InputError(f"--{name} is missing; see --help")
  if settings.recipe == "heads":
    from jaxspec import distillation

    return distillation, {}
  from jaxspec import tuning

  if settings.recipe == "draft_model":
    if settings.heads:
      raise InputError("--recipe=draft_model makes a model, and no heads; "
                       "leave out --heads")
    rate = _rate(settings, 3e-4)
    return tuning, {"model_rate": rate, "layer_dropout": 0.0}
  naming.whole("train_heads", "adapter_rank", settings.adapter_rank, 0, 1024)
  own = settings.adapter_rank == 0
  for name in ("adapter_alpha", "adapter_targets", "adapter_layers"):
    if own and getattr(settings, name) is not None:
      raise InputError(f"--{name} is for an adapter, and --adapter_rank=0 asks "
                       "for none; leave one out")
  if settings.adapter and not own:
    raise InputError("--recipe=layerskip makes an adapter of the model itself; "
                     "leave out --adapter, or pass --adapter_rank=0 to tune "
                     "the model that it makes as a whole")
  kind, text = naming.choose("curriculum", settings.curriculum,
                             tuning.CURRICULA)
  values = naming.options(f"curriculum {kind}", text,
                          ["every"] if kind == "rotational" else [])
  every = values.get("every", tuning.Recipe.every)
  naming.whole("curriculum", "every", every, 1, 1000)
  return tuning, {
    "model_rate": _rate(settings, 3e-5 if own else 3e-4),
    "layer_dropout": naming.number(
      "train_heads", "layer_dropout", settings.layer_dropout, 0, 1),
    "exit_scale": naming.number(
      "train_heads", "exit_scale", settings.exit_scale, 0, 1000),
    "curriculum": kind,
    "every": every,
  }


def _rate(settings: types.SimpleNamespace, default: float) -> float:
  """The learning rate of the model."""
  if settings.model_rate is None:
    settings.model_rate = default
  return naming.number("train_heads", "model_rate", settings.model_rate, 0, 1)


def _head(text: str, model: Any, frequent: Callable[[int], Any]) -> Any:
  """The heads that `text` describes, or that lie in the folder it names."""
  from jaxspec import belonging, heads

  folder = pathlib.Path(text).expanduser()
  if text.partition(":")[0] in heads.kinds() or not folder.is_dir():
    return heads.parse(text, model, frequent)
  kind = belonging.kind_of(folder)
  if kind not in heads.kinds():
    raise InputError(f"--heads={text} holds {kind!r}, which is no kind of "
                     f"heads; there are {', '.join(heads.kinds())}")
  return heads.load(folder, model, kind).heads


def _body(
  settings: types.SimpleNamespace, model: Any, generator: Generator
) -> Any:
  """What becomes of the model; None where heads are taught alone."""
  from jaxspec import adapters, tuning
  from jaxspec.drafters import draft_model

  if settings.recipe == "heads":
    return None
  if settings.recipe == "draft_model":
    layers = settings.draft_layers
    layers = max(model.depth // 5, 1) if layers is None else layers
    naming.whole("train_heads", "draft_layers", layers, 1, model.depth - 1)
    return tuning.Whole(draft_model.select(model, list(range(layers))))
  if not settings.adapter_rank:
    return tuning.Whole(model)
  targets, layers = settings.adapter_targets, settings.adapter_layers
  return tuning.LowRank(model, adapters.Adapter.init(
    model,
    rank=settings.adapter_rank,
    alpha=settings.adapter_alpha,
    targets=targets and targets.split(","),
    layers=layers and naming.layers(
      "train_heads", "adapter_layers", layers, model.depth),
    seed=settings.seed,
  ))


def _refuse_unknown(
  text: str, head: Any, settings: types.SimpleNamespace
) -> None:
  if settings.recipe == "layerskip" and head.kind != "exit":
    raise InputError(f"--heads={text}: --recipe=layerskip teaches exits, which "
                     "are heads of kind exit; teach others on the tuned model, "
                     "with --adapter")


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
    data: [item for path in runs.files(data) for item in corpus.read(path)]
    for data in settings.data
    if not _SELF.fullmatch(data)
  }
  runs.begin(folder, settings, _NOT_IDENTITY)
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
        on_progress=launch.counting(on_progress),
      )
  runs.write_lines(file, [
    {"text": item} if isinstance(item, str) else {"messages": item}
    for item in found
  ])
  return found


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


def _save(
  folder: pathlib.Path,
  tuned: Any,
  generator: Generator,
  settings: types.SimpleNamespace,
) -> None:
  """Writes the adapter, or the model that has learnt as a whole."""
  import numpy as np

  from jaxspec import adapters
  from jaxspec.checkpoint import hf
  from jaxspec.models.transformer import source_of

  if tuned.adapter is not None:
    adapters.save(folder / "adapter", tuned.adapter, generator.model)
    return
  weight = source_of(tuned.model)
  hf.write(
    folder / ("draft" if settings.recipe == "draft_model" else "model"),
    tuned.model.config,
    lambda path: np.asarray(weight(path, None, None)),
    tokenizer=generator.tokenizer,
    generation=generator.defaults,
  )


def _tell(found: Mapping[str, Any]) -> None:
  """Says what became of a model."""
  print(f"model: {100 * found['agreement']:.1f} % agreement with the frozen "
        f"model, perplexity {found['perplexity']:.2f} where that has "
        f"{found['base_perplexity']:.2f}, {found['tokens']:.0f} held-out "
        "tokens", flush=True)


def _report(
  model: Any,
  pupils: Mapping[str, Any],
  speaker: Any,
  taught: Mapping[str, Any],
  held: Sequence[Text],
  learnt: Sequence[Text],
  recipe: Any,
) -> dict[str, Any]:
  """How what was taught agrees with the model on text it has not seen.

  Args:
    speaker: what became of the model: heads foretell it in the end.
  """
  from jaxspec import distillation, training, tuning
  from jaxspec.drafters import medusa
  from jaxspec.heads import HydraHeads, MedusaHeads
  from jaxspec.tree import best_choices

  with launch.progress("judging") as on_progress:
    tell = launch.counting(on_progress)
    after = training.examine(speaker, taught, held, recipe, tell)
    before = training.examine(
      model, {name: pupils[name] for name in taught}, held, recipe, tell)
    report = {}
    if tuning.MODEL in pupils:
      start = pupils[tuning.MODEL].start
      report[tuning.MODEL] = {
        **training.compare(model, speaker, held, recipe, tell),
        "untrained": None if start is model else training.compare(
          model, start, held, recipe, tell),
      }
  for name, head in taught.items():
    extra = {}
    if isinstance(head, MedusaHeads | HydraHeads):
      batch = distillation.batch_of(held, recipe.widths[-1])
      accuracy = medusa.measure(speaker, head, batch.tokens, batch.length)
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
