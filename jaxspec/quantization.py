# SPDX-License-Identifier: Apache-2.0
"""A transformer whose matrices have eight bits: a cheaper model, or a drafter.

It is another model with another law; as a drafter it changes no text.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxspec.models.transformer import Transformer, source_of
from pallas_kernels import quantized
from pallas_kernels.quantized import QArray

_MATRICES = ("qkv", "out", "gate", "up", "down", "lm_head")


def quantize(model: Transformer) -> Transformer:
  """A copy with eight-bit matrices.

  What is not rounded is shared, not copied: norms, biases, experts and their
  routers, and the embedding table, in which rows are looked up. Where that
  table is the head too, the copy has a head of its own. Of shapes alone, it is
  the copy's shapes.
  """
  config = dataclasses.replace(model.config, tied=False)
  weights = source_of(model)

  def source(path, shape, axes, wanted=None):
    name = path.rsplit(".", 1)[-1]
    if name == "lm_head" and model.config.tied:
      path = "embedding"
    weight = weights(path, shape, axes, wanted)
    if name not in _MATRICES or isinstance(weight, QArray):
      return weight
    if config.experts and name == "down":
      return weight
    if isinstance(weight, jax.ShapeDtypeStruct):
      return _outline(weight)
    return quantized.quantize(weight)

  return Transformer(config, source)


def _outline(weight: jax.ShapeDtypeStruct) -> QArray:
  """The shapes of a rounded weight, split as the weight was."""
  def like(dims: int, dtype: Any) -> jax.ShapeDtypeStruct:
    placed = weight.sharding
    if isinstance(placed, NamedSharding):
      placed = NamedSharding(placed.mesh, PartitionSpec(*placed.spec[:dims]))
    return jax.ShapeDtypeStruct(weight.shape[:dims], dtype, sharding=placed)

  dims = len(weight.shape)
  return QArray(like(dims, jnp.int8), like(dims - 1, jnp.float32))
