# SPDX-License-Identifier: Apache-2.0
"""How long an op takes on a device, without what it costs to call it.

A kernel of a decode step takes some microseconds, and a call from Python takes
more. So it is called many times within one program, each time after the time
before, and two counts of times are told apart.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# What is measured takes about this long.
SECONDS = 0.05
MOST_CALLS = 10_000
# No difference of two times counts as less, so that it can divide.
SHORTEST = 1e-9


def repeated(call: Callable[..., Any], donated: tuple[int, ...] = ()
             ) -> Callable[..., Any]:
  """A function of a count and of the arguments, which calls that many times.

  What would be donated goes from call to call, in the memory it is in.

  Returns:
    A function that gives a scalar. Nothing in it can be left out or taken out
    of the loop: every call waits for the one before.
  """
  @jax.jit
  def run(count, *arguments):
    leaves, tree = jax.tree.flatten(arguments)
    at = [len(jax.tree.leaves(arguments[:i])) for i in range(
        len(arguments) + 1)]
    moving = [i for d in donated for i in range(at[d], at[d + 1])]

    def body(_, carry):
      kept, total = carry
      now = list(leaves)
      for i, leaf in zip(moving, kept):
        now[i] = leaf
      # The inputs are not known before the last call is done.
      now, total = lax.optimization_barrier((now, total))
      out = jax.tree.leaves(call(*jax.tree.unflatten(tree, now)))
      out = lax.optimization_barrier(out)
      kept = [_successor(leaf, out) for leaf in kept]
      first = sum(jnp.ravel(x)[0].astype(jnp.float32) for x in out)
      return kept, total + first

    return lax.fori_loop(
        0, count, body, ([leaves[i] for i in moving], jnp.float32(0)))[1]

  return run


def _successor(leaf, out):
  """The result that took over the memory of an argument: the one like it."""
  for i, x in enumerate(out):
    if x.shape == leaf.shape and x.dtype == leaf.dtype:
      return out.pop(i)
  raise ValueError(f"{leaf.shape} of {leaf.dtype} is donated, and no result is "
                   "like it")


def measure(call: Callable[..., Any], arguments: tuple[Any, ...],
            donated: tuple[int, ...] = (), *, repeats: int = 5,
            seconds: float = SECONDS) -> float:
  """Seconds that one call takes: the median of `repeats` measurements."""
  run = repeated(call, donated)

  def clock(count: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(count, *arguments))
    return time.perf_counter() - start

  clock(1)                                           # compiles
  once = min(clock(1) for _ in range(2))
  # An upper bound of what a call takes, so there is a second, longer trial.
  count = _count(seconds, once)
  count = _count(seconds, clock(1 + count) / (1 + count))
  return statistics.median(
      max(clock(1 + count) - clock(1), SHORTEST) / count
      for _ in range(repeats))


def _count(seconds: float, each: float) -> int:
  return max(1, min(MOST_CALLS, int(seconds / max(each, 1e-9))))
