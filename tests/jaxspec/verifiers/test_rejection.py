# SPDX-License-Identifier: Apache-2.0
"""Recursive rejection gives the law of the model, and the package walks it.

Held here, in three links. The walk from its definition (`walks.py`), summed
over all drafts there can be and all that can become of them, has the law of
plain decoding to 1e-12. The package goes the very way that walk goes for the
same coins, in static trees and grown ones, with dead nodes, with and without
replacement, with laws unknown. And the laws it computes on the way satisfy the
identity behind it all: min(p, q) and the residual make p.

`test_distribution.py` then holds the law of whole answers.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec import sampling, verifiers
from jaxspec.base import Proposal
from jaxspec.tree import GrownTree, Tree, branching, chain, from_paths, root
from jaxspec.verifiers import rejection
from jaxspec.verifiers.rejection import Rejection
from tests.jaxspec.verifiers import walks

pytestmark = pytest.mark.usefixtures("quick_compiles")

UNEVEN = from_paths([(0,), (1,), (2,), (0, 0), (2, 0), (2, 1)])
KINDS = pytest.mark.parametrize("kind", ["without", "with", "certain"])


def children_of(tree):
  return lambda node: [c for c in tree.children[node] if c > 0]


# The law, by enumeration.


def texts_of(tree, tokens, node):
  return tuple(tokens[n] for n in tree.paths[node, 1:tree.depths[node] + 1])


def drafts(tree, q_of, replacement):
  """All tokens of the tree there can be, each with its probability."""
  def fill(tokens, chance):
    node = len(tokens)
    if node == tree.size:
      yield tokens, chance
      return
    parent = tree.parents[node]
    q = q_of(texts_of(tree, tokens, parent))
    if not replacement:
      for elder in range(1, node):
        if tree.parents[elder] == parent:
          q = np.where(np.arange(len(q)) == tokens[elder], 0, q)
      # Where nothing is left to draw, a tree is filled somehow.
      q = walks.norm(q, np.eye(len(q))[(7 * node) % len(q)])
    for token in np.flatnonzero(q):
      yield from fill([*tokens, int(token)], chance * q[token])
  yield from fill([0], 1.0)


def written(tree, tokens, p_of, q_of, replacement, vocab):
  """The law of a text as long as the longest the walk can give."""
  total = np.zeros((vocab,) * (tree.height + 1))
  for chance, path, last in walks.outcomes(
      children_of(tree), tokens, lambda n: p_of(texts_of(tree, tokens, n)),
      lambda n: q_of and q_of(texts_of(tree, tokens, n)), replacement):
    text = tuple(tokens[n] for n in path)
    for token in range(vocab):
      if chance * last[token]:
        begun = (*text, token)
        total[begun] += chance * last[token] * decoded(
            p_of, vocab, tree.height + 1 - len(begun), begun)
  return total


def decoded(p_of, vocab, count, begun=()):
  """The law of the next `count` tokens of plain decoding."""
  if not count:
    return np.float64(1)
  p = p_of(begun)
  return np.stack([p[t] * decoded(p_of, vocab, count - 1, (*begun, t))
                   for t in range(vocab)])


def prefix_laws(vocab, seed, zeros=0.2):
  @functools.cache
  def of(text):
    return walks.law(np.random.default_rng([seed, len(text), *text]), vocab,
                     zeros=zeros)
  return of


@pytest.mark.parametrize("tree, vocab", [
    (chain(1), 5), (chain(2), 4), (branching((3,)), 5), (branching((5,)), 4),
    (branching((2, 1)), 4), (branching((2, 2)), 3),
    (from_paths([(0,), (1,), (1, 0)]), 5)], ids=str)
@pytest.mark.parametrize("replacement", [False, True])
def test_drawn_drafts_give_the_law_of_the_model(tree, vocab, replacement):
  if replacement and tree.size > 5:
    tree = Tree(tree.parents[:5])
  for seed in range(2):
    p_of = prefix_laws(vocab, seed)
    # Few tokens that can be drawn, too: then siblings run out of them.
    q_of = prefix_laws(vocab, seed + 9, zeros=0.4)
    total, mass = 0.0, 0.0
    for tokens, chance in drafts(tree, q_of, replacement):
      total += chance * written(tree, tokens, p_of, q_of, replacement, vocab)
      mass += chance
    assert mass == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(
        total, decoded(p_of, vocab, tree.height + 1), atol=1e-12)


@pytest.mark.parametrize("tree, vocab", [
    (chain(2), 4), (branching((3,)), 4), (branching((2, 1)), 3)], ids=str)
def test_certain_drafts_give_the_law_of_the_model(tree, vocab):
  """Whatever they are: not on average, but each."""
  p_of = prefix_laws(vocab, 3)
  law = decoded(p_of, vocab, tree.height + 1)
  for tokens in itertools.product(range(vocab), repeat=tree.size - 1):
    np.testing.assert_allclose(
        written(tree, [0, *tokens], p_of, None, False, vocab), law, atol=1e-12)


def test_greedy_drafts_that_claim_to_be_drawn_do_not():
  """The enumeration can tell: the known bias of a greedy draft."""
  p = np.array([.5, .3, .15, .05])
  q = np.array([.1, .2, .3, .4])
  found = written(chain(1), [0, 3], lambda text: p, lambda text: q, False, 4)
  np.testing.assert_allclose(
      found.sum(axis=1), [.70, .175, 0, .125], atol=1e-12)


# The package goes the same way.


@KINDS
@pytest.mark.parametrize("tree", [chain(4), branching((3, 2)), UNEVEN], ids=[
    "chain", "tree", "uneven"])
def test_the_package_walks_as_plain_python_does(tree, kind):
  lengths = walks.check(Rejection(), *walks.case(tree, kind))
  assert {0, 1, 2} <= set(lengths)


@pytest.mark.medium
@KINDS
def test_grown_trees_and_dead_nodes(kind):
  """Every row has a topology and a number of live nodes of its own."""
  rng = np.random.default_rng(5)
  count, size = 300, 8
  parents = np.array([[-1, *(rng.integers(0, n) for n in range(1, size))]
                      for _ in range(count)], np.int32)
  live = jnp.asarray(rng.integers(1, size + 1, count), jnp.int32)
  tree = GrownTree(jnp.asarray(parents), height=size - 1)
  lengths = walks.check(Rejection(), *walks.case(tree, kind, seed=1, live=live))
  assert {0, 1, 2} <= set(lengths)


@pytest.mark.parametrize("law", ["soft", "greedy"])
def test_greedy_rows_take_the_likeliest_tokens_alone(law):
  proposal, p, q, _ = walks.case(branching((2, 2)), "without", seed=1)
  if law == "greedy":
    q = np.eye(5)[np.argmax(q, axis=-1)]
    best = np.argsort(-q, axis=-1, kind="stable")
    tokens = np.asarray(proposal.tokens).copy()
    for node in range(1, 7):
      parent = proposal.tree.parents[node]
      tokens[:, node] = best[:, parent, (node - 1) % 2]
    proposal = proposal.replace(tokens=jnp.asarray(tokens),
                                probs=jnp.asarray(q, jnp.float32))
  row = walks.rows(0.0, range(len(p)))
  logits = jnp.log(jnp.asarray(p, jnp.float32))
  verdict = jax.jit(Rejection())(
      proposal, walks.laws(logits, row, walks.positions(proposal)))
  tokens, best = np.asarray(proposal.tokens), np.argmax(p, axis=-1)
  path, kept, last = (np.asarray(x) for x in (
      verdict.path, verdict.kept, verdict.next_token))
  for b in range(len(p)):
    node, taken = 0, [0]
    while True:
      right = [c for c in children_of(proposal.tree)(node)
               if tokens[b, c] == best[b, node]]
      if not right:
        break
      node = right[0]
      taken.append(node)
    assert path[b, :kept[b]].tolist() == taken
    assert last[b] == best[b, node]


def test_the_root_alone_is_a_sample_of_the_model():
  count = 20_000
  p = np.array([.5, .3, .15, .05, 0])
  row = walks.rows(1.0, range(count))
  verdict = jax.jit(Rejection())(
      Proposal(jnp.zeros((count, 1), jnp.int32), root()),
      walks.laws(
          jnp.log(jnp.broadcast_to(jnp.asarray(p, jnp.float32),
                                   (count, 1, 5))),
          row, jnp.ones((count, 1), jnp.int32)))
  share = np.bincount(verdict.next_token, minlength=5) / count
  assert np.all(np.asarray(verdict.kept) == 1) and share[4] == 0
  np.testing.assert_allclose(share, p, atol=0.02)


def test_coins_have_no_memory():
  """Other positions, other siblings, other rows: other coins; not gumbel's."""
  key = walks.rows(1.0, [0, 0, 0, 1]).key
  at, number = jnp.array([3, 4, 3, 3]), jnp.array([0, 0, 1, 0])
  coins = np.asarray(sampling.coins(key, at, number))
  assert len(set(coins.tolist())) == 4 and np.all((0 <= coins) & (coins < 1))
  own = sampling.gumbel(key, at, 4)
  apart = sampling.gumbel(sampling.apart(key), at, 4)
  assert not np.any(own == apart)


