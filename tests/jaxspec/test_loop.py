# SPDX-License-Identifier: Apache-2.0
"""The loop around the step: prefill, insert, decode, release, stream.

Held here: refilled rows answer as fresh ones and disturb nobody; the host gets
control back when it asked for it; a row for which the cache has no room ends;
`stream` replayed equals `decode`, and what it says too early is flagged; counts
reconcile.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import loop
from jaxspec.caches.paged import PagedCache
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.profiling import count_compiles
from jaxspec.tree import branching, chain
from jaxspec.verifiers.exact import exact
from tests.jaxspec import batches
from tests.jaxspec.batches import GREEDY, SAMPLED, Scripted

pytestmark = pytest.mark.usefixtures("quick_compiles")
PROMPTS = batches.prompts(4)
OPTIONS = [GREEDY, SAMPLED, dataclasses.replace(SAMPLED, max_new_tokens=9),
           dataclasses.replace(GREEDY, max_new_tokens=5)]


@pytest.fixture(scope="module")
def plain(small):
  return batches.run(small, Autoregressive(), PROMPTS, OPTIONS)


@pytest.fixture(scope="module")
def oracle(plain):
  """Right in its last branch, but for every fourth token."""
  truth = batches.truth(plain)
  wrong = jnp.arange(truth.shape[1])[None] % 4 == 3
  return Scripted(jnp.where(wrong, truth + 1, truth), branching((2, 2, 1)),
                  (2, 6, 10))


def test_a_new_batch_is_free(small):
  state = batches.empty(small, Autoregressive(), 3)
  assert state.done.tolist() == [True] * 3
  np.testing.assert_array_equal(state.seq.cache.length, state.seq.length - 1)
  # Decoding it does nothing.
  state = batches.finish(small, Autoregressive(), state)
  assert state.seq.length.tolist() == [1, 1, 1]
  assert not state.counters.passes.any()


@pytest.mark.parametrize("kind", batches.cache_kinds())
def test_refilled_rows_answer_as_fresh_ones(small, plain, oracle, kind):
  """Whatever the rows held before, and whoever sits beside them."""
  state = batches.begin(small, oracle, PROMPTS, OPTIONS, kind=kind)
  state = batches.finish(small, oracle, state, steps=4)
  assert state.done.tolist() == [False, False, True, True]
  # Rows 3 and 2 get the prompts 0 and 1: the script goes by rows, so that
  # what it says there is wrong, which must not matter. Row 9 is dropped.
  state = batches.refill(
      small, oracle, state, [3, 2, 9, 9],
      [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[3]],
      [OPTIONS[0], OPTIONS[1], OPTIONS[2], OPTIONS[3]])
  batches.check_cache(small, state)
  state = batches.finish(small, oracle, state)
  batches.check_cache(small, state)
  wanted = batches.answers(plain)
  assert batches.answers(state) == [wanted[0], wanted[1], wanted[1], wanted[0]]
  # Counters of a refilled row begin anew.
  emitted = 1 + state.counters.passes + state.counters.accepted.sum(axis=1)
  assert emitted.tolist() == [24] * 4


def test_a_row_that_ends_with_its_first_token(small, plain):
  first = batches.answers(plain)[0][0]
  state = batches.begin(
      small, Autoregressive(), PROMPTS,
      [dataclasses.replace(OPTIONS[0], stop_token_ids=(first,)),
       *OPTIONS[1:]])
  assert state.done.tolist() == [True, False, False, False]
  assert batches.answers(state)[0] == [first]


def test_decode_comes_back_when_asked(small, oracle):
  def run(steps, wait):
    state = batches.begin(small, oracle, PROMPTS, OPTIONS)
    return loop.decode(small, oracle, exact, state, np.int32(steps),
                       np.bool_(wait))

  assert run(1, True).counters.passes.tolist() == [1] * 4
  waited = run(2**30, True)
  assert waited.done.tolist() == [True] * 4
  refill = run(2**30, False)
  assert refill.done.tolist() == [False, False, False, True]
  # And the next call goes on until the next one is through.
  refill = loop.decode(small, oracle, exact, refill, np.int32(2**30),
                       np.bool_(False))
  assert refill.done.tolist() == [False, False, True, True]


def test_released_rows_are_forgotten(small, plain, oracle):
  state = batches.begin(small, oracle, PROMPTS, OPTIONS)
  state = batches.finish(small, oracle, state, steps=2)
  state = loop.release(state, np.array([False, True, False, True]))
  assert state.done.tolist() == [False, True, False, True]
  assert state.seq.length[1] == state.seq.length[3] == 1
  np.testing.assert_array_equal(state.seq.cache.length, state.seq.length - 1)
  state = batches.finish(small, oracle, state)
  assert batches.answers(state)[0] == batches.answers(plain)[0]
  assert batches.answers(state)[2] == batches.answers(plain)[2]


def scarce(model, drafter, pages):
  """Four rows of up to 32 positions, and a few pages of two."""
  @jax.jit
  def make(model, drafter):
    cache = model.init_cache(PagedCache, 4, 32, jnp.float32, page=2,
                             pages=pages)
    return loop.init(model, drafter, cache, capacity=64, stops=4, biases=4)
  return make(model, drafter)


def test_a_row_without_room_ends(small, plain, oracle):
  """It says what it can, corrupts nothing, and is counted rightly."""
  whole = batches.answers(plain)
  state = batches.refill(small, oracle, scarce(small, oracle, 53), range(4),
                         PROMPTS, OPTIONS)
  assert not state.done.any()
  batches.check_cache(small, state)
  state = batches.finish(small, oracle, state, steps=100)
  assert state.done.all()
  answers = batches.answers(state)
  lengths = [len(answer) for answer in answers]
  assert answers == [w[:n] for w, n in zip(whole, lengths)]
  # The second outgrows its 32 positions; the fourth was promised no pages,
  # and the others take all that there are.
  assert lengths[0] == len(whole[0]) and lengths[2] == len(whole[2])
  assert 1 < lengths[1] < len(whole[1]) and lengths[3] < len(whole[3])
  assert state.seq.cache.starved.tolist() == [False, True, False, True]
  batches.check_cache(small, state)
  counters = state.counters
  emitted = 1 + counters.passes + counters.accepted.sum(axis=1)
  assert emitted.tolist() == lengths
  assert batches.accepted(state) > 0
  # Released, its pages serve whoever comes.
  state = loop.release(state, np.ones(4, bool))
  state = batches.refill(small, oracle, state, range(4), PROMPTS[::-1],
                         OPTIONS[::-1])
  assert not state.done.any()


def test_a_prompt_without_room_ends_with_its_first_token(small, plain):
  state = batches.refill(
      small, Autoregressive(), scarce(small, Autoregressive(), 17), range(4),
      PROMPTS, OPTIONS)
  # Of 16 pages, 15 are promised to the first; the others need 6, 9 and 6.
  assert state.done.tolist() == [False, True, True, True]
  state = batches.finish(small, Autoregressive(), state, steps=100)
  assert state.done.all()
  first, *others = batches.answers(plain)
  assert batches.answers(state) == [first, *(w[:1] for w in others)]


def test_stream_replayed_equals_decode(small, plain, oracle):
  state = batches.begin(small, oracle, PROMPTS, OPTIONS)
  texts = batches.texts_of(state)
  shown = [list(text) for text in texts]
  flags, wrong = [], 0
  for emission, after in loop.stream(small, oracle, exact, state):
    state = after
    flags.append(emission.settled)
    start, tokens, count = jax.device_get(
        (emission.start, emission.tokens, emission.count))
    for row, (at, n) in enumerate(zip(start, count)):
      new = tokens[row, :n].tolist()
      if emission.settled:
        if n:
          assert at == len(texts[row])      # settled text only grows
          wrong += shown[row][at:at + n] != new[:len(shown[row]) - at]
          texts[row] += new
          shown[row] = list(texts[row])
      elif n:
        shown[row] = [*texts[row][:at], *new]
  assert texts == batches.texts_of(state) == batches.texts_of(plain)
  # Each step said something too early, flagged, and was corrected sometimes.
  assert flags == [False, True] * (len(flags) // 2)
  assert wrong > 0
  whole = batches.run(small, oracle, PROMPTS, OPTIONS)
  assert batches.texts_of(whole) == texts
  for a, b in zip(jax.tree.leaves(whole.counters),
                  jax.tree.leaves(state.counters)):
    np.testing.assert_array_equal(a, b)


def test_plain_decoding_streams_settled_text_alone(small, plain):
  state = batches.begin(small, Autoregressive(), PROMPTS, OPTIONS)
  told = [[answer[0]] for answer in batches.answers(plain)]
  for emission, _ in loop.stream(small, Autoregressive(), exact, state):
    assert emission.settled
    for row, n in enumerate(emission.count.tolist()):
      told[row] += emission.tokens[row, :n].tolist()
  assert told == batches.answers(plain)


def test_counts_reconcile(small, plain):
  truth = batches.truth(plain)
  oracle = Scripted(truth, chain(3), (1, 2, 3))
  state = batches.run(small, oracle, PROMPTS, OPTIONS)
  counters = state.counters
  lengths = [len(answer) for answer in batches.answers(state)]
  # An oracle: the first token comes with the prompt, then four a pass.
  assert counters.passes.tolist() == [-(-(n - 1) // 4) for n in lengths]
  assert counters.accepted.sum(axis=1).tolist() == [
      n - 1 - p for n, p in zip(lengths, counters.passes.tolist())]
  np.testing.assert_array_equal(counters.nodes, 3 * counters.passes)
  np.testing.assert_array_equal(counters.drafted.sum(axis=1), counters.nodes)
  assert bool(jnp.all(counters.accepted <= counters.drafted))


def test_one_program_for_all_steps_and_requests(small, oracle):
  """Neither a step, nor an option, nor a refill is a reason to compile."""
  def everything(state, options):
    state = batches.refill(small, oracle, state, [0, 1, 2, 3], PROMPTS,
                           options)
    state = batches.finish(small, oracle, state, steps=2)
    state = batches.refill(small, oracle, state, [2, 3, 0, 9], PROMPTS,
                           options)
    return jax.block_until_ready(batches.finish(small, oracle, state))

  state = everything(batches.empty(small, oracle, 4), OPTIONS)
  other = [dataclasses.replace(o, top_k=5, seed=3, stop_token_ids=(9,))
           for o in OPTIONS]
  with count_compiles() as compiles:
    everything(state, other)
  assert compiles.count == 0
