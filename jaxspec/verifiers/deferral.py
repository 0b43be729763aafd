# SPDX-License-Identifier: Apache-2.0
"""Speculative cascades: the drafter's law where it is as sure as the model.

From "Faster Cascades via Speculative Decoding" (Narasimhan et al., 2025,
arXiv:2405.19261). The ratio test runs against a mixture of the model's law p
and the drafter's law q in place of p. So the text has, exactly, the law of
that mixture, and is lossy against the model by a knob.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxspec import naming
from jaxspec.base import Proposal, Verdict
from jaxspec.errors import InputError
from jaxspec.sampling import Laws
from jaxspec.verifiers.rejection import ratio_walk


@dataclasses.dataclass(frozen=True)
class Deferral:
  """Takes drafts so that the text has the law of a cascade.

  The law of a token, p and q being what is left after all warps:

  * `rule="sure"`: q, if max q >= max p - alpha TV(p, q); else p. TV is the
    total variation distance, half the sum of |p - q|.
  * `rule="token"`: q on the tokens with p >= (1 - alpha) max p; the mass that
    q has elsewhere is distributed as p.

  It is p, in any case, where nothing was drafted (as for the token behind the
  last draft) and in a greedy row, whose laws are all equally sure: there the
  text is the model's own.

  Attributes:
    alpha: how much the drafter may lack, in [0, 1]. With 0 it must be as sure
      as the model; with 1 every drafted token is the drafter's.
  """

  alpha: float = 0.2
  rule: str = "sure"

  honest: ClassVar[bool] = True
  needs_probs: ClassVar[bool] = True
  lossy: ClassVar[bool] = True
  label: ClassVar[str] = "deferral(lossy)"

  def __post_init__(self):
    object.__setattr__(self, "alpha", naming.number(
        "verifier deferral", "alpha", self.alpha, 0, 1))
    if self.rule not in ("sure", "token"):
      raise InputError("verifier deferral: rule must be sure or token, got "
                       f"{self.rule!r}")

  def __call__(self, proposal: Proposal, laws: Laws) -> Verdict:
    if proposal.probs is None and proposal.tree.size > 1:
      raise InputError(
          "verifier deferral must know the law that drafts were drawn from, "
          "and this drafter reports none; use --verifier=exact with it")

    def wanted(p, q, drafted):
      if q is None:
        return p
      mixed = drafted & (laws.sampling.temperature > 0)
      return jnp.where(mixed[:, None], self.mixture(p, q), p)

    return ratio_walk(proposal, laws, wanted)

  def mixture(self, p: Float[Array, "B V"], q: Float[Array, "B V"]
              ) -> Float[Array, "B V"]:
    """The law of a token that was drafted."""
    most = jnp.max(p, axis=-1, keepdims=True)
    if self.rule == "token":
      fine = p >= (1 - self.alpha) * most
      rest = jnp.sum(jnp.where(fine, 0, q), axis=-1, keepdims=True)
      return jnp.where(fine, q, 0) + p * rest
    apart = jnp.sum(jnp.abs(p - q), axis=-1, keepdims=True) / 2
    sure = jnp.max(q, axis=-1, keepdims=True) >= most - self.alpha * apart
    return jnp.where(sure, q, p)
