# SPDX-License-Identifier: Apache-2.0
"""Whether drafts are still as good as they were: acceptance over time.

Text changes, and a drafter that suited it yesterday may not today. For each
drafter and task the share of accepted drafts is watched by a Page-Hinkley test
(Page 1954; Hinkley 1971): it sums how far each request falls below the mean so
far, and raises an alarm when the sum has risen too far above its least.
"""

import dataclasses
from typing import Any

from jaxspec.metrics import Stats


@dataclasses.dataclass
class PageHinkley:
  """Notices that the mean of a series has fallen.

  Attributes:
    tolerance: a fall that is not worth an alarm.
    threshold: how much must have fallen, summed over the series.
    warm_up: values before the first alarm.
    alarm: whether the mean has fallen. It stays until `reset`.
  """

  tolerance: float = 0.02
  threshold: float = 2.0
  warm_up: int = 20
  count: int = 0
  mean: float = 0.0
  alarm: bool = False
  _sum: float = 0.0
  _least: float = 0.0

  def add(self, value: float) -> bool:
    """Adds a value; returns whether it raised the alarm."""
    self.count += 1
    self.mean += (value - self.mean) / self.count
    self._sum += self.mean - value - self.tolerance
    self._least = min(self._least, self._sum)
    before = self.alarm
    if self.count > self.warm_up and self._sum - self._least > self.threshold:
      self.alarm = True
    return self.alarm and not before

  def reset(self) -> None:
    """Begins a new series."""
    self.count, self.mean, self.alarm = 0, 0.0, False
    self._sum = self._least = 0.0


@dataclasses.dataclass
class _Series:
  """What is known of one drafter on one task."""

  test: PageHinkley
  requests: int = 0
  drafts: int = 0
  drafted: list[int] = dataclasses.field(default_factory=list)
  accepted: list[int] = dataclasses.field(default_factory=list)


class DriftMonitor:
  """Acceptance by drafter, task and position.

    monitor = DriftMonitor()
    for completion in generator.generate(prompts):
      monitor.add(completion.stats)
    monitor.report()

  Attributes:
    alarms: the (drafter, task) pairs whose acceptance has fallen.
  """

  def __init__(self, **settings: float):
    """Watches nothing yet; `settings` are those of `PageHinkley`."""
    self._settings = settings
    self._series: dict[tuple[str, str], _Series] = {}

  @property
  def alarms(self) -> list[tuple[str, str]]:
    return [key for key, one in self._series.items() if one.test.alarm]

  def add(self, stats: Stats) -> bool:
    """Adds one request; returns whether it raised an alarm.

    A request in which nothing was drafted says nothing of drafts.
    """
    if not stats.drafts:
      return False
    key = (stats.drafter, stats.task)
    one = self._series.setdefault(key, _Series(
        PageHinkley(**self._settings)))  # type: ignore[arg-type]
    one.requests += 1
    one.drafts += stats.drafts
    for total, new in ((one.drafted, stats.drafted_by_position),
                       (one.accepted, stats.accepted_by_position)):
      total.extend([0] * (len(new) - len(total)))
      for at, count in enumerate(new):
        total[at] += count
    # Of the first draft alone: later ones are judged only where it was right.
    return one.test.add(stats.accepted_by_position[0] / stats.drafts)

  def report(self) -> list[dict[str, Any]]:
    """One JSON object for each drafter and task."""
    return [{
        "drafter": drafter, "task": task, "requests": one.requests,
        "drafts": one.drafts,
        # Of the drafts that got so far, which share went further.
        "conditional_acceptance_by_position": [
            accepted / reached if reached else None for accepted, reached in
            zip(one.accepted, [one.drafts, *one.accepted])],
        "mean_first_acceptance": one.test.mean, "alarm": one.test.alarm,
    } for (drafter, task), one in sorted(self._series.items())]

  def lines(self) -> list[str]:
    """The report for people, a line each."""
    def share(rate):
      return "-" if rate is None else f"{rate:.2f}".removeprefix("0")
    return [
        f"{one['drafter']}{' on ' + one['task'] if one['task'] else ''}: "
        f"{one['requests']} requests, {one['drafts']} drafts, each next one "
        "accepted at ["
        + " ".join(map(share, one["conditional_acceptance_by_position"])) + "]"
        + (", HAS FALLEN" if one["alarm"] else "") for one in self.report()]

  def reset(self, drafter: str, task: str) -> None:
    """Begins anew, as after a drafter was trained again."""
    self._series.pop((drafter, task), None)
