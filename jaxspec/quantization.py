# SPDX-License-Identifier: Apache-2.0
"""A transformer whose matrices have eight bits: a cheaper model, or a drafter.

It is another model with another law; as a drafter it changes no text.
"""

import dataclasses

from jaxspec.models.transformer import Transformer, source_of
from pallas_kernels import quantized
from pallas_kernels.quantized import QArray

_MATRICES = ("qkv", "out", "gate", "up", "down", "lm_head")


def quantize(model: Transformer) -> Transformer:
  """A copy with eight-bit matrices.

  What is not rounded is shared, not copied: norms, biases, experts and their
  routers, and the embedding table, in which rows are looked up. Where that
  table is the head too, the copy has a head of its own.
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
    return quantized.quantize(weight)

  return Transformer(config, source)
