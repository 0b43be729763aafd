# SPDX-License-Identifier: Apache-2.0
"""One transformer: `embed`, `extend(layers=range)`, `unembed`.

Families differ by data alone: a `Config`, read from a checkpoint by the short
file that bears the family's name. Weights are Flax NNX and read-only; what
changes while decoding is the plain pytrees of `jaxspec.caches`.

How layers are stored (the one decision, measured by
`experiments/layer_storage.py`): **each layer owns its arrays, and `extend`
unrolls them**. A scan over a stack costs XLA:CPU a copy of all bfloat16 weights
a token, and a static slice `stack[a:b]`, which early exit needs, is a
copy on every backend. A list costs nothing at run time on any of them, makes
`layers=range(a, b)` free, and lets a sliding-window layer keep a smaller cache
than a global one. The price is compile time, linear in the depth; the
persistent compilation cache pays it once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels
from jaxspec import kernels, sharding
from jaxspec.caches import Cache, Fresh, Place
from jaxspec.models import layers, moe
from jaxspec.models.layers import Rope


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything in which two transformers of the supported families differ.

  Attributes:
    windows: for each layer, how many positions a token sees (itself included),
      or None for all of them.
    ropes: for each layer, its rotary embedding.
    query_scale: what attention scores are multiplied by.
    embed_scale: what embeddings are multiplied by (Gemma: sqrt(width)).
    experts: number of experts; 0 means a dense MLP.
    experts_per_token: experts a token is sent to.
    normalize_experts: whether their weights are rescaled to sum to one.
    context: the longest sequence the model was made for, in tokens.
  """

  family: str
  vocab: int
  width: int
  depth: int
  heads: int
  kv_heads: int
  head_size: int
  mlp: int
  ropes: tuple[Rope, ...]
  windows: tuple[int | None, ...]
  context: int
  norm_eps: float = 1e-5
  activation: str = "silu"
  tied: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  attention_cap: float | None = None
  logits_cap: float | None = None
  query_scale: float | None = None
  embed_scale: float | None = None
  experts: int = 0
  experts_per_token: int = 0
  normalize_experts: bool = True

  @property
  def queries_per_kv(self) -> int:
    return self.heads // self.kv_heads

  @property
  def scale(self) -> float:
    return self.query_scale or 1 / math.sqrt(self.head_size)


# Called as source(path, shape, axes, dtype=None), gives the weight called
# `path`: random, read from a file, or abstract. `axes` are the logical names
# of its dimensions (see `jaxspec.sharding`). Norms ask for float32, all others
# take the source's own dtype.
Source = Callable[..., Any]


class Block(nnx.Module):
  """The weights of one layer. Norms are float32 multipliers."""

  def __init__(self, config: Config, source: Source, layer: int):
    c = config

    def weight(name, shape, axes, dtype=None):
      return nnx.Param(source(f"layers.{layer}.{name}", shape, axes, dtype),
                       axes=axes)

    def norm(name, size=c.width):
      return weight(name, (size,), (None,), jnp.float32)

    fused = (c.kv_heads, c.queries_per_kv + 2, c.head_size)
    self.attn_norm = norm("attn_norm")
    # Query, key and value fused by key/value head: one dot, and a tensor
    # axis splits it without cutting through a head.
    self.qkv = weight("qkv", (*fused, c.width),
                      ("kv_heads", None, None, None))
    if c.qkv_bias:
      self.qkv_bias = weight("qkv_bias", fused, ("kv_heads", None, None))
    if c.qk_norm:
      self.q_norm = norm("q_norm", c.head_size)
      self.k_norm = norm("k_norm", c.head_size)
    # Heads are one dimension here: apart, they would be tiled for a TPU in
    # another way than a matrix product wants them, and copied at every call.
    self.out = weight("out", (c.width, c.heads * c.head_size),
                      (None, "kv_heads"))
    self.mlp_norm = norm("mlp_norm")
    if c.post_norms:
      self.post_attn_norm = norm("post_attn_norm")
      self.post_mlp_norm = norm("post_mlp_norm")
    if c.experts:
      self.router = weight("router", (c.experts, c.width), (None, None))
      self.gate_up = weight("gate_up", (c.experts, 2, c.mlp, c.width),
                            ("experts", None, "mlp", None))
      self.down = weight("down", (c.experts, c.width, c.mlp),
                         ("experts", None, "mlp"))
    else:
      # Two weights: fused, they would be one dimension that cannot be split
      # over a mesh, or two, which XLA:CPU transposes at every call.
      self.gate = weight("gate", (c.mlp, c.width), ("mlp", None))
      self.up = weight("up", (c.mlp, c.width), ("mlp", None))
      self.down = weight("down", (c.width, c.mlp), (None, "mlp"))


