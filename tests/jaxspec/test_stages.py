# SPDX-License-Identifier: Apache-2.0
"""One step, stage by stage.

Held here: after any round, whatever was accepted or rejected, the cache below
`length` is a fresh prefill of the committed tokens, in every cache there is.
What follows an end token or the limit is dropped; finished rows do not change;
recorded log-probabilities are those of a fresh pass; features are the residual
stream below the tapped layers; a head start changes nothing; counters add up.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import loop, stages
from jaxspec.base import HeadStart, Proposal, Verdict
from jaxspec.caches import Place
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.options import as_request
from jaxspec.tree import branching, chain
from tests.jaxspec import batches
from tests.jaxspec.batches import GREEDY, SAMPLED, Scripted

pytestmark = pytest.mark.usefixtures("quick_compiles")
PROMPTS = batches.prompts(4)
LATE = branching((2, 2, 1))           # the truth hides in its last branch
LAST = (2, 6, 10)
MIXED = [GREEDY, SAMPLED, dataclasses.replace(SAMPLED, seed=9), GREEDY]


@pytest.fixture(scope="module")
def plain(small):
  """What plain decoding answers."""
  return batches.run(small, Autoregressive(), PROMPTS, MIXED)


def doubtful(truth, wrong: float, seed: int = 0):
  """A script that errs now and then."""
  rng = np.random.default_rng(seed)
  errs = rng.random(truth.shape) < wrong
  return jnp.where(errs, truth + 1, truth)


def leaves_of(state, row: int):
  """Everything a state holds of one row, cache left out."""
  kept = (state.seq.tokens, state.seq.prompt_length, state.seq.length,
          state.done, state.logprobs, state.counters)
  return [np.asarray(x)[row] for x in jax.tree.leaves(kept)]


def test_the_late_branch_is_a_path():
  assert LATE.paths[LAST[-1]].tolist() == [0, *LAST]
  assert LAST[-1] == LATE.size - 1


@pytest.mark.medium
@pytest.mark.parametrize("kind", batches.cache_kinds())
def test_cache_is_a_fresh_prefill_after_every_round(small, plain, kind):
  script = doubtful(batches.truth(plain), 0.3)
  drafter = Scripted(script, LATE, LAST)
  state = batches.begin(small, drafter, PROMPTS, MIXED, kind=kind)
  seen, before = set(), 0
  for _ in range(8):
    state = batches.finish(small, drafter, state, steps=1)
    batches.check_cache(small, state)
    after = batches.accepted(state)
    seen.add(after - before)
    before = after
  # Rounds differ: some accept much, some little.
  assert len(seen) > 2
  assert batches.drafted(state) > batches.accepted(state) > 8


@pytest.mark.parametrize("kind", batches.cache_kinds())
def test_text_is_that_of_plain_decoding(small, plain, kind):
  drafter = Scripted(doubtful(batches.truth(plain), 0.3), LATE, LAST)
  state = batches.run(small, drafter, PROMPTS, MIXED, kind=kind)
  assert batches.answers(state) == batches.answers(plain)
  assert batches.accepted(state) > 20
  assert bool(jnp.all(state.done))


def test_end_token_inside_a_block_drops_what_follows(small, plain):
  drafter = Scripted(batches.truth(plain), chain(6), (1, 2, 3, 4, 5, 6))
  answers = batches.answers(plain)
  # An end token that is new at its place, in the middle of the first block.
  ends = [next(t for t in answer[3:] if t not in answer[:3])
          for answer in answers]
  options = [dataclasses.replace(o, stop_token_ids=(end,))
             for o, end in zip(MIXED, ends)]
  state = batches.run(small, drafter, PROMPTS, options)
  wanted = [a[:a.index(end) + 1] for a, end in zip(answers, ends)]
  assert batches.answers(state) == wanted
  assert batches.accepted(state) > 0
  batches.check_cache(small, state)
  # Nothing is left behind the end, neither as text nor as a count.
  for tokens, length in zip(np.asarray(state.seq.tokens), state.seq.length):
    assert not tokens[int(length):].any()
  emitted = 1 + state.counters.passes + state.counters.accepted.sum(axis=1)
  np.testing.assert_array_equal(
      emitted, state.seq.length - state.seq.prompt_length)


def test_limit_inside_a_block(small, plain):
  drafter = Scripted(batches.truth(plain), chain(6), (1, 2, 3, 4, 5, 6))
  options = [dataclasses.replace(o, max_new_tokens=n)
             for o, n in zip(MIXED, (1, 2, 5, 9))]
  state = batches.run(small, drafter, PROMPTS, options)
  assert batches.answers(state) == [
      a[:n] for a, n in zip(batches.answers(plain), (1, 2, 5, 9))]
  batches.check_cache(small, state)


@pytest.mark.parametrize("kind", batches.cache_kinds())
def test_finished_rows_are_untouched(small, plain, kind):
  drafter = Scripted(doubtful(batches.truth(plain), 0.3), LATE, LAST)
  answers = batches.answers(plain)
  options = [dataclasses.replace(o, max_new_tokens=n, logprobs=True)
             for o, n in zip(MIXED, (24, 24, 1, 24))]
  # One ends where it might have gone on.
  options[1] = dataclasses.replace(options[1],
                                   stop_token_ids=(answers[1][2],))
  state = batches.begin(small, drafter, PROMPTS, options, kind=kind)
  state = batches.finish(small, drafter, state, steps=3)
  assert state.done.tolist() == [False, True, True, False]
  before = [leaves_of(state, row) for row in (1, 2)]
  read = [x[1:3] for x in batches.readings(small, state.seq.cache)]
  state = batches.finish(small, drafter, state)
  assert bool(jnp.all(state.done))
  for row, held in zip((1, 2), before):
    for is_, was in zip(leaves_of(state, row), held):
      np.testing.assert_array_equal(is_, was)
  for is_, was in zip(batches.readings(small, state.seq.cache), read):
    np.testing.assert_array_equal(is_[1:3], was)


def test_logprobs_are_those_of_a_fresh_pass(small, plain):
  drafter = Scripted(doubtful(batches.truth(plain), 0.3), LATE, LAST)
  options = [dataclasses.replace(o, logprobs=True) for o in MIXED]
  state = batches.run(small, drafter, PROMPTS, options)
  texts = batches.texts_of(state)
  tokens, lengths = batches.padded(texts, 64)
  prefix = loop.prefill(small, (small.depth,), tokens, lengths, chunk=512,
                        dtype=jnp.dtype(jnp.float32))
  logits = np.asarray(small.unembed(prefix.features[0]), np.float64)
  for row, (text, answer) in enumerate(zip(texts, batches.answers(state))):
    for at in range(len(text) - len(answer), len(text)):
      x = logits[row, at - 1]
      wanted = x[text[at]] - np.log(np.sum(np.exp(x - x.max()))) - x.max()
      assert abs(float(state.logprobs[row, at]) - wanted) < 1e-3
  # Nobody asked for the prompt's, and nothing is noted behind the end.
  for row, text in enumerate(texts):
    assert not np.asarray(state.logprobs)[row, len(text):].any()


def test_features_are_the_residual_stream(small, plain):
  """What drafters tap, in a step and in a prefill, is what layers pass on."""
  drafter = Scripted(batches.truth(plain), LATE, LAST)
  state = batches.begin(small, drafter, PROMPTS, MIXED)
  proposal, _ = drafter.propose(small, state.seq, state.request, ())
  cache = state.seq.cache
  logits, scores = stages.score(small, tapping(drafter, 0, 1), cache, proposal)
  assert len(scores.features) == 3
  at = Place.of(cache.length[:, None] + LATE.depths[None],
                jnp.asarray(LATE.mask))
  x = small.embed(proposal.tokens)
  np.testing.assert_allclose(scores.features[0], x, atol=1e-6)
  x, _ = small.extend(x, cache, small.init_fresh(cache, LATE.size), at,
                      layers=range(1))
  np.testing.assert_allclose(scores.features[1], x, atol=1e-5)
  np.testing.assert_allclose(small.unembed(scores.features[2]), logits,
                             atol=1e-4)
  # The same tokens, read as a prompt, have the same features.
  tokens, lengths = batches.padded([
      [*text[:-1], *np.asarray(proposal.tokens)[row, [0, *LAST]]]
      for row, text in enumerate(batches.texts_of(state))], 64)
  prefix = loop.prefill(small, (0, 1), tokens, lengths, chunk=512,
                        dtype=jnp.dtype(jnp.float32))
  for row, length in enumerate(lengths):
    for tapped, read in zip(scores.features, prefix.features):
      np.testing.assert_allclose(
          tapped[row, jnp.array([0, *LAST])], read[row, length - 4:length],
          atol=1e-4)


def test_a_head_start_changes_nothing(small, plain):
  """Layers that a proposal has been through are not walked twice."""
  drafter = Scripted(batches.truth(plain), LATE, LAST)
  state = batches.begin(small, drafter, PROMPTS, MIXED)
  proposal, _ = drafter.propose(small, state.seq, state.request, ())
  cache = state.seq.cache
  tapping_one = tapping(drafter, 1)
  logits, whole = stages.score(small, tapping_one, cache, proposal)
  at = Place.of(cache.length[:, None] + LATE.depths[None],
                jnp.asarray(LATE.mask))
  x, fresh = small.extend(
      small.embed(proposal.tokens), cache, small.init_fresh(cache, LATE.size),
      at, layers=range(1))
  again, ahead = stages.score(small, tapping_one, cache, proposal.replace(
      head_start=HeadStart(x, fresh, 1)))
  np.testing.assert_allclose(again, logits, atol=1e-4)
  for a, b in zip(jax.tree.leaves(ahead.fresh), jax.tree.leaves(whole.fresh)):
    np.testing.assert_allclose(a, b, atol=1e-5)


def tapping(drafter, *layers):
  return drafter.replace(taps=layers)


def test_finish_against_plain_python():
  rng = np.random.default_rng(0)
  rows, width = 200, 4
  emitted = rng.integers(0, 5, (rows, width)).astype(np.int32)
  kept = rng.integers(0, width + 1, rows).astype(np.int32)
  length = rng.integers(1, 9, rows).astype(np.int32)
  limit = (length + rng.integers(0, 6, rows)).astype(np.int32)
  stops = np.where(rng.random((rows, 2)) < 0.5, -1,
                   rng.integers(0, 5, (rows, 2))).astype(np.int32)
  request = as_request(
      [GREEDY] * rows, [1] * rows, (), vocab=8, stops=2, biases=1)
  got_kept, got_done = stages.finish(
      request.replace(limit=jnp.asarray(limit), stops=jnp.asarray(stops)),
      *map(jnp.asarray, (length, emitted, kept)))
  for row in range(rows):
    said = emitted[row, :min(kept[row], limit[row] - length[row])].tolist()
    end = next((i for i, t in enumerate(said) if t in stops[row]), None)
    if end is not None:
      said = said[:end + 1]
    assert got_kept[row] == len(said)
    assert bool(got_done[row]) == (
        end is not None or length[row] + len(said) >= limit[row])


def test_write_is_ragged_and_drops_what_does_not_fit():
  buffer = jnp.full((3, 6), 9)
  values = jnp.arange(12).reshape(3, 4)
  written = stages.write(buffer, values, jnp.array([0, 2, 4]),
                         jnp.array([3, 0, 4]))
  assert written.tolist() == [[0, 1, 2, 9, 9, 9], [9] * 6,
                              [9, 9, 9, 9, 8, 9]]


def test_counters_count_live_nodes_and_depths():
  tree = branching((2, 1))            # depths 0 1 1 2 2
  proposal = Proposal(jnp.zeros((4, 5), jnp.int32), tree,
                      live=jnp.array([5, 2, 1, 5], jnp.int32))
  zero = stages.Counters.zeros(4, 3, 5)
  path = jnp.array([[0, 2, 4], [0, 1, 0], [0, 0, 0], [0, 1, 3]], jnp.int32)
  kept = jnp.array([3, 2, 1, 0], jnp.int32)
  got = stages.count(zero, proposal, Verdict(path, kept, kept), kept == 0)
  assert got.passes.tolist() == [1, 1, 1, 0]          # the last is finished
  assert got.nodes.tolist() == [4, 1, 0, 0]
  assert got.drafted.tolist() == [[1, 1, 0], [1, 0, 0], [0] * 3, [0] * 3]
  assert got.accepted.tolist() == [[1, 1, 0], [1, 0, 0], [0] * 3, [0] * 3]
  assert got.used.tolist() == [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0] * 5,
                               [0] * 5]
  assert got.scored.tolist() == [5, 5, 5, 0]


def test_a_row_without_room_made_the_pass_as_wide_as_it_was():
  """It got no token, but the model has seen its nodes."""
  proposal = Proposal(jnp.zeros((2, 4), jnp.int32), chain(3), sizes=(1, 2, 4),
                      live=jnp.array([2, 4], jnp.int32))
  path = jnp.array([[0, 1, 0, 0], [0, 0, 0, 0]], jnp.int32)
  kept = jnp.array([2, 0], jnp.int32)
  for done, scored in ([False, False], [4, 0]), ([False, True], [2, 0]):
    got = stages.count(stages.Counters.zeros(2, 3, 4), proposal,
                       Verdict(path, kept, kept), jnp.array(done))
    assert got.scored.tolist() == scored
