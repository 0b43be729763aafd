# SPDX-License-Identifier: Apache-2.0
"""Teaching heads what their model will say.

The frozen model reads a text once. Below the layers where heads sit, its
stream is what they see; on top, its law of every next token is what they have
to learn, the whole of it and not the likeliest token alone (Kangaroo,
arXiv:2404.18911). So any number of heads learn from one pass, and from text
the model wrote itself they learn what it does in use.

What a run does depends on its recipe and on the number of the step alone: one
that was killed goes on from its last checkpoint and ends in the same weights.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxspec.corpus import Text
from jaxspec.errors import InputError
from jaxspec.heads.base import Spots
from jaxspec.models.transformer import Transformer
from jaxspec.reading import read

PLACES = 33           # of answers that are told apart, the last for the rest
# By name; and their weights, in float32, by name.
Heads = Mapping[str, Any]
Weights = dict[str, dict[str, Float[Array, "..."]]]


@dataclasses.dataclass(frozen=True)
class Pace:
  """How long and how fast anything is taught.

  Attributes:
    steps: batches in all.
    rate: the highest learning rate, reached after `warmup` of all steps; from
      there it falls to 0 along a cosine.
    decay: of weights.
    clip: the largest norm of the gradients of one pupil.
    seed: of the order in which it reads, and of all chance.
  """

  steps: int = 1000
  rate: float = 1e-3
  warmup: float = 0.05
  decay: float = 0.01
  clip: float = 1.0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe(Pace):
  """How heads are taught.

  Attributes:
    tokens: of a batch, padding included.
    widths: of batches, ascending; a text goes into the narrowest that holds
      it, and is cut to the last.
    opening: what each of the first `opening_tokens` of an answer counts: they
      are what an early first token is judged by.
    prompts: what tokens of prompts count.
    positions: of a batch that heads learn from at each step, drawn by what
      they count; 0 for all of them.
    ahead: what each place further ahead counts, relative to the one before.
  """

  tokens: int = 2048
  widths: tuple[int, ...] = (128, 256, 512)
  opening: float = 3.0
  opening_tokens: int = 8
  prompts: float = 0.3
  positions: int = 0
  ahead: float = 0.8


@struct.dataclass
class Batch:
  """Texts side by side.

  Attributes:
    length: tokens of each text; what is beyond is padding.
    prompt_length: of these, the prompt's.
  """

  tokens: Int[Array, "B T"]
  length: Int[Array, "B"]
  prompt_length: Int[Array, "B"]


@struct.dataclass
class Lesson:
  """What training has made so far: all of it that a checkpoint must keep."""

  weights: Weights
  moments: dict[str, Any]
  step: Int[Array, ""]


@struct.dataclass
class Marks:
  """How a head did on a batch.

  Attributes:
    loss: mean soft cross-entropy, in nats.
    agreed: how often its likeliest token was the model's, by how many places
      it looks ahead and by the token's place in the answer; the last of
      `PLACES` stands for all beyond.
    asked: of how many tokens.
  """

  loss: Float[Array | np.ndarray, ""]
  agreed: Float[Array | np.ndarray, "ahead places"]
  asked: Float[Array | np.ndarray, "ahead places"]


# Texts, in an order that depends on the number of the step alone.


class Order:
  """Which texts are read at each step.

  In a round every text is read once. Texts of a batch are about equally long,
  so that little is padding.
  """

  def __init__(self, texts: Sequence[Text], recipe: Recipe):
    if not texts:
      raise InputError("there is no text to learn from")
    self._texts, self._recipe = texts, recipe
    lengths = np.array([len(text.tokens) for text in texts])
    widths = np.array(recipe.widths)
    self._shelf = np.minimum(np.searchsorted(widths, lengths), len(widths) - 1)
    self._rows = [max(recipe.tokens // width, 1) for width in recipe.widths]
    self._counts = [-(-int(np.sum(self._shelf == shelf)) // rows)
                    for shelf, rows in enumerate(self._rows)]

  def batch(self, step: int) -> Batch:
    turn, place = divmod(step, sum(self._counts))
    rng = np.random.default_rng([self._recipe.seed, turn])
    orders = [rng.permutation(np.flatnonzero(self._shelf == shelf))
              for shelf in range(len(self._rows))]
    spots = [(shelf, nth) for shelf, count in enumerate(self._counts)
             for nth in range(count)]
    shelf, nth = spots[rng.permutation(len(spots))[place]]
    rows = self._rows[shelf]
    # The last batch of a shelf is filled up from its beginning.
    which = np.resize(np.roll(orders[shelf], -nth * rows), rows)
    return batch_of([self._texts[i] for i in which],
                    self._recipe.widths[shelf])


def batch_of(texts: Sequence[Text], width: int) -> Batch:
  """Texts side by side, cut to `width`."""
  tokens = np.zeros((len(texts), width), np.int32)
  length = np.array([min(len(t.tokens), width) for t in texts], np.int32)
  for row, text in zip(tokens, texts):
    kept = text.tokens[:width]
    row[:len(kept)] = kept
  prompt = np.minimum([t.prompt_length for t in texts], length)
  return Batch(jnp.asarray(tokens), jnp.asarray(length),
               jnp.asarray(prompt, jnp.int32))


def frequent(texts: Sequence[Text], count: int, vocab: int
             ) -> Int[np.ndarray, "W"]:
  """The most frequent tokens of answers, ascending."""
  seen = np.zeros(vocab, np.int64)
  for text in texts:
    np.add.at(seen, np.asarray(text.tokens[text.prompt_length:], np.int64), 1)
  # Among equals the lower id, which byte-pair merging made earlier.
  return np.sort(np.argsort(-seen, kind="stable")[:count]).astype(np.int32)


# What is seen and what is to be said.


def see(model: Transformer, heads: Heads, batch: Batch
        ) -> dict[int, Float[Array, "B T D"]]:
  """The model's stream below every layer where a head reads, and the top."""
  taps = tuple(sorted({model.depth}.union(
      *(head.taps for head in heads.values()))))
  return read(model, batch.tokens, taps)


