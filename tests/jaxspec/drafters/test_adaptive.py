# SPDX-License-Identifier: Apache-2.0
"""Adaptive: passes as wide as pays, by what they cost and what was accepted.

That it never changes the text is held by the contract. Held here: which widths
it takes of an oracle, of a liar and of one who changes his mind; that it turns
itself off, and tries again; that a run in which the width changes all the time
compiles nothing.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxspec import drafters
from jaxspec.drafters.adaptive import _PROBE, Adaptive
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.errors import InputError
from jaxspec.profiling import count_compiles
from jaxspec.tree import chain
from tests.jaxspec import batches
from tests.jaxspec.batches import GREEDY, Scripted

pytestmark = pytest.mark.usefixtures("quick_compiles")
PROMPTS = batches.prompts(2)
LENGTH = 200
LONG = dataclasses.replace(GREEDY, max_new_tokens=LENGTH)
SIZES = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def plain(small):
  return batches.run(small, Autoregressive(), PROMPTS, LONG, capacity=256)


def script(plain):
  return batches.truth(plain, LENGTH)


def oracle(truth, **change):
  return Scripted(truth, chain(7), tuple(range(1, 8)), **change)


def run(small, plain, drafter, costs):
  adaptive = Adaptive.of(drafter, SIZES, costs)
  state = batches.run(small, adaptive, PROMPTS, LONG, capacity=256)
  assert batches.answers(state) == batches.answers(plain)
  passes = np.asarray(state.counters.passes)
  return state, np.asarray(state.counters.scored) / passes


@pytest.mark.medium
def test_an_oracle_gets_wide_passes(small, plain):
  state, width = run(small, plain, oracle(script(plain)), (1, 1, 1.1, 1.2))
  assert np.all(width > 7)
  assert batches.accepted(state) > 0.8 * 2 * LENGTH


@pytest.mark.medium
def test_what_costs_more_than_it_gives_is_not_taken(small, plain):
  """Right or not: eight nodes for the price of nine passes do not pay."""
  _, width = run(small, plain, oracle(script(plain)), (1, 2.5, 5, 9))
  assert np.all(width < 1.1)


def test_a_liar_is_turned_off(small, plain):
  lies = (script(plain) + 1) % small.vocab
  state, width = run(small, plain, oracle(lies), (1, 1.2, 1.4, 1.6))
  assert np.all(width < 1.3)
  # Off: it was not asked all the time; and still asked now and then.
  assert LENGTH // _PROBE <= batches.drafted(state) / 2 < LENGTH / 4
  assert batches.accepted(state) == 0


def test_it_notices_when_a_drafter_gets_better(small, plain):
  truth = np.asarray(script(plain)).copy()
  right = truth[:, 80:].copy()
  truth[:, :80] = (truth[:, :80] + 1) % small.vocab
  assert np.all(truth[:, 80:] == right)
  state, _ = run(small, plain, oracle(jnp.asarray(truth)), (1, 1.2, 1.4, 1.6))
  assert batches.accepted(state) > 30


def test_width_is_that_of_the_row_that_gains_most(small, plain):
  """A row without a draft costs the pass nothing, and gains nothing."""
  truth = np.asarray(script(plain)).copy()
  truth[1] = (truth[1] + 1) % small.vocab
  state, width = run(small, plain, oracle(jnp.asarray(truth)),
                     (1, 1.1, 1.2, 1.3))
  accepted = np.asarray(state.counters.accepted).sum(axis=1)
  assert accepted[0] > 0.7 * LENGTH and accepted[1] == 0
  assert width[0] > 5


@pytest.mark.slow
def test_a_forced_width_is_taken_whatever_pays(small, plain):
  adaptive = Adaptive.of(oracle(script(plain), live=1), SIZES, (1, 9, 9, 9))
  state = batches.begin(small, adaptive, PROMPTS, LONG, capacity=256)
  for number, size in enumerate(SIZES):
    before = np.asarray(state.counters.scored)
    state = batches.finish(small, adaptive.replace(
        forced=jnp.asarray(number, jnp.int32)), state, steps=1)
    assert (state.counters.scored - before).tolist() == [size] * 2
  # Nothing that was dead is drafted for it.
  assert batches.drafted(state) == 0


def test_widths_change_and_nothing_is_compiled(small, plain):
  """Hundreds of changes, one program."""
  adaptive = Adaptive.of(oracle(script(plain)), SIZES, (1, 1, 1, 1))
  state = batches.begin(small, adaptive, PROMPTS, LONG, capacity=256)
  state = batches.refill(small, adaptive, state, [0, 1], PROMPTS, LONG)
  state = batches.finish(small, adaptive, state, steps=1)
  seen, widths = set(), []
  costs = np.random.default_rng(0).uniform(1, 9, (300, 4)).astype(np.float32)
  costs = [jnp.asarray(row) for row in costs]
  with count_compiles() as compiles:
    for row in costs:
      before = np.asarray(state.counters.scored)
      state = batches.finish(small, adaptive.replace(costs=row), state,
                             steps=1)
      if np.asarray(state.done).all():
        state = batches.refill(small, adaptive, state, [0, 1], PROMPTS, LONG)
        continue
      widths.append(int(np.asarray(state.counters.scored)[0] - before[0]))
      seen.add(widths[-1])
  assert seen == set(SIZES)
  assert np.sum(np.diff(widths) != 0) > 100
  assert compiles.count == 0


@pytest.mark.slow
def test_a_costly_drafter_is_not_asked_while_nothing_pays(small, plain):
  @struct.dataclass
  class Costly(Scripted):
    costly = True

    def init(self, model, rows, capacity):
      return jnp.zeros((), jnp.int32)

    def propose(self, model, seq, request, state):
      proposal, _ = super().propose(model, seq, request, ())
      return proposal, state + 1

  costly = Costly(
      script(plain), chain(7), tuple(range(1, 8)), shift=1)
  state, width = run(small, plain, costly, (1, 2, 3, 4))
  assert np.all(width < 1.2)
  assert 0 < int(state.draft.inner) < LENGTH / 4


@pytest.mark.parametrize("text, word", [
    ("adaptive:sizes=[2;9]", "ascend from 1"),
    ("adaptive:sizes=[1;4]", "ascend from 1 to 8"),
    ("adaptive:sizes=[1;x;9]", "must be numbers"),
    ("adaptive:costs=[1;2]", "one for each"),
    ("adaptive:sizes=[1;8],costs=[1;-2]", "positive"),
    ("adaptive:drafter=oracle", "unknown"),
    ("adaptive:drafter=lookahead", "cannot be cut"),
])
def test_refused(small, text, word):
  with pytest.raises(InputError, match=word):
    drafters.parse(text, drafters.Target(small))


def test_from_text(small):
  made = drafters.parse(
      "adaptive:drafter=[prompt_lookup:length=4],sizes=[1;3;5],costs=[1;1.5;2]",
      drafters.Target(small))
  assert made.sizes == (1, 3, 5) and not made.unmeasured
  np.testing.assert_allclose(made.costs, [1, 1.5, 2])
  assert drafters.parse("adaptive", drafters.Target(small)).unmeasured
