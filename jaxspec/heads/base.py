# SPDX-License-Identifier: Apache-2.0
"""What heads of every kind take from their model, and are told of it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxspec import kernels, sharding
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer
from pallas_kernels import proposal_head

# Of the tokens a head can say.
Ids = Int[np.ndarray, "W"] | Int[Array, "W"]


@struct.dataclass
class Spots:
  """Positions of texts at which heads are judged: all, or a few.

  Attributes:
    weight: what each counts.
    nth: its token's place in the answer that follows; negative in a prompt.
    tokens: of the texts.
  """

  row: Int[Array, "M"]
  column: Int[Array, "M"]
  weight: Float[Array, "M"]
  nth: Int[Array, "M"]
  tokens: Int[Array, "B T"]

  def of(self, x: Float[Array, "B T D"]) -> Float[Array, "M D"]:
    """What stands at each of them."""
    return x[self.row, self.column]

  def ahead(self, count: int) -> tuple[Int[Array, "M"], Bool[Array, "M"]]:
    """The columns so many behind, and which of them are in the text."""
    column, width = self.column + count, self.tokens.shape[1]
    return jnp.minimum(column, width - 1), column < width

  def following(self, count: int) -> Int[Array, "M count"]:
    """So many tokens behind each; beyond the text, any."""
    return jnp.stack([self.tokens[self.row, self.ahead(n + 1)[0]]
                      for n in range(count)], axis=1)


def dtype_of(model: Transformer) -> Any:
  return model.embedding[...].dtype


def ascending(model: Transformer, tokens: Sequence[int] | None
              ) -> Int[np.ndarray, "W"] | None:
  """Ids as they are kept; None for all."""
  if tokens is None:
    return None
  ids = np.unique(np.asarray(tokens, np.int32))
  if not len(ids) or ids[0] < 0 or ids[-1] >= model.vocab:
    raise InputError(f"tokens must be ids in [0, {model.vocab - 1}]")
  return ids


def beside(model: Transformer) -> Callable[..., jax.Array]:
  """Puts an array beside the model's weights."""
  mesh = getattr(model.embedding[...].sharding, "mesh", None)
  if isinstance(mesh, jax.sharding.Mesh):
    return lambda array, axes: sharding.place(array, axes, mesh)
  return lambda array, axes: jnp.asarray(array)


def by_kernel(rows: Any, count: int) -> bool:
  """Whether the device that is aimed at is quickest without making logits.

  It is where a kernel can be had; a CPU makes logits as quickly.

  Args:
    rows: of the unembedding, for the tokens there are.
    count: how many are to be found.
  """
  return (kernels.wanted() and sharding.current() is None
          and isinstance(rows, jax.Array) and count <= len(rows))


def likeliest(said: Transformer, x: Float[Array, "B T D"], count: int,
              rows: Float[Array, "W D"] | None = None
              ) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
  """The likeliest tokens behind a stream, as `said.unembed` has them.

  Where a kernel can be had, no logit is stored.

  Args:
    said: whose norm and unembedding it is.
    rows: those of the unembedding for the tokens that matter; None for all.

  Returns:
    Rows of the unembedding, the likeliest first, and their log probabilities.
  """
  known = said.unembedding if rows is None else rows
  if not by_kernel(known, count):
    logits = said.unembed(x, rows)
    best, index = lax.top_k(logits, count)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return index, best - total
  found = proposal_head(
      x.reshape(-1, x.shape[-1]), said.final_norm[...], known,
      eps=said.config.norm_eps, count=count,
      logits_soft_cap=said.config.logits_cap)
  shape = (*x.shape[:2], count)
  return (found.tokens.reshape(shape),
          (found.logits - found.log_sum_exp[:, None]).reshape(shape))
