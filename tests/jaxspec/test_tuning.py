# SPDX-License-Identifier: Apache-2.0
"""A model that learns keeps its law, and its exits come to know it.

Held here: the plain forward is the prefill's; what counts when, and which
layers are passed by, are the published formulas; the loss falls and the frozen
model does not change; every option of the recipe takes effect; a run that was
stopped ends as one that was not; draft models learn to be accepted; a mesh
changes nothing but the rounding; what is said of the quality of a model is what
NumPy says.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import (
  adapters,
  distillation,
  loop,
  options,
  sharding,
  training,
  tuning,
)
from jaxspec.adapters import Adapter
from jaxspec.corpus import Text
from jaxspec.distillation import Order
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.drafters.draft_model import DraftModel, select
from jaxspec.heads import ExitHead
from jaxspec.models.transformer import Transformer, random_source, source_of
from jaxspec.reading import read
from jaxspec.tuning import MODEL, LowRank, Recipe, Whole
from tests.conftest import tiny_config
from tests.jaxspec import batches, cycles

pytestmark = pytest.mark.usefixtures("quick_compiles")

RECIPE = Recipe(steps=20, tokens=64, widths=(16,), rate=1e-2, model_rate=1e-2,
                positions=48, layer_dropout=0.2)


def periodic(count=12):
  """Texts in which a token tells all that follow."""
  return [Text([(start + 5 * n) % 11 + 2 for n in range(14)], 2)
          for start in range(count)]


def learn(model, pupils, recipe, steps=None, texts=None):
  """The lesson and the marks of every step."""
  lesson, order = tuning.begin(pupils, recipe), Order(
      texts or periodic(), recipe)
  found = []
  for step in range(recipe.steps if steps is None else steps):
    lesson, marks = tuning.advance(model, pupils, lesson, order.batch(step),
                                   recipe)
    found.append(jax.device_get(marks))
  return lesson, found


# The forward.


def test_whole_texts_are_read_as_prompts_are(small):
  """Sliding windows too; and whether it learns changes nothing."""
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (3, 20)),
                       jnp.int32)
  prefix = loop.prefill(small, (0, 1, 2), tokens, jnp.full(3, 20, jnp.int32),
                        chunk=20, dtype=jnp.float32)
  whole = jnp.ones((2, 3), bool)
  for found in (read(small, tokens, (0, 1)),
                read(small, tokens, (1, 0), runs=whole, learns=True)):
    assert sorted(found) == [0, 1, 2]
    for tap, stream in zip((0, 1, 2), prefix.features):
      np.testing.assert_allclose(found[tap], stream, atol=1e-5)


def test_a_text_passes_by_a_layer_unchanged(tiny):
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (3, 7)),
                       jnp.int32)
  runs = jnp.asarray([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 1, 0]], bool)
  found = read(tiny, tokens, (1, 2), runs=runs)
  np.testing.assert_array_equal(found[1][0], found[2][0])
  wanted = [select(tiny, layers) for layers in ([0, 2, 3], [0, 1, 2, 3],
                                                [0, 1])]
  for row, model in enumerate(wanted):
    np.testing.assert_allclose(
        found[4][row], read(model, tokens[row:row + 1])[model.depth][0],
        atol=1e-5)


# What counts when.


def test_upper_layers_are_passed_by_more_often():
  np.testing.assert_allclose(
      tuning.passing_by(5, 0.2),
      [0.2 * (2**(n / 4) - 1) for n in range(5)], rtol=1e-6)
  assert tuning.passing_by(1, 0.2).tolist() == [0]


def test_upper_exits_count_more():
  recipe = dataclasses.replace(RECIPE, curriculum="all", exit_scale=0.5)
  found = tuning.worth({"b": 3, "a": 1}, 4, jnp.asarray(0), recipe)
  raw = {"a": 0.5 * 1, "b": 0.5 * 6, MODEL: 4 + 0.5 * 6}
  assert {n: pytest.approx(float(v)) for n, v in found.items()} == {
      n: v / sum(raw.values()) for n, v in raw.items()}
  (alone,) = tuning.worth({}, 4, jnp.asarray(0), recipe).values()
  assert alone == 1


def taught(recipe, exits, depth, steps):
  """Which exits count something at each step."""
  return [{n for n, v in tuning.worth(exits, depth, jnp.asarray(step),
                                      recipe).items() if v > 0} - {MODEL}
          for step in range(steps)]


def test_exits_take_turns():
  recipe = dataclasses.replace(RECIPE, curriculum="rotational", every=2)
  exits = {"a": 1, "b": 2, "c": 3}
  assert taught(recipe, exits, 4, 4) == [{"a", "c"}, {"b"}] * 2
  by_three = dataclasses.replace(recipe, every=3)
  assert taught(by_three, exits, 4, 3) == [{"a"}, {"c"}, {"b"}]


def test_exits_come_from_the_top():
  recipe = dataclasses.replace(RECIPE, curriculum="gradual", steps=16)
  assert taught(recipe, {"a": 1, "b": 3}, 4, 8) == (
      [set()] * 2 + [{"b"}] * 4 + [{"a", "b"}] * 2)


# Learning.


@pytest.mark.medium
def test_exits_learn_and_the_law_is_kept(small):
  """What the exits gain is more than heads alone do, and the top stays."""
  recipe = dataclasses.replace(RECIPE, steps=30, exit_scale=5.0,
                               curriculum="all", layer_dropout=0.0)
  before = jax.tree.map(np.array, jax.tree.leaves(small))
  heads = {"low": ExitHead.init(small, layer=1, mlp=8)}
  pupils = {MODEL: LowRank(small, Adapter.init(small, rank=4))} | heads
  lesson, marks = learn(small, pupils, recipe)
  assert all(np.array_equal(a, b) for a, b in
             zip(before, jax.tree.leaves(small)))
  first, last = (np.mean([m["low"].loss for m in some])
                 for some in (marks[:3], marks[-3:]))
  assert last < 0.9 * first        # the entropy of the laws is most of it
  made = tuning.taught(small, pupils, lesson)
  alone, order = distillation.begin(heads, recipe), Order(periodic(), recipe)
  for step in range(recipe.steps):
    alone, _ = distillation.advance(small, heads, alone, order.batch(step),
                                    recipe)
  plain = distillation.taught(small, heads, alone)
  one, other = (training.examine(model, {"low": head}, periodic(), recipe)
                ["low"].loss for model, head in
                ((made[MODEL].model, made["low"]), (small, plain["low"])))
  assert one < other
  found = training.compare(small, made[MODEL].model, periodic(), recipe)
  assert 0 < found["divergence"] < 0.1


@pytest.mark.slow
def test_turns_and_heads_of_few_words(tmp_path):
  """Who has no turn is not mentioned; trimmed heads are asked as others."""
  model = Transformer(tiny_config(depth=3), random_source(0))
  heads = {"low": ExitHead.init(model, layer=1, mlp=8),
           "high": ExitHead.init(model, layer=2, mlp=8, attention=True,
                                 tokens=range(2, 60))}
  pupils = {MODEL: LowRank(model, Adapter.init(model, rank=1))} | heads
  recipe = dataclasses.replace(RECIPE, steps=4, every=2)
  asked = []
  made = training.fit(
      model, pupils, periodic(), recipe, tmp_path, course=tuning,
      on_step=lambda step, marks: asked.append(
          {name: m.asked.sum() for name, m in marks.items()}))
  names = [set(line["heads"]) for line in training.read_curve(tmp_path)]
  assert names == [{MODEL, "low"}, {MODEL, "high"}] * 2
  assert asked[0]["low"] == asked[0][MODEL] > 0 == asked[0]["high"]
  assert asked[1]["high"] == asked[1][MODEL] > 0 == asked[1]["low"]
  assert made["high"].tokens[...].tolist() == list(range(2, 60))
  for name, head in heads.items():
    assert np.any(made[name].lens[...] != head.lens[...])


@pytest.mark.medium
@pytest.mark.parametrize("change", [
    dict(layer_dropout=0.0), dict(exit_scale=1.0), dict(positions=40),
    dict(model_rate=1e-3), dict(seed=1)], ids=str)
def test_every_option_takes_effect(small, change):
  """At once: in weights, or in what the optimizer has seen."""
  adapter = Adapter.init(small, rank=1, targets=["down"], layers=[1])
  def learnt(recipe):
    lesson, _ = learn(small, {
        MODEL: LowRank(small, adapter),
        "low": ExitHead.init(small, layer=1, mlp=4)}, recipe, steps=2)
    return jax.tree.leaves((lesson.weights, lesson.moments))
  plain = dataclasses.replace(RECIPE, curriculum="all", layer_dropout=0.5)
  if "plain" not in _LEARNT:
    _LEARNT["plain"] = learnt(plain)
  assert any(not np.array_equal(a, b) for a, b in zip(
      _LEARNT["plain"], learnt(dataclasses.replace(plain, **change))))


_LEARNT: dict = {}


@pytest.mark.slow
def test_a_mesh_changes_the_rounding_alone():
  recipe = dataclasses.replace(RECIPE, curriculum="all", layer_dropout=0.3)
  rng = np.random.default_rng(0)

  def run(sizes):
    mesh = sharding.make_mesh(sizes)
    with jax.set_mesh(mesh):
      model = Transformer(tiny_config(depth=2), random_source(
          0, put=lambda x, axes: sharding.place(x, axes, mesh)))
      adapter = Adapter.init(model, rank=2)
      # An untrained one has no slope but what was rounded.
      adapter = adapter.replace(weights={
          path: value + noise[path] for path, value in adapter.weights.items()})
      lesson, marks = learn(model, {
          MODEL: LowRank(model, adapter),
          "low": ExitHead.init(model, layer=1, mlp=8)}, recipe, steps=3)
      return adapter, jax.device_get(lesson.weights), marks

  shapes = Adapter.init(Transformer(tiny_config(depth=2), random_source(0)),
                        rank=2).weights
  noise = {path: rng.normal(0, 0.2, value.shape).astype(np.float32)
           for path, value in shapes.items()}
  (begun, one, marks), (_, two, others) = run({}), run({"data": 2})
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
    np.testing.assert_allclose(a, b, atol=1e-3)
    assert np.mean(np.abs(a - b)) < 1e-5
  for step, other in zip(marks, others):
    for name, mark in step.items():
      assert mark.loss == pytest.approx(other[name].loss, abs=1e-4)
  moved = [np.max(np.abs(one[MODEL][path] - value))
           for path, value in begun.weights.items()]
  assert min(moved) > 5e-3


# Going on.


def tune(folder, on_step=None):
  """LayerSkip: with layers left out at random and exits by turns."""
  model = Transformer(tiny_config(depth=2), random_source(0))
  pupils = {
      MODEL: LowRank(model, Adapter.init(
          model, rank=1, targets=["out", "down"])),
      "one": ExitHead.init(model, layer=1, mlp=8),
      "two": ExitHead.init(model, layer=1, mlp=4, attention=True)}
  rng = np.random.default_rng(0)
  texts = [Text(rng.integers(0, 64, 14).tolist(), 3) for _ in range(9)]
  recipe = Recipe(steps=8, tokens=32, widths=(16,), positions=20,
                         layer_dropout=0.5, warmup=0.01)
  return training.fit(model, pupils, texts, recipe, folder, every=3,
                      on_step=on_step, course=tuning)


@pytest.mark.slow
def test_a_tuned_model_goes_on(tmp_path):
  """What is left out, drawn and whose turn it is go by the step."""
  class Stop(Exception):
    pass

  def stop(step, marks):
    if step == 5:
      raise Stop

  wanted = tune(tmp_path / "whole")
  with pytest.raises(Stop):
    tune(tmp_path / "run", stop)
  steps = []
  found = tune(tmp_path / "run", lambda step, marks: steps.append(step))
  assert steps == [4, 5, 6, 7, 8]
  assert cycles.leaves_equal(found.pop(MODEL).adapter,
                             wanted.pop(MODEL).adapter)
  assert all(cycles.leaves_equal(found[name].tensors(), wanted[name].tensors())
             for name in wanted)
  curve = training.read_curve(tmp_path / "run")
  assert curve == training.read_curve(tmp_path / "whole")
  assert len({line["heads"][MODEL]["loss"] for line in curve}) == 8


# Draft models.


@pytest.mark.slow
def test_a_draft_model_learns_to_be_accepted(small):
  """More than the same layers untrained."""
  start = select(small, [0])
  pupils = {MODEL: Whole(start)}
  recipe = dataclasses.replace(RECIPE, steps=60, layer_dropout=0.0,
                               positions=0)
  prompts = [text.tokens[:6] for text in periodic(4)]
  wanted = [options.Options(max_new_tokens=12)] * 4
  plain = batches.answers(batches.run(small, Autoregressive(), prompts, wanted))
  # It learns from what the model says.
  texts = [Text([*prompt, *answer], len(prompt))
           for prompt, answer in zip(prompts, plain)]
  recipe = dataclasses.replace(recipe, widths=(32,), tokens=128)
  lesson, _ = learn(small, pupils, recipe, texts=texts)
  made = tuning.taught(small, pupils, lesson)[MODEL].model
  accepted = []
  for model in (start, made):
    state = batches.run(small, DraftModel(model, Autoregressive(), 3), prompts,
                        wanted)
    assert batches.answers(state) == plain
    accepted.append(batches.accepted(state) / batches.drafted(state))
  assert accepted[1] > max(2 * accepted[0], 0.4)
  # The tables of tokens are the model's own.
  assert source_of(made)("embedding", None, None) is small.embedding[...]
  before, after = source_of(start), source_of(made)
  for path in pupils[MODEL].tensors():
    assert np.any(before(path, None, None) != after(path, None, None)), path


# Quality.


def test_likeness_is_what_numpy_says(small):
  adapter = Adapter.init(small, rank=2)
  rng = np.random.default_rng(0)
  tuned = adapters.merged(small, adapter.replace(weights={
      path: value + 0.1 * rng.standard_normal(value.shape, np.float32)
      for path, value in adapter.weights.items()}))
  texts = [Text(rng.integers(0, 64, n).tolist(), 1) for n in (3, 16, 9, 25, 1)]
  recipe = dataclasses.replace(RECIPE, widths=(16,), tokens=32)
  found = training.compare(small, tuned, texts, recipe)
  batch = distillation.batch_of(texts, 16)
  logs = [np.array(jax.nn.log_softmax(jax.jit(
      lambda m: m.unembed(read(m, batch.tokens)[m.depth]))(model)))[:, :-1]
      for model in (small, tuned)]
  there = np.arange(1, 16) < np.asarray(batch.length)[:, None]
  after = np.asarray(batch.tokens)[:, 1:, None]
  lack = [-np.take_along_axis(x, after, 2)[..., 0][there].mean() for x in logs]
  assert found["tokens"] == there.sum() == 2 + 15 + 8 + 15
  np.testing.assert_allclose(
      [found["base_perplexity"], found["perplexity"]], np.exp(lack), rtol=1e-4)
  same = (logs[0].argmax(-1) == logs[1].argmax(-1))[there]
  assert found["agreement"] == pytest.approx(same.mean()) and not same.all()
  divergence = np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)[there]
  assert found["divergence"] == pytest.approx(divergence.mean(), rel=1e-3)
  none = training.compare(small, small, texts, recipe)
  assert none["agreement"] == 1 and none["divergence"] == 0
  assert none["perplexity"] == none["base_perplexity"]
