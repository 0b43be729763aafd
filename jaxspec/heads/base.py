# SPDX-License-Identifier: Apache-2.0
"""What heads of every kind take from their model, and are told of it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxspec import sharding
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer

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