def counted(batch: Batch, recipe: Recipe) -> Float[Array, "B T"]:
  """What the law of the token behind each counts; 0 where there is none."""
  at = jnp.arange(batch.tokens.shape[1])[None] + 1
  nth = at - batch.prompt_length[:, None]              # of the answer
  weight = jnp.where(nth < 0, recipe.prompts, 1.0)
  opening = (nth >= 0) & (nth < recipe.opening_tokens)
  # A text without a prompt is no answer, and has no opening.
  opening &= batch.prompt_length[:, None] > 0
  weight = jnp.where(opening, recipe.opening, weight)
  return jnp.where(at < batch.length[:, None], weight, 0.0)


def drawn(weight: Float[Array, "B T"], count: int, key: Array
          ) -> Float[Array, "B T"]:
  """Counts 1 for `count` positions, drawn by their weight, and 0 for others.

  Most of a step is the logits of its heads. A position that counts three times
  as much is drawn about three times as often, and no other is read at all:
  neither padding, nor most of what a prompt says.
  """
  noise = jax.random.gumbel(key, weight.shape)
  score = jnp.where(weight > 0, jnp.log(weight) + noise, -jnp.inf)
  least = jax.lax.top_k(score.reshape(-1), count)[0][-1]
  return jnp.where((score >= least) & (weight > 0), 1.0, 0.0)


def spots(batch: Batch, recipe: Recipe, key: Array | None = None) -> Spots:
  """All positions, or those that are drawn with `key`."""
  rows, width = batch.tokens.shape
  weight = counted(batch, recipe)
  count = rows * width
  flat = jnp.arange(count)
  if key is not None and 0 < recipe.positions < count:
    weight = drawn(weight, recipe.positions, key)
    count = recipe.positions
    flat = jax.lax.top_k(weight.reshape(-1), count)[1]
  row, column = flat // width, flat % width
  return Spots(row, column, weight[row, column],
               column + 1 - batch.prompt_length[row], batch.tokens)


def judge(foretold: Iterable[tuple[int, Float[Array, "M W"]]],
          tokens: Int[Array, "W"] | None, model: Transformer,
          top: Float[Array, "B T D"], batch: Batch, recipe: Recipe,
          at: Spots) -> Marks:
  """How far what is foretold is from the model's laws.

  Both are compared on the tokens that can be said. Where the text goes on with
  another there is nothing to learn, and all that is said is wrong.

  Args:
    foretold: how far ahead of the model, and logits at every spot.
    tokens: that can be said, ascending; None for all.
    model, top: whose laws, and its stream on top.
  """
  rows = None if tokens is None else model.unembedding[tokens]
  sayable = _next_sayable(tokens, batch.tokens)
  weight = counted(batch, recipe)
  loss, scale, agreed, asked = jnp.zeros(()), 0.0, [], []
  for number, (ahead, logits) in enumerate(foretold):
    column, inside = at.ahead(ahead)
    law = jax.lax.stop_gradient(
        model.unembed(top[at.row, column][None], rows)[0])
    inside &= weight[at.row, column] > 0
    able = inside & sayable[at.row, column]
    # A spot counts what it counts, however far ahead is looked from it.
    w, share = at.weight * able, recipe.ahead**number
    each = optax.softmax_cross_entropy(logits, jax.nn.softmax(law, axis=-1))
    loss += share * jnp.sum(each * w) / jnp.maximum(jnp.sum(w), 1)
    scale += share
    nth = at.nth + ahead
    answer = inside & (nth >= 0) & (at.weight > 0)
    same = jnp.argmax(logits, -1) == jnp.argmax(law, -1)
    agreed.append(_by_place(same & answer & able, nth))
    asked.append(_by_place(answer, nth))
  return Marks(loss / scale, jnp.stack(agreed), jnp.stack(asked))


