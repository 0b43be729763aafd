# SPDX-License-Identifier: Apache-2.0
"""Heads learn what their model says, and nothing else.

Held here: batches depend on the number of the step alone, and every text is
read once a round; what is counted; the loss is least where a head says what
the model says, and trimmed vocabularies do not change that; a step lowers it
and changes the weights of heads alone; heads that look ahead are told what
stands there; agreement is counted at the places where it is; and heads that see
a drafted token learn what others cannot know.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import distillation, training
from jaxspec.corpus import Text
from jaxspec.distillation import PLACES, Order, Recipe
from jaxspec.drafters.eagle import Eagle
from jaxspec.errors import InputError
from jaxspec.heads import EagleHead, ExitHead, HydraHeads, MedusaHeads
from tests.jaxspec import batches, cycles

pytestmark = pytest.mark.usefixtures("quick_compiles")

RECIPE = Recipe(steps=30, tokens=64, widths=(16, 32), rate=3e-3)


def some_texts(count=23, vocab=64, seed=0):
  rng = np.random.default_rng(seed)
  texts = []
  for _ in range(count):
    length = int(rng.integers(4, 40))
    texts.append(Text(rng.integers(2, vocab, length).tolist(),
                      int(rng.integers(0, 4))))
  return texts


# Order.


def test_a_round_reads_every_text_once():
  texts = some_texts()
  order = Order(texts, RECIPE)
  seen, shapes = [], set()
  batches = 0
  while len({tuple(t) for t in seen}) < len(texts):
    batch = order.batch(batches)
    batches += 1
    shapes.add(batch.tokens.shape)
    for row, length in zip(np.asarray(batch.tokens), batch.length.tolist()):
      seen.append(row[:length].tolist())
  assert shapes == {(4, 16), (2, 32)}
  # Some are read again, to fill the last batch of each width.
  short = sum(len(t.tokens) <= 16 for t in texts)
  assert batches == -(-short // 4) + -(-(len(texts) - short) // 2)
  assert sorted(map(tuple, {tuple(s) for s in seen})) == sorted(
      tuple(t.tokens[:32]) for t in texts)


def test_batches_depend_on_the_number_of_the_step_alone():
  texts = some_texts()
  one, other = Order(texts, RECIPE), Order(texts, RECIPE)
  for step in (17, 3, 8, 3):
    assert cycles.leaves_equal(one.batch(step), other.batch(step))
  per_round = sum(one._counts)
  assert any(not np.array_equal(one.batch(s).tokens,
                                one.batch(s + per_round).tokens)
             for s in range(per_round))
  seeded = Order(texts, dataclasses.replace(RECIPE, seed=1))
  assert any(not np.array_equal(one.batch(s).tokens, seeded.batch(s).tokens)
             for s in range(per_round))
  with pytest.raises(InputError, match="no text"):
    Order([], RECIPE)


def test_what_counts():
  batch = distillation.batch_of(
      [Text(range(3, 13), 4), Text(range(3, 8), 0), Text([5], 1)], 12)
  recipe = dataclasses.replace(RECIPE, opening=3.0, opening_tokens=2,
                               prompts=0.25)
  np.testing.assert_allclose(distillation.counted(batch, recipe), [
      [.25, .25, .25, 3, 3, 1, 1, 1, 1, 0, 0, 0],
      [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
      [0] * 12])


def test_positions_are_drawn_by_what_they_count():
  weight = jnp.zeros((4, 50)).at[0, :40].set(3.0).at[1, :40].set(1.0)
  drawn = np.stack([distillation.drawn(weight, 10, jax.random.key(seed))
                    for seed in range(200)])
  assert set(drawn.ravel().tolist()) == {0.0, 1.0}
  assert np.all(drawn.sum((1, 2)) == 10)
  assert drawn[:, 2:].sum() == 0 and drawn[:, :2, 40:].sum() == 0
  assert 2.2 < drawn[:, 0].sum() / drawn[:, 1].sum() < 3.4
  # Fewer than are asked for: all of them, and nothing else.
  assert distillation.drawn(weight, 100, jax.random.key(0)).sum() == 80


@pytest.mark.slow
def test_the_drawn_spots_are_judged_as_they_would_be_among_all(tiny):
  texts = some_texts(4)
  batch = distillation.batch_of(texts, 16)
  few = dataclasses.replace(RECIPE, positions=12)
  heads = heads_of(tiny)
  seen = distillation.see(tiny, heads, batch)
  whole = distillation.spots(batch, few)
  at = distillation.spots(batch, few, jax.random.key(1))
  assert at.row.shape == (12,) and np.asarray(at.weight).tolist() == [1.0] * 12
  assert len(set(zip(at.row.tolist(), at.column.tolist()))) == 12
  for head in heads.values():
    for (ahead, some), (same, all_) in zip(
        head.foretell(tiny, seen, at), head.foretell(tiny, seen, whole),
        strict=True):
      assert ahead == same
      np.testing.assert_allclose(
          some, all_.reshape(4, 16, -1)[at.row, at.column], atol=1e-5)


def test_frequent_tokens_are_those_of_answers():
  texts = [Text([7, 7, 7, 1, 2, 2, 9], 3), Text([7, 3, 3, 3, 9, 1], 1)]
  assert distillation.frequent(texts, 3, 64).tolist() == [1, 3, 9] or (
      distillation.frequent(texts, 3, 64).tolist() == [1, 2, 3])
  assert distillation.frequent(texts, 1, 64).tolist() == [3]
  assert len(distillation.frequent(texts, 20, 64)) == 20


# Marks.


def recitals(count=8, length=20):
  return [Text([start, *cycles.recited([start], length)], 1)
          for start in range(count)]


# Right, or looking so many places too far.
MADE = {
    "exit": lambda shift: cycles.exit_head(shift=shift),
    "medusa": lambda shift: cycles.medusa_heads(shift=shift),
    "hydra": lambda shift: cycles.hydra_heads(shift=shift),
    "eagle": lambda shift: cycles.eagle_head(feature=cycles.ahead(1 + shift))}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", MADE)
def test_who_knows_agrees(kind, shift):
  head = MADE[kind](shift)
  marks = training.examine(cycles.model(), {"h": head}, recitals(), RECIPE)["h"]
  np.testing.assert_array_equal(training.share(marks), float(shift == 0))
  asked = np.sum(marks.asked, axis=1)
  # A head that looks ahead has fewer to foretell.
  first = kind != "exit"
  assert len(asked) == (3 if first else 1)
  assert asked.tolist() == [8 * (20 - n - first) for n in range(len(asked))]


def test_agreement_stands_at_its_place():
  """Right for the first half of each answer, and long ones end in the rest."""
  texts = [Text([*t.tokens[:11], *[1] * 9, *range(30)], 1)
           for t in recitals(4)]
  recipe = dataclasses.replace(RECIPE, widths=(64,), tokens=128)
  model, head = cycles.model(), cycles.exit_head(shift=1)
  marks = training.examine(model, {"h": head}, texts, recipe)["h"]
  assert marks.asked.shape == (1, PLACES)
  assert marks.asked[0, :32].tolist() == [4] * 32
  assert marks.asked[0, 32] == 4 * (len(texts[0].tokens) - 1 - 32)
  assert np.all(marks.agreed == 0)


def test_only_what_a_head_can_say_is_right():
  """What it cannot say is asked of it all the same."""
  model = cycles.model()
  half = sorted(cycles.after(0, n) for n in range(1, 17))
  head = ExitHead.init(model, layer=2, tokens=half)
  texts = [Text([0, *cycles.recited([0], 31)], 1)]
  marks = training.examine(model, {"h": head}, texts, RECIPE)["h"]
  assert np.sum(marks.asked) == 31 and np.sum(marks.agreed) == 16


def test_the_loss_is_least_for_the_models_own_law(tiny):
  """Then it is the law's entropy."""
  texts = some_texts()
  batch = distillation.batch_of(texts[:4], 32)
  seen = distillation.see(tiny, {}, batch)

  class Top:
    """Says what the model says."""
    tokens = None

    def __init__(self, change=0.0):
      self.change = change

    def foretell(self, model, seen, at):
      laws = model.unembed(at.of(seen[model.depth])[None])[0]
      yield 0, laws + self.change * jnp.arange(64.0)[None]

  def loss(change):
    return float(distillation.judge_head(
        Top(change), tiny, seen, batch, RECIPE,
        distillation.spots(batch, RECIPE)).loss)
  assert loss(0) < loss(1e-2) and loss(0) < loss(-1e-2)


