# SPDX-License-Identifier: Apache-2.0
"""Early exit drafts with the lower layers, which then never run again.

Held here: a head that knows is always accepted, and one that looks one place
too far never; every layer takes every node once and no more; a row stops where
its head is not sure, and nothing is computed when all have; the cache of the
head's attention is that of a fresh pass, whatever was accepted; drafts at a
temperature are the head's own samples with the model's noise; and a kernel
that makes no logits drafts the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import drafters, heads, loop, sampling, stages
from jaxspec.caches import Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.confidence import confidence
from jaxspec.drafters import early_exit
from jaxspec.drafters.adaptive import Adaptive
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.drafters.early_exit import EarlyExit
from jaxspec.errors import InputError
from jaxspec.heads import ExitHead
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.options import Options
from jaxspec.profiling import count_compiles
from jaxspec.verifiers.exact import exact
from pallas_kernels import Target, aim
from tests.jaxspec import batches, cycles
from tests.jaxspec.batches import GREEDY, SAMPLED

pytestmark = pytest.mark.usefixtures("quick_compiles")

CHAIN = ((0,), (0, 0), (0, 0, 0))
BUSHY = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
PROMPTS = [[5, 9, 2], [7], [1, 1, 4, 30, 8]]


@pytest.fixture(scope="module")
def stopping(tiny):
  """Drafts a tree as far as its head is sure; tests share its programs."""
  head = ExitHead.init(tiny, layer=3, attention=True)
  return EarlyExit(head, BUSHY, stop=0.1, show=0.2)


@pytest.mark.medium
@pytest.mark.parametrize("choices, attention", [
    pytest.param(CHAIN, False, marks=pytest.mark.slow), (BUSHY, True),
    pytest.param(CHAIN, True, marks=pytest.mark.slow),
    pytest.param(BUSHY, False, marks=pytest.mark.slow)])
def test_a_head_that_knows_is_always_right(choices, attention):
  drafter = EarlyExit(cycles.exit_head(attention=attention), choices)
  state = batches.run(cycles.model(), drafter, PROMPTS, GREEDY)
  assert batches.answers(state) == [cycles.recited(p, 24) for p in PROMPTS]
  passes = -(-(24 - 1) // 4)
  assert state.counters.passes.tolist() == [passes] * 3
  assert batches.accepted(state) == 3 * (24 - 1 - passes)


@pytest.mark.medium
@pytest.mark.parametrize("shift", [1, -1])
def test_a_head_that_looks_elsewhere_is_always_wrong(shift):
  drafter = EarlyExit(cycles.exit_head(shift=shift), CHAIN)
  state = batches.run(cycles.model(), drafter, PROMPTS, GREEDY)
  assert batches.answers(state) == [cycles.recited(p, 24) for p in PROMPTS]
  assert batches.accepted(state) == 0


@pytest.mark.medium
@pytest.mark.parametrize("choices", [CHAIN, BUSHY])
def test_no_layer_takes_a_node_twice(tiny, choices, monkeypatch):
  """Counted where layers are called: node by node and layer by layer."""
  drafter = EarlyExit(ExitHead.init(tiny, layer=2, attention=True), choices)
  state = batches.begin(tiny, drafter, batches.prompts(3), GREEDY)
  taken, extend = [], Transformer.extend

  def counted(self, x, cache, fresh, at, *, layers):
    if self is tiny:
      taken.extend((layer, at.start + n) for layer in layers
                   for n in range(x.shape[1]))
    return extend(self, x, cache, fresh, at, layers=layers)

  monkeypatch.setattr(Transformer, "extend", counted)
  jax.eval_shape(lambda: stages.step(tiny, drafter, exact, state))
  assert sorted(taken) == [(layer, node) for layer in range(tiny.depth)
                           for node in range(drafter.size)]


@pytest.mark.medium
def test_a_row_stops_where_the_head_is_not_sure(tiny):
  """And what is behind is not computed when no row goes on."""
  head = cycles.exit_head()
  model = cycles.model()
  state = batches.begin(model, EarlyExit(head, CHAIN), PROMPTS, GREEDY)

  def proposed(**settings):
    drafter = EarlyExit(head, CHAIN, **settings)
    proposal, _ = jax.jit(drafter.propose)(
        model, state.seq, state.request, state.draft)
    return proposal

  assert proposed(stop=0.0).live.tolist() == [4] * 3
  never = proposed(stop=1.0)
  assert never.live.tolist() == [1] * 3
  assert np.all(np.asarray(never.head_start.x)[:, 1:] == 0)
  assert np.all(np.asarray(never.head_start.x)[:, 0].any(axis=-1))


@pytest.mark.slow
def test_rows_stop_each_for_itself(tiny):
  head = ExitHead.init(tiny, layer=2)
  prompts = batches.prompts(8)
  state = batches.begin(tiny, EarlyExit(head, CHAIN), prompts, GREEDY)
  sure = jax.jit(lambda: confidence(
      head(tiny, EarlyExit(head, CHAIN).propose(
          tiny, state.seq, state.request, state.draft
      )[0].head_start.x)[:, 0], "top"))()
  stop = float(np.median(sure))
  drafter = EarlyExit(head, CHAIN, stop=stop)
  proposal, _ = jax.jit(drafter.propose)(
      tiny, state.seq, state.request, state.draft)
  live = np.asarray(proposal.live)
  np.testing.assert_array_equal(live > 1, np.asarray(sure) >= stop)
  assert 1 in live and live.max() > 1
  plain = batches.run(tiny, EarlyExit(head, CHAIN), prompts, GREEDY)
  some = batches.run(tiny, drafter, prompts, GREEDY)
  assert batches.answers(plain) == batches.answers(some)
  assert batches.drafted(some) < batches.drafted(plain)


@pytest.mark.slow
def test_no_more_is_drafted_than_pays(tiny):
  """Of what is left out no layer is run, nor the head behind the last."""
  model, head = cycles.model(), cycles.exit_head(attention=True)
  chain = EarlyExit(head, CHAIN)
  plain = batches.run(model, chain, PROMPTS, GREEDY)
  for costs, passes in (((1, 1.1, 1.2), 6), ((1, 9, 99), 23)):
    drafter = Adaptive.of(chain, (1, 2, 4), costs)
    state = batches.run(model, drafter, PROMPTS, GREEDY)
    assert batches.answers(state) == batches.answers(plain)
    found = state.counters.passes.tolist()
    assert max(found) <= passes + 2 and min(found) >= passes - 2, found
  state = batches.begin(model, drafter, PROMPTS, GREEDY)
  propose = jax.jit(Adaptive.propose)
  for forced, taken in ((0, 1), (1, 2), (2, 4)):
    proposal, _ = propose(
        drafter.replace(forced=jnp.asarray(forced, jnp.int32)),
        model, state.seq, state.request, state.draft)
    assert proposal.live.tolist() == [taken] * 3
    ran = np.asarray(proposal.head_start.x).any(axis=-1)
    assert ran.tolist() == [[n < taken for n in range(4)]] * 3
    said = np.asarray(proposal.tokens) != 0
    assert not said[:, taken:].any()


@pytest.mark.medium
def test_each_draft_has_its_confidence(tiny):
  """That of the head behind its parent; and so far it may be shown."""
  head = ExitHead.init(tiny, layer=2)
  state = batches.begin(tiny, EarlyExit(head, BUSHY), batches.prompts(8),
                        GREEDY)

  @jax.jit
  def walk(drafter, state):
    walk = drafter.look(tiny, state.seq, state.request, state.draft)
    for depth in (1, 2, 3):
      walk = drafter.deepen(tiny, state.seq, state.request, state.draft, walk,
                            depth)
    proposal, _ = drafter.close(state.seq, state.draft, walk)
    return walk, proposal, head(tiny, walk.x)

  found, _, logits = walk(EarlyExit(head, BUSHY), state)
  wanted = np.zeros((8, 7))
  for parent, eldest in ((0, 1), (1, 3), (2, 5), (3, 6)):
    wanted[:, eldest] = confidence(logits[:, parent], "top")
  np.testing.assert_allclose(found.confidence, wanted, rtol=1e-4)
  path = wanted[:, [1, 3, 6]]
  show = float(np.median(path))
  _, proposal, _ = walk(EarlyExit(head, BUSHY, show=show), state)
  run = np.cumprod(path >= show, axis=1).sum(axis=1)
  np.testing.assert_array_equal(proposal.shown, run)
  assert len(set(run.tolist())) > 2 and proposal.live.tolist() == [7] * 8
  np.testing.assert_array_equal(loop.leading(proposal)[1], run)
  # What is not drafted for speed's sake is not shown either.
  stop = float(np.median(path[:, 0]))
  _, proposal, _ = walk(EarlyExit(head, BUSHY, stop=stop), state)
  np.testing.assert_array_equal(proposal.shown > 0, path[:, 0] >= stop)


def test_the_first_token_has_a_threshold_of_its_own():
  model, head = cycles.model(), cycles.exit_head()
  drafter = EarlyExit(head, CHAIN, show=2.0, show_first=0.0)
  state = batches.begin(model, drafter, PROMPTS, GREEDY)
  walk = jax.jit(drafter.look)(model, state.seq, state.request, state.draft)
  assert drafter.shown(state.seq, walk).tolist() == [0] * 3
  fresh = state.seq.replace(prompt_length=state.seq.length)
  assert drafter.shown(fresh, walk).tolist() == [1] * 3


@pytest.mark.slow
def test_drafts_made_in_parts_are_the_same(tiny, stopping):
  """Replayed, a stream is `decode`; each emission is more than the last."""
  prompts, wrong, right = batches.prompts(3), 0, 0
  for options in (GREEDY, SAMPLED):
    whole = batches.run(tiny, stopping, prompts, options)
    state = batches.begin(tiny, stopping, prompts, options)
    texts, told = batches.texts_of(state), batches.texts_of(whole)
    before = [0] * 3
    for emission, after in loop.stream(tiny, stopping, exact, state):
      state = after
      start, count = emission.start.tolist(), emission.count.tolist()
      tokens = np.asarray(emission.tokens)
      assert start == [len(text) for text in texts]
      for row, n in enumerate(count):
        new = tokens[row, :n].tolist()
        if emission.settled:
          texts[row] += new
        else:
          assert n >= before[row]
          same = new == told[row][start[row]:][:n]
          right, wrong = right + (same and n > 0), wrong + (not same)
      if not emission.settled:
        assert sum(count) > sum(before)
      before = [0] * 3 if emission.settled else count
    assert texts == batches.texts_of(state) == told
    assert cycles.leaves_equal(state.counters, whole.counters)
    batches.check_cache(tiny, state)
  assert right > 3 and wrong > 3


@pytest.mark.medium
def test_a_stream_compiles_once(tiny, stopping):
  some, other = (batches.begin(tiny, stopping, batches.prompts(3), options)
                 for options in (GREEDY, SAMPLED))

  def run(drafter, state):
    return sum(1 for _ in loop.stream(tiny, drafter, exact, state))
  assert run(stopping.replace(show=0.0), some) > 10
  with count_compiles() as compiles:
    run(stopping, other)
  assert compiles.count == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_adaptive_early_exit_is_exact(tiny, options):
  head = ExitHead.init(tiny, layer=3, attention=True)
  prompts = batches.prompts(4)
  plain = batches.run(tiny, Autoregressive(), prompts, options)
  drafter = Adaptive.of(EarlyExit(head, BUSHY), costs=(1, 1.1, 1.2, 1.3))
  state = batches.run(tiny, drafter, prompts, options)
  assert batches.answers(state) == batches.answers(plain)
  assert batches.accepted(state) > 0


@pytest.mark.slow
@pytest.mark.parametrize("choices", [CHAIN, BUSHY])
def test_cache_of_its_attention_is_that_of_a_fresh_pass(tiny, choices):
  head = ExitHead(tiny, random_source(4), layer=3, mlp=8, attention=True)
  drafter = EarlyExit(head, choices)
  prompts = batches.prompts(3)
  state = batches.begin(tiny, drafter, prompts, GREEDY)
  for steps in (1, 1, 2, 3):
    state = batches.finish(tiny, drafter, state, steps=steps)
    _check_cache(tiny, head, state)
  state = batches.refill(tiny, drafter, state, [2, 0],
                         [prompts[1], prompts[0]], GREEDY)
  _check_cache(tiny, head, state)


def _check_cache(model, head, state):
  np.testing.assert_array_equal(state.draft.cache.length,
                                state.seq.cache.length)
  for row, text in enumerate(batches.texts_of(state)):
    text = text[:-1]
    tokens, lengths = batches.padded([text], 64)
    prefix = loop.prefill(model, (head.layer,), tokens, lengths, chunk=512,
                          dtype=jnp.dtype("float32"))
    fresh = _heard(head, prefix.features[0])
    for kept, new in zip((state.draft.cache.k, state.draft.cache.v),
                         (fresh.k, fresh.v)):
      np.testing.assert_allclose(
          kept[0][row, :, :len(text)],
          jnp.swapaxes(new[0][0], 0, 1)[:, :len(text)], atol=1e-4)


@jax.jit
def _heard(head, x):
  """Keys and values of the head's attention, of one pass over a text."""
  count = x.shape[1]
  cache = head.init_cache(ContiguousCache, 1, 0, jnp.float32)
  at = Place.of(jnp.arange(count)[None],
                jnp.tril(jnp.ones((count, count), bool)))
  _, fresh = head.extend(x, cache, head.init_fresh(cache, count), at,
                         layers=range(1))
  return fresh


