# SPDX-License-Identifier: Apache-2.0
"""Shares and their intervals, against values worked out elsewhere."""

import numpy as np
import pytest

from experiments import rates


@pytest.mark.parametrize("hits, of, low, high", [
    (0, 10, 0.0, 0.3085), (10, 10, 0.6915, 1.0), (5, 10, 0.1871, 0.8129),
    (3, 100, 0.0062, 0.0852), (0, 0, 0.0, 1.0)])
def test_exact_intervals(hits, of, low, high):
  found = rates.rate(hits, of)
  assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-4)
  assert found["share"] == (hits / of if of else None)


def test_answers_that_are_alike_tell_less_than_tokens():
  hits, of = [10, 0] * 10, [10] * 20
  whole, each = rates.clustered(hits, of), rates.rate(100, 200)
  assert whole["share"] == each["share"] == 0.5
  assert whole["high"] - whole["low"] > 2 * (each["high"] - each["low"])
  assert rates.clustered([0], [0])["share"] is None


def test_what_is_shown_and_taken_back():
  sure, right = [0.9, 0.8, 0.5, 0.5, 0.1], [True, False, True, True, False]
  at = rates.at_threshold(sure, right, 0.5)
  assert (at["emission"]["hits"], at["emission"]["of"]) == (4, 5)
  assert (at["retraction"]["hits"], at["retraction"]["of"]) == (1, 4)
  assert rates.most_shown(sure, right, 0.1)["emission"]["hits"] == 1
  # Not the first threshold at which too much is taken back, but the last.
  best = rates.most_shown(sure, right, 0.3)
  assert (best["threshold"], best["emission"]["hits"]) == (0.5, 4)
  none = rates.most_shown([0.9, 0.9], [True, False], 0.3)
  assert (none["threshold"], none["emission"]["hits"]) == (None, 0)
  assert np.isfinite(best["retraction"]["high"])
