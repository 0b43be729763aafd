# SPDX-License-Identifier: Apache-2.0
"""Hydra's nodes follow from the nodes above them, and from the right place.

Held here: heads made by hand for a model that recites a cycle are always
accepted, whether they know by the stream or by the last token they see, and
heads that look one place too far never; each node is what the heads say, by
the formula, behind its own path; accuracy is a plain count, given the text.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import drafters, heads, loop
from jaxspec.drafters import medusa
from jaxspec.drafters.hydra import Hydra
from jaxspec.errors import InputError
from tests.jaxspec import batches, cycles
from tests.jaxspec.batches import GREEDY
from tests.jaxspec.heads.test_hydra import random_heads, said_by

pytestmark = pytest.mark.usefixtures("quick_compiles")

CHAIN = ((0,), (0, 0), (0, 0, 0))
# The deepest node stands before a better one's sibling.
BUSHY = ((0,), (0, 0), (1,), (0, 0, 0), (0, 1), (2,), (1, 0), (1, 0, 1))
PROMPTS = [[5, 9, 2], [7], [1, 1, 4, 30, 8]]


@pytest.mark.medium
@pytest.mark.parametrize("by, choices", [("token", BUSHY), ("state", CHAIN)])
def test_heads_that_know_are_always_right(by, choices):
  drafter = Hydra(cycles.hydra_heads(by=by), choices)
  state = batches.run(cycles.model(), drafter, PROMPTS, GREEDY)
  assert batches.answers(state) == [cycles.recited(p, 24) for p in PROMPTS]
  # One token at insertion, then four a pass: three drafted, one behind them.
  passes = -(-(24 - 1) // 4)
  assert state.counters.passes.tolist() == [passes] * 3
  assert batches.accepted(state) == 3 * (24 - 1 - passes)


def test_heads_that_look_elsewhere_are_always_wrong():
  drafter = Hydra(cycles.hydra_heads(shift=1), CHAIN)
  state = batches.run(cycles.model(), drafter, PROMPTS, GREEDY)
  assert batches.answers(state) == [cycles.recited(p, 24) for p in PROMPTS]
  assert batches.accepted(state) == 0


@pytest.mark.medium
@pytest.mark.parametrize("tokens", [
    pytest.param(None, marks=pytest.mark.slow), range(1, 64, 2)])
def test_nodes_follow_from_their_own_path(small, tokens):
  """In every round, accepted or not; the nodes in the order of the choices."""
  made = random_heads(small, heads=3, rank=4, tokens=tokens)
  drafter = Hydra(made, BUSHY)
  ids = np.arange(64) if tokens is None else np.array(tokens)
  prompts = batches.prompts(3)
  state = batches.begin(small, drafter, prompts, GREEDY)
  propose, differ = jax.jit(drafter.propose), False
  for _ in range(4):
    proposal, _ = propose(small, state.seq, state.request, state.draft)
    texts = batches.texts_of(state)
    padded, lengths = batches.padded([t[:-1] for t in texts], 64)
    x = loop.prefill(small, (), padded, lengths, chunk=512,
                     dtype=jnp.dtype("float32")).last
    for row, text in enumerate(texts):
      said = {(): [text[-1]]}
      for choice in BUSHY:
        path = said[choice[:-1]]
        order = np.argsort(-said_by(small, made, x[row], path), kind="stable")
        said[choice] = [*path, int(ids[order[choice[-1]]])]
      assert proposal.tokens[row].tolist() == [p[-1] for p in said.values()]
      differ |= said[0, 0][-1] != said[1, 0][-1]
    assert proposal.kinds[0].tolist() == [0, *(c[-1] for c in BUSHY)]
    state = batches.finish(small, drafter, state, steps=1)
  # Else the path would not matter.
  assert differ


def test_accuracy_is_a_plain_count(small):
  made = random_heads(small, heads=2, rank=4, tokens=[3, 8, *range(20, 60)])
  texts = [p * 2 for p in batches.prompts(3)] + [[5], [5, 6]]
  padded, lengths = batches.padded(texts)
  found = medusa.measure(small, made, padded, lengths, ranks=6, chunk=16)
  features = loop.prefill(small, (small.depth,), padded, lengths, chunk=512,
                          dtype=jnp.dtype("float32")).features[0]
  ids = np.asarray(made.tokens)
  right, asked = np.zeros((2, 6)), np.zeros((2, 1))
  for row, text in enumerate(texts):
    for at in range(len(text)):
      for head in range(2):
        if at + 2 + head < len(text):
          logits = said_by(small, made, features[row, at],
                           text[at + 1:at + 2 + head])
          best = ids[np.argsort(-logits, kind="stable")[:6]]
          asked[head] += 1
          right[head] += best == text[at + 2 + head]
  np.testing.assert_allclose(found, right / asked)
  assert right.sum() > 0


def test_it_is_made_as_medusa_is(small, tmp_path):
  made = heads.HydraHeads.init(small, heads=2, tokens=range(16))
  accuracy = np.array([[0.5, 0.25], [0.5, 0.1]])
  heads.save(tmp_path, made, small, accuracy=accuracy)

  def parse(options):
    return drafters.parse(f"hydra:heads=[{tmp_path}]{options}",
                          drafters.Target(small))
  drafter = parse(",nodes=4")
  assert drafter.choices == ((0,), (1,), (0, 0))
  assert drafter.priors == pytest.approx((0.5, 0.175))
  with pytest.raises(InputError, match="hydra: tree mc_sim_7b_63 is 4 deep"):
    parse(",tree=mc_sim_7b_63")
  with pytest.raises(InputError, match="no heads of kind hydra are shipped"):
    drafters.parse("hydra", drafters.Target(small))
  with pytest.raises(InputError, match="is of kind 'hydra'"):
    drafters.parse(f"medusa:heads=[{tmp_path}]", drafters.Target(small))


@pytest.mark.slow
@pytest.mark.parametrize("text", [
    "adaptive:drafter=[hydra:heads=[{}],nodes=8],costs=[1;1;1;1]",
    "union:drafters=[hydra:heads=[{}],nodes=8;prompt_lookup:length=2],nodes=8"])
def test_it_joins_others(tmp_path, text):
  """And what it drafts in them is accepted."""
  model = cycles.model()
  heads.save(tmp_path, cycles.hydra_heads(), model)
  drafter = drafters.parse(text.format(tmp_path), drafters.Target(model))
  state = batches.run(model, drafter, PROMPTS, GREEDY)
  assert batches.answers(state) == [cycles.recited(p, 24) for p in PROMPTS]
  assert batches.accepted(state) > 3 * 24 // 2
