# SPDX-License-Identifier: Apache-2.0
"""Medusa: heads that look several tokens ahead (arXiv:2401.10774)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxspec.heads.base import (
  Ids,
  Spots,
  ascending,
  beside,
  dtype_of,
  likeliest,
)
from jaxspec.heads.settings import Settings
from jaxspec.models import layers
from jaxspec.models.transformer import Source, Transformer, random_source


@struct.dataclass
class MedusaHeads:
  """Heads on the top of the residual stream (arXiv:2401.10774).

  Head k reads the stream h at position t, below the final norm, and predicts
  the token at t + 2 + k; the model itself says what stands at t + 1. A head is
  one or more blocks h + SiLU(W h), then the model's own unembedding: heads
  with W = 0 say what the model says.

  Attributes:
    up: W of each head and block, or its left factor.
    down: its right factor; None where W is whole.
    tokens: the ids logits are computed for, ascending; None for all.
    rows: the rows of the model's unembedding for them.
  """

  kind: ClassVar[str] = "medusa"
  taps: ClassVar[tuple[int, ...]] = ()

  up: Float[Array, "heads blocks D rank"]
  down: Float[Array, "heads blocks rank D"] | None = None
  tokens: Int[Array, "W"] | None = None
  rows: Float[Array, "W D"] | None = None

  @classmethod
  def init(cls, model: Transformer, *, heads: int = 4, blocks: int = 1,
           rank: int | None = None, tokens: Sequence[int] | None = None,
           seed: int = 0) -> "MedusaHeads":
    """Untrained heads.

    Args:
      rank: of each W; None for one that is whole.
      tokens: the ids logits are computed for, such as the most frequent ones.
    """
    random = random_source(seed, dtype_of(model), put=beside(model))

    def source(path, shape, axes, wanted=None):
      if path == "up":
        return beside(model)(np.zeros(shape, dtype_of(model)), axes)
      return random(path, shape, axes, wanted)
    return cls.make(model, source, heads, blocks, rank,
                    ascending(model, tokens))

  @classmethod
  def make(cls, model: Transformer, source: Source, heads: int, blocks: int,
           rank: int | None, tokens: Ids | None
           ) -> "MedusaHeads":
    """From a source of the weights `up` and `down`."""
    width = model.config.width
    inner = rank or width
    axes = (None,) * 4
    up = source("up", (heads, blocks, width, inner), axes)
    down = (source("down", (heads, blocks, inner, width), axes)
            if rank else None)
    if tokens is None:
      return cls(up, down)
    return cls(up, down, jnp.asarray(tokens), model.unembedding[tokens])

  @staticmethod
  def bounds(model: Transformer) -> dict[str, tuple[int, int]]:
    return dict(heads=(1, 16), blocks=(1, 8), rank=(1, model.config.width))

  @property
  def count(self) -> int:
    return self.up.shape[0]

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T heads D"]:
    """The stream that each head unembeds."""
    each = jax.vmap(layers.linear, in_axes=(-2, 0), out_axes=-2)
    y = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], self.count, x.shape[2]))
    for block in range(self.up.shape[1]):
      inner = y
      if self.down is not None:
        inner = each(inner, self.down[:, block]).astype(x.dtype)
      inner = each(inner, self.up[:, block])
      y = y + jax.nn.silu(inner).astype(x.dtype)
    return y

  def logits(self, model: Transformer, y: Float[Array, "B T D"]
             ) -> Float[Array, "B T _"]:
    """Of the tokens there are: all, or `tokens`."""
    return model.unembed(y, self.rows)

  def say(self, model: Transformer, x: Float[Array, "M D"],
          following: Int[Array, "M heads"]) -> Iterator[Float[Array, "M W"]]:
    """The logits of each head, whatever the tokens that follow."""
    y = self(x[None])
    for number in range(self.count):
      yield self.logits(model, y[:, :, number])[0]

  def foretell(self, model: Transformer,
               seen: Mapping[int, Float[Array, "B T D"]], at: Spots
               ) -> Iterator[tuple[int, Float[Array, "M W"]]]:
    """The first head looks one further than the model."""
    return enumerate(self.say(model, at.of(seen[model.depth]),
                              at.following(self.count)), start=1)

  def like(self, model: Transformer, weights: Mapping[str, Array]
           ) -> "MedusaHeads":
    """The same heads with other weights, by the names in `tensors`."""
    def source(path, shape, axes, wanted=None):
      return weights[path].astype(wanted or dtype_of(model))
    rank = None if self.down is None else self.down.shape[2]
    return self.make(model, source, self.count, self.up.shape[1], rank,
                     self.tokens)

  def choose(self, model: Transformer, x: Float[Array, "B D"], count: int
             ) -> Int[Array, "B heads count"]:
    """The likeliest tokens of each head, best first."""
    best, _ = likeliest(model, self(x[:, None])[:, 0], count, self.rows)
    return (best if self.tokens is None else self.tokens[best]
            ).astype(jnp.int32)

  def settings(self) -> dict[str, Any]:
    return dict(heads=self.count, blocks=self.up.shape[1],
                rank=None if self.down is None else self.down.shape[2])

  def tensors(self) -> dict[str, Array]:
    return {"up": self.up} | ({} if self.down is None else {"down": self.down})

  @classmethod
  def read(cls, model: Transformer, source: Source, settings: Settings,
           tokens: Int[np.ndarray, "W"] | None) -> "MedusaHeads":
    ends = cls.bounds(model)
    return cls.make(model, source, settings.integer("heads", *ends["heads"]),
                    settings.integer("blocks", *ends["blocks"]),
                    settings.integer("rank", *ends["rank"], default=None),
                    tokens)
