# SPDX-License-Identifier: Apache-2.0
"""A model that learns: to be foretold by its own lower layers, or to be small.

LayerSkip (arXiv:2404.16710). Heads on lower layers learn what the frozen model
says on top, and so do the layers below them, while the changed model is held
to the law it had: what it says on top is compared with the frozen model too.
Layers are left out at random, the higher the more often, so that none counts
on all others. The model changes by an adapter of low rank, or in every layer.

A draft model is the same lesson without exits, for a model of fewer layers.

Here the pupil called `MODEL` is the model itself, and all others are exit
heads. The functions below are to `training.fit` what those of the same name in
`jaxspec.distillation` are, which teach heads alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxspec import adapters, distillation
from jaxspec.adapters import Adapter
from jaxspec.distillation import PLACES, Batch, Lesson, Marks, Order, begin
from jaxspec.models import weights as stored
from jaxspec.models.transformer import Transformer, source_of
from jaxspec.reading import read

MODEL = "model"
CURRICULA = ("all", "rotational", "gradual")
# By name: what becomes of the model, under `MODEL`, and exit heads.
Pupils = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe(distillation.Recipe):
  """How a model is taught, and heads on its layers with it.

  Attributes:
    rate: the highest learning rate of heads.
    model_rate: the same of the model.
    layer_dropout: how often a text passes by the last layer. By others it
      does less often, and never by the first.
    exit_scale: what an exit counts.
    curriculum: which exits are taught at a step: `all`; `rotational`, every
      `every`-th, by turns; or `gradual`, the upper ones at first and all from
      the middle of the training on.
    every: see `curriculum`.
  """

  model_rate: float = 3e-4
  layer_dropout: float = 0.1
  exit_scale: float = 0.2
  curriculum: str = "rotational"
  every: int = 2


# What becomes of the model.


@struct.dataclass
class LowRank:
  """A model that learns by an adapter."""

  start: Transformer
  adapter: Adapter

  def tensors(self) -> Mapping[str, Array]:
    return self.adapter.weights

  def onto(self, weights: Mapping[str, Array]) -> Transformer:
    """The model while it learns."""
    return adapters.applied(self.start, self.adapter.replace(weights=weights))

  def taught(self, weights: Mapping[str, Array]) -> "Tuned":
    adapter = self.adapter.replace(weights=weights)
    return Tuned(adapters.merged(self.start, adapter), adapter)


@struct.dataclass
class Whole:
  """A model that learns in every layer, its final norm included.

  Embedding and unembedding stay. While they learn weights are float32; in use
  they have the dtype they began with.
  """

  start: Transformer

  def tensors(self) -> dict[str, Array]:
    weight = source_of(self.start)
    return {path: weight(path, shape, None)
            for path, shape in stored.shapes(self.start.config).items()
            if path.startswith("layers.") or path == "final_norm"}

  def onto(self, weights: Mapping[str, Array]) -> Transformer:
    """The model while it learns."""
    before = source_of(self.start)

    def source(path, shape, axes, wanted=None):
      old = before(path, shape, axes, wanted)
      return weights[path].astype(old.dtype) if path in weights else old
    return Transformer(self.start.config, source)

  def taught(self, weights: Mapping[str, Array]) -> "Tuned":
    return Tuned(self.onto(weights))


@dataclasses.dataclass(frozen=True)
class Tuned:
  """A model that has learnt, and the adapter by which it did, if any."""

  model: Transformer
  adapter: Adapter | None = None


# What counts when.


def passing_by(depth: int, most: float) -> Float[Array, "L"]:
  """How often a text passes by each layer: most * (2^(l / (L - 1)) - 1)."""
  return most * (2.0**(jnp.arange(depth) / max(depth - 1, 1)) - 1)


def worth(layers: Mapping[str, int], depth: int, step: Int[Array, ""],
          recipe: Recipe) -> dict[str, Float[Array, ""]]:
  """What exits, and the model on top, count at a step; 1 in all.

  Of L layers, an exit behind l counts `exit_scale` * (1 + ... + l), and the
  top L + `exit_scale` * (1 + ... + L - 1): the upper an exit the more, since
  what comes early is hard to tell, and the top shall not suffer.

  Args:
    layers: how many lie below each exit.
  """
  def sum_to(count):
    return recipe.exit_scale * count * (count + 1) / 2

  found = {MODEL: jnp.asarray(depth + sum_to(depth - 1), jnp.float32)}
  for nth, name in enumerate(sorted(layers, key=lambda n: (layers[n], n))):
    layer = layers[name]
    if recipe.curriculum == "rotational":
      taught = (nth + step) % recipe.every == 0
    elif recipe.curriculum == "gradual":
      # A layer more, from the top, in every 2 L-th part of the training.
      taught = 2 * depth * step >= (depth - layer) * recipe.steps
    else:
      taught = True
    found[name] = jnp.where(taught, sum_to(layer), 0.0)
  total = sum(found.values())
  return {name: value / total for name, value in found.items()}


# Training.


@functools.partial(jax.jit, static_argnames=("recipe",),
                   donate_argnames=("lesson",))
def advance(model: Transformer, pupils: Pupils, lesson: Lesson, batch: Batch,
            recipe: Recipe) -> tuple[Lesson, dict[str, Marks]]:
  """One step of all pupils.

  Args:
    model: the frozen one, whose laws are learnt.

  Returns:
    What was learnt, and marks; those of an exit that had no turn are of 0
    tokens, their loss not a number.
  """
  body = pupils[MODEL]
  heads = {name: p for name, p in pupils.items() if name != MODEL}
  layers = {name: head.layer for name, head in heads.items()}
  key = distillation.draw_key(recipe, lesson.step)
  at = distillation.spots(batch, recipe, key)
  depth, runs = body.start.depth, None
  top = jax.lax.stop_gradient(read(model, batch.tokens)[model.depth])
  if recipe.layer_dropout:
    runs = passing_by(depth, recipe.layer_dropout)[:, None] <= (
        jax.random.uniform(jax.random.fold_in(key, 1),
                           (depth, len(batch.tokens))))
  counts = worth(layers, depth, lesson.step, recipe)

  def judge(foretold, tokens=None):
    return distillation.judge(foretold, tokens, model, top, batch, recipe, at)

  def loss(weights):
    pupil = body.onto(weights[MODEL])
    seen = read(pupil, batch.tokens, tuple(layers.values()), runs=runs,
                learns=True)
    marks = {MODEL: judge([
        (0, pupil.unembed(at.of(seen[depth])[None])[0])])}
    for name, head in heads.items():
      def taught(head=head, name=name):
        learner = head.like(pupil, weights[name])
        return judge(learner.foretell(pupil, seen, at),
                     distillation.head_tokens(learner))

      def passed():
        return Marks(jnp.zeros(()), *jnp.zeros((2, 1, PLACES)))

      # What has no turn costs nothing.
      marks[name] = jax.lax.cond(counts[name] > 0, taught, passed)
    return sum(counts[name] * m.loss for name, m in marks.items()), marks

  slope, marks = jax.grad(loss, has_aux=True)(lesson.weights)
  weights, moments = {}, {}
  own = dataclasses.replace(recipe, rate=recipe.model_rate)
  for name in pupils:
    weights[name], moments[name] = distillation.learn(
        lesson.weights[name], lesson.moments[name], slope[name],
        own if name == MODEL else recipe)
  marks = {name: m.replace(loss=jnp.where(counts[name] > 0, m.loss, jnp.nan))
           for name, m in marks.items()}
  return Lesson(weights, moments, lesson.step + 1), marks


def taught(model: Transformer, pupils: Pupils, lesson: Lesson
           ) -> dict[str, Any]:
  """A `Tuned` under `MODEL`, and the heads in the dtype of their model."""
  tuned = pupils[MODEL].taught(lesson.weights[MODEL])
  return {MODEL: tuned} | {
      name: head.like(tuned.model, lesson.weights[name])
      for name, head in pupils.items() if name != MODEL}


# What became of the model.


@jax.jit
def compare(base: Transformer, tuned: Transformer, batch: Batch
            ) -> dict[str, Float[Array, ""]]:
  """How near a model is to another on some text, as sums over tokens.

  Returns:
    What `base` and `tuned` lack, in nats, to say what stands there; the
    `divergence` of the second's law from the first's; how often the likeliest
    token of both is the same (`agreed`); and of how many tokens (`count`).
  """
  above = [read(model, batch.tokens)[model.depth] for model in (base, tuned)]

  def row(args):
    x, y, tokens, length = args
    laws, told = (jax.nn.log_softmax(model.unembed(z[None, :-1])[0])
                  for model, z in ((base, x), (tuned, y)))
    there = jnp.arange(1, len(tokens)) < length
    def total(value):
      return jnp.sum(jnp.where(there, value, 0.0))
    def lack(logs):
      return total(-jnp.take_along_axis(logs, tokens[1:, None], axis=1)[:, 0])
    same = jnp.argmax(laws, axis=-1) == jnp.argmax(told, axis=-1)
    divergence = jnp.sum(jnp.exp(laws) * (laws - told), axis=-1)
    return dict(base=lack(laws), tuned=lack(told), agreed=total(same),
                divergence=total(divergence), count=jnp.sum(there))

  # Row by row: laws of all positions would fill the memory.
  found = jax.lax.map(row, (*above, batch.tokens, batch.length))
  return jax.tree.map(jnp.sum, found)


__all__ = ["CURRICULA", "MODEL", "LowRank", "Order", "Recipe", "Tuned",
           "Whole", "advance", "begin", "compare", "passing_by", "taught",
           "worth"]
