# SPDX-License-Identifier: Apache-2.0
"""Rejection: drafts that were drawn by chance stand by chance.

The ratio test of speculative sampling (arXiv:2211.17192, arXiv:2302.01318),
and behind a rejection the same test of the next sibling against what is left
of the law (recursive rejection, arXiv:2305.09781). The law of the text is that
of plain decoding; unlike with `exact`, its tokens are others.

For drafts that are sampled from a law which the drafter reports. Without it
they count as certain, which is right for any tree; but then `exact` accepts as
much, and more where drafts were drawn with its noise.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxspec import sampling as noise
from jaxspec.base import Proposal, Verdict
from jaxspec.sampling import Laws, Sampling
from jaxspec.verifiers.exact import ending


@dataclasses.dataclass(frozen=True)
class Rejection:
  """Takes drafts so that the text has the law of the model."""

  honest: ClassVar[bool] = True
  lossy: ClassVar[bool] = False
  label: ClassVar[str] = "rejection"

  def __call__(self, proposal: Proposal, laws: Laws) -> Verdict:
    return ratio_walk(proposal, laws, lambda p, q, drafted: p)


def ratio_walk(
    proposal: Proposal, laws: Laws,
    wanted: Callable[[Float[Array, "B V"], Float[Array, "B V"] | None,
                      Bool[Array, "B"]], Float[Array, "B V"]]) -> Verdict:
  """One pass over the nodes, in which each row goes down one path.

  Parents come before children, and siblings in the order they were drawn. So
  node i is either a child of the node its row has reached, and is tested, or
  it is none of that row's business. A row carries p, the law wanted of its
  next token, and q, the law its next draft was drawn from:

    accept x with probability min(1, p[x] / q[x]), and go there; else
    p <- norm(max(0, p - q)), and q <- q without x, unless x was put back.

  The next token is drawn from the p in the end. By induction over siblings it
  has the law wanted at its node, whatever was drafted:
  min(p, q) + (1 - sum(min(p, q))) norm(max(0, p - q)) = p.

  Coins and the last draw depend on the request, the position and which sibling
  is tested alone, and on no noise a drafter may have used. A position is
  tested in one step and never again.

  Args:
    wanted: from the model's law at a node, the law its children were drawn
      from, if any is known, and whether it has children, the law that the
      token behind that node shall have.
  """
  size = proposal.tree.size
  parents, alive = proposal.parents, proposal.alive
  sampling, positions = laws.sampling, laws.positions
  rows = jnp.arange(len(positions))
  drafted = jnp.any(
      (parents[:, None] == jnp.arange(size)[None, :, None])
      & alive[:, None], axis=-1)                                   # [B N]

  def both(n):
    """Laws at node `n`: few at a time, for each is as wide as the words."""
    q = None
    if proposal.probs is not None:
      q = _at(proposal.probs, n).astype(jnp.float32)
    p = target(laws.at(jnp.full(len(rows), n)), sampling)
    return wanted(p, q, _at(drafted, n)), q

  def test(n, carry):
    node, tries, p, q = carry
    tested = _at(alive, n) & (_at(parents, n) == node)
    token = _at(proposal.tokens, n)
    law = drawn_from(q, token, p.shape[1])
    coin = noise.coins(sampling.key, positions[rows, node], tries)
    # (A ratio would divide by zero.)
    stands = coin * law[rows, token] < p[rows, token]
    taken, refused = tested & stands, tested & ~stands

    def leave(p, q):
      p = jnp.where(refused[:, None], residual(p, law), p)
      if q is not None and not proposal.replacement:
        q = jnp.where(refused[:, None], without(q, token), q)
      return p, q

    def go(p, q):
      there = both(n)
      return jax.tree.map(
          lambda new, old: jnp.where(taken[:, None], new, old), there, (p, q))

    def keep(p, q):
      return p, q

    p, q = lax.cond(jnp.any(refused), leave, keep, p, q)
    p, q = lax.cond(jnp.any(taken), go, keep, p, q)
    return (jnp.where(taken, n, node), jnp.where(taken, 0, tries + refused),
            p, q)

  start = jnp.zeros(len(rows), jnp.int32)
  node, _, p, _ = lax.fori_loop(1, size, test, (start, start, *both(0)))
  return ending(proposal, node,
                last_draw(p, sampling, positions[rows, node]))


def target(logits: Float[Array, "B V"], sampling: Sampling
           ) -> Float[Array, "B V"]:
  """The model's law; all on the likeliest token in a greedy row."""
  best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
  return jnp.where(sampling.temperature[:, None] > 0,
                   jax.nn.softmax(logits, axis=-1), best)


def drawn_from(q: Float[Array, "B V"] | None, token: Int[Array, "B"],
               vocab: int) -> Float[Array, "B V"]:
  """The law a draft came from.

  A draft that its own law rules out was not drawn from it: it fills a tree
  when nothing is left to draw, as in a greedy row, and counts as certain.
  """
  certain = jax.nn.one_hot(token, vocab)
  if q is None:
    return certain
  chance = jnp.take_along_axis(q, token[:, None], axis=1)
  return jnp.where(chance > 0, q, certain)


def residual(p: Float[Array, "B V"], q: Float[Array, "B V"]
             ) -> Float[Array, "B V"]:
  """What p has more than q, as a law; p itself where rounding leaves none."""
  return _normalised(jnp.maximum(p - q, 0), p)


def without(q: Float[Array, "B V"], token: Int[Array, "B"]
            ) -> Float[Array, "B V"]:
  """The law of the next draw if `token` is not put back; 0 if none is left."""
  rest = q.at[jnp.arange(len(q)), token].set(0)
  return _normalised(rest, rest)


def last_draw(p: Float[Array, "B V"], sampling: Sampling,
              positions: Int[Array, "B"]) -> Int[Array, "B"]:
  """A sample of p."""
  gumbel = noise.gumbel(noise.apart(sampling.key), positions, p.shape[-1])
  return jnp.argmax(jnp.log(p) + gumbel, axis=-1).astype(jnp.int32)


def _normalised(weights, otherwise):
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1),
                   otherwise)


def _at(values, n):
  """What is at node `n` of every row."""
  return lax.dynamic_index_in_dim(values, n, axis=1, keepdims=False)