# Learning.


def periodic(count=12):
  """Texts in which a token tells all that follow."""
  return [Text([(start + 5 * n) % 11 + 2 for n in range(24)], 2)
          for start in range(count)]


def heads_of(model):
  return {
      "low": ExitHead.init(model, layer=1, mlp=16),
      "attention": ExitHead.init(model, layer=2, mlp=16, attention=True,
                                 tokens=range(2, 60)),
      "medusa": MedusaHeads.init(model, heads=2, rank=8),
      "hydra": HydraHeads.init(model, heads=2, rank=8, tokens=range(2, 60)),
      "eagle": EagleHead.init(model, mlp=16, tokens=range(2, 60))}


@pytest.mark.medium
def test_heads_learn_and_the_model_does_not(tiny):
  texts, heads = periodic(), heads_of(tiny)
  recipe = dataclasses.replace(RECIPE, rate=1e-2)
  before = jax.tree.map(np.array, jax.tree.leaves(tiny))
  lesson = distillation.begin(heads, recipe)
  first = {n: jax.tree.map(np.array, w) for n, w in lesson.weights.items()}
  order, losses = Order(texts, recipe), []
  for step in range(recipe.steps):
    lesson, marks = distillation.advance(
        tiny, heads, lesson, order.batch(step), recipe)
    losses.append({n: float(m.loss) for n, m in marks.items()})
  for name in heads:
    begun, ended = (np.mean([x[name] for x in some])
                    for some in (losses[:6], losses[-6:]))
    assert ended < 0.97 * begun, name
    for path, old in first[name].items():
      assert np.any(old != lesson.weights[name][path]), (name, path)
  assert all(np.array_equal(a, b) for a, b in
             zip(before, jax.tree.leaves(tiny)))
  taught = distillation.taught(tiny, heads, lesson)
  found = training.examine(tiny, taught, texts, recipe)
  raw = training.examine(tiny, heads, texts, recipe)
  assert all(found[n].loss < raw[n].loss for n in heads)
  assert taught["attention"].tokens[...].tolist() == list(range(2, 60))


