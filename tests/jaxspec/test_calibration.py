# SPDX-License-Identifier: Apache-2.0
"""Thresholds that keep their promise.

Held here: tails and intervals are exact; what is tested with dependent texts
errs no more often than it may; over many sets of texts, thresholds break the
promise no more often than it allows, and they are chosen wherever a head knows
enough; chains count what falls with a wrong draft; what a head is said to say
is what it drafts.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxspec import calibration, corpus, heads
from jaxspec.calibration import Seen
from jaxspec.drafters.early_exit import EarlyExit
from jaxspec.heads import ExitHead
from tests.jaxspec import batches, cycles
from tests.jaxspec.batches import GREEDY

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("hits, count, share", [
    (0, 29, .1), (3, 50, .1), (5, 7, .3), (0, 1, .5), (7, 7, .4), (0, 0, .1)])
def test_tails_are_sums_of_chances(hits, count, share):
  rates = np.repeat([1.0, 0.0, np.nan], [hits, count - hits, 3])[:, None]
  chances = [math.comb(count, k) * share**k * (1 - share)**(count - k)
             for k in range(hits + 1)]
  assert calibration.binomial_p(rates, share) == pytest.approx(
      [sum(chances)])


@pytest.mark.parametrize("hits, count", [(0, 20), (3, 50), (50, 50), (7, 400)])
def test_intervals_of_counts_are_exact(hits, count):
  rates = np.repeat([1.0, 0.0], [hits, count - hits])
  wanted = stats.binomtest(hits, count).proportion_ci(method="exact")
  assert calibration.interval(rates) == pytest.approx((wanted.low, wanted.high))
  assert calibration.interval(np.zeros(0)) == (0, 1)


def test_intervals_of_means_cover():
  rng = np.random.default_rng(0)
  found = [calibration.interval(rng.beta(1, 9, 80)) for _ in range(300)]
  assert np.mean([low <= .1 <= high for low, high in found]) > .92
  assert np.mean([high - low for low, high in found]) < .06


def test_bets_are_won_by_chance_no_more_often_than_they_may_be():
  rng = np.random.default_rng(1)

  def share_won(draw):
    rates = np.stack([draw() for _ in range(400)], axis=1)
    return np.mean(calibration.betting_p(rates, .1) <= .05)
  for null in (lambda: rng.beta(.5, 4.5, 120), lambda: rng.beta(5, 45, 120),
               lambda: (rng.random(120) < .1) * 1.0):
    assert share_won(null) <= .07
  assert share_won(lambda: rng.binomial(60, .05, 100) / 60) > .9


# What is chosen.


def texts(rng, count, places=40, honest=1.0):
  """A head that is right as often as its confidence says, or a share of it;
  in some texts more often than in others."""
  found = []
  for _ in range(count):
    shift = rng.normal(0, .05)
    sure = rng.beta(2, 1, places)
    right = rng.random(places) < np.clip(honest * sure + shift, 0, 1)
    found.append(Seen(np.stack([sure, sure / 2, sure**2], -1), right))
  return found


@pytest.mark.slow
@pytest.mark.parametrize("part, places", [("first", 1), ("later", 40)])
def test_promises_are_kept(part, places, monkeypatch):
  """Of 60 runs, no more than may be have a threshold that is too low."""
  monkeypatch.setattr(calibration, "interval", lambda rates: (0.0, 1.0))
  rng = np.random.default_rng(2)
  whole = texts(rng, 2000, places)
  views = dict(first=calibration._opening,
               later=lambda *args: calibration._chains(*args, 2))
  true = dict(zip(calibration.THRESHOLDS, np.nanmean(calibration._rates([
      views[part](t.confidence("top", None), t.right) for t in whole]), 0)))
  broken = chosen = 0
  for _ in range(60):
    some = [whole[i] for i in rng.integers(0, len(whole), 200)]
    found = calibration.calibrate(some, risk=.2, confidence=.9, length=2)
    threshold = getattr(found.calibration, part)
    if threshold > 1:
      continue
    chosen += 1
    broken += true[threshold] > .2
  assert chosen > 30
  assert broken <= 13                 # 6 of 60, and three deviations


def test_a_head_that_knows_nothing_is_never_shown():
  rng = np.random.default_rng(3)
  found = calibration.calibrate(texts(rng, 200, honest=.5), risk=.1)
  assert found.calibration.first == found.calibration.later == heads.NEVER
  assert found.texts == 150
  assert len(found.first) == len(calibration.THRESHOLDS)


def test_a_head_that_knows_all_is_always_shown():
  rng = np.random.default_rng(4)
  found = calibration.calibrate([
      dataclasses.replace(t, right=np.ones(40, bool))
      for t in texts(rng, 200)], measure="entropy")
  assert found.calibration.first == found.calibration.later == 0
  assert found.calibration.measure == "entropy"
  last = found.later[-1]
  assert (last.threshold, last.retracted, last.texts) == (0, 0, 150)
  assert last.shown == pytest.approx(32 / 39)   # one in five is the model's own


def test_what_is_learned_is_the_chance_of_being_right():
  rng = np.random.default_rng(5)
  weights = np.array([-1.0, .8, -.3, .2, .4])
  some = []
  for text in texts(rng, 300):
    p = calibration.chance(text.signs, np.arange(40), weights)
    some.append(dataclasses.replace(text, right=rng.random(40) < p))
  learned = calibration.fit(some)
  told = np.concatenate([t.confidence("learned", learned) for t in some])
  true = np.concatenate([t.confidence("learned", tuple(weights)) for t in some])
  assert np.abs(told - true).mean() < .02
  found = calibration.calibrate(some, measure="learned", risk=.2)
  assert len(found.calibration.coefficients) == 5
  assert found.calibration.later < 1
  # Where all are right there is no best fit; it must be finite all the same.
  assert np.all(np.isfinite(calibration.fit([
      dataclasses.replace(t, right=np.ones(40, bool)) for t in some])))


def test_chains_fall_together():
  """Places 1 to 8 of an answer, drafted three at a time."""
  sure = np.array([.1, .9, .8, .7, .3, .6, .9, .5, .4])
  right = np.array([0, 1, 1, 1, 0, 1, 0, 1, 1], bool)
  found = calibration._chains(sure, right, 3)
  # 1, 2, 3 are drafted and stand; 4 is the model's own; 5 stands, 6 falls and
  # takes what is behind it along; 7 and 8 are drafted anew.
  np.testing.assert_allclose(found.confidence, [.9, .8, .7, .6, .6, .5, .4])
  assert found.stands.tolist() == [1, 1, 1, 1, 0, 1, 1]
  assert found.falls.tolist() == [0, 0, 0, 0, 2, 0, 0]
  assert found.places == 8
  (rates,) = calibration._rates([found])
  told = dict(zip(calibration.THRESHOLDS, rates.tolist()))
  assert told[.6] == 2 / 6 and told[.61] == 0 and told[0] == 2 / 8
  assert np.isnan(told[.95])


# What a head says.


@pytest.mark.medium
def test_a_head_says_here_what_it_drafts(tiny):
  """The same tokens with the same confidence, whichever way they are asked."""
  head = ExitHead.init(tiny, layer=3, attention=True, tokens=range(0, 64, 2))
  prompts = batches.prompts(3)
  drafter = EarlyExit(head, ((0,),))
  look = jax.jit(drafter.look)
  state = batches.begin(tiny, drafter, prompts, GREEDY)
  wanted = []
  while not bool(state.done.all()):
    walk = look(tiny, state.seq, state.request, state.draft)
    before = np.asarray(state.seq.length)
    state = batches.finish(tiny, drafter, state, steps=1)
    said = np.asarray(state.seq.tokens)
    wanted.append([
        (n - len(p), float(walk.confidence[row, 1]),
         bool(walk.tokens[row, 1] == said[row, n]))
        for row, (n, p) in enumerate(zip(before, prompts))])
  answered = [corpus.Text([*p, *a], len(p))
              for p, a in zip(prompts, batches.answers(state))]
  told = []
  seen = calibration.see(tiny, head, answered,
                         lambda n, of: told.append((n, of)))
  assert told == [(1, 3), (2, 3), (3, 3)]
  compared = 0
  for step in wanted:
    for text, (place, sure, right) in zip(seen, step):
      if place < len(text.right):
        assert text.confidence("top", None)[place] == pytest.approx(
            sure, abs=1e-4)
        assert bool(text.right[place]) == right
        compared += right
  assert all(len(text.right) == 24 for text in seen)
  assert compared > 3


def test_the_first_token_is_the_first():
  model = cycles.model()
  text = corpus.Text([5, 9, *cycles.recited([9], 6)], 2)
  (right,) = calibration.see(model, cycles.exit_head(), [text])
  assert right.right.tolist() == [True] * 6
  (wrong,) = calibration.see(model, cycles.exit_head(shift=1), [text])
  assert wrong.right.tolist() == [False] * 6
  assert jnp.all(jnp.asarray(wrong.signs[:, 0]) > .5)
