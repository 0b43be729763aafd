# SPDX-License-Identifier: Apache-2.0
"""What a request cost and what speculation gave back.

The counts obey one convention, and `Stats.reconcile` holds them to it: the
prefill emits the first token, every later pass of the target emits one of its
own, and both emit the draft tokens they accepted. A draft token that agreed but
stood behind an end token or past the token budget was not emitted, so it is
not counted as accepted.

The formulas are vLLM's, so that figures can be compared:
`mean_len = 1 + accepted / drafts`, and the rate of a position is the share of
all drafts in which that position was accepted.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from jaxspec.errors import InputError


@dataclasses.dataclass
class Stats:
  """Counts and times of one request, or of several together.

  Attributes:
    prompt_tokens: tokens prefilled.
    prompt_seconds: time of the prefill.
    first_token_seconds: from the request to its first token; of several
      requests, the mean.
    new_tokens: tokens in the completion.
    decode_seconds: time of the passes after the prefill; of several requests,
      the sum, although rows decode at the same time.
    passes: passes of the target after the prefill.
    drafted: draft tokens the target has scored.
    accepted: draft tokens that were emitted.
    drafted_by_position: passes that drafted something `i + 1` tokens ahead.
      Its first entry is the number of drafts.
    accepted_by_position: passes that accepted the draft `i + 1` tokens ahead.
    accepted_by_node: how often each node of the tree was accepted, the root
      left out; of a tree that is grown, its likeliest node comes first.
    scored: nodes the target's passes were wide, roots and dead ones included.
    compiles: programs built meanwhile, compiled or read from the persistent
      cache.
    compiles_cached: how many of them the cache had.
    seed: seed of the noise, or None where requests differ.
    verifier: name of the verifier, or "mixed".
    draft_length: longest path of a proposal; 0 is plain decoding.
    drafter: what drafted, as it was named; "mixed" where requests differ.
    task: the caller's word for what was asked, "" for none, or "mixed".
    adapter: what was merged into the model, whose text is then the changed
      model's; "" for nothing, or "mixed".
    wall_seconds: from the request to its completion; of several requests,
      whatever the caller measured, else the sum.
    dropped: tokens decoded and thrown away by the host, which alone can see
      a stop string.
    requests: how many requests were added up.
    shown: tokens that a stream showed before they were settled.
    retracted: how many of them something else took the place of.
    retracted_seconds: how long those were on display, all together.
  """

  prompt_tokens: int = 0
  prompt_seconds: float = 0.0
  first_token_seconds: float = 0.0
  new_tokens: int = 0
  decode_seconds: float = 0.0
  passes: int = 0
  drafted: int = 0
  accepted: int = 0
  drafted_by_position: list[int] = dataclasses.field(default_factory=list)
  accepted_by_position: list[int] = dataclasses.field(default_factory=list)
  accepted_by_node: list[int] = dataclasses.field(default_factory=list)
  scored: int = 0
  compiles: int = 0
  compiles_cached: int = 0
  seed: int | None = 0
  verifier: str = "exact"
  draft_length: int = 0
  drafter: str = "autoregressive"
  task: str = ""
  adapter: str = ""
  wall_seconds: float = 0.0
  dropped: int = 0
  requests: int = 1
  shown: int = 0
  retracted: int = 0
  retracted_seconds: float = 0.0

  @property
  def retraction_rate(self) -> float:
    """Share of what was shown unsettled that was taken back."""
    return self.retracted / self.shown if self.shown else 0.0

  @property
  def seconds_before_retraction(self) -> float:
    """How long a token that was taken back was on display, on average."""
    return self.retracted_seconds / self.retracted if self.retracted else 0.0

  @property
  def drafts(self) -> int:
    """Passes that had a draft to verify."""
    return self.drafted_by_position[0] if self.drafted_by_position else 0

  @property
  def acceptance_rate(self) -> float:
    """Share of the draft tokens that was accepted."""
    return self.accepted / self.drafted if self.drafted else 0.0

  @property
  def mean_length(self) -> float:
    """Tokens a pass with a draft emitted, on average."""
    return 1.0 + (self.accepted / self.drafts if self.drafts else 0.0)

  @property
  def decode_tokens(self) -> int:
    """Tokens the passes emitted: all but the ones the prefill gave."""
    return self.passes + self.accepted

  @property
  def rates_by_position(self) -> list[float]:
    """Share of all drafts in which each position was accepted."""
    return [n / self.drafts for n in self.accepted_by_position if self.drafts]

  def merge(self, other: "Stats") -> "Stats":
    """Returns both together; see the attributes for what is not a sum."""
    requests = self.requests + other.requests
    first_token = (
      self.first_token_seconds * self.requests
      + other.first_token_seconds * other.requests
    )
    sums = {
      name: getattr(self, name) + getattr(other, name)
      for name in (
        "prompt_tokens",
        "prompt_seconds",
        "new_tokens",
        "decode_seconds",
        "passes",
        "drafted",
        "accepted",
        "scored",
        "compiles",
        "compiles_cached",
        "wall_seconds",
        "dropped",
        "shown",
        "retracted",
        "retracted_seconds",
      )
    }
    def same(name):
      value = getattr(self, name)
      return value if value == getattr(other, name) else "mixed"
    return Stats(
      **sums,
      first_token_seconds=first_token / requests if requests else 0.0,
      drafted_by_position=_add(
        self.drafted_by_position, other.drafted_by_position
      ),
      accepted_by_position=_add(
        self.accepted_by_position, other.accepted_by_position
      ),
      accepted_by_node=_add(self.accepted_by_node, other.accepted_by_node),
      seed=self.seed if self.seed == other.seed else None,
      verifier=same("verifier"),
      drafter=same("drafter"),
      task=same("task"),
      adapter=same("adapter"),
      draft_length=max(self.draft_length, other.draft_length),
      requests=requests,
    )

  def reconcile(self) -> None:
    """Raises AssertionError, with both sides, where counts do not add up."""
    emitted = self.new_tokens + self.dropped
    expected = self.requests + self.passes + self.accepted
    _equal(
      "new_tokens + dropped", emitted, "requests + passes + accepted", expected
    )
    _equal(
      "sum(accepted_by_position)",
      sum(self.accepted_by_position),
      "accepted",
      self.accepted,
    )
    _equal(
      "sum(accepted_by_node)",
      sum(self.accepted_by_node),
      "accepted",
      self.accepted,
    )
    _at_most("accepted", self.accepted, "drafted", self.drafted)
    _at_most("passes + drafted", self.passes + self.drafted, "scored",
             self.scored)
    # A prefill that goes layer by layer verifies drafts too.
    _at_most("drafts", self.drafts, "requests + passes",
             self.requests + self.passes)
    _at_most("compiles_cached", self.compiles_cached, "compiles", self.compiles)
    _at_most("retracted", self.retracted, "shown", self.shown)
    # A tree drafts several nodes at one position, a chain exactly one.
    _at_most(
      "sum(drafted_by_position)",
      sum(self.drafted_by_position),
      "drafted",
      self.drafted,
    )
    drafted = self.drafted_by_position
    accepted = self.accepted_by_position
    _at_most("accepted positions", len(accepted), "drafted", len(drafted))
    for at, (part, whole) in enumerate(zip(accepted, drafted)):
      _at_most(f"accepted_by_position[{at}]", part, "drafted", whole)
    for name, counts in (("drafted", drafted), ("accepted", accepted)):
      for at, (more, fewer) in enumerate(zip(counts, counts[1:])):
        _at_most(f"{name}_by_position[{at + 1}]", fewer, f"[{at}]", more)

  def line(self, memory: str | None = None) -> str:
    """Returns the one line that says it all.

    Args:
      memory: replaces the measured memory; "" leaves it out.
    """
    if memory is None:
      memory = memory_in_use()
    parts = []
    if self.requests > 1:
      rate = _rate(self.new_tokens, self.wall_seconds)
      wall = _duration(self.wall_seconds)
      parts.append(f"{self.requests} requests {wall} ({rate})")
    parts += [
      f"prompt {self.prompt_tokens} tok {_duration(self.prompt_seconds)} "
      f"({_rate(self.prompt_tokens, self.prompt_seconds)})",
      f"ttft {_duration(self.first_token_seconds, 0)}",
      f"decode {self.decode_tokens} tok {_duration(self.decode_seconds)} "
      f"({_rate(self.decode_tokens, self.decode_seconds)})",
    ]
    if self.draft_length:
      rates = " ".join(_share(rate) for rate in self.rates_by_position)
      parts.append(
        f"spec k={self.draft_length} drafts={self.drafts} "
        f"accepted={self.accepted}/{self.drafted} "
        f"({100 * self.acceptance_rate:.1f}%) "
        f"mean_len={self.mean_length:.2f} pos=[{rates}]"
      )
    if self.shown:
      part = (f"shown {self.shown} tok early, {self.retracted} taken back "
              f"({100 * self.retraction_rate:.1f}%)")
      if self.retracted:
        part += f" after {_duration(self.seconds_before_retraction)}"
      parts.append(part)
    cached = f" ({self.compiles_cached} cached)" if self.compiles_cached else ""
    parts.append(f"compiles {self.compiles}{cached}")
    if memory:
      parts.append(memory)
    seed = "mixed" if self.seed is None else self.seed
    adapter = f" adapter={self.adapter}" if self.adapter else ""
    parts.append(f"seed={seed} verify={self.verifier}{adapter}")
    return " | ".join(parts)

  def as_dict(self) -> dict[str, Any]:
    """Returns what JSON can hold: the fields and what follows from them."""
    return dataclasses.asdict(self) | {
      "drafts": self.drafts,
      "acceptance_rate": self.acceptance_rate,
      "mean_length": self.mean_length,
      "retraction_rate": self.retraction_rate,
      "seconds_before_retraction": self.seconds_before_retraction,
    }


def total(stats: Iterable[Stats], wall_seconds: float | None = None) -> Stats:
  """Returns all of `stats` together.

  Args:
    stats: one a request.
    wall_seconds: the time they took side by side. Without it the result's
      `wall_seconds` is their sum, which is too long for rows that ran at once.
  """
  whole = None
  for one in stats:
    whole = dataclasses.replace(one) if whole is None else whole.merge(one)
  whole = Stats(requests=0) if whole is None else whole
  if wall_seconds is not None:
    whole.wall_seconds = wall_seconds
  return whole


def stored_acceptance(path: str, drafter: str) -> tuple[list[float], int]:
  """The shares of passes that accepted something at each depth, as stored.

  Args:
    path: a file of JSON, or of lines of it, that holds statistics at any
      depth: what `decode --output` writes, or an experiment of speculation.
    drafter: whose they must be, as it is named there. One of other settings
      is taken where it is the only one of its name.

  Returns:
    Them, and the passes that they are of.

  Raises:
    InputError: there are none in the file.
  """
  try:
    with open(path, encoding="utf-8") as file:
      text = file.read()
    try:
      content = json.loads(text)
    except ValueError:
      content = [json.loads(line) for line in text.splitlines() if line.strip()]
  except OSError as e:
    raise InputError(f"cannot read {path}: {e.strerror}") from e
  except ValueError as e:
    raise InputError(f"{path} is no JSON ({e}); pass a file of statistics, as "
                     "decode --output writes it") from e
  found: dict[str, list[tuple[int, list[int]]]] = {}
  for item in _dicts(content):
    accepted, passes = item.get("accepted_by_position"), item.get("passes")
    if isinstance(passes, list):         # of each row
      passes = sum(passes)
    if isinstance(accepted, list) and accepted and passes:
      name = str(item.get("drafter", ""))
      found.setdefault(name, []).append((passes, accepted))
  if not found:
    raise InputError(
      f"{path} holds no statistics of drafts (accepted_by_position and "
      "passes); pass one that decode --output or experiments.speculation wrote")
  names = [name for name in found if name == drafter] or [
    name for name in found
    if name.partition(":")[0] == drafter.partition(":")[0]]
  if len(names) != 1:
    raise InputError(
      f"{path} holds statistics of {', '.join(sorted(found))}, and --drafter="
      f"{drafter} is {'several' if names else 'none'} of them; name one")
  stats = found[names[0]]
  passes = sum(count for count, _ in stats)
  depths = itertools.zip_longest(*(counts for _, counts in stats), fillvalue=0)
  return [sum(depth) / passes for depth in depths], passes


def _dicts(content: Any) -> Iterator[dict[str, Any]]:
  """All objects in what JSON holds, from the outside in."""
  if isinstance(content, dict):
    yield content
    content = list(content.values())
  for item in content if isinstance(content, list) else ():
    yield from _dicts(item)


def memory_in_use() -> str:
  """Returns the first device's peak and limit, else this process's peak."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and stats.get("bytes_limit"):
    peak = stats.get("peak_bytes_in_use", stats.get("bytes_in_use", 0))
    return f"hbm {peak / 2**30:.1f}/{stats['bytes_limit'] / 2**30:.1f} GiB"
  try:
    import resource
  except ImportError:  # Windows has no such module.
    return ""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts in KiB, macOS in bytes.
  size = peak if sys.platform == "darwin" else peak * 1024
  return f"rss {size / 2**30:.1f} GiB"


def _add(a: Sequence[int], b: Sequence[int]) -> list[int]:
  length = max(len(a), len(b))
  pad = lambda counts: [*counts, *[0] * (length - len(counts))]
  return [x + y for x, y in zip(pad(a), pad(b))]


def _equal(name: str, value: int, other: str, limit: int) -> None:
  if value != limit:
    raise AssertionError(f"{name} is {value}, but {other} is {limit}")


def _at_most(name: str, value: int, other: str, limit: int) -> None:
  if value > limit:
    raise AssertionError(f"{name} is {value}, above {other}, which is {limit}")


def _duration(seconds: float, digits: int = 1) -> str:
  if seconds < 1.0:
    return f"{1000 * seconds:.{digits}f} ms"
  return f"{seconds:.2f} s"


def _rate(count: int, seconds: float) -> str:
  return f"{count / seconds:.0f}/s" if seconds > 0 else "-/s"


def _share(rate: float) -> str:
  return f"{rate:.2f}".removeprefix("0")
