# SPDX-License-Identifier: Apache-2.0
"""Finds sizes of blocks by trying them on the device that is here.

What an op asks `blocks.choose` while it is traced says what there is to choose;
the candidates are the heuristic's answer and its neighbours by powers of two.
One that does not compile, or whose results differ, is no candidate.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import blocks, timing
from pallas_kernels.blocks import Blocks
from pallas_kernels.case import Case
from pallas_kernels.errors import InputError
from pallas_kernels.target import Target, aim, of

FACTORS = (0.25, 0.5, 1, 2, 4)
# A candidate must be this much faster than the heuristic to enter the table.
GAIN = 0.97

_COUNT = itertools.count()


@dataclasses.dataclass(frozen=True)
class Trial:
  """One candidate of one case.

  Attributes:
    op: that whose table is asked, which may be another than the case's.
    seconds: of one call; None where it is no candidate.
    reason: why not.
  """

  case: Case
  op: str
  key: str
  blocks: Blocks
  seconds: float | None
  reason: str = ""


def local_target(interpret: bool = False) -> Target:
  """The accelerator of this machine; with `interpret`, a TPU that is not here.

  Raises:
    InputError: there is no accelerator.
  """
  if interpret:
    return Target("tpu", "TPU v5 lite", interpret=True)
  found = of(jax.devices()[0])
  if found.platform not in ("tpu", "gpu"):
    raise InputError(
        "blocks are tuned on a TPU or a GPU, and this machine has only a "
        f"{found.platform}; --interpret tries the command without one")
  return found


def candidates(guess: Blocks) -> list[Blocks]:
  """The heuristic's answer, and its neighbours."""
  whole = isinstance(guess, tuple)
  sizes = guess if isinstance(guess, tuple) else (guess,)
  found = [tuple(int(size * factor) for size, factor in zip(sizes, factors))
           for factors in itertools.product(FACTORS, repeat=len(sizes))
           if all((size * factor) % 1 == 0 and size * factor >= 1
                  for size, factor in zip(sizes, factors))]
  found.sort(key=lambda f: f != sizes)                 # the guess comes first
  return [f if whole else f[0] for f in found]


def tune(cases: Sequence[Case], target: Target, *, repeats: int = 5,
         seconds: float = timing.SECONDS,
         among: Callable[[Blocks], list[Blocks]] = candidates
         ) -> Iterator[list[Trial]]:
  """Yields the trials of every choice that a case's kernel asks for.

  Choices of the same key are tried once. Where a case asks for several, each
  is tried with the best of those before it.
  """
  done: set[tuple[str, str]] = set()
  for case in cases:
    call = lambda *args, case=case: case.call(
        *args, implementation=target.platform)
    try:
      # A trial of nothing: what was traced before would ask nothing any more.
      with (aim(target), blocks.trial(((("", str(next(_COUNT))), 0),)),
            blocks.watch() as asked):
        jax.eval_shape(call, *case.arguments)
    except NotImplementedError as e:
      yield [Trial(case, "", "", 0, None, str(e))]
      continue
    best: dict[tuple[str, str], Blocks] = {}
    for choice, guess in asked.items():
      if choice in done:
        continue
      done.add(choice)
      arrays = case.sample(0)
      trials: list[Trial] = []
      reference = None
      for candidate in among(guess):
        fixed = tuple({**best, choice: candidate}.items())
        try:
          with aim(target), blocks.trial(fixed):
            result = jax.jit(call)(*arrays)
            if reference is None:
              reference = result
            problem = _difference(result, reference)
            taken = None if problem else timing.measure(
                call, arrays, case.donated, repeats=repeats, seconds=seconds)
        except Exception as e:           # a compiler may raise anything
          taken, problem = None, str(e).strip().partition("\n")[0]
          if not trials:                 # the heuristic itself does not work
            yield [Trial(case, *choice, candidate, None, problem)]
            break
        trials.append(Trial(case, *choice, candidate, taken, problem))
      else:
        yield trials
        best[choice] = winner(trials).blocks


def winner(trials: Sequence[Trial]) -> Trial:
  """The fastest, if it beats the heuristic clearly; else that one."""
  first = trials[0]
  assert first.seconds is not None
  best = min((t for t in trials if t.seconds is not None),
             key=lambda t: t.seconds)
  return best if best.seconds < GAIN * first.seconds else first


def enter(table: blocks.Table, target: Target, trials: Sequence[Trial]
          ) -> None:
  """Writes the winner into a table."""
  best = winner(trials)
  ops = table.setdefault(target.kind, {})
  ops.setdefault(best.op, {})[best.key] = best.blocks


def _difference(result: Any, reference: Any) -> str:
  """Says whether two results differ by more than the order of sums does."""
  for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(reference)):
    if not jnp.issubdtype(a.dtype, jnp.floating):
      if not np.array_equal(np.asarray(a), np.asarray(b)):
        return "the result is another one than with the heuristic's blocks"
      continue
    a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
    most = np.max(np.abs(b), initial=0.0, where=np.isfinite(b))
    if not np.allclose(a, b, rtol=0.02, atol=0.02 * most, equal_nan=True):
      return "the result is another one than with the heuristic's blocks"
  return ""
