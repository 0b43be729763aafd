# SPDX-License-Identifier: Apache-2.0
"""The least time each case can take: what must move, and what must be done.

From published figures of the chips (`pallas_kernels.target.CHIPS`), without a
device: no kernel is faster than the longer of the two times. Beside them stand
the bytes that the TPU kernel moves, counted from its own blocks and grid.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels.case import Case
from pallas_kernels.matmul.cases import SHARES, Exit
from pallas_kernels.target import CHIPS, Chip

# A kernel may move this many times the least.
MOST = 1.1

_SHORT = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e",
          "TPU7x": "tpu7x", "NVIDIA H100 80GB HBM3": "H100",
          "NVIDIA H200": "H200"}


@dataclasses.dataclass(frozen=True)
class Floor:
  """One case on one chip.

  Attributes:
    memory_seconds: to move the least bytes at the published bandwidth.
    compute_seconds: to do the operations at the published rate of bfloat16,
      to which eight- and four-bit weights are converted.
  """

  case: Case
  kind: str
  memory_seconds: float
  compute_seconds: float

  @property
  def seconds(self) -> float:
    return max(self.memory_seconds, self.compute_seconds)

  @property
  def bound(self) -> str:
    return ("memory" if self.memory_seconds >= self.compute_seconds
            else "compute")


def floor(case: Case, kind: str, chip: Chip | None = None) -> Floor:
  """The floor of a case on a chip; by its published figures, if not given."""
  chip = chip or CHIPS[kind]
  return Floor(case, kind, case.least_bytes / chip.bandwidth,
               case.operations / chip.bf16)


def ratio(case: Case) -> float:
  """What the TPU kernel moves, as a multiple of the least."""
  return case.moved_bytes / case.least_bytes


def grain(case: Case) -> float:
  """What it moves, as a multiple of the least that memory's units allow.

  For what writes large pieces that is the ratio.
  """
  return case.moved_bytes / (case.least_units or case.least_bytes)


def records(cases: Sequence[Case]) -> list[dict[str, Any]]:
  """For JSON."""
  return [{
      "op": case.op, "case": case.name, "least_bytes": case.least_bytes,
      "operations": case.operations, "moved_bytes": case.moved_bytes,
      "ratio": ratio(case), "least_units": case.least_units,
      "ratio_to_units": grain(case),
      "chips": {kind: {
          "seconds": (f := floor(case, kind)).seconds, "bound": f.bound,
          "memory_seconds": f.memory_seconds,
          "compute_seconds": f.compute_seconds} for kind in CHIPS},
  } for case in cases]


def table(cases: Sequence[Case]) -> str:
  """In Markdown; a c behind a time says that arithmetic is what takes it."""
  kinds = list(CHIPS)
  lines = ["| op | case | least MB | moved MB | ratio | to units | GFLOP | "
           + " | ".join(f"{_SHORT.get(kind, kind)}, us" for kind in kinds)
           + " |", "|---|---|--:|--:|--:|--:|--:|" + "--:|" * len(kinds)]
  for case in cases:
    times = []
    for kind in kinds:
      f = floor(case, kind)
      times.append(f"{1e6 * f.seconds:.3g}"
                   + ("c" if f.bound == "compute" else ""))
    cells = [case.op, case.name, f"{case.least_bytes / 1e6:.4g}",
             f"{case.moved_bytes / 1e6:.4g}", f"{ratio(case):.3f}",
             "" if case.least_units is None else f"{grain(case):.3f}",
             f"{case.operations / 1e9:.3g}", *times]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def exit_records(exits: Sequence[Exit]) -> list[dict[str, Any]]:
  """Of rows that leave early, for JSON."""
  return [{"op": "early_exit_stream",
           "case": f"{e.model}, {e.rows} rows, {e.share:.0%} leave after "
                   f"{e.lower} of {e.depth} layers",
           **dataclasses.asdict(e)} for e in exits]


def exit_table(exits: Sequence[Exit]) -> str:
  """In Markdown: MB by the share of rows that leave."""
  lines = ["| model | | " + " | ".join(f"{s:.0%}" for s in SHARES) + " |",
           "|---|---|" + "--:|" * len(SHARES)]
  for model, rows in dict.fromkeys((e.model, e.rows) for e in exits):
    mine = sorted((e for e in exits if (e.model, e.rows) == (model, rows)),
                  key=lambda e: e.share)
    name = f"{model}, {mine[0].lower} of {mine[0].depth} layers"
    for what, found in (
        (f"that share of {rows} rows", [e.moved_bytes for e in mine]),
        (f"each of {rows} with that chance" if rows > 1 else
         "one with that chance", [e.mean_bytes for e in mine])):
      if None not in found:
        lines.append(f"| {name} | {what} | " + " | ".join(
            f"{n / 1e6:,.0f}" for n in found if n is not None) + " |")
  return "\n".join(lines)
