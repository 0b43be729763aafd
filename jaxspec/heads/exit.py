# SPDX-License-Identifier: Apache-2.0
"""Proposal heads: what the model will say, told from one of its lower layers.

The residual stream x below layer `layer` at position t becomes, in a few small
products, what the head believes the top of it will be:

  x <- x + attention(x)                 where there is attention, over all
                                        earlier positions (Kangaroo,
                                        arXiv:2404.18911)
  y  = x + lens n(x) + down (SiLU(gate n(x)) * up n(x)),   n a norm

and the model's own unembedding says the token at t + 1. With `lens`, `down`
and the attention's output 0, as at first, it says what the plain early exit
does, the model's final norm and unembedding on x.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from jaxspec.caches import Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.heads.base import (
  Ids,
  Spots,
  ascending,
  beside,
  by_kernel,
  dtype_of,
)
from jaxspec.heads.settings import Settings
from jaxspec.models import layers
from jaxspec.models.transformer import (
  Config,
  Source,
  Transformer,
  project,
  random_source,
)
from pallas_kernels import Forecast, proposal_head


class Attention(nnx.Module):
  """The weights of attention alone."""

  def __init__(self, config: Config, source: Source):
    c = config

    def weight(name, shape, axes, dtype=None):
      return nnx.Param(source(f"layers.0.{name}", shape, axes, dtype),
                       axes=axes)

    self.attn_norm = weight("attn_norm", (c.width,), (None,), jnp.float32)
    self.qkv = weight(
        "qkv", (c.kv_heads, c.queries_per_kv + 2, c.head_size, c.width),
        ("kv_heads", None, None, None))
    self.out = weight("out", (c.width, c.heads * c.head_size),
                      (None, "kv_heads"))


class ExitHead(Transformer):
  """A head on the stream below one layer.

  To caches and `extend` it is a transformer of depth 1, or of depth 0 where it
  has no attention and needs no cache.

  Attributes:
    layer: how many layers lie below it.
    tokens: the ids it can say, ascending; None for all.
    rows: the rows of the model's unembedding for them.
  """

  kind = "exit"

  def __init__(self, model: Transformer, source: Source, *, layer: int,
               mlp: int, attention: bool = False,
               tokens: Ids | None = None):
    c, depth = model.config, int(attention)
    like = next((i for i, window in enumerate(c.windows) if window is None), 0)
    self.layer = layer
    self.config = c = dataclasses.replace(
        c, depth=depth, windows=(None,) * depth, ropes=(c.ropes[like],) * depth,
        mlp=mlp, qkv_bias=False, qk_norm=False)

    def weight(name, shape, axes, dtype=None):
      return nnx.Param(source(name, shape, axes, dtype), axes=axes)

    self.layers = nnx.List([Attention(c, source) for _ in range(depth)])
    self.norm = weight("norm", (c.width,), (None,), jnp.float32)
    self.lens = weight("lens", (c.width, c.width), (None, None))
    self.gate = weight("gate", (c.mlp, c.width), ("mlp", None))
    self.up = weight("up", (c.mlp, c.width), ("mlp", None))
    self.down = weight("down", (c.width, c.mlp), (None, "mlp"))
    self.final_norm = weight("final_norm", (c.width,), (None,), jnp.float32)
    self.tokens = None if tokens is None else nnx.Variable(jnp.asarray(tokens))
    self.rows = (None if tokens is None
                 else nnx.Variable(model.unembedding[tokens]))

  @classmethod
  def init(cls, model: Transformer, *, layer: int, mlp: int | None = None,
           attention: bool = False, tokens: Sequence[int] | None = None,
           seed: int = 0) -> "ExitHead":
    """An untrained head, which is the plain early exit.

    Args:
      mlp: None for the width of the model.
      tokens: the ids it can say, such as the most frequent ones; None for all.
    """
    random = random_source(seed, dtype_of(model), put=beside(model))

    def source(path, shape, axes, wanted=None):
      if path == "final_norm":
        return model.final_norm[...]
      if path == "norm":
        return beside(model)(np.ones(shape, np.float32), axes)
      if path.rsplit(".", 1)[-1] in ("lens", "down", "out"):
        return beside(model)(np.zeros(shape, wanted or dtype_of(model)), axes)
      return random(path, shape, axes, wanted)
    return cls(model, source, layer=layer, mlp=mlp or model.config.width,
               attention=attention, tokens=ascending(model, tokens))

  @staticmethod
  def bounds(model: Transformer) -> dict[str, tuple[int, int]]:
    return dict(layer=(1, model.depth - 1), mlp=(1, 2**20))

  @property
  def taps(self) -> tuple[int, ...]:
    return (self.layer,)

  def _block(self, layer, x, cache, fresh, at, angles):
    c, block = self.config, self.layers[layer]
    q, k, v = project(block, x, angles[c.ropes[layer]], config=c)
    fresh = fresh.write(layer, at.start, k, v)
    y = cache.attend(layer, q, fresh, at, scale=c.scale, window=None,
                     logits_soft_cap=c.attention_cap)
    y = layers.linear(y.reshape(*x.shape[:2], -1), block.out[...])
    return x + y.astype(x.dtype), fresh

  def __call__(self, model: Transformer, x: Float[Array, "B T D"]
               ) -> Float[Array, "B T _"]:
    """Logits, in float32, of the tokens there are: all, or `tokens`."""
    c = self.config
    y = layers.rms_norm(self._behind(x), self.final_norm[...], c.norm_eps)
    logits = layers.linear(y, self.sayable(model))
    if c.logits_cap is not None:
      logits = c.logits_cap * jnp.tanh(logits / c.logits_cap)
    return logits

  def forecasts(self, model: Transformer, count: int) -> bool:
    """Whether `forecast` is what the device that is aimed at is quickest at."""
    return by_kernel(self.sayable(model), count)

  def forecast(self, model: Transformer, x: Float[Array, "B T D"], count: int,
               noise: UInt32[Array, "B T 2"], temperature: Float[Array, "B"]
               ) -> Forecast:
    """The likeliest tokens, or some drawn, and how sure it is; no logits.

    Args:
      noise: words of the key of each, see `sampling.words`.

    Returns:
      B T rows; see `pallas_kernels.proposal_head`.
    """
    c = self.config
    return proposal_head(
        self._behind(x).reshape(-1, x.shape[-1]), self.final_norm[...],
        self.sayable(model), eps=c.norm_eps, count=count,
        logits_soft_cap=c.logits_cap,
        tokens=None if self.tokens is None else self.tokens[...],
        noise=noise.reshape(-1, 2),
        temperature=jnp.repeat(temperature, x.shape[1]))

  def _behind(self, x):
    """The stream behind the head's block."""
    z = layers.rms_norm(x, self.norm[...], self.config.norm_eps)
    inner = (layers.ACTIVATIONS["silu"](layers.linear(z, self.gate[...]))
             * layers.linear(z, self.up[...])).astype(x.dtype)
    return x + (layers.linear(z, self.lens[...])
                + layers.linear(inner, self.down[...])).astype(x.dtype)

  def sayable(self, model: Transformer) -> Any:
    """The rows of the unembedding for the tokens it can say."""
    return model.unembedding if self.rows is None else self.rows[...]

  def spread(self, logits: Float[Array, "*rows W"], vocab: int
             ) -> Float[Array, "*rows V"]:
    """Logits of all tokens; what the head cannot say has none."""
    if self.tokens is None:
      return logits
    return jnp.full((*logits.shape[:-1], vocab), -jnp.inf).at[
        ..., self.tokens[...]].set(logits)

  def attended(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The stream of whole texts behind the head's attention, if it has any."""
    if not self.depth:
      return x
    rows, count = x.shape[:2]
    cache = self.init_cache(ContiguousCache, rows, 0, x.dtype)
    at = Place.of(jnp.broadcast_to(jnp.arange(count)[None], (rows, count)),
                  jnp.tril(jnp.ones((count, count), bool)))
    return self.extend(x, cache, self.init_fresh(cache, count), at,
                       layers=range(self.depth))[0]

  def foretell(self, model: Transformer,
               seen: Mapping[int, Float[Array, "B T D"]], at: Spots
               ) -> Iterator[tuple[int, Float[Array, "M W"]]]:
    """Looks no further ahead than the model."""
    yield 0, self(model, at.of(self.attended(seen[self.layer]))[None])[0]

  def like(self, model: Transformer, weights: Mapping[str, Array]
           ) -> "ExitHead":
    """The same head with other weights, by the names in `tensors`."""
    def source(path, shape, axes, wanted=None):
      return weights[path].astype(wanted or dtype_of(model))
    return ExitHead(
        model, source, layer=self.layer, mlp=self.config.mlp,
        attention=bool(self.depth),
        tokens=None if self.tokens is None else self.tokens[...])

  def settings(self) -> dict[str, Any]:
    return dict(layer=self.layer, mlp=self.config.mlp,
                attention=bool(self.depth))

  def tensors(self) -> dict[str, Array]:
    return {".".join(map(str, path)): value[...] for path, value
            in nnx.to_flat_state(nnx.state(self, nnx.Param))}

  @classmethod
  def read(cls, model: Transformer, source: Source, settings: Settings,
           tokens: Int[np.ndarray, "W"] | None) -> "ExitHead":
    sizes = {name: settings.integer(name, *ends)
             for name, ends in cls.bounds(model).items()}
    return cls(model, source, **sizes,
               attention=settings.flag("attention"), tokens=tokens)