def judge_head(head: Any, model: Transformer,
               seen: Mapping[int, Float[Array, "B T D"]], batch: Batch,
               recipe: Recipe, at: Spots) -> Marks:
  """How far a head's laws are from those of the model it reads."""
  return judge(head.foretell(model, seen, at), head_tokens(head), model,
               seen[model.depth], batch, recipe, at)


def head_tokens(head: Any) -> Int[Array, "W"] | None:
  """What a head can say; None for all."""
  return None if head.tokens is None else jnp.asarray(head.tokens[...])


def _by_place(flags: Bool[Array, "M"], nth: Int[Array, "M"]
              ) -> Float[Array, "places"]:
  """How many are set at each place of an answer."""
  here = jax.nn.one_hot(jnp.clip(nth, 0, PLACES - 1), PLACES)
  return jnp.sum(jnp.where(flags[:, None], here, 0.0), axis=0)


def _next_sayable(ids: Int[Array, "W"] | None, tokens: Int[Array, "B T"]
                  ) -> Bool[Array, "B T"]:
  """Whether what follows each token can be said."""
  if ids is None:
    return jnp.ones(tokens.shape, bool)
  after = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
  at = jnp.minimum(jnp.searchsorted(ids, after), len(ids) - 1)
  return ids[at] == after


# Training.


def begin(heads: Heads, recipe: Pace) -> Lesson:
  """Before the first step."""
  weights = {name: {path: jnp.array(value, jnp.float32)
                    for path, value in head.tensors().items()}
             for name, head in heads.items()}
  rule = _rule(recipe)
  return Lesson(weights, {name: rule.init(w) for name, w in weights.items()},
                jnp.zeros((), jnp.int32))


def draw_key(recipe: Pace, step: Int[Array, ""]) -> Array:
  """The key of all chance at a step."""
  return jax.random.fold_in(jax.random.key(recipe.seed), step)


@functools.partial(jax.jit, static_argnames=("recipe",),
                   donate_argnames=("lesson",))
def advance(model: Transformer, heads: Heads, lesson: Lesson, batch: Batch,
            recipe: Recipe) -> tuple[Lesson, dict[str, Marks]]:
  """One step of every head, from one pass of the model."""
  seen = jax.lax.stop_gradient(see(model, heads, batch))
  weights, moments, marks = {}, {}, {}
  at = spots(batch, recipe, draw_key(recipe, lesson.step))
  for name, head in heads.items():
    def loss(w, head=head):
      found = judge_head(head.like(model, w), model, seen, batch, recipe, at)
      return found.loss, found

    old = lesson.weights[name]
    slope, marks[name] = jax.grad(loss, has_aux=True)(old)
    weights[name], moments[name] = learn(
        old, lesson.moments[name], slope, recipe)
  return Lesson(weights, moments, lesson.step + 1), marks


@functools.partial(jax.jit, static_argnames=("recipe",))
def examine(model: Transformer, heads: Heads, batch: Batch, recipe: Recipe
            ) -> dict[str, Marks]:
  """What heads would be told of a batch, without learning from it."""
  seen, at = see(model, heads, batch), spots(batch, recipe)
  return {name: judge_head(head, model, seen, batch, recipe, at)
          for name, head in heads.items()}


def taught(model: Transformer, heads: Heads, lesson: Lesson) -> dict[str, Any]:
  """The heads as they are now, in the dtype of their model."""
  return {name: head.like(model, lesson.weights[name])
          for name, head in heads.items()}


def learn(weights: Any, moments: Any, slope: Any, recipe: Pace
          ) -> tuple[Any, Any]:
  """Weights and moments one step down a slope."""
  change, moments = _rule(recipe).update(slope, moments, weights)
  return optax.apply_updates(weights, change), moments


def _rule(recipe: Pace) -> optax.GradientTransformation:
  warm = max(int(recipe.steps * recipe.warmup), 1)
  rate = optax.warmup_cosine_decay_schedule(
      0.0, recipe.rate, warm, max(recipe.steps, warm + 1))
  return optax.chain(
      optax.clip_by_global_norm(recipe.clip),
      optax.adamw(rate, b2=0.99, weight_decay=recipe.decay,
                  mask=lambda w: jax.tree.map(lambda x: x.ndim > 1, w)))
