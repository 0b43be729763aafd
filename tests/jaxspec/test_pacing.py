# SPDX-License-Identifier: Apache-2.0
"""The meter takes turns, ignores what did not run, and wastes nothing.

The ledger gives back what was noted, and nothing else.
"""

import json

import jax
import numpy as np
import pytest

from jaxspec import pacing
from jaxspec.pacing import Ledger, Meter


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


def test_what_was_noted_comes_back(tmp_path):
  path = tmp_path / "new" / "costs.json"
  assert Ledger(path).read("this", 2) is None
  Ledger(path).write("this", np.array([0.5, 0.75], np.float32))
  Ledger(path).write("that", np.array([1, 2, 3]))
  np.testing.assert_array_equal(Ledger(path).read("this", 2), [0.5, 0.75])
  np.testing.assert_array_equal(Ledger(path).read("that", 3), [1, 2, 3])
  assert Ledger(path).read("this", 3) is None        # of other widths
  assert [p.name for p in path.parent.iterdir()] == ["costs.json"]


@pytest.mark.parametrize("text", [
    "", "[1, 2]", '{"this": 3}', '{"this": ["a", "b"]}', '{"this": [1, 0]}',
    '{"this": [1, NaN]}', '{"this": [[1], [2]]}', '{"this": [true, 1]}'])
def test_what_cannot_be_used_is_nothing(tmp_path, text):
  path = tmp_path / "costs.json"
  path.write_text(text)
  assert Ledger(path).read("this", 2) is None
  Ledger(path).write("this", np.array([1, 2]))
  assert json.loads(path.read_text())["this"] == [1, 2]


def test_a_folder_that_takes_no_file_is_no_error(tmp_path):
  (tmp_path / "file").write_text("")
  where = Ledger(tmp_path / "file" / "costs.json")
  where.write("this", np.array([1, 2]))
  assert where.read("this", 2) is None


def test_it_lies_beside_compiled_programs(tmp_path):
  folder = jax.config.jax_compilation_cache_dir
  try:
    for text, kept in ((str(tmp_path), True), ("gs://bucket/x", False),
                       (None, False)):
      jax.config.update("jax_compilation_cache_dir", text)
      found = pacing.ledger()
      assert (found is not None) == kept
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    pacing.ledger().write("this", np.array([1]))
    assert (tmp_path / "jaxspec_costs.json").exists()
  finally:
    jax.config.update("jax_compilation_cache_dir", folder)
