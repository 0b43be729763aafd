# SPDX-License-Identifier: Apache-2.0
"""One shape at which a kernel is compiled, counted and timed.

Every op has a file `cases.py` with a function `cases()`, which yields those of
the models people run: SmolLM2-135M, Llama-3-8B, and a device's part of
Llama-3-70B over eight.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.errors import InputError


@dataclasses.dataclass(frozen=True)
class Case:
  """A call with shapes instead of arrays.

  Attributes:
    op: the public function's name.
    name: the model and what is done, e.g. "llama3-8b, verify 8 of 4096".
    call: `call(*arguments, implementation=...)`.
    arguments: pytrees of `jax.ShapeDtypeStruct`.
    least_bytes: what must move between memory and chip: each input once, but
      for what the values of others rule out, and each output once.
    operations: multiplications and additions that must be done.
    moved_bytes: what the TPU kernel moves by its own blocks and grid.
    least_units: of `least_bytes`, what the units of memory make of it where
      what is written is smaller than one: a unit that is written in part is
      read and written. None where that is no matter.
    donated: positions of arguments whose memory the result takes over.
    sample: `sample(seed)` gives arrays that fit `arguments`, with lengths and
      the like in range.
  """

  op: str
  name: str
  call: Callable[..., Any]
  arguments: tuple[Any, ...]
  least_bytes: int
  operations: int
  moved_bytes: int
  sample: Callable[[int], tuple[Any, ...]]
  donated: tuple[int, ...] = ()
  least_units: int | None = None


def collect(ops: Sequence[str] = ()) -> list[Case]:
  """The cases of every folder that has a `cases.py`, or of some ops.

  Raises:
    InputError: an op has no cases.
  """
  here = pathlib.Path(__file__).parent
  found = [case for file in sorted(here.glob("*/cases.py"))
           for case in importlib.import_module(
               f"{here.name}.{file.parent.name}.cases").cases()]
  known = sorted({case.op for case in found})
  for op in ops:
    if op not in known:
      raise InputError(f"there are no cases of an op {op!r}; there are some of "
                       f"{', '.join(known) or 'none'}")
  return [case for case in found if not ops or case.op in ops]
