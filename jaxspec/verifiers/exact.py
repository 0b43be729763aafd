# SPDX-License-Identifier: Apache-2.0
"""Sample and match: the committed text is what plain decoding would give.

At every node the model's own sample is drawn, with noise that depends on the
request and the position alone. A drafted token stands if it is the sample of
its parent. Whatever was drafted, each committed token is therefore the sample
plain decoding would have drawn behind the same text with the same noise: the
law, and for a given seed the very tokens, are those of plain decoding. It
needs no draft probabilities and serves any tree.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspec import kernels
from jaxspec.base import Proposal, Verdict
from jaxspec.sampling import Laws


def exact(proposal: Proposal, laws: Laws) -> Verdict:
  """Takes the deepest node whose whole path was sampled.

  Where a kernel reads all logits in less time than a walk takes to wait for
  each node, samples are drawn behind all nodes at once; they are the same.
  """
  def walk():
    return follow(proposal, laws.draw)

  def at_once():
    sample = laws.draw_all()
    parents = jnp.maximum(proposal.parents, 0)
    node = deepest(proposal, proposal.tokens == jnp.take_along_axis(
        sample, parents, axis=1))
    return ending(proposal, node, jnp.take_along_axis(
        sample, node[:, None], axis=1)[:, 0])

  if not _kernels(laws):
    return walk()
  return jax.lax.cond(laws.plain(), at_once, walk)


def _kernels(laws: Laws) -> bool:
  """Whether the target has kernels, which make noise as jax does by default."""
  return (kernels.wanted()
          and str(jax.random.key_impl(laws.sampling.key)) == "threefry2x32"
          and jax.config.jax_threefry_partitionable)


def follow(proposal: Proposal,
           sample: Callable[[Int[Array, "B"]], Int[Array, "B"]]) -> Verdict:
  """Goes down from the root, as long as a live child was sampled.

  Depth by depth: so a sample is drawn for each accepted node and no other.
  Siblings that hold the same token are followed side by side.

  Args:
    sample: of one node of each row.
  """
  start = jnp.zeros_like(proposal.tokens[:, 0])
  here = (jnp.arange(proposal.tree.size)[None] == 0) & proposal.alive
  token = sample(start)
  if not proposal.tree.height:
    return ending(proposal, start, token)
  parents = jnp.maximum(proposal.parents, 0)
  drafted = proposal.alive & (proposal.depths > 0)

  def below(here, token):
    """The children that were sampled, of what was reached."""
    return (jnp.take_along_axis(here, parents, axis=1) & drafted
            & (proposal.tokens == token[:, None]))

  def further(walk):
    _, _, beyond = walk
    return jnp.any(beyond)

  def go(walk):
    node, token, beyond = walk
    moves = jnp.any(beyond, axis=1)
    node = jnp.where(moves, jnp.argmax(beyond, axis=1), node)
    token = jnp.where(moves, sample(node), token)
    return node, token, below(beyond, token)

  node, token, _ = jax.lax.while_loop(
      further, go, (start, token, below(here, token)))
  return ending(proposal, node, token)


def deepest(proposal: Proposal, stands: Bool[Array, "B N"],
            score: Float[Array, "B N"] | None = None) -> Int[Array, "B"]:
  """The last node of the longest path of live nodes that stand.

  Of several, the one of the best score, or the first.
  """
  stands = (stands & proposal.alive).at[:, 0].set(True)
  reached = jnp.all(stands[:, None] | ~proposal.mask, axis=-1)
  depth = jnp.where(reached, proposal.depths, -1)
  if score is not None:
    last = depth == jnp.max(depth, axis=1, keepdims=True)
    return jnp.argmax(jnp.where(last, score, -jnp.inf), axis=1)
  return jnp.argmax(depth, axis=1)


def ending(proposal: Proposal, node: Int[Array, "B"],
           next_token: Int[Array, "B"]) -> Verdict:
  """The path to `node`, and the token behind it."""
  depth = jnp.take_along_axis(proposal.depths, node[:, None], axis=1)[:, 0]
  return Verdict(path=proposal.path_to(node), kept=depth + 1,
                 next_token=next_token)
