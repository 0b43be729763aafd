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
from jaxtyping import Array, Bool, Float

from jaxspec import naming
from jaxspec.base import Proposal, Verdict
from jaxspec.sampling import Laws
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

  def __call__(self, proposal: Proposal, laws: Laws) -> Verdict:
    chance, enough, best = self._judge(proposal, laws)
    stands = jnp.where(laws.sampling.temperature[:, None] > 0,
                       jnp.exp(chance) > enough, best)
    # Of a path, the root left out: the root's chance is not known.
    path = jnp.sum(jnp.where(proposal.mask, chance[:, None], 0), axis=-1)
    node = deepest(proposal, stands, path)
    return ending(proposal, node, laws.draw(node))

  def _judge(self, proposal: Proposal, laws: Laws
             ) -> tuple[Float[Array, "B N"], Float[Array, "B N"],
                        Bool[Array, "B N"]]:
    """Of each node, but for the root: the log of its token's chance, what is
    enough, and whether there is none likelier."""
    tokens, parents = proposal.tokens, proposal.parents

    def children(n, found):
      """Those of node n: few laws at a time, for each is as wide as the
      words."""
      law = laws.at(jnp.full(len(tokens), n))
      log_p = jax.nn.log_softmax(law, axis=-1)
      p = jnp.exp(log_p)
      entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1)
      enough = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
      told = (jnp.take_along_axis(log_p, tokens, axis=1), enough[:, None],
              tokens == jnp.argmax(law, axis=-1)[:, None])
      return tuple(jnp.where(parents == n, new, old)
                   for new, old in zip(told, found))

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    return lax.fori_loop(0, proposal.tree.size, children,
                         (zeros, zeros, jnp.zeros(tokens.shape, bool)))
