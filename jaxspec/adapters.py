# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: small changes to some matrices of a transformer.

A matrix W becomes W + alpha / rank * up @ down (LoRA, arXiv:2106.09685), with
`up` 0 at first. What a model has learnt in this way is kept as a small folder;
merged into its model, it costs nothing to use.
"""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jaxspec import belonging
from jaxspec.errors import InputError, nearest
from jaxspec.heads.base import beside
from jaxspec.models.layers import Adapted
from jaxspec.models.transformer import Transformer, random_source, source_of

TARGETS = ("qkv", "out", "gate", "up", "down")
RANKS, ALPHAS = (1, 1024), (1e-6, 1e6)
_KIND = "adapter"
_Axes = tuple[str | None, ...]


@struct.dataclass
class Adapter:
  """A change of low rank to some matrices.

  Query, key and value are one matrix here, and their change is one too.

  Attributes:
    weights: in float32, `up` [*outputs, rank] and `down` [rank, inputs] of
      each matrix, as `layers.3.out.up`.
    targets: which matrices of a layer are changed; some of `TARGETS`.
    layers: in which layers, ascending.
    alpha: what the change is multiplied by, times the rank.
  """

  weights: Mapping[str, Float[Array, "..."]]
  targets: tuple[str, ...] = struct.field(pytree_node=False)
  layers: tuple[int, ...] = struct.field(pytree_node=False)
  rank: int = struct.field(pytree_node=False)
  alpha: float = struct.field(pytree_node=False)

  @classmethod
  def init(cls, model: Transformer, *, rank: int = 16,
           alpha: float | None = None, targets: Sequence[str] | None = None,
           layers: Sequence[int] | None = None, seed: int = 0) -> "Adapter":
    """An untrained adapter, which changes nothing.

    Args:
      alpha: None for twice the rank.
      targets: None for all that can be changed.
      layers: None for all.

    Raises:
      InputError: the model has no such matrix or layer.
    """
    able = _able(model)
    targets = able if targets is None else targets
    for target in targets:
      if target not in able:
        raise InputError(f"an adapter of this model can change "
                         f"{', '.join(able)}, not {target!r}."
                         f"{nearest(target, able)}")
    layers = range(model.depth) if layers is None else layers
    chosen = tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= model.depth:
      raise InputError("layers of an adapter must be some of "
                       f"0-{model.depth - 1}, got {list(chosen)}")
    targets = tuple(target for target in able if target in targets)
    if not targets:
      raise InputError(f"an adapter must change some of {', '.join(able)}")
    if not RANKS[0] <= rank <= RANKS[1]:
      raise InputError(f"the rank of an adapter must be in {list(RANKS)}, got "
                       f"{rank}")
    alpha = 2.0 * rank if alpha is None else float(alpha)
    if not ALPHAS[0] <= alpha <= ALPHAS[1]:
      raise InputError("alpha of an adapter must be in "
                       f"[{ALPHAS[0]:g}, {ALPHAS[1]:g}], got {alpha:g}")
    put, random = beside(model), random_source(seed, put=beside(model))

    def source(path, shape, axes):
      if path.endswith(".up"):
        return put(np.zeros(shape, np.float32), axes)
      return random(path, shape, axes)
    return cls._make(model, source, targets, chosen, rank, alpha)

  @classmethod
  def _make(cls, model, source, targets, layers, rank, alpha):
    return cls({path: source(path, shape, axes) for path, (shape, axes)
                in _shapes(model, targets, layers, rank).items()},
               targets, layers, rank, alpha)

  @property
  def scale(self) -> float:
    return self.alpha / self.rank

  def changes(self, path: str) -> bool:
    """Whether it changes the weight of this name."""
    return f"{path}.up" in self.weights

  def parts(self, path: str) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`up`, times the scale, and `down`."""
    return (self.weights[f"{path}.up"] * self.scale,
            self.weights[f"{path}.down"])


def _able(model: Transformer) -> tuple[str, ...]:
  """The matrices that can be changed; experts cannot."""
  return TARGETS[:2] if model.config.experts else TARGETS


