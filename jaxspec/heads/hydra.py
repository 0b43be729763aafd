# SPDX-License-Identifier: Apache-2.0
"""Hydra: Medusa's heads that also see what was drafted (arXiv:2402.05109)."""

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
class HydraHeads:
  """Heads on the top of the residual stream and the tokens behind it.

  Head k reads the stream h at position t, below the final norm, and the
  embeddings e of the tokens t + 1 ... t + 1 + k, and predicts the token at
  t + 2 + k:

    y = n(h) + up SiLU(state n(h) + drafted_0 n(e_0) + ... + drafted_k n(e_k))

  with norms n, then the model's own unembedding. Heads with `up` = 0, as at
  first, say what the model says.

  Attributes:
    drafted: what each head makes of each token it sees: of the first token
      all heads, of the second all but the first head, and so on.
    tokens: the ids logits are computed for, ascending; None for all.
    rows: the rows of the model's unembedding for them.
  """

  kind: ClassVar[str] = "hydra"
  taps: ClassVar[tuple[int, ...]] = ()

  state_norm: Float[Array, "D"]
  token_norm: Float[Array, "D"]
  state: Float[Array, "heads rank D"]
  drafted: Float[Array, "pairs rank D"]
  up: Float[Array, "heads D rank"]
  tokens: Int[Array, "W"] | None = None
  rows: Float[Array, "W D"] | None = None

  @classmethod
  def init(cls, model: Transformer, *, heads: int = 4, rank: int | None = None,
           tokens: Sequence[int] | None = None, seed: int = 0) -> "HydraHeads":
    """Untrained heads.

    Args:
      rank: the width in which what is seen is joined; None for the model's.
      tokens: the ids logits are computed for, such as the most frequent ones.
    """
    random = random_source(seed, dtype_of(model), put=beside(model))

    def source(path, shape, axes, wanted=None):
      if path in ("state", "drafted"):
        return random(path, shape, axes, wanted)
      fill = np.zeros if path == "up" else np.ones
      return beside(model)(fill(shape, wanted or dtype_of(model)), axes)
    return cls.make(model, source, heads, rank or model.config.width,
                    ascending(model, tokens))

  @classmethod
  def make(cls, model: Transformer, source: Source, heads: int, rank: int,
           tokens: Ids | None) -> "HydraHeads":
    """From a source of the weights."""
    width, pairs = model.config.width, heads * (heads + 1) // 2
    axes = (None,) * 3
    some = tokens is not None
    return cls(
        source("state_norm", (width,), (None,), jnp.float32),
        source("token_norm", (width,), (None,), jnp.float32),
        source("state", (heads, rank, width), axes),
        source("drafted", (pairs, rank, width), axes),
        source("up", (heads, width, rank), axes),
        jnp.asarray(tokens) if some else None,
        model.unembedding[tokens] if some else None)

  @staticmethod
  def bounds(model: Transformer) -> dict[str, tuple[int, int]]:
    return dict(heads=(1, 16), rank=(1, model.config.width))

  @property
  def count(self) -> int:
    return self.up.shape[0]

  def look(self, model: Transformer, x: Float[Array, "B D"]
           ) -> tuple[Float[Array, "B D"], Float[Array, "B heads rank"]]:
    """What all heads make of the stream alone, its norm first."""
    z = layers.rms_norm(x, self.state_norm, model.config.norm_eps)
    return z, layers.linear(z, self.state)

  def hear(self, model: Transformer, number: int,
           heard: Float[Array, "B M heads rank"], tokens: Int[Array, "B M"]
           ) -> Float[Array, "B M heads rank"]:
    """Adds the token behind `number` others, for all heads that see it."""
    first = sum(self.count - before for before in range(number))
    e = layers.rms_norm(model.embed(tokens), self.token_norm,
                        model.config.norm_eps)
    return heard.at[:, :, number:].add(layers.linear(
        e, self.drafted[first:first + self.count - number]))

  def logits(self, model: Transformer, number: int, z: Float[Array, "B D"],
             heard: Float[Array, "B M heads rank"]) -> Float[Array, "B M _"]:
    """What one head says; of the tokens there are: all, or `tokens`."""
    return model.unembed(self._behind(number, z, heard), self.rows)

  def choose(self, model: Transformer, number: int, z: Float[Array, "B D"],
             heard: Float[Array, "B M heads rank"], count: int
             ) -> Int[Array, "B M count"]:
    """The likeliest tokens by one head, best first."""
    return self.ids(likeliest(model, self._behind(number, z, heard), count,
                              self.rows)[0])

  def _behind(self, number, z, heard):
    """The stream that a head unembeds, `[B M D]`."""
    inner = jax.nn.silu(heard[:, :, number]).astype(z.dtype)
    return z[:, None] + layers.linear(inner, self.up[number]).astype(z.dtype)

  def ids(self, index: Int[Array, "..."]) -> Int[Array, "..."]:
    """Which tokens these are of those there are logits for."""
    return (index if self.tokens is None else self.tokens[index]
            ).astype(jnp.int32)

  def say(self, model: Transformer, x: Float[Array, "M D"],
          following: Int[Array, "M heads"]) -> Iterator[Float[Array, "M W"]]:
    """The logits of each head, given the tokens that follow."""
    z, heard = self.look(model, x)
    heard = heard[:, None]
    for number in range(self.count):
      heard = self.hear(model, number, heard, following[:, number:number + 1])
      yield self.logits(model, number, z, heard)[:, 0]

  def foretell(self, model: Transformer,
               seen: Mapping[int, Float[Array, "B T D"]], at: Spots
               ) -> Iterator[tuple[int, Float[Array, "M W"]]]:
    """The text's own tokens stand for what would be drafted."""
    return enumerate(self.say(model, at.of(seen[model.depth]),
                              at.following(self.count)), start=1)

  def like(self, model: Transformer, weights: Mapping[str, Array]
           ) -> "HydraHeads":
    """The same heads with other weights, by the names in `tensors`."""
    def source(path, shape, axes, wanted=None):
      return weights[path].astype(wanted or dtype_of(model))
    return self.make(model, source, self.count, self.up.shape[2], self.tokens)

  def settings(self) -> dict[str, Any]:
    return dict(heads=self.count, rank=self.up.shape[2])

  def tensors(self) -> dict[str, Array]:
    return dict(state_norm=self.state_norm, token_norm=self.token_norm,
                state=self.state, drafted=self.drafted, up=self.up)

  @classmethod
  def read(cls, model: Transformer, source: Source, settings: Settings,
           tokens: Int[np.ndarray, "W"] | None) -> "HydraHeads":
    sizes = {name: settings.integer(name, *ends)
             for name, ends in cls.bounds(model).items()}
    return cls.make(model, source, **sizes, tokens=tokens)
