# SPDX-License-Identifier: Apache-2.0
"""Medusa's heads look as far ahead as they should, and from the right place.

Held here: heads made by hand for a model that recites a cycle are always
accepted, and heads that look one place too far or too short never; what is
drafted is what the heads say of the last committed feature, whatever was
accepted on the way; untrained heads say what the model says; the published
trees have their published shapes; accuracy is that of a plain count.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import drafters, heads, loop
from jaxspec.drafters import medusa
from jaxspec.drafters.medusa import Medusa
from jaxspec.errors import InputError
from tests.jaxspec import batches, cycles
from tests.jaxspec.batches import GREEDY

pytestmark = pytest.mark.usefixtures("quick_compiles")

CHAIN = ((0,), (0, 0), (0, 0, 0))
# As CHAIN, but the deepest node stands before a better one's sibling.
BUSHY = ((0,), (0, 0), (1,), (0, 0, 0), (0, 1), (2,), (1, 0))
PROMPTS = [[5, 9, 2], [7], [1, 1, 4, 30, 8]]


@pytest.mark.medium
@pytest.mark.parametrize("choices", [CHAIN, BUSHY])
def test_heads_that_know_are_always_right(choices):
  drafter = Medusa(cycles.medusa_heads(), choices)
  state = batches.run(cycles.model(), drafter, PROMPTS, GREEDY)
  assert batches.answers(state) == [cycles.recited(p, 24) for p in PROMPTS]
  # One token at insertion, then four a pass: three drafted, one behind them.
  passes = -(-(24 - 1) // 4)
  assert state.counters.passes.tolist() == [passes] * 3
  assert batches.accepted(state) == 3 * (24 - 1 - passes)


@pytest.mark.parametrize("shift", [-1, 1])
def test_heads_that_look_elsewhere_are_always_wrong(shift):
  drafter = Medusa(cycles.medusa_heads(shift=shift), CHAIN)
  state = batches.run(cycles.model(), drafter, PROMPTS, GREEDY)
  assert batches.answers(state) == [cycles.recited(p, 24) for p in PROMPTS]
  assert batches.accepted(state) == 0


def random_heads(model, **settings):
  """Heads that say something of their own."""
  made = heads.MedusaHeads.init(model, **settings)
  noise = np.random.default_rng(0).standard_normal(made.up.shape) * 0.4
  return made.replace(up=jnp.asarray(noise, jnp.float32))


@pytest.mark.medium
@pytest.mark.parametrize("settings", [
    dict(heads=3), dict(heads=3, rank=4, blocks=2, tokens=range(1, 64, 2))])
def test_drafts_are_of_the_last_committed_feature(small, settings):
  """In every round, accepted or not; the nodes in the order of the choices."""
  made = random_heads(small, **settings)
  drafter = Medusa(made, medusa.published("mc_sim_7b_63")[:30])
  prompts = batches.prompts(3)
  state = batches.begin(small, drafter, prompts, GREEDY)
  propose = jax.jit(drafter.propose)
  for _ in range(4):
    proposal, _ = propose(small, state.seq, state.request, state.draft)
    texts = batches.texts_of(state)
    tokens, lengths = batches.padded([t[:-1] for t in texts], 64)
    x = loop.prefill(small, (), tokens, lengths, chunk=512,
                     dtype=jnp.dtype("float32")).last
    wanted = said_by(small, made, x)
    for row, text in enumerate(texts):
      assert proposal.tokens[row].tolist() == [text[-1], *(
          wanted[row, len(c) - 1, c[-1]] for c in drafter.choices)]
    assert proposal.kinds[0].tolist() == [
        0, *(c[-1] for c in drafter.choices)]
    state = batches.finish(small, drafter, state, steps=1)
  assert batches.accepted(state) > 0


def said_by(model, made, x):
  """The tokens of each head by their logits, best first, by the formula."""
  x = np.asarray(x, np.float32)
  found = []
  for head in range(made.count):
    y = x
    for block in range(made.up.shape[1]):
      inner = y
      if made.down is not None:
        inner = inner @ np.asarray(made.down[head, block]).T
      inner = inner @ np.asarray(made.up[head, block]).T
      y = y + inner / (1 + np.exp(-inner))
    logits = np.array(model.unembed(jnp.asarray(y)[:, None])[:, 0])
    if made.tokens is not None:
      unsayable = np.setdiff1d(np.arange(model.vocab), made.tokens)
      logits[:, unsayable] = -np.inf
    found.append(np.argsort(-logits, axis=-1, kind="stable"))
  return np.stack(found, axis=1)


def test_untrained_heads_say_what_the_model_says(small):
  made = heads.MedusaHeads.init(small, heads=2)
  x = jax.random.normal(jax.random.key(0), (3, small.config.width))
  model_says = jax.lax.top_k(small.unembed(x[:, None])[:, 0], 5)[1]
  for head in range(2):
    np.testing.assert_array_equal(made.choose(small, x, 5)[:, head],
                                  model_says)


@pytest.mark.parametrize("name, shape", [
    ("mc_sim_7b_63", [1, 10, 28, 23, 2]),
    ("vicuna_7b_stage2", [1, 10, 23, 23, 7])])
def test_published_trees_have_their_shapes(name, shape):
  drafter = Medusa(cycles.medusa_heads(), medusa.published(name))
  assert len(set(drafter.choices)) == 63
  assert np.bincount(drafter.tree.depths).tolist() == shape
  # Best node first; every beginning of it is a tree.
  assert drafter.choices[0] == (0,)
  for nodes in range(1, 64):
    assert dataclasses.replace(
        drafter, choices=drafter.choices[:nodes]).size == nodes + 1


def test_which_tree_is_taken(small, tmp_path):
  def parse(options, **stored):
    heads.save(tmp_path, heads.MedusaHeads.init(small, heads=3), small,
               **stored)
    return drafters.parse(f"medusa:heads=[{tmp_path}]{options}",
                          drafters.Target(small))

  accuracy = np.array([[0.5, 0.25], [0.5, 0.1], [0.1, 0.0]])
  best = ((0,), (1,), (0, 0), (1, 0))       # .5, .25, .25, .125
  assert parse("").choices == tuple(
      c for c in medusa.published("mc_sim_7b_63") if len(c) <= 3)
  assert parse("", choices=[(1, 0), (2,)]).choices == ((1,), (1, 0), (2,))
  assert parse(",nodes=5", accuracy=accuracy).choices == best
  assert parse(",tree=best,nodes=3", accuracy=accuracy,
               choices=[(1,)]).choices == best[:2]
  assert parse(",nodes=3", choices=[(1,), (0,), (2,)]).choices == ((1,), (0,))
  assert parse("", accuracy=accuracy).priors == pytest.approx(
      (1.1 / 3, .35 / 3))
  assert parse("", accuracy=np.zeros((3, 2))).choices == ((0,),)
  for options, words in [
      (",tree=mc_sim_7b_63", "4 deep and there are 3 heads"),
      (",tree=best", "accuracy was measured"),
      (",tree=bets", "Did you mean 'best'"),
      (",nodes=1", "nodes must be"),
      (",nodes=many", "nodes must be")]:
    with pytest.raises(InputError, match=words):
      parse(options)
  with pytest.raises(InputError, match="65 choices beside each other"):
    parse("", choices=[(64,)])
  with pytest.raises(InputError, match="pass heads=FOLDER"):
    drafters.parse("medusa", drafters.Target(small))
  with pytest.raises(InputError, match="told what it drafts for"):
    drafters.parse("medusa:heads=x")


@pytest.mark.parametrize("tokens", [None, [3, 8, *range(20, 60)]])
def test_accuracy_is_a_plain_count(small, tokens):
  made = heads.MedusaHeads.init(small, heads=2, tokens=tokens)
  noise = np.random.default_rng(0).standard_normal(made.up.shape) * 0.3
  made = made.replace(up=jnp.asarray(noise, jnp.float32))
  texts = [p * 2 for p in batches.prompts(3)] + [[5], [5, 6]]
  padded, lengths = batches.padded(texts)
  found = medusa.measure(small, made, padded, lengths, ranks=6, chunk=16)
  prefix = loop.prefill(small, (small.depth,), padded, lengths, chunk=512,
                        dtype=jnp.dtype("float32"))
  said = np.stack([made.choose(small, x, 6) for x in prefix.features[0]])
  right, asked = np.zeros((2, 6)), np.zeros((2, 1))
  for row, text in enumerate(texts):
    for at in range(len(text)):
      for head in range(2):
        if at + 2 + head < len(text):
          asked[head] += 1
          right[head] += said[row, at, head] == text[at + 2 + head]
  np.testing.assert_allclose(found, right / asked)
  assert right.sum() > 0


def test_heads_that_know_are_measured_so():
  text = [3, *cycles.recited([3], 30)]
  made = cycles.medusa_heads()
  found = medusa.measure(cycles.model(), made, np.array([text, text]),
                        np.array([31, 12]), ranks=3)
  np.testing.assert_array_equal(found, [[1, 0, 0]] * 3)
  found = medusa.measure(cycles.model(), cycles.medusa_heads(shift=1),
                        np.array([text]), np.array([31]))
  assert not found[:, 0].any()
