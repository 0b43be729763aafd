# SPDX-License-Identifier: Apache-2.0
"""The meter takes turns, ignores what did not run, and wastes nothing."""

import numpy as np
import pytest

from jaxspec import pacing
from jaxspec.pacing import Meter


class Work:
  """Steps that cost what `costs` say, by a clock of its own."""

  def __init__(self, costs, limit=10**6):
    self.costs, self.limit = costs, limit
    self.now, self.calls = 0.0, []

  def decode(self, state, steps, width):
    self.calls.append((steps, width))
    steps = min(steps, self.limit - state)
    self.now += steps * self.costs[width]
    return state + steps

  def passes(self, state):
    return [state, state - 1]           # one row ended a step before

  def clock(self):
    return self.now


@pytest.fixture
def work(monkeypatch):
  def make(*args, **kwargs):
    made = Work(*args, **kwargs)
    monkeypatch.setattr(pacing.time, "perf_counter", made.clock)
    return made
  return make


def measure(meter, work, state=0, rounds=100):
  for _ in range(rounds):
    if not meter.known:
      state = meter.measure(work.decode, work.passes, state)
  return state


def test_costs_are_those_of_a_pass(work):
  job, meter = work([2.0, 3.0, 7.0]), Meter(3)
  state = measure(meter, job)
  assert meter.known
  np.testing.assert_allclose(meter.costs, [2, 3, 7])
  # Compiled before the clock runs; then in turns.
  assert job.calls[0][0] == 0
  assert [width for _, width in job.calls[1:7]] == [0, 1, 2, 0, 1, 2]
  assert state == sum(steps for steps, _ in job.calls)     # nothing is lost


def test_a_narrow_pass_never_costs_more(work):
  job, meter = work([5.0, 3.0, 7.0]), Meter(3)
  measure(meter, job)
  np.testing.assert_allclose(meter.costs, [3, 3, 7])


def test_work_that_ends_is_no_measurement(work):
  job, meter = work([2.0, 3.0], limit=3), Meter(2)
  measure(meter, job)
  assert not meter.known
  job.limit = 10**6
  measure(meter, job, state=3)
  np.testing.assert_allclose(meter.costs, [2, 3])
