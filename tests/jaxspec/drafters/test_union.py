# SPDX-License-Identifier: Apache-2.0
"""Union: one tree of what several drafters say, likeliest first.

That it never changes the text is held by the contract. Held here: what its
tree is made of, that it accepts what the best of its drafters would have, and
that it learns whom to believe.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import drafters
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.drafters.union import Union
from jaxspec.errors import InputError
from jaxspec.tree import chain
from tests.jaxspec import batches
from tests.jaxspec.batches import GREEDY, Scripted

pytestmark = pytest.mark.usefixtures("quick_compiles")
PROMPTS = batches.prompts(3)
LONG = dataclasses.replace(GREEDY, max_new_tokens=40)


@pytest.fixture(scope="module")
def plain(small):
  return batches.run(small, Autoregressive(), PROMPTS, LONG, capacity=80)


def scripted(plain, length, shift=0):
  return Scripted(batches.truth(plain), chain(length),
                  tuple(range(1, length + 1)), shift=shift)


def first_proposal(small, drafter):
  state = batches.begin(small, drafter, PROMPTS, LONG, capacity=80)
  return propose(small, drafter, state)


@jax.jit
def propose(model, drafter, state):
  return drafter.propose(model, state.seq, state.request, state.draft)


def test_what_two_say_is_one_node(small, plain):
  """Three right tokens, said twice, and three wrong ones."""
  union = Union((scripted(plain, 3), scripted(plain, 2),
                 scripted(plain, 3, shift=1)), nodes=7)
  proposal, state = first_proposal(small, union)
  assert proposal.live.tolist() == [7] * 3           # 1 + 3 + 3, not 1 + 8
  for row, answer in enumerate(batches.answers(plain)):
    said = proposal.tokens[row, state.node[row]].tolist()
    wanted = answer[1:4]
    assert said[1:4] == wanted and said[4:6] == wanted[:2]
    assert state.node[row, 1:3].tolist() == state.node[row, 4:6].tolist()


def test_the_budget_takes_the_likeliest(small, plain):
  union = Union((scripted(plain, 3), scripted(plain, 3, shift=1)), nodes=3)
  proposal, state = first_proposal(small, union)
  assert proposal.tokens.shape == (3, 3)
  chances = np.asarray(proposal.chances)
  assert np.all(np.diff(chances, axis=1) <= 0)
  # Both first guesses, for a second one is less likely than either.
  assert state.node[0].tolist() == [0, 1, 3, 3, 2, 3, 3]


@pytest.mark.slow
def test_it_accepts_what_its_best_drafter_would(small, plain):
  right, wrong = scripted(plain, 3), scripted(plain, 3, shift=1)
  alone = batches.run(small, right, PROMPTS, LONG, capacity=80)
  union = Union((wrong, right), nodes=7)
  state = batches.run(small, union, PROMPTS, LONG, capacity=80)
  assert batches.answers(state) == batches.answers(plain)
  assert batches.accepted(state) == batches.accepted(alone) > 60


@pytest.mark.slow
def test_it_learns_whom_to_believe(small, plain):
  """Too few nodes for all: who is right gets them, in the end."""
  union = Union((scripted(plain, 3, shift=1), scripted(plain, 3)), nodes=4)
  state = batches.run(small, union, PROMPTS, LONG, capacity=80)
  assert batches.answers(state) == batches.answers(plain)
  rates = np.asarray(state.draft.acceptance.rates())
  assert np.all(rates[:, 0, 0] < 0.35) and np.all(rates[:, 1, 0] > 0.6)
  # Four a pass, once the three nodes are all the right one's.
  proposal, _ = propose(small, union, state)
  assert np.asarray(proposal.depths).tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.medium
def test_a_late_row_begins_with_no_grudge(small, plain):
  union = Union((scripted(plain, 2), scripted(plain, 2, shift=1)), nodes=5)
  state = batches.run(small, union, PROMPTS, LONG, capacity=80)
  state = batches.refill(small, union, state, [1], PROMPTS[1:2], LONG)
  assert state.draft.acceptance.tried[1].sum() == 0
  assert state.draft.acceptance.tried[0].sum() > 0


def test_from_text(small):
  made = drafters.parse(
      "union:drafters=[prompt_lookup:length=3;prompt_lookup:length=2],nodes=5",
      drafters.Target(small))
  assert [part.length for part in made.drafters] == [3, 2]
  assert (made.size, made.height) == (5, 3)


@pytest.mark.parametrize("text, word", [
    ("union:drafters=prompt_lookup", "at least two"),
    ("union:drafters=[prompt_lookup;prompt_lookup],nodes=99", r"\[2, 15\]"),
    ("union:drafters=[prompt_lookup;prompt_lookup],nodes=1", r"\[2, 15\]"),
    ("union:drafters=[prompt_lookup;oracle]", "unknown"),
    ("union:drafters=[prompt_lookup", "brackets"),
    ("union:drafters=[lookahead;prompt_lookup]", "cannot be joined"),
])
def test_refused(small, text, word):
  with pytest.raises(InputError, match=word):
    drafters.parse(text, drafters.Target(small))


def test_candidates_that_are_dead_become_no_nodes(small, plain):
  half = dataclasses.replace(scripted(plain, 3), live=2)
  union = Union((half, scripted(plain, 1, shift=1)), nodes=5)
  proposal, _ = first_proposal(small, union)
  assert proposal.live.tolist() == [3] * 3
  assert jnp.all(proposal.chances[:, 3:] == 0)
