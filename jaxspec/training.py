# SPDX-License-Identifier: Apache-2.0
"""Long runs of what is taught: killed at any moment, nothing is lost.

A checkpoint holds the weights, the optimizer's moments and the number of the
step, from which everything else follows. Orbax puts it in place whole, so that
there is always a good one; the steps behind it are done again, with the same
results.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxspec import distillation, tuning
from jaxspec.corpus import Text
from jaxspec.distillation import Heads, Lesson, Marks, Pace, Recipe
from jaxspec.models.transformer import Transformer

CURVE = "curve.jsonl"


def fit(model: Transformer, heads: Heads, texts: Sequence[Any],
        recipe: Pace, folder: str | pathlib.Path, *, every: int = 100,
        on_step: Callable[[int, Mapping[str, Marks]], None] | None = None,
        until: Callable[[], bool] = lambda: False,
        course: Any = distillation) -> Any:
  """Teaches heads, from the last checkpoint in `folder` if there is one.

  Args:
    heads: or what else `course` teaches.
    texts: or what else it teaches from.
    folder: for checkpoints and the curve; of one model, text and recipe.
    every: steps between checkpoints.
    on_step: called behind each step with its number, from 1, and the marks.
    until: asked behind each step; where it is true the run ends there, with a
      checkpoint, and may go on another day.
    course: has `Order`, `begin`, `advance` and `taught`, as
      `jaxspec.distillation`, `jaxspec.tuning` and `jaxspec.streams.teaching`
      have.

  Returns:
    The heads as they are in the end; what `course.taught` gives.
  """
  from orbax.checkpoint import v1  # Loaded when something is trained.

  order, lesson = course.Order(texts, recipe), course.begin(heads, recipe)
  folder = pathlib.Path(folder).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  with v1.training.Checkpointer(
      folder / "checkpoints", cleanup_tmp_directories=True,
      preservation_policy=v1.training.preservation_policies.LatestN(2)
  ) as kept:
    if kept.latest is not None:
      lesson = Lesson(**kept.load(abstract_state=jax.tree.map(
          _abstract, vars(lesson))))
    done = int(lesson.step)
    with _Curve(folder / CURVE, done) as curve:
      for step in range(done, recipe.steps):
        lesson, marks = course.advance(
            model, heads, lesson, order.batch(step), recipe)
        marks = jax.device_get(marks)
        # The curve first: of what a checkpoint has seen nothing is missing.
        curve.add(step + 1, marks)
        if on_step:
          on_step(step + 1, marks)
        last = until() or step + 1 == recipe.steps
        if (step + 1) % every == 0 or last:
          kept.save(step + 1, vars(lesson))
        if last:
          break
  return course.taught(model, heads, lesson)


def examine(model: Transformer, heads: Heads, texts: Sequence[Text],
            recipe: Recipe,
            on_batch: Callable[[int, int], None] | None = None
            ) -> dict[str, Marks]:
  """What heads know of texts, summed up; `loss` is a mean over batches."""
  found: dict[str, list[Marks]] = {name: [] for name in heads}
  batches = list(_shelved(texts, recipe))
  for number, batch in enumerate(batches, 1):
    marks = distillation.examine(model, heads, batch, recipe)
    for name, mark in jax.device_get(marks).items():
      found[name].append(mark)
    if on_batch:
      on_batch(number, len(batches))
  return {name: Marks(np.asarray(np.mean([m.loss for m in some])),
                      np.sum([m.agreed for m in some], axis=0),
                      np.sum([m.asked for m in some], axis=0))
          for name, some in found.items()}


def compare(base: Transformer, tuned: Transformer, texts: Sequence[Text],
            recipe: Recipe,
            on_batch: Callable[[int, int], None] | None = None
            ) -> dict[str, float]:
  """How near a model is to another on texts, and how well each foretells them.

  Returns:
    `base_perplexity` and `perplexity`; how many of the `tokens` have the same
    likeliest one (`agreement`); and the mean `divergence`, in nats.
  """
  batches, found = list(_shelved(texts, recipe)), []
  for number, batch in enumerate(batches, 1):
    found.append(jax.device_get(tuning.compare(base, tuned, batch)))
    if on_batch:
      on_batch(number, len(batches))
  sums = {name: sum(float(one[name]) for one in found) for name in found[0]}
  count = max(sums["count"], 1.0)
  return {"base_perplexity": float(np.exp(sums["base"] / count)),
          "perplexity": float(np.exp(sums["tuned"] / count)),
          "agreement": sums["agreed"] / count,
          "divergence": sums["divergence"] / count, "tokens": sums["count"]}


def _shelved(texts: Sequence[Text], recipe: Recipe
             ) -> Iterator[distillation.Batch]:
  """Every text once; what fills the last batch of a width is empty."""
  widths = np.array(recipe.widths)
  for shelf, width in enumerate(recipe.widths):
    here = [t for t in texts if min(
        np.searchsorted(widths, len(t.tokens)), len(widths) - 1) == shelf]
    rows = max(recipe.tokens // width, 1)
    for start in range(0, len(here), rows):
      some = here[start:start + rows]
      some += [Text((0,), 1)] * (rows - len(some))
      yield distillation.batch_of(some, width)


def share(marks: Marks) -> Float[np.ndarray, "ahead"]:
  """Of the tokens of answers, how many were foretold; by how far ahead."""
  return (np.sum(marks.agreed, axis=1)
          / np.maximum(np.sum(marks.asked, axis=1), 1))


def read_curve(folder: str | pathlib.Path) -> list[dict[str, Any]]:
  """What each step gave: `step`, and by head its `loss` and `agreement`.

  A head that was not taught at a step is not mentioned there.
  """
  path = pathlib.Path(folder) / CURVE
  return [json.loads(line) for line in path.read_text().splitlines()]


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


class _Curve:
  """One line a step, of which those behind the checkpoint are forgotten."""

  def __init__(self, path: pathlib.Path, done: int):
    lines = path.read_text().splitlines(True) if path.exists() else []
    new = path.with_suffix(".new")
    new.write_text("".join(lines[:done]), encoding="utf-8")
    new.replace(path)
    self._file = open(path, "a", encoding="utf-8")

  def add(self, step: int, marks: Mapping[str, Marks]) -> None:
    line = {"step": step, "heads": {
        name: {"loss": round(float(m.loss), 5),
               "agreement": [round(float(x), 4) for x in share(m)]}
        for name, m in marks.items() if not np.isnan(m.loss)}}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()
