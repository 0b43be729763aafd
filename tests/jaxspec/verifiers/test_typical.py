# SPDX-License-Identifier: Apache-2.0
"""Typical acceptance, against its definition in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import verifiers
from jaxspec.base import Proposal
from jaxspec.tree import GrownTree, branching
from jaxspec.verifiers.typical import Typical
from tests.jaxspec.verifiers import walks

pytestmark = pytest.mark.usefixtures("quick_compiles")


def best_path(parents, tokens, live, p, epsilon, delta):
  """The longest path of plausible drafts; of several, the likeliest."""
  def plausible(node):
    law = p[parents[node]]
    some = law[law > 0]
    entropy = -np.sum(some * np.log(some))
    return law[tokens[node]] > min(epsilon, delta * np.exp(-entropy))

  def beyond(node, path, chance):
    yield len(path), chance, path
    for child in range(1, live):
      if parents[child] == node and plausible(child):
        yield from beyond(child, [*path, child],
                          chance * p[node][tokens[child]])
  return max(beyond(0, [0], 1.0))[2]


@pytest.mark.medium
@pytest.mark.parametrize("epsilon, delta", [(0.09, 0.3), (0.3, 0.9), (1, 0.5)])
def test_against_the_definition(epsilon, delta):
  rng = np.random.default_rng(0)
  count, size, vocab = 200, 9, 6
  p = walks.law(rng, count, size, vocab)
  tokens = rng.integers(0, vocab, (count, size)).astype(np.int32)
  parents = np.array([[-1, *(rng.integers(0, n) for n in range(1, size))]
                      for _ in range(count)], np.int32)
  live = rng.integers(1, size + 1, count).astype(np.int32)
  proposal = Proposal(jnp.asarray(tokens),
                      GrownTree(jnp.asarray(parents), height=size - 1),
                      live=jnp.asarray(live))
  with np.errstate(divide="ignore"):
    logits = jnp.asarray(np.log(p) + 2, jnp.float32)  # not normalised
  row, at = walks.rows(1.0, range(count)), walks.positions(proposal)
  verdict = jax.jit(Typical(epsilon, delta))(
      proposal, walks.laws(logits, row, at))
  own = walks.draw(logits, row, at)
  path, kept, last = (np.asarray(x) for x in (
      verdict.path, verdict.kept, verdict.next_token))
  lengths = set()
  for b in range(count):
    wanted = best_path(parents[b], tokens[b], live[b], p[b], epsilon, delta)
    said = [tokens[b, n] for n in wanted[1:]]
    assert [tokens[b, n] for n in path[b, 1:kept[b]]] == said
    # The token behind it is the one plain decoding would draw there.
    assert last[b] == own[b, path[b, kept[b] - 1]]
    lengths.add(len(said))
  assert {0, 1, 2, 3} <= lengths


def test_of_paths_as_long_the_likeliest_wins():
  tree = branching((2, 1))
  p = np.full((2, 5, 4), 0.25)
  p[0, 0] = [.3, .4, .2, .1]
  p[1, 0] = [.4, .3, .2, .1]
  p[:, 3] = [.9, .1, 0, 0]           # behind neither of them
  tokens = jnp.asarray([[3, 0, 1, 2, 2]] * 2)
  proposal = Proposal(tokens, tree)
  verdict = Typical()(proposal, walks.laws(
      jnp.log(jnp.asarray(p, jnp.float32)), walks.rows(1.0, [0, 1]),
      walks.positions(proposal)))
  assert verdict.kept.tolist() == [3, 3]
  assert verdict.path.tolist() == [[0, 2, 4], [0, 1, 3]]


def test_a_greedy_row_is_the_models_own():
  proposal, p, _, row = walks.case(branching((3, 2)), "without", temperature=0)
  logits = jnp.log(jnp.asarray(p, jnp.float32))
  at = walks.positions(proposal)
  lenient, exact = (
      jax.jit(verifiers.parse(text))(proposal, walks.laws(logits, row, at))
      for text in ("typical:epsilon=0,delta=0", "exact"))
  np.testing.assert_array_equal(lenient.kept, exact.kept)
  np.testing.assert_array_equal(lenient.next_token, exact.next_token)
  assert np.any(np.asarray(exact.kept) > 1)


def test_found_by_name():
  assert verifiers.parse("typical") == Typical(0.09, 0.3)
  assert verifiers.parse("typical:epsilon=1") == Typical(epsilon=1.0)
  assert hash(Typical()) == hash(Typical())