# The identity behind it.


laws = st.lists(st.sampled_from([0., 1e-6, 1e-3, .1, .2, .5, 1., 3.]),
                min_size=6, max_size=6).filter(any).map(
                    lambda w: np.array(w) / np.sum(w))


@settings(max_examples=100, deadline=None)
@given(laws, laws)
def test_what_both_have_and_the_residual_make_the_law(p, q):
  rest = np.asarray(rejection.residual(
      jnp.asarray([p], jnp.float32), jnp.asarray([q], jnp.float32)))[0]
  both = np.minimum(p, q)
  np.testing.assert_allclose(both + (1 - both.sum()) * rest, p, atol=1e-6)
  assert rest.sum() == pytest.approx(1, abs=1e-6) and np.all(rest >= 0)


@pytest.mark.medium
@settings(max_examples=100, deadline=None)
@given(laws, laws, st.booleans())
def test_two_siblings_and_what_is_left_make_the_law(p, q, replacement):
  """Summed over both drafts, with the laws that the package computes."""
  def f32(x):
    return jnp.asarray([x], jnp.float32)
  total = np.zeros(6)
  for x in np.flatnonzero(q):
    takes = min(1, p[x] / q[x])
    total[x] += q[x] * takes
    rest = np.asarray(rejection.residual(f32(p), f32(q)))[0]
    left = q if replacement else np.asarray(
        rejection.without(f32(q), jnp.array([x])))[0]
    miss = q[x] * (1 - takes)
    if not np.any(left):             # it is filled with any token, as certain
      total += miss * rest
      continue
    for y in np.flatnonzero(left):
      then = min(1, rest[y] / left[y])
      total[y] += miss * left[y] * then
      total += miss * left[y] * (1 - then) * np.asarray(
          rejection.residual(f32(rest), f32(left)))[0]
  np.testing.assert_allclose(total, p, atol=1e-5)