def learnt(model, heads, texts, recipe):
  """The heads behind the last step."""
  lesson, order = distillation.begin(heads, recipe), Order(texts, recipe)
  for step in range(recipe.steps):
    lesson, _ = distillation.advance(model, heads, lesson, order.batch(step),
                                     recipe)
  return distillation.taught(model, heads, lesson)


def test_who_sees_a_token_learns_what_follows_it():
  """In texts in which nothing else tells it."""
  model, rng = cycles.model(), np.random.default_rng(0)
  texts = [Text(rng.integers(0, cycles.SIZE, 32).tolist(), 1)
           for _ in range(40)]
  recipe = dataclasses.replace(RECIPE, widths=(32,), tokens=256, rate=2e-2,
                               steps=60)
  heads = learnt(model, {"medusa": MedusaHeads.init(model, heads=2),
                         "hydra": HydraHeads.init(model, heads=2)},
                 texts[8:], recipe)
  marks = training.examine(model, heads, texts[:8], recipe)
  assert np.all(training.share(marks["hydra"]) > 0.9)
  assert np.all(training.share(marks["medusa"]) < 0.2)


@pytest.mark.slow
def test_a_taught_eagle_drafts_what_is_accepted(tiny):
  """More than an untrained one, and the text is that of plain decoding."""
  prompts = batches.prompts(4)

  def drafts(head):
    drafter = Eagle(head, head.taps, choices=((0,), (0, 0), (0, 0, 0)))
    state = batches.run(tiny, drafter, prompts, batches.GREEDY)
    return batches.texts_of(state), np.sum(state.counters.accepted, axis=0)

  head = EagleHead.init(tiny, mlp=16, tokens=range(1, 64))
  plain, before = drafts(head)
  texts = [Text(text, len(p)) for text, p in zip(plain, prompts)]
  recipe = dataclasses.replace(RECIPE, widths=(64,), tokens=256, rate=1e-2)
  same, after = drafts(learnt(tiny, {"e": head}, texts, recipe)["e"])
  assert same == plain
  assert np.sum(after) > 2 * np.sum(before)
  # What the layer made of its own outputs.
  assert after[-1] > 4


def test_heads_do_not_disturb_one_another(tiny):
  """Together they end in the weights in which each alone does."""
  texts = some_texts(12)
  recipe = dataclasses.replace(RECIPE, steps=3)

  heads = heads_of(tiny)
  together = learnt(tiny, {name: heads[name] for name in ("medusa", "low")},
                    texts, recipe)["medusa"]
  alone = learnt(tiny, {"medusa": heads["medusa"]}, texts, recipe)["medusa"]
  for path, value in alone.tensors().items():
    np.testing.assert_allclose(together.tensors()[path], value, atol=1e-5)
