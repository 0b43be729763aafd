# SPDX-License-Identifier: Apache-2.0
"""Prompts read layer by layer leave what prompts read chunk by chunk do.

Held here: the same text, cache, log-probabilities and drafter's state, in
every kind of cache, for prompts of one and of several chunks and of unlike
lengths; a row that is begun disturbs no other; the first guess is there before
the upper layers have run, and is right where the head knows; no layer takes a
token twice; an answer of one token, or one that ends at once, ends there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import opening
from jaxspec.drafters.adaptive import Adaptive
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.drafters.early_exit import EarlyExit
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from jaxspec.heads import ExitHead
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.profiling import count_compiles
from jaxspec.verifiers.exact import exact
from tests.jaxspec import batches, cycles
from tests.jaxspec.batches import GREEDY, SAMPLED

pytestmark = pytest.mark.usefixtures("quick_compiles")

CHAIN = ((0,), (0, 0), (0, 0, 0))
BUSHY = ((0,), (1,), (0, 0), (1, 0))


@pytest.fixture(scope="module")
def drafter(small):
  head = ExitHead(small, random_source(4), layer=1, mlp=8, attention=True)
  return EarlyExit(head, BUSHY)


def open_rows(model, drafter, state, rows, texts, options, chunk=512):
  """Begins requests layer by layer; also what was seen on the way."""
  tokens, lengths = batches.padded(texts)
  request = batches.requests(model, texts, options)
  seen = opening.glimpse(model, drafter, tokens, lengths, request,
                         chunk=chunk, dtype=jnp.dtype("float32"))
  seen = opening.go_on(model, drafter, seen)
  state, emission = opening.settle(
      model, drafter, exact, state, np.array(rows, np.int32), seen,
      chunk=chunk)
  return state, seen, emission


def begin(model, drafter, texts, options, *, kind="contiguous", chunk=512,
          capacity=80):
  state = batches.empty(model, drafter, len(texts), kind=kind,
                        capacity=capacity)
  return open_rows(model, drafter, state, range(len(texts)), texts, options,
                   chunk)


@pytest.mark.medium
@pytest.mark.parametrize("kind, chunk", [
    # (In one chunk rows are begun below, too.)
    pytest.param("contiguous", 512, marks=pytest.mark.slow),
    ("contiguous", 16),
    pytest.param("paged", 16, marks=pytest.mark.slow),
    pytest.param("window", 16, marks=pytest.mark.slow)])
def test_text_and_cache_are_the_same(small, drafter, kind, chunk):
  for options in (GREEDY, dataclasses.replace(SAMPLED, logprobs=True)):
    check_text(small, drafter, options, kind, chunk)


def check_text(small, drafter, options, kind, chunk):
  texts = [p * n for p, n in zip(batches.prompts(3), (1, 3, 2))]
  wanted = batches.run(small, Autoregressive(), texts, options, capacity=80)
  state, _, emission = begin(small, drafter, texts, options, kind=kind,
                             chunk=chunk)
  batches.check_cache(small, state)
  first = np.asarray(emission.tokens)[:, 0].tolist()
  assert first == [a[0] for a in batches.answers(wanted)]
  assert np.all(emission.count >= 1)
  np.testing.assert_array_equal(state.draft.cache.length,
                                state.seq.cache.length)
  state = batches.finish(small, drafter, state)
  assert batches.answers(state) == batches.answers(wanted)
  if options.logprobs:
    np.testing.assert_allclose(state.logprobs, wanted.logprobs, atol=1e-4)
  batches.check_cache(small, state)


@pytest.mark.slow
def test_drafts_are_settled_with_the_prompt():
  """A head that knows has all of its drafts accepted, in no pass at all."""
  model = cycles.model()
  drafter = EarlyExit(cycles.exit_head(attention=True), CHAIN)
  texts = [[5, 9, 2], [7], [1, 1, 4, 30, 8] * 5]
  state, seen, emission = begin(model, drafter, texts, GREEDY, chunk=16)
  assert seen.emission().tokens.tolist() == [
      [cycles.after(t[-1])] for t in texts]
  assert emission.count.tolist() == [4] * 3
  assert batches.answers(state) == [cycles.recited(t, 4) for t in texts]
  assert state.counters.passes.tolist() == [0] * 3
  assert state.counters.accepted.sum(axis=1).tolist() == [3] * 3
  wrong = EarlyExit(cycles.exit_head(shift=1), CHAIN)
  state, seen, emission = begin(model, wrong, texts, GREEDY)
  assert emission.count.tolist() == [1] * 3
  assert batches.answers(state) == [cycles.recited(t, 1) for t in texts]


@pytest.mark.medium
def test_nothing_is_shown_where_the_head_is_not_sure():
  model = cycles.model()
  drafter = EarlyExit(cycles.exit_head(), CHAIN, stop=1.0)
  state, seen, emission = begin(model, drafter, [[5, 9, 2], [7]], GREEDY)
  assert seen.emission().count.tolist() == [0, 0]
  assert batches.answers(state) == [cycles.recited([t], 1) for t in (2, 7)]


def test_what_is_shown_has_thresholds_of_its_own():
  """Of the first token, and of those behind it; the text is the same."""
  model, texts = cycles.model(), [[5, 9, 2], [7]]
  for show_first, show, shown in ((2.0, 0.0, 0), (0.0, 2.0, 1), (0.0, 0.0, 3)):
    drafter = EarlyExit(cycles.exit_head(), CHAIN, show=show,
                        show_first=show_first)
    state, seen, emission = begin(model, drafter, texts, GREEDY)
    assert seen.emission().count.tolist() == [min(shown, 1)] * 2
    assert seen.proposal.shown.tolist() == [shown] * 2
    assert batches.answers(state) == [cycles.recited(t, 4) for t in texts]


@pytest.mark.medium
def test_drafts_unfold_one_after_another(small, drafter):
  texts = batches.prompts(2)
  tokens, lengths = batches.padded(texts)
  request = batches.requests(small, texts, SAMPLED)
  seen = opening.glimpse(small, drafter, tokens, lengths, request, chunk=512,
                         dtype=jnp.dtype("float32"))
  whole = opening.go_on(small, drafter, seen)
  told = list(opening.unfold(small, drafter, seen))
  assert [e.count.tolist() for e, _ in told] == [[1, 1], [2, 2], [2, 2]]
  last = told[-1][1]
  np.testing.assert_array_equal(last.proposal.tokens, whole.proposal.tokens)
  np.testing.assert_allclose(last.proposal.head_start.x,
                             whole.proposal.head_start.x, atol=1e-5)
  doubtful = drafter.replace(stop=1.0)
  seen = opening.glimpse(small, doubtful, tokens, lengths, request, chunk=512,
                         dtype=jnp.dtype("float32"))
  ((emission, last),) = opening.unfold(small, doubtful, seen)
  assert emission.count.tolist() == [0, 0] and last.proposal is not None


@pytest.mark.slow
def test_a_row_that_begins_disturbs_no_other(small, drafter):
  texts = batches.prompts(4)
  wanted = batches.answers(batches.run(
      small, Autoregressive(), texts, SAMPLED, capacity=80))
  state, _, _ = begin(small, drafter, texts[:3], SAMPLED)
  state = batches.finish(small, drafter, state, steps=2)
  before = batches.answers(state)
  passes = state.counters.passes.tolist()
  # The last index is no row.
  state, _, emission = open_rows(small, drafter, state, [1, 3],
                                 [texts[3], texts[0]], SAMPLED)
  after = batches.answers(state)
  assert [after[0], after[2]] == [before[0], before[2]]
  assert state.counters.passes.tolist() == [passes[0], 0, passes[2]]
  assert emission.count.tolist()[0] == emission.count.tolist()[2] == 0
  batches.check_cache(small, state)
  state = batches.finish(small, drafter, state)
  assert batches.answers(state) == [wanted[0], wanted[3], wanted[2]]


def test_answers_end_where_they_should():
  model = cycles.model()
  drafter = EarlyExit(cycles.exit_head(), CHAIN)
  one = dataclasses.replace(GREEDY, max_new_tokens=1)
  stop = dataclasses.replace(
      GREEDY, stop_token_ids=(cycles.after(9, 2),))
  state, _, emission = begin(model, drafter, [[5], [9]], [one, stop])
  assert emission.count.tolist() == [1, 2]
  assert state.done.tolist() == [True, True]
  assert batches.answers(state) == [cycles.recited([5], 1),
                                    cycles.recited([9], 2)]


# From the front door.


def generator(model, drafter, **settings):
  return Generator(model, drafter=drafter, capacity=96, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_generators_read_either_way(small, adaptive):
  drafter = EarlyExit(ExitHead.init(small, layer=1, attention=True), CHAIN)
  if adaptive:
    drafter = Adaptive.of(drafter, costs=(1, 1.1, 1.2))
  texts = [text[:n] for text, n in zip(batches.prompts(4), (12, 9, 14, 16))]
  plain = generator(small, "autoregressive", rows=2).generate(texts, SAMPLED)
  layers = generator(small, drafter, rows=2, prefill="layer_major")
  found = layers.generate(texts, SAMPLED)
  assert [c.token_ids for c in found] == [c.token_ids for c in plain]
  for completion in found:
    completion.stats.reconcile()
  assert sum(c.stats.accepted for c in found) > 0
  layers.generate(texts[:1], GREEDY)          # prompts come alone, or together
  with count_compiles() as compiles:
    layers.generate(texts, GREEDY)
  assert compiles.count == 0
  events = list(layers.stream(texts[0], SAMPLED))
  assert events[-1].completion.token_ids == plain[0].token_ids


@pytest.mark.medium
def test_what_may_come_first_is_shown_first(tiny_model):
  """Then the drafts, and then what stands, in their place."""
  made = Generator.load(str(tiny_model), dtype="float32", capacity=96,
                        drafter="early_exit:layer=3,length=2",
                        prefill="layer_major")
  options = made.default_options(max_new_tokens=32)
  events = list(made.stream("who is it?", options))
  first, second, third = events[:3]
  assert not first.settled and first.replaces == 0
  assert not second.settled and second.replaces == len(first.text)
  assert second.text.startswith(first.text)
  assert third.settled and third.replaces == len(second.text)
  plain = Generator.load(str(tiny_model), dtype="float32", capacity=96)
  (wanted,) = plain.generate(["who is it?"], options)
  assert "".join(e.text for e in events if e.settled) == wanted.text


def test_what_cannot_open_is_refused(small):
  with pytest.raises(InputError, match="prompt_lookup has none; use early_ex"):
    generator(small, "prompt_lookup", prefill="layer_major")
  with pytest.raises(InputError, match="Did you mean 'layer_major'"):
    generator(small, "prompt_lookup", prefill="layers_major")


# At the end: it forgets what is compiled.


def test_no_layer_takes_a_token_twice(small, drafter, monkeypatch):
  taken, extend = [], Transformer.extend

  def counted(self, x, cache, fresh, at, *, layers):
    if type(self) is Transformer:      # and no head
      taken.append((layers, x.shape[1]))
    return extend(self, x, cache, fresh, at, layers=layers)

  jax.clear_caches()                # else it is known already, and not called
  monkeypatch.setattr(Transformer, "extend", counted)
  jax.eval_shape(lambda: begin(small, drafter, [[3] * 16], dataclasses.replace(
      GREEDY, max_new_tokens=5)))
  drafts = drafter.size - 1
  low = sum(count for layers, count in taken if layers == range(1))
  high = sum(count for layers, count in taken if layers == range(1, 2))
  assert low == high == 16 + drafts
  assert {layers for layers, count in taken if len(layers)} == {
      range(1), range(1, 2)}
