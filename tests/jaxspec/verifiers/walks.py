# SPDX-License-Identifier: Apache-2.0
"""Trees, rows and laws for the tests of verifiers; the walk in plain Python.

`walk` follows recursive rejection from its definition, in float64, one row at
a time and with recursion where the package has one loop over all nodes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import sampling

Law = np.ndarray


def rows(temperature: float | Sequence[float], seeds: Sequence[int]
         ) -> sampling.Sampling:
  """How rows of these seeds are sampled."""
  count = len(seeds)
  return sampling.defaults(count, 1).replace(
      temperature=jnp.broadcast_to(
          jnp.asarray(temperature, jnp.float32), (count,)),
      key=jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)))


def positions(proposal: Any, start: int = 5) -> jax.Array:
  """Of the token behind each node."""
  return start + proposal.depths


def law(rng: np.random.Generator, *shape: int, zeros: float = 0.2) -> Law:
  """Random laws, some of whose tokens are ruled out."""
  weights = rng.exponential(size=shape)**2
  weights *= rng.random(shape) >= zeros
  weights[..., 0] += 1e-3
  return weights / weights.sum(axis=-1, keepdims=True)


def norm(weights: Law, otherwise: Law) -> Law:
  return weights / weights.sum() if weights.sum() > 0 else otherwise


def certain(token: int, vocab: int) -> Law:
  return np.eye(vocab)[token]


def outcomes(children: Callable[[int], Sequence[int]], tokens: Sequence[int],
             wanted: Callable[[int], Law], drawn: Callable[[int], Law | None],
             replacement: bool) -> Iterator[tuple[float, tuple[int, ...], Law]]:
  """Every way the walk can go, with its probability.

  Yields:
    The probability, the nodes taken, and the law of the next token.
  """
  def at(node, path):
    p, q = wanted(node), drawn(node)
    vocab, chance = len(p), 1.0
    for child in children(node):
      x = tokens[child]
      ruled_out = q is None or q[x] == 0
      r = certain(x, vocab) if ruled_out else q
      takes = min(1.0, p[x] / r[x])
      for further, nodes, last in at(child, (*path, child)):
        yield chance * takes * further, nodes, last
      chance *= 1 - takes
      p = norm(np.maximum(p - r, 0), p)
      if q is not None and not replacement:
        left = np.where(np.arange(vocab) == x, 0, q)
        q = norm(left, left)
    yield chance, path, p

  return at(0, ())


def walk(children: Callable[[int], Sequence[int]], tokens: Sequence[int],
         wanted: Callable[[int], Law], drawn: Callable[[int], Law | None],
         replacement: bool, coin: Callable[[int, int], float]
         ) -> tuple[list[int], Law, float]:
  """The way it goes for given coins.

  Args:
    coin: of a node and the number of the child that is tested.

  Returns:
    The nodes taken, the law of the next token, and how close the closest
    decision was.
  """
  node, path, margin = 0, [], 1.0
  while True:
    p, q = wanted(node), drawn(node)
    for number, child in enumerate(children(node)):
      x = tokens[child]
      r = certain(x, len(p)) if q is None or q[x] == 0 else q
      toss = coin(node, number)
      margin = min(margin, abs(toss * r[x] - p[x]))
      if toss * r[x] < p[x]:
        node = child
        path.append(child)
        break
      p = norm(np.maximum(p - r, 0), p)
      if q is not None and not replacement:
        left = np.where(np.arange(len(p)) == x, 0, q)
        q = norm(left, left)
    else:
      return path, p, margin
