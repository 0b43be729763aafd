# SPDX-License-Identifier: Apache-2.0
"""The exact verifier walks the tree as plain Python does.

Held here: from the root, go to the child that equals the node's own sample, as
long as there is one that is alive; the sample of the last node comes next.
Siblings may hold the same token; dead nodes are never walked. Samples depend
on the request and the position alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec import verifiers
from jaxspec.base import Proposal
from jaxspec.errors import InputError
from jaxspec.tree import Tree, branching, chain, root
from jaxspec.verifiers.exact import exact, follow
from tests.jaxspec.verifiers import walks


@st.composite
def cases(draw):
  size = draw(st.integers(1, 12))
  parents = [-1] + [draw(st.integers(0, n - 1)) for n in range(1, size)]
  def numbers(high, count):
    return draw(st.lists(st.integers(0, high), min_size=count,
                         max_size=count))
  return (tuple(parents), numbers(2, size), numbers(2, size),
          draw(st.integers(1, size)))


@pytest.mark.medium
@settings(max_examples=30, deadline=None)
@given(cases())
def test_against_plain_python(case):
  parents, tokens, samples, live = case
  tree = Tree(parents)
  # Twins say the same, so that the model says the same behind them.
  says = dict(zip(reversed(texts(parents, tokens)), reversed(samples)))
  samples = [says[text] for text in texts(parents, tokens)]
  asked = []

  def sample(node):
    jax.debug.callback(lambda n: asked.append(int(n[0])), node)
    return jnp.asarray(samples)[node]

  verdict = follow(
      Proposal(jnp.asarray([tokens]), tree, live=jnp.asarray([live])), sample)
  kept = int(verdict.kept[0])
  path = verdict.path[0, :kept].tolist()
  # Where siblings hold the same token, any of them will do; the longest walk
  # is the best.
  best = longest(tree, tokens, samples, live)
  assert [tree.parents[n] for n in path[1:]] == path[:-1] and path[0] == 0
  assert [tokens[n] for n in path[1:]] == [tokens[n] for n in best[1:]]
  assert all(n < live for n in path)
  assert int(verdict.next_token[0]) == samples[path[-1]]
  jax.effects_barrier()
  assert len(asked) == kept          # not one sample more than is said


def texts(parents, tokens):
  """What the path to each node says."""
  said = [()]
  for parent, token in zip(parents[1:], tokens[1:]):
    said.append((*said[parent], token))
  return said


def longest(tree, tokens, samples, live):
  """The longest of all walks, where siblings may be twins."""
  def beyond(node):
    ways = [beyond(c) for c in tree.children[node]
            if 0 < c < live and tokens[c] == samples[node]]
    return [node, *max(ways, key=len, default=[])]
  return beyond(0)


def logits_of(rows, nodes, vocab=8, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((rows, nodes, vocab)), jnp.float32)


@pytest.mark.medium
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accepted_and_next_tokens_are_the_models_own_samples(temperature):
  tree = branching((2, 2))
  logits = logits_of(6, tree.size)
  row = walks.rows(temperature, range(6))
  positions = 5 + jnp.broadcast_to(jnp.asarray(tree.depths)[None],
                                   (6, tree.size))
  samples = walks.draw(logits, row, positions)
  # Truth in the last branch of even rows, nothing true in odd ones.
  tokens = np.full((6, tree.size), -1, np.int32)
  tokens[::2, 2], tokens[::2, 6] = samples[::2, 0], samples[::2, 2]
  verdict = exact(Proposal(jnp.asarray(tokens), tree),
                  walks.laws(logits, row, positions))
  assert verdict.kept.tolist() == [3, 1] * 3
  assert verdict.path[0].tolist() == [0, 2, 6]
  for r in range(6):
    last = 6 if r % 2 == 0 else 0
    assert int(verdict.next_token[r]) == int(samples[r, last])


@pytest.mark.medium
def test_what_was_drafted_elsewhere_changes_nothing():
  """The walk of a row sees its own nodes alone."""
  tree = chain(3)
  logits, row = logits_of(2, 4), walks.rows(1.0, [3, 3])
  positions = jnp.broadcast_to(jnp.arange(4)[None], (2, 4))
  logits = jnp.broadcast_to(logits[:1], logits.shape)
  samples = walks.draw(logits, row, positions)
  tokens = jnp.concatenate([jnp.zeros((2, 1), jnp.int32), samples[:, :3]], 1)
  tokens = tokens.at[1, 1].add(1)
  verdict = exact(Proposal(tokens, tree), walks.laws(logits, row, positions))
  assert verdict.kept.tolist() == [4, 1]
  assert int(verdict.next_token[1]) == int(samples[0, 0])


def test_the_root_alone_is_plain_decoding():
  logits, row = logits_of(3, 1), walks.rows(0.0, [0, 1, 2])
  verdict = exact(Proposal(jnp.zeros((3, 1), jnp.int32), root()),
                  walks.laws(logits, row, jnp.ones((3, 1), jnp.int32)))
  assert verdict.kept.tolist() == [1, 1, 1]
  np.testing.assert_array_equal(verdict.next_token,
                                jnp.argmax(logits[:, 0], axis=-1))


def test_found_by_name():
  assert verifiers.parse("exact") is exact
  with pytest.raises(InputError, match="Did you mean 'exact'"):
    verifiers.parse("exat")
