# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler's dump says of a kernel's schedule.

A TPU core issues a bundle of instructions a cycle, and the compiler writes down
which of its units each bundle uses. What it cannot know is how often a loop
runs and how long a transfer is waited for: these figures compare two variants
of a kernel, and show spills; they are no times.
"""

import dataclasses
import pathlib
import re

# LIBTPU_INIT_ARGS, read when the compiler is loaded: of all passes the last.
FLAGS = ("--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
         "--xla_jf_dump_llo_pass_label_regex=final.*")

_UTILIZATION = "final_hlo-static-per-bundle-utilization"
_BUNDLES = "final_bundles"
_VECTOR = ("MXU", "XLU", "VALU", "EUP")
# Address, mark of a control target, a ">" for each loop around it, and whether
# it is empty: such a one has no ">".
_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +([A-Z]*) *: ((?: *>)*) *\{ *(\}?)")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """One kernel's final schedule.

  Attributes:
    bundles: all of them.
    loop: those of the loop in which most vector work stands, without those of
      the loops in it; of what is in no loop, where most stands there.
    utilization: of that loop, the share of each unit's slots that is used.
    spills, fills: vector registers stored for want of room, and loaded again.
  """

  bundles: int
  loop: int
  utilization: dict[str, float]
  spills: int
  fills: int


def read(folder: pathlib.Path, kernel: str) -> Schedule | None:
  """The schedule of the instruction `kernel`, if it is in the dump."""
  def find(what):
    return sorted(folder.glob(f"*-{kernel}-*-{what}.txt"))

  uses, bundles = find(_UTILIZATION), find(_BUNDLES)
  bundles = [b for b in bundles if "schedule-analysis" not in b.name]
  if not uses or not bundles:
    return None
  # The last is the one of the program; one before it was a first attempt.
  return parse(uses[-1].read_text(), bundles[-1].read_text())


def parse(utilization: str, bundles: str) -> Schedule:
  """Reads the texts of the two files of one kernel."""
  head, _, rows = utilization.partition("== UTILIZATION:")
  names, capacity = head.strip().splitlines()[-2:]
  units = [name.strip() for name in names.split(",")]
  slots = dict(zip(units, map(int, capacity.split())))
  used = [dict(zip(units, map(int, row.split())))
          for row in rows.strip().splitlines()]
  loops: dict[int, list[dict[str, int]]] = {}
  for number, use in zip(_loops(bundles), used):
    loops.setdefault(number, []).append(use)
  body = max(loops.values(), key=lambda uses: (
      sum(use[unit] for use in uses for unit in _VECTOR), len(uses)))
  return Schedule(
      bundles=len(used), loop=len(body),
      utilization={unit: sum(use[unit] for use in body)
                   / (len(body) * slots[unit]) for unit in units},
      spills=sum(use["VSTORE:SPILL"] for use in used),
      fills=sum(use["VLOAD:FILL"] for use in used))


def _loops(bundles: str) -> list[int]:
  """For each bundle the number of the loop it is in, 0 where in none."""
  around, numbers, count = [0], [], 0
  for line in bundles.splitlines():
    found = _BUNDLE.match(line)
    if not found:
      continue
    mark, nested, empty = found.groups()
    depth = len(around) - 1 if empty else nested.count(">")
    del around[depth + (mark != "LB"):]
    while len(around) <= depth:
      count += 1
      around.append(count)
    numbers.append(around[-1])
  return numbers
