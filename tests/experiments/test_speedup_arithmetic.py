# SPDX-License-Identifier: Apache-2.0
"""The published tables, and counts of a simulated decoder."""

import numpy as np
import pytest

from experiments import speedup_arithmetic as arithmetic


@pytest.mark.parametrize("acceptance, length, operations, speed",
                         arithmetic.TABLE)
def test_the_published_table(acceptance, length, operations, speed):
  assert arithmetic.speedup(acceptance, length, 0) == pytest.approx(
      speed, abs=0.005)
  assert arithmetic.operations(acceptance, length) == pytest.approx(
      operations, abs=0.005)


@pytest.mark.parametrize("acceptance, length", [(0.3, 1), (0.8, 5), (1.0, 4)])
def test_tokens_a_pass_against_dice(acceptance, length):
  rng = np.random.default_rng(0)
  accepted = rng.random((200_000, length)) < acceptance
  emitted = 1 + np.cumprod(accepted, axis=1).sum(axis=1)
  assert arithmetic.tokens_per_pass(acceptance, length) == pytest.approx(
      emitted.mean(), abs=0.02)


def test_the_claim_of_four_and_a_half():
  """80 % acceptance gives 2.5 times at a draft cost of a tenth."""
  assert arithmetic.best(0.8, 0.1) == (6, pytest.approx(2.47, abs=0.005))
  assert arithmetic.best(0.83, 0.15)[1] == pytest.approx(2.26, abs=0.005)
  assert arithmetic.free_length(4.5, 0.8) == 10
  assert arithmetic.free_length(5.5, 0.8) is None
  wanted = arithmetic.acceptance_for(4.5, 0.05)
  assert wanted == pytest.approx(0.895, abs=0.01)
  assert arithmetic.best(wanted, 0.05)[1] == pytest.approx(4.5, abs=1e-3)
  assert arithmetic.acceptance_for(4.5, 0.3) is None


def test_where_drafts_cost_too_much_the_best_is_none():
  assert arithmetic.best(0.3, 0.5) == (0, 1.0)
