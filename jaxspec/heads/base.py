# SPDX-License-Identifier: Apache-2.0
"""What heads of every kind take from their model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxspec import sharding
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer

# Of the tokens a head can say.
Ids = Int[np.ndarray, "W"] | Int[Array, "W"]


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
