# SPDX-License-Identifier: Apache-2.0
"""Heads that draft from what the model computes anyway: Medusa's and EAGLE's.

They are made for one model, and are kept in a folder of their own: a
`config.json`, which says what they are and bears the model's fingerprint, and
a `model.safetensors`. They are read-only here; nothing in this file trains.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import lax
from jaxtyping import Array, Float, Int

from jaxspec import sharding
from jaxspec.errors import InputError
from jaxspec.models import layers
from jaxspec.models.transformer import (
  Block,
  Source,
  Transformer,
  random_source,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FORMAT = 1
_MOST = {"heads": 16, "blocks": 8, "taps": 8, "choices": 1024, "ranks": 1024}
_FLOATS = ("F32", "F16", "BF16")


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
    random = random_source(seed, _dtype(model), put=_put(model))

    def source(path, shape, axes, wanted=None):
      if path == "up":
        return _put(model)(np.zeros(shape, _dtype(model)), axes)
      return random(path, shape, axes, wanted)
    return cls.make(model, source, heads, blocks, rank, _ids(model, tokens))

  @classmethod
  def make(cls, model: Transformer, source: Source, heads: int, blocks: int,
           rank: int | None, tokens: Int[np.ndarray, "W"] | None
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
    return cls(up, down, jnp.asarray(tokens), _unembedding(model)[tokens])

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
    if self.rows is None:
      return model.unembed(y)
    # A cap on logits would not change which are the highest.
    y = layers.rms_norm(y, model.final_norm[...], model.config.norm_eps)
    return layers.linear(y, self.rows)

  def choose(self, model: Transformer, x: Float[Array, "B D"], count: int
             ) -> Int[Array, "B heads count"]:
    """The likeliest tokens of each head, best first."""
    best = lax.top_k(self.logits(model, self(x[:, None])[:, 0]), count)[1]
    return (best if self.tokens is None else self.tokens[best]
            ).astype(jnp.int32)


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

  def __init__(self, model: Transformer, source: Source, *,
               taps: tuple[int, ...], mlp: int,
               tokens: Int[np.ndarray, "W"] | None = None):
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
    ids = _ids(model, tokens)
    random = random_source(seed, _dtype(model), put=_put(model))

    def source(path, shape, axes, wanted=None):
      if path == "lm_head":
        return _unembedding(model)[ids]
      if path == "final_norm":
        return model.final_norm[...]
      return random(path, shape, axes, wanted)
    return cls(model, source, taps=tuple(taps or default_taps(model.depth)),
               mlp=mlp or model.config.mlp, tokens=ids)

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

  def ids(self, index: Int[Array, "..."]) -> Int[Array, "..."]:
    """Which tokens these are of those there are logits for."""
    return (index if self.tokens is None else self.tokens[...][index]
            ).astype(jnp.int32)


def default_taps(depth: int) -> tuple[int, ...]:
  """A low, a middle and a high layer, as EAGLE-3 takes them."""
  return tuple(sorted(min(max(tap, 0), depth)
                      for tap in (2, depth // 2, depth - 3)))


Heads = MedusaHeads | EagleHead


# Which model.


def fingerprint(model: Transformer) -> str:
  """What tells one model from another: its sizes and a sample of its weights.

  Values are sampled from the embedding, the final norm, and three layers, and
  rounded to bfloat16, so that a model read as float32 and one read as bfloat16
  are the same. One that was quantized is another model.
  """
  c = model.config
  sizes = (c.vocab, c.width, c.depth, c.heads, c.kv_heads, c.head_size, c.mlp,
           c.experts)
  found = hashlib.sha256(repr(sizes).encode())
  weights = [model.embedding, model.final_norm]
  for layer in sorted({0, c.depth // 2, c.depth - 1}):
    weights += [model.layers[layer].qkv, model.layers[layer].down]
  rng = np.random.default_rng(0)
  for weight in weights:
    value = weight[...]
    some = tuple(rng.integers(0, size, 64) for size in value.shape)
    value = np.asarray(value[some].astype(jnp.bfloat16).astype(jnp.float32))
    found.update(value.astype("<f4").tobytes())
  return found.hexdigest()[:32]


# Folders.


@dataclasses.dataclass(frozen=True)
class Stored:
  """What a folder holds.

  Attributes:
    choices: the tree it comes with, best node first; empty for none.
    accuracy: what `medusa.measure` found; None where nothing was measured.
  """

  heads: Heads
  choices: tuple[tuple[int, ...], ...] = ()
  accuracy: Float[np.ndarray, "heads ranks"] | None = None


def save(folder: str | pathlib.Path, heads: Heads, model: Transformer, *,
         choices: Sequence[Sequence[int]] = (),
         accuracy: Float[np.ndarray, "heads ranks"] | None = None) -> None:
  """Writes heads as a folder, with the fingerprint of their model."""
  import safetensors.numpy  # Loaded when a file is written.
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if isinstance(heads, MedusaHeads):
    weights = {"up": heads.up, "down": heads.down, "tokens": heads.tokens}
    config = dict(
        kind="medusa", heads=heads.count, blocks=heads.up.shape[1],
        rank=None if heads.down is None else heads.down.shape[2],
        choices=[list(c) for c in choices],
        accuracy=None if accuracy is None else np.asarray(accuracy).tolist())
  else:
    weights = {".".join(map(str, path)): value[...]
               for path, value in nnx.to_flat_state(nnx.state(heads))}
    config = dict(kind="eagle", taps=list(heads.taps), mlp=heads.config.mlp)
  weights = {name: np.ascontiguousarray(value)
             for name, value in weights.items() if value is not None}
  tokens = weights.get("tokens")
  config |= dict(format=_FORMAT, model=fingerprint(model),
                 vocabulary=None if tokens is None else len(tokens))
  safetensors.numpy.save_file(weights, folder / WEIGHTS)
  # Last: a folder without it is not one of heads.
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n",
                               encoding="utf-8")


def load(folder: str | pathlib.Path, model: Transformer, kind: str) -> Stored:
  """Reads heads for `model`, onto its mesh and in its dtype.

  Args:
    kind: "medusa" or "eagle".

  Raises:
    InputError: they are of another kind or for another model, or a file is
      not as its config says.
  """
  from jaxspec.checkpoint import hf  # pulls in file formats
  folder = pathlib.Path(folder)
  path = folder / CONFIG
  if not path.is_file():
    raise InputError(f"{folder} has no {CONFIG}; pass a folder that "
                     "jaxspec.heads.save wrote")
  config = _Settings(path, hf.read_json(path))
  if config.get("kind") != kind:
    raise InputError(f"{path} is of kind {config.get('kind')!r}; pass a folder "
                     f"of kind {kind!r}")
  config.integer("format", _FORMAT, _FORMAT)
  made_for, here = config.get("model"), fingerprint(model)
  if made_for != here:
    raise InputError(f"{folder} was made for the model {made_for!r} and this "
                     f"is {here!r}; pass heads of this model")
  count = config.integer("vocabulary", 1, model.vocab, default=None)
  with _open(folder / WEIGHTS) as file:
    tokens = None
    if count is not None:
      tokens = file.read("tokens", (count,), ("I32",))
      if tokens[0] < 0 or tokens[-1] >= model.vocab or np.any(
          np.diff(tokens) <= 0):
        raise InputError(f"{file.path}: tokens must be ascending ids below "
                         f"{model.vocab}; fetch it again")
    put = _put(model)

    def source(name, shape, axes, wanted=None):
      array = file.read(name, shape, _FLOATS)
      return put(array.astype(wanted or _dtype(model)), axes)

    if kind == "medusa":
      heads = config.integer("heads", 1, _MOST["heads"])
      stored = Stored(
          MedusaHeads.make(
              model, source, heads,
              config.integer("blocks", 1, _MOST["blocks"]),
              config.integer("rank", 1, model.config.width, default=None),
              tokens),
          config.choices(heads), config.accuracy(heads))
    else:
      stored = Stored(EagleHead(
          model, source, taps=config.taps(model.depth),
          mlp=config.integer("mlp", 1, 2**20), tokens=tokens))
    file.refuse_unread()
  return stored


class _Settings:
  """A config that may say anything; what is wrong is named."""

  def __init__(self, path: pathlib.Path, values: dict):
    self.path, self.get = path, values.get

  def fail(self, key: str, wanted: str) -> InputError:
    found = repr(self.get(key))
    if len(found) > 60:
      found = found[:60] + "..."
    return InputError(f"{self.path}: {key} must be {wanted}, got {found}")

  def integer(self, key: str, low: int, high: int, **default: Any) -> Any:
    value = self.get(key)
    if default and value is None:
      return default["default"]
    if type(value) is not int or not low <= value <= high:
      raise self.fail(key, f"an integer in [{low}, {high}]")
    return value

  def taps(self, depth: int) -> tuple[int, ...]:
    value = self.get("taps")
    if (not isinstance(value, list) or not 1 <= len(value) <= _MOST["taps"]
        or any(type(tap) is not int or not 0 <= tap <= depth for tap in value)
        or sorted(value) != value):
      raise self.fail("taps", f"ascending layers of [0, {depth}]")
    return tuple(value)

  def choices(self, heads: int) -> tuple[tuple[int, ...], ...]:
    value = self.get("choices") or []
    if not isinstance(value, list) or len(value) > _MOST["choices"] or any(
        not isinstance(choice, list) or not 1 <= len(choice) <= heads
        or any(type(rank) is not int or not 0 <= rank < _MOST["ranks"]
               for rank in choice) for choice in value):
      raise self.fail("choices", f"at most {_MOST['choices']} lists of up to "
                      f"{heads} ranks")
    return tuple(map(tuple, value))

  def accuracy(self, heads: int) -> Float[np.ndarray, "heads ranks"] | None:
    value = self.get("accuracy")
    if value is None:
      return None
    try:
      found = np.array(value, np.float64)
    except (ValueError, TypeError):
      found = np.zeros((0, 0))
    if (found.ndim != 2 or len(found) != heads
        or not 1 <= found.shape[1] <= _MOST["ranks"]
        or not np.all((found >= 0) & (found <= 1))):
      raise self.fail("accuracy", f"{heads} lists of shares, equally long")
    return found


class _File:
  """An open safetensors file, read tensor by tensor and in full."""

  def __init__(self, path: pathlib.Path, file: Any):
    self.path, self._file = path, file
    self._unread = set(file.keys())

  def read(self, name: str, shape: tuple[int, ...], kinds: Sequence[str]
           ) -> np.ndarray:
    if name not in self._unread:
      raise InputError(f"{self.path} has no tensor {name!r}; fetch it again")
    part = self._file.get_slice(name)
    found, kind = tuple(part.get_shape()), part.get_dtype()
    if found != shape or kind not in kinds:
      raise InputError(
          f"{self.path}: tensor {name!r} is {kind}{list(found)} where the "
          f"config asks for {'/'.join(kinds)}{list(shape)}; use the config "
          "that belongs to it")
    self._unread.discard(name)
    return self._file.get_tensor(name)

  def refuse_unread(self) -> None:
    for name in sorted(self._unread):
      raise InputError(f"{self.path}: tensor {name!r} has no place in these "
                       "heads; use the config that belongs to it")


@contextlib.contextmanager
def _open(path: pathlib.Path):
  import safetensors  # Loaded when a file is opened.

  from jaxspec.checkpoint import hf
  try:
    hf.refuse_duplicates(path)
    with safetensors.safe_open(path, framework="numpy") as file:
      yield _File(path, file)
  except (safetensors.SafetensorError, OSError) as error:
    raise InputError(f"{path} is not a whole safetensors file ({error}); "
                     "fetch it again") from error


def _dtype(model: Transformer) -> Any:
  return model.embedding[...].dtype


def _unembedding(model: Transformer) -> Float[Array, "V D"]:
  return (model.embedding if model.config.tied else model.lm_head)[...]


def _ids(model: Transformer, tokens: Sequence[int] | None
         ) -> Int[np.ndarray, "W"] | None:
  """Ids as they are kept, ascending."""
  if tokens is None:
    return None
  ids = np.unique(np.asarray(tokens, np.int32))
  if not len(ids) or ids[0] < 0 or ids[-1] >= model.vocab:
    raise InputError(f"tokens must be ids in [0, {model.vocab - 1}]")
  return ids


def _put(model: Transformer) -> Callable[..., jax.Array]:
  """Puts an array beside the model's weights."""
  mesh = getattr(model.embedding[...].sharding, "mesh", None)
  if isinstance(mesh, jax.sharding.Mesh):
    return lambda array, axes: sharding.place(array, axes, mesh)
  return lambda array, axes: jnp.asarray(array)


__all__ = ["EagleHead", "Heads", "MedusaHeads", "Stored", "default_taps",
           "fingerprint", "load", "save"]
