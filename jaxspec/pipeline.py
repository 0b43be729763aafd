# SPDX-License-Identifier: Apache-2.0
"""A model whose layers lie on different chips, over the mesh axis `stage`.

Every chip runs one program, so what differs from stage to stage must be data:
the weights of the n-th layer of each stage are one array, a slice of which
each stage holds, and so are its keys and values. Stages need not be equally
deep; where one has fewer layers than another it holds zeros, and runs nothing.

Embedding, unembedding and final norm are on every stage: the first and the
last need them, and one program has no array that some chips lack. Split over
the stages instead, they would cost two more collectives for every token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxspec import sharding
from jaxspec.caches import Fresh, Place
from jaxspec.caches.contiguous import AXES, ContiguousCache, zeros
from jaxspec.errors import InputError
from jaxspec.models.transformer import (
  Config,
  Source,
  Transformer,
  source_of,
)

AXIS = "stage"


def divide(depth: int, stages: int, first: int | None = None
           ) -> tuple[int, ...]:
  """How many layers each stage gets.

  Args:
    first: layers of the first stage, where its end is a matter of choice; the
      others share the rest, the earlier ones what does not divide.
  """
  if first is None:
    return _share(depth, stages)
  return first, *_share(depth - first, stages - 1)


def _share(depth: int, stages: int) -> tuple[int, ...]:
  return tuple((depth + stages - 1 - s) // stages for s in range(stages))


def on_stages(run: Callable[..., PyTree], state: PyTree, *args: PyTree
              ) -> PyTree:
  """`run(state, *args)`, on all stages at once, where it gives a new state.

  Each stage sees a slice of one of what is split over them. The mesh is the
  one that is set (`jax.set_mesh`).
  """
  # Leaf by leaf, because no class of arrays can hold partitions in their place.
  leaves, form = jax.tree.flatten((state, *args))
  new = jax.tree.structure(state)

  def on_one(*leaves):
    return jax.tree.leaves(run(*jax.tree.unflatten(form, leaves)))

  # Nothing inside says which values differ between stages: no check_vma.
  made = jax.shard_map(on_one, in_specs=tuple(_specs((state, *args))),
                       out_specs=_specs(state), check_vma=False)(*leaves)
  return jax.tree.unflatten(new, made)


def _specs(tree: PyTree) -> list[P]:
  """Of every leaf; `split` of a class says which of its own are split."""
  def has(x):
    return hasattr(x, "split")
  return [P(AXIS) if split else P()
          for node in jax.tree.leaves(tree, is_leaf=has)
          for split in (node.split() if has(node) else [False])]


@struct.dataclass
class Pipeline:
  """A model on the stages of a mesh.

  Attributes:
    stage: the deepest stage, as a model. Each weight of its layers has the
      stages in front, and the mesh axis `stage` splits it there.
    layers: of each stage.
    config: of the whole model.
  """

  stage: Transformer
  layers: tuple[int, ...] = struct.field(pytree_node=False)
  config: Config = struct.field(pytree_node=False)

  @classmethod
  def of(cls, model: Transformer, layers: Sequence[int], mesh: Mesh
         ) -> "Pipeline":
    """From a model that is already in memory."""
    return cls.read(model.config, source_of(model), layers, mesh)

  @classmethod
  def read(cls, config: Config, source: Source, layers: Sequence[int],
           mesh: Mesh) -> "Pipeline":
    """Puts the weights of a model on the stages of a mesh.

    Args:
      source: where each weight comes from; shapes will do, to compile only.
      layers: of each stage, from the first on.

    Raises:
      InputError: the mesh or the layers do not fit.
    """
    layers = tuple(layers)
    first = np.cumsum([0, *layers[:-1]]).tolist()
    like = _alike(config, layers, first, mesh)

    def put(x, spec):
      at = NamedSharding(mesh, spec)
      if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
      return jax.device_put(x, at)

    def stack(*weights):
      like = next(w for w in weights if w is not None)
      if isinstance(like, jax.ShapeDtypeStruct):
        return put(like.update(shape=(len(weights), *like.shape)), P(AXIS))
      return put(jnp.stack([jnp.zeros_like(like) if w is None else w
                            for w in weights]), P(AXIS))

    def placed(path, shape, axes, wanted=None):
      if not path.startswith("layers."):
        return jax.tree.map(lambda w: put(w, P()),
                            source(path, shape, axes, wanted))
      _, slot, name = path.split(".")
      found = [source(f"layers.{f + int(slot)}.{name}", shape, axes, wanted)
               if int(slot) < n else None for f, n in zip(first, layers)]
      # A weight may be several arrays, as an eight-bit one is.
      form = jax.tree.structure(next(w for w in found if w is not None))
      parts = [[None] * form.num_leaves if w is None else jax.tree.leaves(w)
               for w in found]
      return jax.tree.unflatten(form, map(stack, *parts))

    return cls(Transformer(like, placed), layers, config)

  @property
  def depth(self) -> int:
    return self.config.depth

  @property
  def vocab(self) -> int:
    return self.config.vocab

  def init_cache(self, kind: Any, rows: int, capacity: int, dtype: Any
                 ) -> "StageCache":
    """An empty cache, which is contiguous on each stage."""
    if kind is not ContiguousCache:
      raise InputError("keys and values on the stages of a pipeline are stored "
                       "in contiguous caches; use cache=contiguous")
    return StageCache.empty(self.config, self.layers, rows, capacity, dtype)

  def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return self.stage.embed(tokens)

  def unembed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return self.stage.unembed(x)

  # From outside of the stages, as of any model; weights travel for it.

  def whole(self) -> Transformer:
    """The model without stages."""
    order = _order(self.layers)
    split = source_of(self.stage)

    def source(path, shape, axes, wanted=None):
      if not path.startswith("layers."):
        return split(path, shape, axes, wanted)
      _, layer, name = path.split(".")
      stage, slot = order[int(layer)]
      return jax.tree.map(lambda w: w[stage], split(
          f"layers.{slot}.{name}", shape, axes, wanted))
    return Transformer(self.config, source)

  def init_fresh(self, cache: Any, nodes: int) -> Fresh:
    c = self.config
    return Fresh.empty(c.depth, len(cache.length), nodes, c.kv_heads,
                       c.head_size, cache.dtype)

  def extend(self, x: Float[Array, "B T D"], cache: Any, fresh: Fresh,
             at: Place, *, layers: range
             ) -> tuple[Float[Array, "B T D"], Fresh]:
    return self.whole().extend(x, cache, fresh, at, layers=layers)

  # From within a stage.

  def split(self) -> list[bool]:
    """Which of its leaves are split over the stages."""
    return [_of_a_layer(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(self)]

  def mine(self) -> Transformer:
    """The layers of the stage that asks."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x[0] if _of_a_layer(path) else x, self).stage

  def run(self, model: Transformer, x: Float[Array, "B T D"],
          cache: ContiguousCache, at: Place
          ) -> tuple[Float[Array, "B T D"], Fresh]:
    """Takes the stream through the layers of the stage that asks.

    Args:
      model: what `mine` gave.
    """
    stage = lax.axis_index(AXIS)
    fresh, start = model.init_fresh(cache, x.shape[1]), 0
    # As far as all stages go, then as far as some do, and so on.
    for end in sorted(set(self.layers)):
      def some(x, fresh, part=range(start, end)):
        return model.extend(x, cache, fresh, at, layers=part)
      if end == min(self.layers):
        x, fresh = some(x, fresh)
      else:
        x, fresh = lax.cond(jnp.asarray(self.layers)[stage] >= end, some,
                            lambda x, fresh: (x, fresh), x, fresh)
      start = end
    return x, fresh