def _shapes(model: Transformer, targets: Sequence[str], layers: Sequence[int],
            rank: int) -> dict[str, tuple[tuple[int, ...], _Axes]]:
  """Shape and logical axes of every weight of an adapter."""
  found: dict[str, tuple[tuple[int, ...], _Axes]] = {}
  for layer in layers:
    for target in targets:
      param, path = getattr(model.layers[layer], target), (
          f"layers.{layer}.{target}")
      weight = param[...]
      if not isinstance(weight, jax.Array):
        raise InputError("an adapter needs the model's matrices as they are, "
                         "and these were quantized or adapted before")
      *outputs, inputs = weight.shape
      axes = param.get_metadata()["axes"]
      found[f"{path}.up"] = ((*outputs, rank), (*axes[:-1], None))
      found[f"{path}.down"] = ((rank, inputs), (None, axes[-1]))
  return found


def applied(model: Transformer, adapter: Adapter) -> Transformer:
  """The changed model, each change beside its matrix: to be learnt."""
  weights = source_of(model)

  def source(path, shape, axes, wanted=None):
    weight = weights(path, shape, axes, wanted)
    if not adapter.changes(path):
      return weight
    return Adapted(weight, *adapter.parts(path))
  return Transformer(model.config, source)


def merged(model: Transformer, adapter: Adapter, *, consume: bool = False
           ) -> Transformer:
  """The changed model, each change added to its matrix: to be used.

  It is another model than the one it is made of, unless the adapter is
  untrained. Small changes may be lost in the rounding of one weight, so it
  does not go by its weights: its fingerprint follows from the model's and the
  adapter's.

  Args:
    consume: whether matrices may be changed in place; `model` is then lost.
  """
  weights, before = source_of(model), belonging.fingerprint(model)
  fold = _fold_in_place if consume else _fold

  def source(path, shape, axes, wanted=None):
    weight = weights(path, shape, axes, wanted)
    return (fold(weight, *adapter.parts(path)) if adapter.changes(path)
            else weight)
  made = Transformer(model.config, source)
  made.identity = _identity(before, adapter)
  return made


def _add(weight, up, down):
  change = jnp.tensordot(up, down, axes=1, precision="highest",
                         preferred_element_type=jnp.float32)
  return (weight.astype(jnp.float32) + change).astype(weight.dtype)


_fold = jax.jit(_add)
_fold_in_place = jax.jit(_add, donate_argnums=0)


def _identity(before: str, adapter: Adapter) -> str:
  """The fingerprint of a model with an adapter merged into it."""
  ups = [w for path, w in adapter.weights.items() if path.endswith(".up")]
  if not any(bool(jnp.any(up != 0)) for up in ups):
    return before
  found = hashlib.sha256(
      f"{before} {adapter.rank} {adapter.alpha!r}".encode())
  for path in sorted(adapter.weights):
    value = np.asarray(adapter.weights[path])
    found.update(path.encode() + value.astype("<f4").tobytes())
  return found.hexdigest()[:32]


def save(folder: str | pathlib.Path, adapter: Adapter, model: Transformer
         ) -> None:
  """Writes an adapter as a folder, with the fingerprint of its model."""
  belonging.write(folder, model, _KIND, dict(
      rank=adapter.rank, alpha=adapter.alpha, targets=list(adapter.targets),
      layers=list(adapter.layers)), adapter.weights)


def load(folder: str | pathlib.Path, model: Transformer) -> Adapter:
  """Reads an adapter for `model`, onto its mesh.

  Raises:
    InputError: it is no adapter or for another model, or a file is not as its
      config says.
  """
  with belonging.reading(
      folder, model, _KIND, noun="adapters",
      writer="jaxspec.adapters.save") as (config, file):
    rank = config.integer("rank", *RANKS)
    alpha = config.number("alpha", *ALPHAS)
    targets = _subset(config, "targets", _able(model))
    layers = _subset(config, "layers", range(model.depth))
    put = beside(model)

    def source(path, shape, axes):
      value = file.read(path, shape).astype(np.float32)
      if not np.isfinite(value).all():
        raise InputError(f"{file.path}: tensor {path!r} holds NaN or infinity; "
                         "fetch it again")
      return put(value, axes)
    return Adapter._make(model, source, targets, layers, rank, alpha)


def _subset(config: belonging.Settings, key: str, of: Sequence[Any]
            ) -> tuple[Any, ...]:
  """Some of `of`, each once and in their order."""
  value = config.get(key)
  if not isinstance(value, list) or not value or any(
      type(v) is not type(of[0]) for v in value) or (
          [v for v in of if v in value] != value):
    raise config.fail(key, f"some of {', '.join(map(str, of))}, in order"
                      if len(of) < 9 else
                      f"some of {of[0]} to {of[-1]}, in order")
  return tuple(value)


__all__ = ["TARGETS", "Adapter", "applied", "load", "merged", "save"]
