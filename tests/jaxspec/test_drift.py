# SPDX-License-Identifier: Apache-2.0
"""Acceptance that falls raises an alarm; acceptance that wavers does not."""

import numpy as np
import pytest

from jaxspec.drift import DriftMonitor, PageHinkley
from jaxspec.metrics import Stats


def stats(first: int, drafts: int = 20, *, drafter="medusa", task="") -> Stats:
  second = first // 2
  return Stats(
      passes=drafts, new_tokens=1 + drafts + first + second,
      drafted=2 * drafts, accepted=first + second, scored=3 * drafts,
      drafted_by_position=[drafts, drafts],
      accepted_by_position=[first, second],
      accepted_by_node=[first, second], drafter=drafter, task=task)


def series(rng, rate, count, drafts=20):
  return rng.binomial(drafts, rate, count) / drafts


@pytest.mark.parametrize("seed", range(5))
def test_no_alarm_without_a_fall(seed):
  rng, test = np.random.default_rng(seed), PageHinkley()
  for value in (*series(rng, 0.5, 200), *series(rng, 0.6, 200)):
    assert not test.add(value)


@pytest.mark.parametrize("seed", range(5))
def test_a_fall_is_noticed_soon(seed):
  rng, test = np.random.default_rng(seed), PageHinkley()
  for value in series(rng, 0.6, 100):
    test.add(value)
  assert not test.alarm
  raised = [test.add(value) for value in series(rng, 0.3, 60)]
  assert sum(raised) == 1 and raised.index(True) < 25
  test.reset()
  assert not test.alarm and test.count == 0


def test_no_alarm_before_it_has_warmed_up():
  test = PageHinkley(warm_up=10, threshold=0.1)
  raised = [test.add(value) for value in [1.0] * 3 + [0.0] * 10]
  assert not any(raised[:10]) and raised[10]


def test_by_drafter_and_task():
  monitor, rng = DriftMonitor(threshold=1.0), np.random.default_rng(0)
  for number in range(120):
    rate = 0.7 if number < 60 else 0.2
    monitor.add(stats(rng.binomial(20, rate), task="code"))
    monitor.add(stats(rng.binomial(20, 0.4), task="chat"))
    monitor.add(stats(rng.binomial(20, 0.5), drafter="eagle", task="code"))
  assert monitor.alarms == [("medusa", "code")]
  found = {(r["drafter"], r["task"]): r for r in monitor.report()}
  assert found["medusa", "code"]["alarm"]
  assert not found["eagle", "code"]["alarm"]
  assert found["medusa", "chat"]["requests"] == 120
  rates = found["medusa", "chat"]["conditional_acceptance_by_position"]
  np.testing.assert_allclose(rates, [0.4, 0.5], atol=0.05)
  monitor.reset("medusa", "code")
  assert monitor.alarms == []


def test_a_request_without_drafts_says_nothing():
  monitor = DriftMonitor()
  assert not monitor.add(Stats(passes=3, new_tokens=4, scored=3))
  assert monitor.report() == []
