# SPDX-License-Identifier: Apache-2.0
"""Sample and match: the committed text is what plain decoding would give.

At every node the model's own sample is drawn, with noise that depends on the
request and the position alone. A drafted token stands if it is the sample of
its parent. Whatever was drafted, each committed token is therefore the sample
plain decoding would have drawn behind the same text with the same noise: the
law, and for a given seed the very tokens, are those of plain decoding. It
needs no draft probabilities and serves any tree.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspec.base import Proposal, Verdict
from jaxspec.sampling import Sampling, draw


def exact(proposal: Proposal, logits: Float[Array, "B N V"],
          sampling: Sampling, positions: Int[Array, "B N"]) -> Verdict:
  """Takes the deepest node whose whole path was sampled."""
  return match(proposal, draw(logits, sampling, positions))


def match(proposal: Proposal, samples: Int[Array, "B N"]) -> Verdict:
  """The longest path on which every token is its parent's sample."""
  parents = jnp.maximum(proposal.parents, 0)
  stands = proposal.tokens == jnp.take_along_axis(samples, parents, axis=1)
  return longest(proposal, stands, samples)


def longest(proposal: Proposal, stands: Bool[Array, "B N"],
            samples: Int[Array, "B N"]) -> Verdict:
  """The longest path of live nodes that stand, and the sample behind it."""
  node = deepest(proposal, stands)
  return ending(proposal, node, jnp.take_along_axis(
      samples, node[:, None], axis=1)[:, 0])


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
