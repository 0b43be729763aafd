# SPDX-License-Identifier: Apache-2.0
"""EAGLE: one layer that continues the model's features (arXiv:2503.01840)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspec.caches import Place
from jaxspec.caches.contiguous import ContiguousCache
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
from jaxspec.models.transformer import (
  Block,
  Source,
  Transformer,
  random_source,
)

# How far it runs on its own outputs when it is taught.
_UNROLLED = 3


class EagleHead(Transformer):
  """One layer that continues the model's own features (arXiv:2503.01840).

  Position i reads what the model made of token i, and token i + 1, and
  predicts token i + 2. The features of several layers are fused into one;
  behind the committed text, where the model has not been yet, the layer's own
  output stands in for them. Feature and embedding are each normed, joined,
  and taken through one layer of the model's own shape and rotary embedding.

  It is a transformer of depth 1: caches and `extend` serve it as they do any.

  Attributes:
    taps: the layers below which the model's features are read.
    tokens: the ids it can say, ascending, if it has a norm and an unembedding
      of its own for them; else the model's serve.
  """

  kind = "eagle"

  def __init__(self, model: Transformer, source: Source, *,
               taps: tuple[int, ...], mlp: int,
               tokens: Ids | None = None):
    c = model.config
    # Where some layers see a window alone, this one is like those that do not.
    like = next((i for i, window in enumerate(c.windows) if window is None), 0)
    self.config = c = dataclasses.replace(
        c, depth=1, windows=(None,), ropes=(c.ropes[like],), mlp=mlp,
        experts=0, experts_per_token=0, tied=False,
        vocab=c.vocab if tokens is None else len(tokens))
    self.taps = taps

    def weight(name, shape, dtype=None):
      axes = (None,) * len(shape)
      return nnx.Param(source(name, shape, axes, dtype), axes=axes)

    self.fuse_weight = weight("fuse_weight", (c.width, len(taps) * c.width))
    self.token_norm = weight("token_norm", (c.width,), jnp.float32)
    self.feature_norm = weight("feature_norm", (c.width,), jnp.float32)
    self.join_weight = weight("join_weight", (c.width, 2 * c.width))
    self.layers = nnx.List([Block(c, source, 0)])
    self.tokens = None if tokens is None else nnx.Variable(jnp.asarray(tokens))
    if tokens is not None:
      axes = ("vocab", None)
      self.final_norm = weight("final_norm", (c.width,), jnp.float32)
      self.lm_head = nnx.Param(
          source("lm_head", (c.vocab, c.width), axes), axes=axes)

  @classmethod
  def init(cls, model: Transformer, *, taps: Sequence[int] | None = None,
           mlp: int | None = None, tokens: Sequence[int] | None = None,
           seed: int = 0) -> "EagleHead":
    """An untrained head, random but for its unembedding, the model's own.

    Args:
      taps: None for a low, a middle and a high layer, as published.
      mlp: width of the MLP; None for the model's.
      tokens: the ids it can say; None for all.
    """
    ids = ascending(model, tokens)
    random = random_source(seed, dtype_of(model), put=beside(model))

    def source(path, shape, axes, wanted=None):
      if path == "lm_head":
        return model.unembedding[ids]
      if path == "final_norm":
        return model.final_norm[...]
      return random(path, shape, axes, wanted)
    return cls(model, source, taps=tuple(taps or default_taps(model.depth)),
               mlp=mlp or model.config.mlp, tokens=ids)

  @staticmethod
  def bounds(model: Transformer) -> dict[str, tuple[int, int]]:
    return dict(mlp=(1, 2**20))

  def fuse(self, features: Sequence[Float[Array, "B T D"]]
           ) -> Float[Array, "B T D"]:
    """One feature from those of all taps, the lowest first."""
    return layers.linear(jnp.concatenate(features, axis=-1),
                         self.fuse_weight[...]).astype(features[0].dtype)

  def join(self, model: Transformer, feature: Float[Array, "B T D"],
           following: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """What enters the layer: a feature and the token that follows it."""
    eps = self.config.norm_eps
    both = (layers.rms_norm(model.embed(following), self.token_norm[...], eps),
            layers.rms_norm(feature, self.feature_norm[...], eps))
    return layers.linear(jnp.concatenate(both, axis=-1), self.join_weight[...]
                         ).astype(feature.dtype)

  def logits(self, model: Transformer, x: Float[Array, "B T D"]
             ) -> Float[Array, "B T _"]:
    """Behind the layer; of the tokens there are: all, or `tokens`."""
    return model.unembed(x) if self.tokens is None else self.unembed(x)

  def choose(self, model: Transformer, x: Float[Array, "B T D"], count: int
             ) -> tuple[Int[Array, "B T count"], Float[Array, "B T count"]]:
    """The likeliest tokens, best first, and their log probabilities."""
    index, chance = likeliest(model if self.tokens is None else self, x, count)
    return self.ids(index), chance

  def ids(self, index: Int[Array, "..."]) -> Int[Array, "..."]:
    """Which tokens these are of those there are logits for."""
    return (index if self.tokens is None else self.tokens[...][index]
            ).astype(jnp.int32)

  def foretell(self, model: Transformer,
               seen: Mapping[int, Float[Array, "B T D"]], at: Spots
               ) -> Iterator[tuple[int, Float[Array, "M W"]]]:
    """First from the model's features, then from its own outputs.

    As in use: what starts at a position sees the model's features up to
    there, and behind them what it made itself. Tokens are the text's own.
    """
    rows, count = at.tokens.shape
    total = _UNROLLED * count
    cache = self.init_cache(ContiguousCache, rows, 0, dtype_of(model))
    fresh = self.init_fresh(cache, total)
    start = np.arange(count)
    # Run after run, each with a node for every start.
    positions = jnp.asarray((start[None] + np.arange(_UNROLLED)[:, None]
                             ).reshape(1, total))
    positions = jnp.broadcast_to(positions, (rows, total))
    x = self.fuse([seen[tap] for tap in self.taps])
    for run in range(_UNROLLED):
      mask = np.zeros((count, _UNROLLED, count), bool)
      mask[:, 0] = np.tri(count, dtype=bool)
      mask[:, 1:run + 1] = np.eye(count, dtype=bool)[:, None]
      after = at.tokens[:, np.minimum(start + 1 + run, count - 1)]
      x, fresh = self.extend(
          self.join(model, x, after), cache, fresh,
          Place.of(positions, jnp.asarray(mask.reshape(count, total)),
                   run * count), layers=range(1))
      yield run + 1, self.logits(model, at.of(x)[None])[0]

  def like(self, model: Transformer, weights: Mapping[str, Array]
           ) -> "EagleHead":
    """The same head with other weights, by the names in `tensors`."""
    def source(path, shape, axes, wanted=None):
      return weights[path].astype(wanted or dtype_of(model))
    return EagleHead(
        model, source, taps=self.taps, mlp=self.config.mlp,
        tokens=None if self.tokens is None else self.tokens[...])

  def settings(self) -> dict[str, Any]:
    return dict(taps=list(self.taps), mlp=self.config.mlp)

  def tensors(self) -> dict[str, Array]:
    return {".".join(map(str, path)): value[...] for path, value
            in nnx.to_flat_state(nnx.state(self, nnx.Param))}

  @classmethod
  def read(cls, model: Transformer, source: Source, settings: Settings,
           tokens: Int[np.ndarray, "W"] | None) -> "EagleHead":
    taps = settings.get("taps")
    if (not isinstance(taps, list) or not 1 <= len(taps) <= 8
        or any(type(tap) is not int or not 0 <= tap <= model.depth
               for tap in taps) or sorted(taps) != taps):
      raise settings.fail("taps", f"ascending layers of [0, {model.depth}]")
    return cls(model, source, taps=tuple(taps),
               mlp=settings.integer("mlp", *cls.bounds(model)["mlp"]),
               tokens=tokens)


def default_taps(depth: int) -> tuple[int, ...]:
  """A low, a middle and a high layer, as EAGLE-3 takes them."""
  return tuple(sorted(min(max(tap, 0), depth)
                      for tap in (2, depth // 2, depth - 3)))