@struct.dataclass
class StageCache:
  """Keys and values where their layers are.

  Slot s of a row holds position s, as in a `ContiguousCache`. What lies at or
  beyond the position of a token is never seen by it, so that what a drained
  token left there does no harm, and is overwritten by the right one.

  Attributes:
    k: of the n-th layer of every stage.
    length: committed positions.
  """

  k: tuple[Float[Array, "S B G C K"], ...]
  v: tuple[Float[Array, "S B G C K"], ...]
  length: Int[Array, "B"]
  layers: tuple[int, ...] = struct.field(pytree_node=False)

  @classmethod
  def empty(cls, config: Config, layers: tuple[int, ...], rows: int,
            capacity: int, dtype: Any) -> "StageCache":
    """Of a model's `config`, with room for `capacity` positions."""
    shape = (len(layers), rows, config.kv_heads, capacity, config.head_size)
    def buffers():
      return tuple(zeros(shape, dtype, ("stages", *AXES))
                   for _ in range(max(layers)))
    return cls(buffers(), buffers(), jnp.zeros(rows, jnp.int32), layers)

  @property
  def dtype(self) -> Any:
    return self.k[0].dtype

  @property
  def capacity(self) -> int:
    return self.k[0].shape[3]

  def mine(self) -> ContiguousCache:
    """The cache of the stage that asks."""
    return ContiguousCache(tuple(x[0] for x in self.k),
                           tuple(x[0] for x in self.v), self.length)

  def of(self, mine: ContiguousCache) -> "StageCache":
    """Back from `mine`."""
    return self.replace(k=tuple(x[None] for x in mine.k),
                        v=tuple(x[None] for x in mine.v), length=mine.length)

  def split(self) -> list[bool]:
    """Which of its leaves are split over the stages."""
    return [True] * len(self.k + self.v) + [False]

  def insert(self, rows: Int[Array, "R"],
             prefix: "ContiguousCache | StageCache",
             reserve: Int[Array, "R"]) -> "StageCache":
    def insert(cache, rows, prefix, reserve):
      return cache.of(cache.mine().insert(rows, prefix.mine(), reserve))

    if isinstance(prefix, ContiguousCache):
      prefix = self.gather(prefix)
    return on_stages(insert, self, rows, prefix, reserve)

  def gather(self, cache: ContiguousCache) -> "StageCache":
    """The same keys and values, stage by stage."""
    first = np.cumsum([0, *self.layers[:-1]]).tolist()

    def stack(xs, slot):
      blank = jnp.zeros_like(xs[0])
      stages = jnp.stack([xs[f + slot] if slot < n else blank
                          for f, n in zip(first, self.layers)])
      return sharding.constrain(stages, "stages", *[None] * blank.ndim)

    slots = range(max(self.layers))
    return StageCache(tuple(stack(cache.k, slot) for slot in slots),
                      tuple(stack(cache.v, slot) for slot in slots),
                      cache.length, self.layers)

  def whole(self) -> ContiguousCache:
    """All layers in their order, as a model without stages holds them."""
    def layer(xs, stage, slot):
      return sharding.constrain(xs[slot][stage], *AXES)

    order = _order(self.layers)
    return ContiguousCache(tuple(layer(self.k, *at) for at in order),
                           tuple(layer(self.v, *at) for at in order),
                           self.length)

  # From outside of the stages, as of any cache; keys and values travel for it.

  def attend(self, layer: int, query: Float[Array, "B T H K"], fresh: Fresh,
             at: Place, **options: Any) -> Float[Array, "B T H K"]:
    return self.whole().attend(layer, query, fresh, at, **options)

  def commit(self, fresh: Fresh, path: Int[Array, "B P"],
             kept: Int[Array, "B"]) -> "StageCache":
    return self.gather(self.whole().commit(fresh, path, kept))

  def fits(self, lengths: Sequence[int]) -> int:
    return len(lengths)

  def release(self, rows: Bool[Array, "B"]) -> "StageCache":
    def release(cache, rows):
      return cache.of(cache.mine().release(rows))
    return on_stages(release, self, rows)


