# SPDX-License-Identifier: Apache-2.0
"""Acceptance at a given rate, whatever was drafted: a tool, not a decoder.

For work on speed without a trained drafter, as with random weights. First
children are walked, each of which stands by a coin. What was drafted and
accepted becomes the text, so the text is NOT the model's, and everything that
reports on such a run says so.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxspec import naming
from jaxspec import sampling as noise
from jaxspec.base import Proposal, Verdict
from jaxspec.sampling import Laws
from jaxspec.verifiers.exact import deepest, ending


@dataclasses.dataclass(frozen=True)
class Simulated:
  """Takes first children, each with probability `rate` if its parent stood.

  Coins depend on the request and the position alone. The next token is the
  model's own sample.
  """

  rate: float = 0.7

  honest: ClassVar[bool] = False
  lossy: ClassVar[bool] = True

  def __post_init__(self):
    object.__setattr__(self, "rate", naming.number(
        "verifier simulated", "rate", self.rate, 0, 1))

  @property
  def label(self) -> str:
    return f"simulated({self.rate:g}, not the model's text)"

  def __call__(self, proposal: Proposal, laws: Laws) -> Verdict:
    rows, size = laws.positions.shape
    parents = proposal.parents
    elder = jnp.tril(jnp.ones((size, size), bool), -1)[None]
    first = ~jnp.any((parents[:, :, None] == parents[:, None]) & elder,
                     axis=-1)
    coin = noise.coins(
        jnp.repeat(laws.sampling.key, size), laws.positions.reshape(-1),
        jnp.zeros(rows * size, jnp.int32)).reshape(rows, size)
    node = deepest(proposal, first & (coin < self.rate))
    return ending(proposal, node, laws.draw(node))
