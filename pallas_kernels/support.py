# SPDX-License-Identifier: Apache-2.0
"""Which implementation takes what, as the dispatcher says when it is asked.

Every case, and every case of another type, is traced with shapes: an
implementation takes it, or gives its reason.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.target import Target, aim

TARGETS = {"tpu": Target("tpu", "TPU v5 lite"),
           "gpu": Target("gpu", "NVIDIA H100 80GB HBM3"),
           "xla": Target("cpu", "cpu")}
DTYPES = ("float32", "float16")


@dataclasses.dataclass(frozen=True)
class Answer:
  """What one implementation says of one probe.

  Attributes:
    taken: None where the op has no such implementation.
    reason: why it is not taken.
  """

  op: str
  probe: str
  implementation: str
  taken: bool | None
  reason: str = ""


def ask(case: Case, probe: str = "") -> list[Answer]:
  """Asks every implementation whether it takes a case."""
  answers = []
  for name, target in TARGETS.items():
    taken, reason = True, ""
    try:
      with aim(target):
        jax.eval_shape(functools.partial(case.call, implementation=name),
                       *case.arguments)
    except NotImplementedError as e:
      taken, reason = False, _bare(str(e), case.op, name)
    except ValueError as e:
      if f"{case.op} has no implementation {name!r}" not in str(e):
        raise
      taken = None
    answers.append(Answer(case.op, probe or case.name, name, taken, reason))
  return answers


def ask_all(cases: Sequence[Case]) -> list[Answer]:
  """Every case; and the first of each op in other types."""
  answers, seen = [], set()
  for case in cases:
    answers += ask(case)
    if case.op not in seen:
      seen.add(case.op)
      for dtype in DTYPES:
        answers += ask(of_type(case, dtype), f"{case.name}, {dtype}")
  return answers


def of_type(case: Case, dtype: str) -> Case:
  """A case whose bfloat16 arrays have another type."""
  change = lambda x: (jax.ShapeDtypeStruct(x.shape, dtype)
                      if x.dtype == jnp.bfloat16 else x)
  return dataclasses.replace(
      case, arguments=jax.tree.map(change, case.arguments))


def records(answers: Sequence[Answer]) -> list[dict[str, Any]]:
  """For JSON."""
  return [dataclasses.asdict(answer) for answer in answers]


def table(answers: Sequence[Answer]) -> str:
  """In Markdown; reasons stand below it, numbered."""
  names = list(TARGETS)
  lines = ["| op | | " + " | ".join(names) + " |",
           "|---|---|" + "---|" * len(names)]
  by_probe: dict[tuple[str, str], dict[str, Answer]] = {}
  for answer in answers:
    by_probe.setdefault((answer.op, answer.probe), {})[
        answer.implementation] = answer
  reasons: list[str] = []
  for (op, probe), said in by_probe.items():
    cells = []
    for name in names:
      answer = said[name]
      if answer.taken is None:
        cells.append("")
      elif answer.taken:
        cells.append("yes")
      else:
        if answer.reason not in reasons:
          reasons.append(answer.reason)
        cells.append(f"no ({reasons.index(answer.reason) + 1})")
    lines.append(f"| {op} | {probe} | " + " | ".join(cells) + " |")
  if reasons:
    lines.append("")
    lines += [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
  return "\n".join(lines)


def _bare(message: str, op: str, implementation: str) -> str:
  """The reason without what the dispatcher puts before it."""
  return message.removeprefix(f"{op}: ").removeprefix(f"{implementation}: ")