def _alike(config: Config, layers: tuple[int, ...], first: Sequence[int],
           mesh: Mesh) -> Config:
  """The config of the deepest stage; refuses what cannot be one program."""
  stages = mesh.shape.get(AXIS, 1)
  if stages < 2 or stages != mesh.size:
    raise InputError(
        "layers are split over the mesh axis stage alone, of at least 2; got "
        f"{dict(mesh.shape)}; use stage=2 or more, and leave the others out")
  if (len(layers) != stages or min(layers) < 1
      or sum(layers) != config.depth):
    raise InputError(
        f"{stages} stages of at least one layer must have the model's "
        f"{config.depth} layers together, got {', '.join(map(str, layers))}")
  for name in ("windows", "ropes"):
    for slot in range(max(layers)):
      kinds = {getattr(config, name)[f + slot]
               for f, n in zip(first, layers) if slot < n}
      if len(kinds) > 1:
        raise InputError(
            f"the stages of {', '.join(map(str, layers))} layers differ in the "
            f"{name} of their layer {slot + 1}, and all run one program; "
            "divide the model where its pattern repeats")
  deepest = slice(first[layers.index(max(layers))], None)
  return dataclasses.replace(
      config, depth=max(layers), windows=config.windows[deepest][:max(layers)],
      ropes=config.ropes[deepest][:max(layers)])


def _order(layers: tuple[int, ...]) -> list[tuple[int, int]]:
  """Of each layer, its stage and its place there."""
  return [(stage, slot) for stage, count in enumerate(layers)
          for slot in range(count)]


def _of_a_layer(path: Any) -> bool:
  """Whether a weight is one of a layer."""
  return "layers" in jax.tree_util.keystr(path)


__all__ = ["AXIS", "Pipeline", "StageCache", "divide", "on_stages"]
