# SPDX-License-Identifier: Apache-2.0
"""What a pass costs by its width, measured on the work at hand.

The text does not depend on how wide passes are. So the first steps of a run
can be taken at one width after another, with a clock beside them, and nothing
of it is wasted. What was learned is kept for later runs of the same work.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np

_State = TypeVar("_State")

# Passes that are timed together, and how often each width is.
_STEPS, _ROUNDS = 2, 4


class Meter:
  """Times passes of each width in turns, until every one is known."""

  def __init__(self, widths: int):
    """Knows nothing of any of so many widths yet."""
    self._seconds: list[list[float]] = [[] for _ in range(widths)]
    self._compiled = False

  @property
  def known(self) -> bool:
    """Whether every width was timed often enough."""
    return min(map(len, self._seconds)) >= _ROUNDS

  @property
  def costs(self) -> np.ndarray:
    """Seconds of a pass of each width; the fastest run counts.

    A narrow pass is a part of a wider one, so that it never costs more.
    """
    fastest = [min(times) for times in self._seconds]
    return np.minimum.accumulate(fastest[::-1])[::-1].astype(np.float32)

  def measure(self, decode: Callable[[_State, int, int], _State],
              passes: Callable[[_State], Sequence[int]],
              state: _State) -> _State:
    """Takes a few steps at the width that was timed least.

    Args:
      decode: takes the state so many steps with passes of one width, given
        by its number; none for 0 steps, so that it is compiled.
      passes: how many each row has had.
    """
    width = int(np.argmin([len(times) for times in self._seconds]))
    if not self._compiled:
      state = decode(state, 0, width)
      self._compiled = True
    before = np.asarray(passes(state))         # waits for what is under way
    start = time.perf_counter()
    state = decode(state, _STEPS, width)
    after = np.asarray(passes(state))
    seconds = time.perf_counter() - start
    # A row that ended has had fewer; none that runs has had more.
    taken = int(np.max(after - before))
    if taken:
      self._seconds[width].append(seconds / taken)
    return state


class Ledger:
  """Costs by the work they are of, in a file."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def read(self, work: str, widths: int) -> np.ndarray | None:
    """What was noted of some work; None for nothing that can be used."""
    costs = np.asarray(self._all().get(work), np.float64)
    if costs.shape != (widths,) or not np.all(np.isfinite(costs) & (costs > 0)):
      return None
    return costs.astype(np.float32)

  def write(self, work: str, costs: np.ndarray) -> None:
    """Notes what some work costs, beside what is there.

    Where that cannot be written it is not: the next run measures again.
    """
    noted = {**self._all(), work: [float(cost) for cost in costs]}
    part = self._path.with_name(f"{self._path.name}.{os.getpid()}")
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      part.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
      part.replace(self._path)          # another run sees all of it or nothing
    except OSError:
      with contextlib.suppress(OSError):
        part.unlink()

  def _all(self) -> dict[str, list[float]]:
    try:
      found = json.loads(self._path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
      return {}
    if not isinstance(found, dict):
      return {}
    return {work: costs for work, costs in found.items()
            if isinstance(costs, list)
            and all(type(cost) in (int, float) for cost in costs)}


def ledger() -> Ledger | None:
  """Beside compiled programs, which too are this machine's; if any are kept."""
  folder = jax.config.jax_compilation_cache_dir
  if not folder or not jax.config.jax_enable_compilation_cache or (
      "://" in folder):
    return None
  return Ledger(pathlib.Path(folder) / "jaxspec_costs.json")
