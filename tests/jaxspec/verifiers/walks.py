# SPDX-License-Identifier: Apache-2.0
"""Trees, rows and laws for the tests of verifiers; the walk in plain Python.

`walk` follows recursive rejection from its definition, in float64, one row at
a time and with recursion where the package has one loop over all nodes.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import sampling
from jaxspec.base import Proposal

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


def laws(logits: Any, row: sampling.Sampling, at: Any) -> sampling.Laws:
  """Of a pass whose text is of no importance."""
  count, size, _ = logits.shape
  one, nodes = jnp.ones(count, jnp.int32), jnp.zeros((count, size), jnp.int32)
  history = sampling.History(one[:, None], one, one, nodes,
                             jnp.ones((count, size, size), bool))
  return sampling.Laws(jnp.asarray(logits), row, history, jnp.asarray(at))


def draw(logits: Any, row: sampling.Sampling, at: Any) -> np.ndarray:
  """The sample behind every node."""
  said = laws(logits, row, at)
  nodes = jnp.broadcast_to(jnp.arange(at.shape[1])[:, None], at.shape[::-1])
  return np.asarray(jax.jit(jax.vmap(said.draw))(nodes).T)


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


def case(tree: Any, kind: str, count: int = 300, vocab: int = 5,
         seed: int = 0, temperature: float = 1.0, live: Any = None) -> tuple:
  """A proposal, laws of its nodes, and how its rows are sampled.

  Args:
    kind: whether siblings are drawn "with" replacement or "without", or the
      law they were drawn from is not reported, "certain".
  """
  rng = np.random.default_rng(seed)
  size = tree.size
  p = law(rng, count, size, vocab)
  q = law(rng, count, size, vocab)
  # In every other row laws are alike, so that the walk goes far.
  q[::2] = 0.3 * q[::2] + 0.7 * p[::2]
  parents = np.broadcast_to(np.asarray(tree.parents), (count, size))
  tokens = np.zeros((count, size), np.int32)
  for row in range(count):
    for node in range(1, size):
      draw = q[row, parents[row, node]]
      if kind == "without":
        elders = [n for n in range(1, node)
                  if parents[row, n] == parents[row, node]]
        draw = draw.copy()
        draw[tokens[row, elders]] = 0
        draw = norm(draw, np.eye(vocab)[node % vocab])
      tokens[row, node] = rng.choice(vocab, p=draw)
  proposal = Proposal(
      jnp.asarray(tokens), tree, live=live,
      probs=None if kind == "certain" else jnp.asarray(q, jnp.float32),
      replacement=kind == "with")
  return (proposal, p, None if kind == "certain" else q,
          rows(temperature, range(count)))


@jax.jit
def _tosses(key, at):
  """The coins behind each node, one for each child it may have."""
  numbers = jnp.arange(at.shape[1])
  return jax.vmap(jax.vmap(
      lambda key, at: sampling.coins(
          jnp.repeat(key[None], len(numbers)),
          jnp.repeat(at[None], len(numbers)), numbers),
      (None, 0)))(key, at)


@functools.partial(jax.jit, static_argnames="vocab")
def _noise(key, at, vocab):
  """The noise with which the token behind each node is drawn."""
  return jax.vmap(
      lambda at: sampling.gumbel(sampling.apart(key), at, vocab), 1, 1)(at)


def check(verifier: Any, proposal: Proposal, p: Law, q: Law | None,
          row: sampling.Sampling,
          wanted: Callable = lambda p, q, drafted: p) -> list[int]:
  """Sees that every row goes the way `walk` goes for the same coins.

  Args:
    wanted: the law wanted at a node, from that of the model and that of the
      drafts, and whether there are any.

  Returns:
    How many drafts were accepted in each row.
  """
  with np.errstate(divide="ignore"):
    logits = jnp.asarray(np.log(p), jnp.float32)
  at = positions(proposal)
  count, size, vocab = p.shape
  toss = _tosses(row.key, at)
  last = _noise(row.key, at, vocab)
  verdict = jax.jit(verifier)(proposal, laws(logits, row, at))
  toss, last, parents, alive, tokens, path, kept, next_token = (
      np.asarray(x) for x in (
          toss, last, proposal.parents, proposal.alive, proposal.tokens,
          verdict.path, verdict.kept, verdict.next_token))

  def one(b):
    def children(node):
      return [c for c in range(1, size)
              if alive[b, c] and parents[b, c] == node]

    def drawn(node):
      return None if q is None else q[b, node]

    taken, law, margin = walk(
        children, tokens[b],
        lambda n: wanted(p[b, n], drawn(n), bool(children(n))), drawn,
        proposal.replacement, lambda node, number: toss[b, node, number])
    scores = np.log(law, where=law > 1e-9, out=np.full(vocab, -np.inf))
    scores += last[b, [0, *taken][-1]]
    second, first = np.sort(scores)[-2:]
    if margin < 1e-6 or first - second < 1e-5:
      return None                    # closer than a float32 can tell
    assert path[b, :kept[b]].tolist() == [0, *taken]
    assert next_token[b] == np.argmax(scores)
    return len(taken)

  lengths = [length for length in map(one, range(count)) if length is not None]
  assert len(lengths) > 0.95 * count
  return lengths
