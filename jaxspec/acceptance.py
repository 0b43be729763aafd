# SPDX-License-Identifier: Apache-2.0
"""How often guesses are right, learned on the device while decoding.

A guess is judged only if the model has seen it and what it follows was
accepted. So the rates are conditional: the chance of a path is the product
along it.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxspec.base import Proposal, Verdict

# What each judgement leaves of the weight of older ones.
_ROW_MEMORY, _SHARED_MEMORY = 0.97, 0.995
# How many judgements of its own outweigh what was believed before.
_ROW_DOUBT, _SHARED_DOUBT = 3.0, 8.0


@struct.dataclass
class Acceptance:
  """Judged guesses by kind and by depth, older ones counting less.

  Attributes:
    tried, right: of each row's request.
    all_tried, all_right: of all rows and requests; None where a row's
      drafts must not depend on others.
    priors: what is believed of each kind before anything is judged.
  """

  tried: Float[Array, "B kinds depth"]
  right: Float[Array, "B kinds depth"]
  all_tried: Float[Array, "kinds depth"] | None
  all_right: Float[Array, "kinds depth"] | None
  priors: Float[Array, "kinds"]

  @classmethod
  def unknown(cls, rows: int, height: int, priors: tuple[float, ...], *,
              shared: bool) -> "Acceptance":
    """Nothing is judged yet."""
    row = jnp.zeros((rows, len(priors), height), jnp.float32)
    every = jnp.zeros(row.shape[1:], jnp.float32) if shared else None
    return cls(row, row, every, every, jnp.asarray(priors, jnp.float32))

  def begin(self, rows: Int[Array, "R"]) -> "Acceptance":
    """Forgets what was judged for the earlier requests of `rows`."""
    def wipe(x):
      return x.at[rows].set(0.0, mode="drop")
    return self.replace(tried=wipe(self.tried), right=wipe(self.right))

  def rates(self) -> Float[Array, "B kinds depth"]:
    """The chance of each guess, its parent accepted."""
    belief = jnp.broadcast_to(self.priors[:, None], self.tried.shape[1:])
    if self.all_tried is not None and self.all_right is not None:
      belief = ((self.all_right + _SHARED_DOUBT * belief)
                / (self.all_tried + _SHARED_DOUBT))
    return ((self.right + _ROW_DOUBT * belief[None])
            / (self.tried + _ROW_DOUBT))

  def of(self, kinds: Int[Array, "B N"], depths: Int[Array, "B N"]
         ) -> Float[Array, "B N"]:
    """The chance of each node, its parent accepted; 1 for a root."""
    rates = self.rates().reshape(len(kinds), -1)
    found = jnp.take_along_axis(rates, self._cells(kinds, depths), axis=1)
    return jnp.where(depths > 0, found, 1.0)

  def judge(self, kinds: Int[Array, "B N"], depths: Int[Array, "B N"],
            tried: Bool[Array, "B N"], right: Bool[Array, "B N"]
            ) -> "Acceptance":
    """Adds what became of some guesses."""
    shape = self.tried.shape
    here = (self._cells(kinds, depths)[..., None]
            == jnp.arange(shape[1] * shape[2])[None, None])

    def add(which):
      found = jnp.sum(here & which[..., None], axis=1, dtype=jnp.float32)
      return found.reshape(shape)

    tried, right = add(tried), add(tried & right)
    fade = _ROW_MEMORY ** tried
    changed = self.replace(tried=self.tried * fade + tried,
                           right=self.right * fade + right)
    if self.all_tried is None or self.all_right is None:
      return changed
    tried, right = tried.sum(axis=0), right.sum(axis=0)
    fade = _SHARED_MEMORY ** tried
    return changed.replace(all_tried=self.all_tried * fade + tried,
                           all_right=self.all_right * fade + right)

  def _cells(self, kinds, depths):
    """Where each guess stands in `tried`, its two dimensions taken as one."""
    return kinds * self.tried.shape[2] + jnp.maximum(depths - 1, 0)


def along(proposal: Proposal, chances: Float[Array, "B N"]
          ) -> Float[Array, "B N"]:
  """The chance of each node's whole path; 0 for a node that is not alive."""
  logs = jnp.log(jnp.maximum(chances, 1e-9))
  paths = jnp.exp(jnp.sum(
      jnp.where(proposal.mask, logs[:, None], 0.0), axis=-1))
  return jnp.where(proposal.alive, paths, 0.0)


def outcome(proposal: Proposal, verdict: Verdict
            ) -> tuple[Bool[Array, "B N"], Bool[Array, "B N"]]:
  """Which nodes a pass has judged, and which of them were right."""
  kept = verdict.walked(proposal.tree.size)
  parents = jnp.maximum(proposal.parents, 0)
  judged = (jnp.take_along_axis(kept, parents, axis=1) & proposal.alive
            & (proposal.depths > 0))
  return judged, judged & kept
