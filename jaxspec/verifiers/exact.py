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
from jaxtyping import Array, Float, Int

from jaxspec.base import Proposal, Verdict
from jaxspec.sampling import Sampling, draw


def exact(proposal: Proposal, logits: Float[Array, "B N V"],
          sampling: Sampling, positions: Int[Array, "B N"]) -> Verdict:
  """Takes the deepest node whose whole path was sampled."""
  return match(proposal, draw(logits, sampling, positions))


def match(proposal: Proposal, samples: Int[Array, "B N"]) -> Verdict:
  """The longest path on which every token is its parent's sample."""
  tree = proposal.tree
  parents = jnp.asarray(tree.parents).at[0].set(0)
  stands = (proposal.tokens == samples[:, parents]) & proposal.alive
  stands = stands.at[:, 0].set(True)
  reached = jnp.all(stands[:, None] | ~jnp.asarray(tree.mask)[None], axis=-1)
  depths = jnp.asarray(tree.depths)
  node = jnp.argmax(jnp.where(reached, depths[None], -1), axis=1)
  return Verdict(
      path=jnp.asarray(tree.paths)[node], kept=depths[node] + 1,
      next_token=jnp.take_along_axis(samples, node[:, None], axis=1)[:, 0])