def test_long_prompts_are_read_in_parts(tiny, monkeypatch):
  head = ExitHead(tiny, random_source(4), layer=2, mlp=8, attention=True)
  drafter = EarlyExit(head, CHAIN)
  prompts = [p * 3 for p in batches.prompts(3)]
  monkeypatch.setattr(early_exit, "_CHUNK", 16)
  state = batches.begin(tiny, drafter, prompts, GREEDY)
  assert int(state.draft.cache.length.max()) > 32
  _check_cache(tiny, head, state)


@pytest.mark.medium
@pytest.mark.parametrize("tokens", [
    pytest.param(None, marks=pytest.mark.slow), range(0, 64, 3)])
def test_drafts_are_samples_with_the_models_noise(tiny, tokens):
  """Of a chain node by node; what the head cannot say is never drafted."""
  head = ExitHead.init(tiny, layer=3, tokens=tokens)
  drafter = EarlyExit(head, CHAIN)
  options = [dataclasses.replace(SAMPLED, seed=s) for s in range(3)]
  state = batches.begin(tiny, drafter, batches.prompts(3), options)
  proposal, _ = jax.jit(drafter.propose)(tiny, state.seq, state.request,
                                         state.draft)
  request, seq = state.request, state.seq
  logits = jnp.full((3, 4, tiny.vocab), -jnp.inf).at[
      :, :, jnp.arange(64) if tokens is None else jnp.array([*tokens])].set(
          head(tiny, proposal.head_start.x))
  laws = sampling.Laws(
      logits, request.sampling, sampling.History(
          seq.tokens, seq.prompt_length, seq.length, proposal.tokens,
          proposal.mask), seq.length[:, None] + proposal.depths)
  for node in range(3):
    np.testing.assert_array_equal(proposal.tokens[:, node + 1],
                                  laws.draw(jnp.full(3, node)))
  if tokens is not None:
    assert set(np.asarray(proposal.tokens)[:, 1:].ravel()) <= set(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("tokens, options, measure", [
    (None, [GREEDY, Options(temperature=0.8), Options(temperature=2.0)],
     "margin"),
    (range(0, 64, 3), [GREEDY, Options(temperature=0.8), SAMPLED],
     "entropy")])
def test_a_kernel_drafts_the_same(tiny, tokens, options, measure):
  """Aimed at a TPU the head makes no logits, but where they are warped."""
  head = ExitHead.init(tiny, layer=3, tokens=tokens)
  drafter = EarlyExit(head, BUSHY[:4], measure=measure)
  state = batches.begin(tiny, drafter, batches.prompts(3), options)

  def walk(state):
    walk = drafter.look(tiny, state.seq, state.request, state.draft)
    walk = drafter.deepen(tiny, state.seq, state.request, state.draft, walk, 1)
    return walk.tokens, walk.confidence

  expected = jax.jit(walk)(state)
  assert "pallas_call" not in str(jax.make_jaxpr(walk)(state))
  with aim(Target("tpu", "TPU v5 lite", interpret=True)):
    found = jax.jit(walk)(state)
    assert "pallas_call" in str(jax.make_jaxpr(walk)(state))
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("options, words", [
    ("", "kind exit are shipped for this model; pass heads=FOLDER"),
    ("layer=2,heads=[x]", "and not both"),
    ("heads=[x]", "x is no folder"),
    ("layer=4", r"layer must be an integer in \[1, 3\], got 4"),
    ("layer=2,length=0", r"length must be an integer in \[1, 64\], got 0"),
    ("layer=2,show=3", r"show must be a number in \[0, 2\], got 3"),
    ("layer=2,show_first=x", r"show_first must be a number in \[0, 2\]"),
    ("layer=2,measure=learned", "was calibrated with it; run"),
    ("layer=2,stop=2", r"stop must be a number in \[0, 1\], got 2"),
    ("layer=2,measure=tops", "Did you mean 'top'"),
    ("layer=2,widths=[3;x]", "widths must be"),
    ("layer=2,widths=[30;30]", "at most 512 nodes"),
    ("layer=2,widths=[0]", "widths must be")])
def test_bad_settings_are_named(tiny, options, words):
  with pytest.raises(InputError, match=words):
    drafters.parse(f"early_exit:{options}", drafters.Target(tiny))


def test_settings_reach_the_drafter(tiny, tmp_path):
  heads.save(tmp_path, ExitHead.init(tiny, layer=2), tiny)

  def parse(options):
    return drafters.parse(f"early_exit:{options}", drafters.Target(tiny))
  chain = parse(f"heads=[{tmp_path}],length=6,stop=0.5,measure=margin")
  assert (chain.size, chain.height, chain.taps) == (7, 6, (2,))
  assert (chain.stop, chain.measure) == (0.5, "margin")
  tree = parse("layer=1,widths=[3;2;1]")
  assert (tree.size, tree.height, tree.taps) == (16, 3, (1,))
  assert len(tree.priors) == 3


def test_what_was_calibrated_is_taken(tiny, tmp_path):
  heads.save(tmp_path, ExitHead.init(tiny, layer=2), tiny)

  def parse(options=""):
    return drafters.parse(f"early_exit:heads=[{tmp_path}]{options}",
                          drafters.Target(tiny))
  assert (parse().show, parse().show_first) == (0, 0)
  assert parse(",show=0.3").show_first == 0.3
  heads.note(tmp_path, heads.Calibration(
      "learned", 0.7, 2.0, 0.1, 0.95, (1.0, 2.0, 3.0, 4.0, 5.0)))
  found = parse()
  assert (found.measure, found.show, found.show_first) == ("learned", 2.0, 0.7)
  assert found.coefficients.tolist() == [1, 2, 3, 4, 5]
  other = parse(",show=0.4")
  assert (other.show, other.show_first) == (0.4, 0.7)
  with pytest.raises(InputError, match="calibrated for measure=learned, and "):
    parse(",measure=top")
  plain = parse(",measure=top,show=0.4")
  assert (plain.measure, plain.show, plain.show_first) == ("top", 0.4, 0.4)
  assert plain.coefficients is None


@pytest.mark.medium
def test_what_is_learned_decides(tiny):
  """The place in the answer counts, on the device as on the host."""
  head = ExitHead.init(tiny, layer=2)
  weights = jnp.asarray([0.0, 0, 0, 0, 1.0])
  drafter = EarlyExit(head, CHAIN, measure="learned", coefficients=weights)
  state = batches.begin(tiny, drafter, batches.prompts(3), GREEDY)
  state = batches.finish(tiny, drafter, state, steps=2)
  walk = jax.jit(drafter.look)(tiny, state.seq, state.request, state.draft)
  place = np.asarray(state.seq.length - state.seq.prompt_length)
  assert len(set(place.tolist())) > 1 or place.min() > 1
  np.testing.assert_allclose(
      walk.confidence[:, 1], 1 / (1 + np.exp(-np.log1p(place))), rtol=1e-5)