class Transformer(nnx.Module):
  """A decoder-only transformer. Read-only: every method is pure.

  Attributes:
    identity: its fingerprint, where weights do not tell it (see
      `jaxspec.adapters.merged`); a model derived from it has none.
  """

  identity = ""

  def __init__(self, config: Config, source: Source):
    self.config = config
    shape, axes = (config.vocab, config.width), ("vocab", None)
    self.embedding = nnx.Param(source("embedding", shape, axes),
                               axes=axes)
    self.layers = nnx.List(
        Block(config, source, layer) for layer in range(config.depth))
    self.final_norm = nnx.Param(
        source("final_norm", (config.width,), (None,), jnp.float32),
        axes=(None,))
    if not config.tied:
      self.lm_head = nnx.Param(source("lm_head", shape, axes),
                               axes=axes)

  @property
  def depth(self) -> int:
    return self.config.depth

  @property
  def vocab(self) -> int:
    return self.config.vocab

  def init_fresh(self, cache: Cache, nodes: int) -> Fresh:
    """A buffer for `nodes` tokens in flight beside `cache`."""
    c = self.config
    return Fresh.empty(c.depth, len(cache.length), nodes, c.kv_heads,
                       c.head_size, cache.dtype)

  def init_cache(self, kind: Any, rows: int, capacity: int,
                 dtype: Any, **options: Any) -> Cache:
    """An empty cache; `kind` is one of the classes in `jaxspec.caches`."""
    c = self.config
    return kind.empty(c.windows, rows, capacity, c.kv_heads, c.head_size,
                      dtype, **options)

  def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The residual stream below the first layer."""
    x = layers.look_up(self.embedding[...], tokens)
    if self.config.embed_scale is not None:
      x = x * jnp.asarray(self.config.embed_scale, x.dtype)
    return sharding.constrain(x, "rows", None, None)

  def extend(self, x: Float[Array, "B T D"], cache: Cache, fresh: Fresh,
             at: Place, *, layers: range
             ) -> tuple[Float[Array, "B T D"], Fresh]:
    """Takes the residual stream through `layers`.

    Every layer writes the keys and values of these tokens into `fresh` and
    attends to the committed prefix and to the fresh nodes `at.mask` allows.
    """
    angles = {rope: rope.angles(at.tokens, self.config.head_size)
              for rope in {self.config.ropes[i] for i in layers}}
    for layer in layers:
      x, fresh = self._block(layer, x, cache, fresh, at, angles)
    return x, fresh

  @property
  def unembedding(self) -> Any:
    """`[V D]`, an array or a quantized one."""
    return (self.embedding if self.config.tied else self.lm_head)[...]

  def unembed(self, x: Float[Array, "B T D"],
              rows: Float[Array, "W D"] | None = None
              ) -> Float[Array, "B T _"]:
    """Logits, in float32.

    Args:
      rows: those of the unembedding for the tokens that matter; None for all.
    """
    x = layers.rms_norm(x, self.final_norm[...], self.config.norm_eps)
    logits = layers.linear(x, self.unembedding if rows is None else rows)
    if self.config.logits_cap is not None:
      logits = self.config.logits_cap * jnp.tanh(
          logits / self.config.logits_cap)
    return sharding.constrain(logits, "rows", None, "vocab")

  def _block(self, layer, x, cache, fresh, at, angles):
    c, block = self.config, self.layers[layer]
    q, k, v = project(block, x, angles[c.ropes[layer]], config=c)
    fresh = fresh.write(layer, at.start, k, v)
    y = cache.attend(layer, q, fresh, at, scale=c.scale,
                     window=c.windows[layer], logits_soft_cap=c.attention_cap)
    return _feed_forward(block, x, y, config=c), fresh


# The two halves of a layer around attention. Each is traced once, not once a
# layer: tracing is what a start with a warm compilation cache waits for.


@functools.partial(jax.jit, static_argnames="config")
def project(block, x, angles, *, config):
  """Queries `[B T H K]`, keys and values `[B T G K]` of one layer."""
  c = config
  x = layers.rms_norm(x, block.attn_norm[...], c.norm_eps)
  qkv = layers.linear(x, block.qkv[...])                   # [B T G R+2 K]
  if c.qkv_bias:
    qkv = qkv + block.qkv_bias[...][None, None]
  q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
  if c.qk_norm:
    q = layers.rms_norm(q, block.q_norm[...], c.norm_eps)
    k = layers.rms_norm(k, block.k_norm[...], c.norm_eps)
  q = layers.rotate(q, angles).astype(x.dtype)
  return (q.reshape(*x.shape[:2], c.heads, c.head_size),
          layers.rotate(k, angles), v)


@functools.partial(jax.jit, static_argnames="config")
def _feed_forward(block, x, attended, *, config):
  """The residual stream behind one layer."""
  c = config

  def add(x, y, post_norm):
    y = y.astype(x.dtype)
    if c.post_norms:
      y = layers.rms_norm(y, getattr(block, post_norm)[...], c.norm_eps)
    return sharding.constrain(x + y, "rows", None, None)

  y = layers.linear(attended.reshape(*x.shape[:2], -1), block.out[...])
  x = add(x, y, "post_attn_norm")
  if _takes_kernel(block, x, c):
    y = _fused_mlp(block, x, c)
  else:
    y = _mlp(block, layers.rms_norm(x, block.mlp_norm[...], c.norm_eps), c)
  return add(x, y, "post_mlp_norm")


# Up to so many tokens reading the weights is all the time an MLP takes.
_FEW = 64


def _takes_kernel(block, x, c):
  return (kernels.wanted() and x.shape[0] * x.shape[1] <= _FEW and not c.experts
          and all(isinstance(w[...], jax.Array)
                  for w in (block.gate, block.up, block.down)))


def _fused_mlp(block, x, c):
  """As `_mlp` behind its norm: one kernel on each device of a mesh."""
  activation = {"gelu_pytorch_tanh": "gelu_tanh"}.get(c.activation,
                                                      c.activation)
  weights = [w[...] for w in (block.mlp_norm, block.gate, block.up, block.down)]
  rows = x.reshape(-1, x.shape[-1])
  mesh = sharding.current()
  split = None if mesh is None else sharding.spec(
      ("mlp", None), weights[1].shape, mesh)[0]

  def mlp(*arguments):
    y = pallas_kernels.fused_mlp(*arguments, eps=c.norm_eps,
                                 activation=activation)
    return y if split is None else jax.lax.psum(y, split)

  if mesh is not None:
    whole, part = PartitionSpec(), PartitionSpec(split)
    along = sharding.spec(("rows", None), rows.shape, mesh)
    mlp = jax.shard_map(
        mlp, mesh=mesh, out_specs=along, check_vma=False,
        in_specs=(along, whole, part, part, PartitionSpec(None, split)))
  return mlp(rows, *weights).reshape(x.shape)


def _mlp(block, x, c):
  if c.experts:
    return moe.mixture(
        x, block.router[...], block.gate_up[...], block.down[...],
        per_token=c.experts_per_token, normalize=c.normalize_experts,
        activation=c.activation)
  gate = layers.ACTIVATIONS[c.activation](
      layers.linear(x, block.gate[...]))                   # [B T F]
  hidden = (gate * layers.linear(x, block.up[...])).astype(x.dtype)
  hidden = sharding.constrain(hidden, "rows", None, "mlp")
  return layers.linear(hidden, block.down[...])


def random_source(seed: int, dtype: Any = jnp.float32, scale: float = 1.0,
                  put: Callable[..., jax.Array] | None = None) -> Source:
  """Weights from a seed, for tests and for plumbing: norms 1, the rest normal.

  Args:
    scale: standard deviation of a weight, times the square root of its
      fan-in.
  """
  def source(path, shape, axes, wanted=None):
    name = path.rsplit(".", 1)[-1]
    rng = np.random.default_rng([seed, *path.encode()])
    if name.endswith("norm"):
      value = 1 + 0.1 * rng.standard_normal(shape)
    else:
      value = rng.standard_normal(shape) * scale / math.sqrt(shape[-1])
    value = value.astype(np.float32).astype(wanted or dtype)
    return put(value, axes) if put else jnp.asarray(value)
  return source


def source_of(model: Transformer) -> Source:
  """The weights of a model, or its shapes, for another one to share."""
  def source(path, shape, axes, wanted=None):
    if not path.startswith("layers."):
      return getattr(model, path).get_value()
    _, layer, name = path.split(".")
    return getattr(model.layers[int(layer)], name).get_value()
  return source


def abstract_source(dtype: Any, mesh: Any = None) -> Source:
  """Shapes instead of weights, to compile without either weights or device."""
  def source(path, shape, axes, wanted=None):
    placed = mesh and jax.sharding.NamedSharding(
        mesh, sharding.spec(axes, shape, mesh))
    return jax.ShapeDtypeStruct(shape, wanted or dtype, sharding=placed)
  return source
