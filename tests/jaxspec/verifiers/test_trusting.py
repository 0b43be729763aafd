# SPDX-License-Identifier: Apache-2.0
"""Trusting: what a drafter is sure of stands, and says that it is lossy.

Held here: of any tree the live path of first children is taken, and behind it
comes the model's own token; no token that was shown is ever taken back, even
from a head that is always wrong; what is kept is what was live; the cache is
still that of a fresh pass; a drafter that drafts nothing decodes plainly.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import loop, verifiers
from jaxspec.base import Proposal
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.drafters.early_exit import EarlyExit
from jaxspec.errors import InputError
from jaxspec.first_tokens import FirstTokens
from jaxspec.generator import Generator
from jaxspec.heads import ExitHead
from jaxspec.tree import GrownTree, chain
from jaxspec.verifiers.trusting import Trusting
from tests.jaxspec import batches, cycles
from tests.jaxspec.batches import GREEDY, SAMPLED
from tests.jaxspec.verifiers import walks

pytestmark = pytest.mark.usefixtures("quick_compiles")

CHAIN = ((0,), (0, 0), (0, 0, 0))


def test_live_first_children_stand():
  rng = np.random.default_rng(0)
  count, size, vocab = 60, 8, 6
  parents = np.array([[-1, *(rng.integers(0, n) for n in range(1, size))]
                      for _ in range(count)], np.int32)
  live = rng.integers(1, size + 1, count).astype(np.int32)
  tokens = rng.integers(0, vocab, (count, size)).astype(np.int32)
  proposal = Proposal(jnp.asarray(tokens),
                      GrownTree(jnp.asarray(parents), height=size - 1),
                      live=jnp.asarray(live))
  logits = jnp.asarray(rng.standard_normal((count, size, vocab)), jnp.float32)
  row, at = walks.rows(1.0, range(count)), walks.positions(proposal)
  verdict = jax.jit(Trusting())(proposal, walks.laws(logits, row, at))
  own = walks.draw(logits, row, at)
  lengths = set()
  for b in range(count):
    path = [0]
    while True:
      children = [n for n in range(1, size) if parents[b, n] == path[-1]]
      if not children or children[0] >= live[b]:
        break
      path.append(children[0])
    kept = int(verdict.kept[b])
    assert verdict.path[b, :kept].tolist() == path
    assert verdict.next_token[b] == own[b, path[-1]]
    lengths.add(kept)
  assert len(lengths) > 3


@pytest.mark.slow
def test_nothing_drafted_is_plain_decoding(small):
  prompts = batches.prompts(3)
  for options in (GREEDY, SAMPLED):
    plain, trusting = (
        batches.answers(batches.run(small, Autoregressive(), prompts, options,
                                    verifier=verifier))
        for verifier in (verifiers.parse("exact"), Trusting()))
    assert plain == trusting


@pytest.mark.medium
@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_that_is_shown_is_taken_back(shift):
  """Neither by the model, nor by an end or a limit."""
  model = cycles.model()
  drafter = EarlyExit(cycles.exit_head(shift=shift), CHAIN)
  prompts = [[5, 9, 2], [7], [1, 1, 4, 30, 8]]
  options = [GREEDY, dataclasses.replace(GREEDY, max_new_tokens=10),
             dataclasses.replace(GREEDY, stop_token_ids=(
                 cycles.after(8, 7 + shift),))]
  state = batches.begin(model, drafter, prompts, options, verifier=Trusting())
  pending, shown = {}, 0
  for emission, after in loop.stream(model, drafter, Trusting(), state):
    state = after
    for row, (at, n) in enumerate(zip(emission.start.tolist(),
                                      emission.count.tolist())):
      told = dict(enumerate(emission.tokens[row, :n].tolist(), at))
      for place in told.keys() & {p for r, p in pending if r == row}:
        assert pending[row, place] == told[place]
      if not emission.settled:
        pending |= {(row, place): t for place, t in told.items()}
        shown += n
  texts = batches.texts_of(state)
  assert all(texts[row][place] == t for (row, place), t in pending.items())
  assert shown > 20
  assert [len(a) for a in batches.answers(state)][1] == 10
  assert (batches.answers(state)[0] == cycles.recited(prompts[0], 24)) == (
      shift == 0)
  batches.check_cache(model, state)
  # What is kept is what was live, but where an answer ends.
  assert state.counters.accepted[0].sum() == state.counters.nodes[0] - (
      state.counters.passes[0] * 4 + 1 - 24)


@pytest.mark.slow
def test_how_much_is_believed_is_the_drafters(tiny):
  """The surer it must be, the nearer the text is to the model's own."""
  head, prompts = ExitHead.init(tiny, layer=3), batches.prompts(4)
  plain = batches.answers(batches.run(tiny, Autoregressive(), prompts, GREEDY))

  def run(stop):
    state = batches.run(tiny, EarlyExit(head, CHAIN, stop=stop), prompts,
                        GREEDY, verifier=Trusting())
    batches.check_cache(tiny, state)
    assert batches.accepted(state) >= batches.drafted(state) - 3 * 4
    return batches.accepted(state), batches.answers(state)
  most, other = run(0.0)
  some, _ = run(0.5)
  none, same = run(1.0)
  assert most > some > none == 0
  assert same == plain and other != plain


@pytest.mark.slow
def test_it_says_that_it_is_lossy(tiny):
  assert verifiers.parse("trusting") == Trusting()
  assert hash(Trusting()) == hash(Trusting()) and Trusting().lossy
  head = ExitHead.init(tiny, layer=3)
  made = Generator(tiny, drafter=EarlyExit(head, CHAIN), verifier="trusting",
                   capacity=64)
  (found,) = made.generate([[5, 9, 2]], GREEDY)
  found.stats.reconcile()
  assert "verify=trusting(lossy)" in found.stats.line("")


def test_guesses_of_first_tokens_are_refused(tiny):
  """They are no drafts, and would be taken back."""
  with pytest.raises(InputError, match="one of them without the other"):
    Generator(tiny, verifier="trusting", capacity=64,
              first_tokens=FirstTokens(64, None, {}))
  with pytest.raises(InputError, match="vocabulary of 9 tokens"):
    Generator(tiny, capacity=64, first_tokens=FirstTokens(9, None, {}))


def test_a_chain_is_kept_whole():
  proposal = Proposal(jnp.asarray([[1, 2, 3]]), chain(2))
  assert proposal.leads.tolist() == [[True] * 3]
