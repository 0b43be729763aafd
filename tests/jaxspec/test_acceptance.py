# SPDX-License-Identifier: Apache-2.0
"""Acceptance is learned from what was judged, and from nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.acceptance import Acceptance, along, outcome
from jaxspec.base import Proposal, Verdict
from jaxspec.tree import GrownTree, branching, chain


def tokens(tree, rows=1):
  return jnp.zeros((rows, tree.size), jnp.int32)


def verdict(path, kept):
  path = jnp.asarray([path], jnp.int32)
  kept = jnp.asarray([kept], jnp.int32)
  return Verdict(path, kept, kept)


def test_only_children_of_accepted_nodes_are_judged():
  tree = branching((2, 2))                    # 1, 2 below 0; 3, 4 | 5, 6
  judged, right = outcome(Proposal(tokens(tree), tree),
                          verdict([0, 2, 0], 2))
  assert np.flatnonzero(judged[0]).tolist() == [1, 2, 5, 6]
  assert np.flatnonzero(right[0]).tolist() == [2]


def test_dead_nodes_and_finished_rows_are_not_judged():
  tree = chain(3)
  live = Proposal(tokens(tree), tree, live=jnp.array([2], jnp.int32))
  judged, right = outcome(live, verdict([0, 1, 0, 0], 2))
  assert np.flatnonzero(judged[0]).tolist() == [1]
  assert np.flatnonzero(right[0]).tolist() == [1]
  judged, _ = outcome(Proposal(tokens(tree), tree), verdict([0] * 4, 0))
  assert not judged.any()


def test_a_tree_that_is_data_is_judged_alike():
  tree = branching((2, 2))
  grown = GrownTree(jnp.asarray([tree.parents], jnp.int32), tree.height)
  for path, kept in (([0, 0, 0], 1), ([0, 1, 3], 3), ([0, 2, 0], 2)):
    for one, other in zip(outcome(Proposal(tokens(tree), tree),
                                  verdict(path, kept)),
                          outcome(Proposal(tokens(tree), grown),
                                  verdict(path, kept))):
      np.testing.assert_array_equal(one, other)


def test_a_path_is_as_likely_as_all_its_steps():
  tree = branching((2, 1))                    # 1, 2 below 0; 3 | 4
  proposal = Proposal(tokens(tree), tree, live=jnp.array([4], jnp.int32))
  found = along(proposal, jnp.array([[1, 0.5, 0.25, 0.5, 0.5]]))
  np.testing.assert_allclose(found, [[1, 0.5, 0.25, 0.25, 0]], rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_rates_go_to_what_is_true(shared):
  """Each kind at each depth by itself, whatever was believed before."""
  truth = np.array([[0.9, 0.5], [0.2, 0.7]])
  rng = np.random.default_rng(0)
  known = Acceptance.unknown(3, 2, (0.5, 0.5), shared=shared)
  kinds = jnp.tile(jnp.array([[0, 0, 1, 1]], jnp.int32), (3, 1))
  depths = jnp.tile(jnp.array([[1, 2, 1, 2]], jnp.int32), (3, 1))
  found = []
  for step in range(300):
    right = rng.random((3, 4)) < truth.reshape(-1)
    known = known.judge(kinds, depths, jnp.ones((3, 4), bool),
                        jnp.asarray(right))
    if step >= 100:
      found.append(np.asarray(known.rates()))
  np.testing.assert_allclose(np.mean(found, axis=(0, 1)), truth, atol=0.1)
  np.testing.assert_allclose(known.of(kinds, depths)[0],
                             np.asarray(known.rates())[0].reshape(-1))


def test_what_is_not_tried_stays_as_it_was():
  known = Acceptance.unknown(2, 2, (0.3,), shared=True)
  kinds, depths = (jnp.zeros((2, 2), jnp.int32),
                   jnp.array([[1, 2], [1, 2]], jnp.int32))
  tried = jnp.array([[True, False], [False, False]])
  after = known.judge(kinds, depths, tried, tried)
  assert after.tried.tolist() == [[[1, 0]], [[0, 0]]]
  # One row's luck is the other's belief, but weighs less there.
  rates = np.asarray(after.rates())
  assert rates[0, 0, 0] > rates[1, 0, 0] > 0.3
  np.testing.assert_allclose(rates[:, 0, 1], 0.3, rtol=1e-6)
  alone = known.replace(all_tried=None, all_right=None).judge(
      kinds, depths, tried, tried)
  np.testing.assert_allclose(alone.rates()[1], 0.3, rtol=1e-6)


def test_a_new_request_begins_anew():
  known = Acceptance.unknown(2, 1, (0.5,), shared=True)
  one = jnp.ones((2, 1), jnp.int32)
  known = known.judge(one * 0, one, one > 0, one > 0).begin(
      jnp.array([1, 2], jnp.int32))
  assert known.tried.tolist() == [[[1]], [[0]]]
  assert known.all_tried.tolist() == [[2]]
