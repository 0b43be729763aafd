# SPDX-License-Identifier: Apache-2.0
"""Simulated acceptance: the rate asked for, whatever is drafted; marked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import verifiers
from jaxspec.base import Proposal
from jaxspec.tree import GrownTree, branching, chain
from jaxspec.verifiers.simulated import Simulated
from tests.jaxspec.verifiers import walks

pytestmark = pytest.mark.usefixtures("quick_compiles")

COUNT = 4000


def verdict_of(tree, rate, tokens=None, live=None, temperature=1.0, vocab=4):
  if tokens is None:
    tokens = jnp.zeros((COUNT, tree.size), jnp.int32)
  proposal = Proposal(tokens, tree, live=live)
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.standard_normal((COUNT, tree.size, vocab)),
                       jnp.float32)
  row, at = walks.rows(temperature, range(COUNT)), walks.positions(proposal)
  own = walks.draw(logits, row, at)
  return jax.jit(Simulated(rate))(proposal, walks.laws(logits, row, at)), own


@pytest.mark.medium
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 1.0])
def test_each_draft_stands_at_the_rate(rate):
  verdict, own = verdict_of(chain(3), rate)
  kept = np.asarray(verdict.kept)
  for depth in range(1, 4):
    reached = kept >= depth
    if reached.sum() > 100:
      assert np.mean(kept[reached] > depth) == pytest.approx(rate, abs=0.05)
  np.testing.assert_array_equal(verdict.next_token,
                                own[np.arange(COUNT), kept - 1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_was_drafted_changes_nothing(temperature):
  some, other = (verdict_of(chain(3), 0.5, tokens, temperature=temperature)[0]
                 for tokens in (None, jnp.ones((COUNT, 4), jnp.int32)))
  np.testing.assert_array_equal(some.kept, other.kept)
  np.testing.assert_array_equal(some.next_token, other.next_token)
  assert len(set(np.asarray(some.kept).tolist())) == 4


@pytest.mark.medium
def test_first_children_alone_are_walked():
  tree = branching((2, 2))
  parents = jnp.broadcast_to(jnp.asarray(tree.parents), (COUNT, tree.size))
  for topology in (tree, GrownTree(parents, height=2)):
    verdict, _ = verdict_of(topology, 1.0)
    assert np.all(np.asarray(verdict.path) == [0, 1, 3])
    assert np.all(np.asarray(verdict.kept) == 3)
  live = jnp.where(jnp.arange(COUNT) % 2 == 0, 2, 1)
  verdict, _ = verdict_of(tree, 1.0, live=live)
  np.testing.assert_array_equal(verdict.kept, live)


def test_found_by_name_and_marked():
  found = verifiers.parse("simulated:rate=1")
  assert found == Simulated(1.0) and hash(found) == hash(Simulated(1.0))
  assert found.lossy
  assert Simulated(0.25).label == "simulated(0.25, not the model's text)"