def test_a_residual_of_nothing_is_the_law_itself():
  p = jnp.array([[.25, .75, 0], [.5, .5, 0]])
  q = p.at[1].set(jnp.array([0., .5, .5]))
  np.testing.assert_allclose(
      rejection.residual(p, q), [[.25, .75, 0], [1, 0, 0]])
  np.testing.assert_allclose(
      rejection.without(jnp.array([[0., 1, 0], [.5, .25, .25]]),
                        jnp.array([1, 0])), [[0, 0, 0], [0, .5, .5]])


def test_a_certain_law_that_is_drafted_always_stands():
  """Even where rounding makes it less than 1."""
  tree, count = chain(1), 2000
  p = np.zeros((count, 2, 5))
  p[..., 2] = 1 - 1e-7
  p[..., 3] = 1e-7
  verdict = jax.jit(Rejection())(
      Proposal(jnp.full((count, 2), 2, jnp.int32), tree,
               probs=jnp.asarray(p, jnp.float32)),
      walks.laws(
          jnp.log(jnp.asarray(p, jnp.float32)), walks.rows(1.0, range(count)),
          jnp.broadcast_to(jnp.array([5, 6]), (count, 2))))
  assert np.all(np.asarray(verdict.kept) == 2)


def test_it_makes_no_temporary_as_large_as_all_logits():
  """Laws are computed a node at a time."""
  tree, vocab, count = branching((4, 4, 3)), 20_000, 2
  logits = jnp.zeros((count, tree.size, vocab))
  proposal = Proposal(jnp.zeros((count, tree.size), jnp.int32), tree,
                      probs=logits)
  compiled = jax.jit(Rejection()).lower(
      proposal, walks.laws(logits, walks.rows(1.0, range(count)),
                           jnp.zeros((count, tree.size), jnp.int32))).compile()
  used = compiled.memory_analysis().temp_size_in_bytes
  assert used < 20 * count * vocab * 4 < logits.nbytes / 3


def test_found_by_name():
  assert verifiers.parse("rejection") == Rejection()
  assert hash(Rejection()) == hash(Rejection())
