# SPDX-License-Identifier: Apache-2.0
"""Shares of what was counted, and what they may be in truth.

`rate` gives Clopper and Pearson's interval, which holds whatever the share is
and however few were counted, as long as what is counted is independent. Tokens
of one answer are not: `clustered` draws whole answers instead.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxspec.calibration import interval

LEVEL = 0.95


def rate(hits: int, of: int, level: float = LEVEL) -> dict[str, Any]:
  """A share with its exact interval, both tails alike; of none, nothing."""
  hits, of = int(hits), int(of)
  low, high = interval((np.arange(of) < hits) * 1.0, level)
  return {"hits": hits, "of": of, "share": hits / of if of else None,
          "low": low, "high": high}


def clustered(hits: Sequence[int], of: Sequence[int], level: float = LEVEL,
              draws: int = 2000) -> dict[str, Any]:
  """A share over groups whose members are alike, by drawing groups anew."""
  some, all_ = np.asarray(hits, float), np.asarray(of, float)
  if not all_.sum():
    return {"hits": 0, "of": 0, "share": None, "low": 0.0, "high": 1.0}
  picked = np.random.default_rng(0).integers(0, len(some), (draws, len(some)))
  asked = all_[picked].sum(axis=1)
  found = (some[picked].sum(axis=1) / np.maximum(asked, 1))[asked > 0]
  low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
  return {"hits": int(some.sum()), "of": int(all_.sum()),
          "share": float(some.sum() / all_.sum()), "low": float(low),
          "high": float(high)}


def at_threshold(sure: Sequence[float], right: Sequence[bool],
                 threshold: float) -> dict[str, Any]:
  """What is shown from a confidence on, and how much of it is taken back."""
  shown = np.asarray(sure, float) >= threshold
  wrong = shown & ~np.asarray(right, bool)
  return {"threshold": float(threshold),
          "emission": rate(shown.sum(), shown.size),
          "retraction": rate(wrong.sum(), shown.sum())}


def most_shown(sure: Sequence[float], right: Sequence[bool], risk: float
               ) -> dict[str, Any]:
  """The most that can be shown while no more than `risk` is taken back.

  The threshold is chosen on what it is judged on: a bound to compare sources
  with, no promise.
  """
  confidence = np.asarray(sure, float)
  best = at_threshold(confidence, right, np.inf)
  best["threshold"] = None
  for threshold in np.unique(confidence)[::-1]:
    found = at_threshold(confidence, right, threshold)
    if found["retraction"]["share"] <= risk:
      best = found                   # ascending in what is shown
  return best
