# SPDX-License-Identifier: Apache-2.0
"""Which implementation takes what, as the dispatcher says when it is asked.

Every case, and every case of another type, is traced with shapes: an
implementation takes it, or gives its reason.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.errors import InputError
from pallas_kernels.target import Target, aim

TARGETS = {"tpu": Target("tpu", "TPU v5 lite"),
           "gpu": Target("gpu", "NVIDIA H100 80GB HBM3"),
           "xla": Target("cpu", "cpu")}
DTYPES = ("float32", "float16")
# What names of cases begin with.
_MODEL = re.compile(
    r"^(smollm2-135m|llama3-8b|llama3-70b(/8| of 8| of tp 8|, one of 8)?),? +")


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
  """In Markdown; reasons stand below it, numbered.

  What is answered alike for all models is one row.
  """
  names = list(TARGETS)
  lines = ["| op | | " + " | ".join(names) + " |",
           "|---|---|" + "---|" * len(names)]
  reasons: list[str] = []
  said: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {}
  for op, probe in dict.fromkeys((a.op, a.probe) for a in answers):
    cells = {a.implementation: _cell(a, reasons)
             for a in answers if (a.op, a.probe) == (op, probe)}
    said.setdefault((op, _MODEL.sub("", probe)), {})[probe] = tuple(
        cells[name] for name in names)
  for (op, what), by_probe in said.items():
    if len(set(by_probe.values())) == 1:
      by_probe = {what: next(iter(by_probe.values()))}
    lines += [f"| {op} | {probe} | " + " | ".join(cells) + " |"
              for probe, cells in by_probe.items()]
  if reasons:
    lines.append("")
    lines += [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
  return "\n".join(lines)


def insert(text: str, shown: str, name: str = "support") -> str:
  """Puts a table between the marks of its name in a README.

  Raises:
    InputError: there are no marks.
  """
  marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
  before, begin, rest = text.partition(marks[0])
  _, end, after = rest.partition(marks[1])
  if not begin or not end:
    raise InputError(f"the file has no lines {marks[0]!r} and {marks[1]!r} for "
                     "the table to stand between")
  return f"{before}{begin}\n{shown}\n{end}{after}"


def _cell(answer: Answer, reasons: list[str]) -> str:
  if answer.taken is None:
    return ""
  if answer.taken:
    return "yes"
  if answer.reason not in reasons:
    reasons.append(answer.reason)
  return f"no ({reasons.index(answer.reason) + 1})"


def _bare(message: str, op: str, implementation: str) -> str:
  """The reason without what the dispatcher puts before it."""
  return message.removeprefix(f"{op}: ").removeprefix(f"{implementation}: ")
