# SPDX-License-Identifier: Apache-2.0
"""Typical acceptance: drafts that the model finds plausible stand. Lossy.

From Medusa (arXiv:2401.10774). A draft stands if its probability p(x) exceeds
min(epsilon, delta exp(-H)), H being the entropy of p: the less sure the model
is, the more it lets pass. The longest path wins, of several the likeliest.
Nothing is drawn to accept, so the law of the text is not the model's; a greedy
row is, token for token.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxspec import naming
from jaxspec.base import Proposal, Verdict
from jaxspec.sampling import Sampling, draw
from jaxspec.verifiers.exact import deepest, ending


@dataclasses.dataclass(frozen=True)
class Typical:
  """Takes the longest path of plausible drafts.

  Attributes:
    epsilon: what is likelier stands in any case.
    delta: how strict it is where the model is not sure.
  """

  epsilon: float = 0.09
  delta: float = 0.3

  honest: ClassVar[bool] = False
  lossy: ClassVar[bool] = True
  label: ClassVar[str] = "typical(lossy)"

  def __post_init__(self):
    for name in ("epsilon", "delta"):
      object.__setattr__(self, name, naming.number(
          "verifier typical", name, getattr(self, name), 0, 1))

  def __call__(self, proposal: Proposal, logits: Float[Array, "B N V"],
               sampling: Sampling, positions: Int[Array, "B N"]) -> Verdict:
    rows = jnp.arange(len(logits))[:, None]
    parents = jnp.maximum(proposal.parents, 0)
    total, entropy = _measures(logits)
    chance = logits[rows, parents, proposal.tokens] - total[rows, parents]
    enough = jnp.minimum(self.epsilon,
                         self.delta * jnp.exp(-entropy[rows, parents]))
    best = jnp.argmax(logits, axis=-1)[rows, parents]
    stands = jnp.where(sampling.temperature[:, None] > 0,
                       jnp.exp(chance) > enough, proposal.tokens == best)
    # Of a path, the root left out: the root's chance is not known.
    chance = jnp.where(jnp.arange(proposal.tree.size)[None] > 0, chance, 0)
    path = jnp.sum(jnp.where(proposal.mask, chance[:, None], 0), axis=-1)
    node = deepest(proposal, stands, path)
    own = draw(logits[rows, node[:, None]], sampling,
               positions[rows, node[:, None]])
    return ending(proposal, node, own[:, 0])


def _measures(logits):
  """Log of the sum of exponentials, and entropy, of each node."""
  # One node after another, as `sampling.draw` does: there are temporaries as
  # large as the logits of all of them otherwise.
  def node(n, found):
    x = lax.dynamic_index_in_dim(logits, n, axis=1, keepdims=False)
    total = jax.nn.logsumexp(x, axis=-1)
    log_p = x - total[:, None]
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1)
    return tuple(lax.dynamic_update_index_in_dim(old, new, n, axis=1)
                 for old, new in zip(found, (total, entropy)))
  zeros = jnp.zeros(logits.shape[:2], jnp.float32)
  return lax.fori_loop(0, logits.shape[1], node, (zeros, zeros))
