# SPDX-License-Identifier: Apache-2.0
"""EAGLE: one layer that runs ahead on the model's own features.

Position i of the layer reads the feature of token i and the token i + 1, and
predicts token i + 2. Of a text of n tokens, the last of which is the root, the
model has read n - 1: so the layer's own cache holds positions 0 ... n - 2, all
of them from the model's features, and what stands at n - 2 predicts the first
draft. Behind it, the layer's output takes the place of the feature; nothing of
that outlives the step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxspec import heads as heads_lib
from jaxspec import naming
from jaxspec.base import Drafter, Model, Prefix, Proposal, Sequences
from jaxspec.caches import Cache, Fresh, Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.errors import InputError, nearest
from jaxspec.heads import EagleHead
from jaxspec.tree import Choices, GrownTree, in_order

# The static tree published with the first EAGLE (github.com/SafeAILab/EAGLE):
# the ranks taken on the way to each node, a digit a depth.
_STATIC = ("0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 "
           "0000 0001 0002 00000 00001")
_TREES = ("dynamic", "static", "chain")
_CHUNK = 512
_NEVER = -1e9         # a log-probability; sums of it are finite


@struct.dataclass
class EagleState:
  """What the layer has read, and what it has yet to read.

  Attributes:
    cache: of the layer, from the model's features alone.
    features: fused, of tokens behind what the cache holds.
    count: how many of them.
  """

  cache: Cache
  features: Float[Array, "B P D"]
  count: Int[Array, "B"]


@struct.dataclass
class Eagle(Drafter):
  """Drafts what the layer finds likely, on a tree it grows or on a given one.

  Attributes:
    taps: the layers whose features are fused.
    nodes: of a grown tree, root included.
    depth: rounds in which a tree grows.
    width: beams that are followed in each round, and children of each.
    choices: the ranks taken on the way to each node of a given tree, parents
      first; None to grow one.
    cache_dtype: of the layer's keys and values.
  """

  head: EagleHead
  taps: tuple[int, ...] = struct.field(pytree_node=False)
  nodes: int = struct.field(pytree_node=False, default=60)
  depth: int = struct.field(pytree_node=False, default=7)
  width: int = struct.field(pytree_node=False, default=10)
  choices: Choices | None = struct.field(pytree_node=False, default=None)
  cache_dtype: str = struct.field(pytree_node=False, default="float32")

  @classmethod
  def build(cls, target: Any, heads: Any = "", tree: Any = "dynamic",
            nodes: Any = 60, depth: Any = 7, width: Any = 10) -> "Eagle":
    """For the target, from a folder.

    Args:
      heads: the folder.
      tree: `dynamic`, grown anew in each step; `static`, 25 nodes; `chain`,
        `depth` nodes in a row.
      nodes: of a dynamic tree, root included.
      depth: of a dynamic tree or a chain.
      width: beams of a dynamic tree, and children of each.
    """
    if tree not in _TREES:
      raise InputError(f"eagle: tree {tree!r} is unknown; there are "
                       f"{', '.join(_TREES)}.{nearest(str(tree), _TREES)}")
    naming.whole("eagle", "depth", depth, 1, 32)
    naming.whole("eagle", "width", width, 1, 64)
    most = 1 + width + (depth - 1) * width**2
    if type(nodes) is not int or nodes < 2:
      raise InputError("eagle: nodes must be an integer of at least 2, got "
                       f"{nodes!r}")
    if tree == "dynamic" and nodes > most:
      raise InputError(f"eagle: depth {depth} and width {width} make {most} "
                       f"nodes, fewer than nodes={nodes}; ask for fewer")
    folder = heads_lib.find(str(heads), target.model, "eagle")
    head = heads_lib.load(folder, target.model, "eagle").heads
    assert isinstance(head, EagleHead)
    choices = {"dynamic": None,
               "static": tuple(tuple(map(int, w)) for w in _STATIC.split()),
               "chain": tuple((0,) * d for d in range(1, depth + 1))}[tree]
    words = (target.model.vocab if head.tokens is None
             else len(head.tokens[...]))
    made = cls(head, head.taps, nodes, depth, width, choices,
               target.cache_dtype)
    if len(made.priors) > words:
      raise InputError(f"eagle: the tree is {len(made.priors)} wide and the "
                       f"head knows {words} tokens; ask for less width")
    return made

  @property
  def _given(self):
    """The tree, where it is given."""
    return in_order(self.choices)

  @property
  def height(self):
    return self.depth if self.choices is None else self._given.height

  @property
  def size(self):
    return self.nodes if self.choices is None else self._given.size

  @property
  def priors(self):
    widest = (self.width if self.choices is None
              else max(choice[-1] for choice in self.choices) + 1)
    return tuple(0.5 ** (rank + 1) for rank in range(widest))

  def init(self, model, rows, capacity):
    x = jax.eval_shape(model.embed, jnp.zeros((rows, 1), jnp.int32))
    return EagleState(
        self.head.init_cache(ContiguousCache, rows, capacity,
                             jnp.dtype(self.cache_dtype)),
        jnp.zeros((rows, self.height + 1, x.shape[-1]), x.dtype),
        jnp.zeros(rows, jnp.int32))

  def insert(self, model, state, rows, prefix, request):
    cache = self._read_prompts(model, prefix, state.cache.dtype)
    at = (prefix.length - 1)[:, None, None]
    last = self.head.fuse([jnp.take_along_axis(x, at, axis=1)
                           for x in prefix.features])
    last = jnp.pad(last, ((0, 0), (0, self.height), (0, 0)))
    return EagleState(
        state.cache.insert(rows, cache, request.limit),
        state.features.at[rows].set(last, mode="drop"),
        state.count.at[rows].set(1, mode="drop"))

  def propose(self, model, seq, request, state):
    state, x = self._catch_up(model, seq, state)
    draft = self._grow if self.choices is None else self._fill
    return draft(model, seq, state.cache, x), state

  def observe(self, model, seq, state, proposal, scores, verdict):
    # What an earlier step left waits still where nothing was asked for since.
    state = lax.cond(jnp.any(state.count > 0),
                     lambda: self._catch_up(model, seq, state)[0],
                     lambda: state)
    path = verdict.path[..., None]
    features = self.head.fuse([jnp.take_along_axis(x, path, axis=1)
                               for x in scores.features[:-1]])
    return state.replace(features=features, count=verdict.kept)

  # The committed text.

  def _read_prompts(self, model: Model, prefix: Prefix, dtype: Any
                    ) -> ContiguousCache:
    """The layer's cache of each prompt, but for its last token."""
    length = prefix.tokens.shape[1]
    count = min(length, _CHUNK)
    room = -(-length // count) * count

    def fit(x):
      spare = ((0, 0), (0, room - x.shape[1]))
      return jnp.pad(x, spare + ((0, 0),) * (x.ndim - 2))

    after = fit(prefix.tokens[:, 1:])
    features = [fit(x) for x in prefix.features]
    wanted = prefix.length - 1

    def body(i, cache):
      def part(x):
        return lax.dynamic_slice_in_dim(x, i * count, count, axis=1)
      _, cache = self._read(
          model, cache, self.head.fuse([part(x) for x in features]),
          part(after), jnp.clip(wanted - i * count, 0, count))
      return cache

    cache = self.head.init_cache(ContiguousCache, len(wanted), room, dtype)
    return lax.fori_loop(0, (jnp.max(wanted) + count - 1) // count, body,
                         cache)

  def _catch_up(self, model: Model, seq: Sequences, state: EagleState
                ) -> tuple[EagleState, Float[Array, "B 1 D"]]:
    """Reads what was committed since; gives the layer's last output.

    Here and not in `observe`: so one pass of the layer does for what was
    accepted and for the first draft.
    """
    at = state.cache.length[:, None] + jnp.arange(state.features.shape[1])[None]
    after = jnp.take_along_axis(
        seq.tokens, jnp.minimum(at + 1, seq.tokens.shape[1] - 1), axis=1)
    x, cache = self._read(model, state.cache, state.features, after,
                          state.count)
    last = jnp.maximum(state.count - 1, 0)[:, None, None]
    state = state.replace(cache=cache, count=jnp.zeros_like(state.count))
    return state, jnp.take_along_axis(x, last, axis=1)

  def _read(self, model: Model, cache: ContiguousCache,
            features: Float[Array, "B T D"], after: Int[Array, "B T"],
            kept: Int[Array, "B"]
            ) -> tuple[Float[Array, "B T D"], ContiguousCache]:
    """Takes features in a row through the layer; the first `kept` stay."""
    count = features.shape[1]
    nth = jnp.broadcast_to(jnp.arange(count)[None], after.shape)
    at = Place.of(cache.length[:, None] + nth,
                  jnp.tril(jnp.ones((count, count), bool)))
    x, fresh = self.head.extend(
        self.head.join(model, features, after), cache,
        self.head.init_fresh(cache, count), at, layers=range(1))
    return x, cache.commit(fresh, nth, kept)

  # The draft.

  def _ahead(self, model: Model, cache: Cache, fresh: Fresh,
             features: Float[Array, "B W D"], after: Int[Array, "B W"],
             mask: Bool[Any, "*B W M"], rounds: Int[np.ndarray, "M"],
             start: int) -> tuple[Float[Array, "B W D"], Fresh]:
    """Takes drafted tokens through the layer, behind those before them.

    Args:
      rounds: how deep below the first draft each fresh node stands.
    """
    at = Place.of(cache.length[:, None] + rounds[None],
                  jnp.asarray(mask), start)
    return self.head.extend(self.head.join(model, features, after), cache,
                            fresh, at, layers=range(1))

  def _fill(self, model: Model, seq: Sequences, cache: Cache,
            x: Float[Array, "B 1 D"]) -> Proposal:
    """The given tree, depth by depth."""
    assert self.choices is not None
    tree = self._given
    rank = np.array([0, *(c[-1] for c in self.choices)], np.int32)
    # Nodes with children, and where their fresh keys are.
    inner = sorted(set(tree.parents[1:]), key=lambda n: (tree.depths[n], n))
    inner = np.array(inner, np.int32)
    rounds = tree.depths[inner[1:]] - 1
    fresh = self.head.init_fresh(cache, len(rounds))
    tokens = [seq.tail()[:, 0]] * tree.size
    nodes = inner[:1]
    for depth in range(tree.height):
      if depth:
        above, nodes = nodes, inner[tree.depths[inner] == depth]
        parents = np.array(tree.parents)[nodes]
        x, fresh = self._ahead(
            model, cache, fresh, x[:, np.searchsorted(above, parents)],
            jnp.stack([tokens[node] for node in nodes], axis=1),
            tree.mask[np.ix_(nodes, inner[1:])], rounds,
            int(np.searchsorted(rounds, depth - 1)))
      children = [n for n in range(1, tree.size) if tree.parents[n] in nodes]
      best, _ = self.head.choose(model, x, int(rank[children].max()) + 1)
      for child in children:
        beam = int(np.searchsorted(nodes, tree.parents[child]))
        tokens[child] = best[:, beam, rank[child]]
    filled = jnp.stack(tokens, axis=1)
    return Proposal(filled, tree,
                    kinds=jnp.broadcast_to(rank[None], filled.shape))

  def _grow(self, model: Model, seq: Sequences, cache: Cache,
            x: Float[Array, "B 1 D"]) -> Proposal:
    """The likeliest nodes of a beam search (arXiv:2406.16858).

    In each round every beam offers its likeliest children, and the likeliest
    of these are the next beams. All that were offered may become nodes.
    """
    width, rounds = self.width, self.depth - 1
    rows = len(x)

    def offer(x, score):
      """Children of each beam, `[B W*width]`, and how likely their paths."""
      best, chance = self.head.choose(model, x, width)
      # No path is likelier than its beginning, whatever a head may say.
      chance = jnp.where(jnp.isnan(chance), _NEVER,
                         jnp.clip(chance, _NEVER, 0.0))
      return (best.reshape(rows, -1),
              (score[..., None] + chance).reshape(rows, -1))

    def pick(values, index):
      return jnp.take_along_axis(
          values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), axis=1)

    score = jnp.zeros((rows, 1), jnp.float32)
    root = jnp.zeros((rows, 1), jnp.int32)
    token, chance = offer(x, score)
    tokens = [seq.tail(), token]
    scores, parents = [score, chance], [root, jnp.repeat(root, width, axis=1)]
    # The beams: which candidates they are, and what they follow.
    beam = jnp.broadcast_to(jnp.arange(width)[None] + 1, (rows, width))
    features = jnp.repeat(x, width, axis=1)
    count = width * rounds
    fresh = self.head.init_fresh(cache, count)
    mask = jnp.zeros((rows, width, count), bool)
    for start in range(0, count, width):
      own = np.eye(width, count, start, dtype=bool)
      mask = mask | own[None]
      x, fresh = self._ahead(model, cache, fresh, features, token, mask,
                             np.arange(count) // width, start)
      offered, likely = offer(x, chance)
      first = 1 + width + start * width
      tokens.append(offered)
      scores.append(likely)
      parents.append(jnp.repeat(beam, width, axis=1))
      chance, best = lax.top_k(likely, width)
      beam, token = first + best, pick(offered, best)
      features, mask = pick(x, best // width), pick(mask, best // width)
    return self._best(*(jnp.concatenate(a, axis=1)
                        for a in (tokens, parents, scores)))

  def _best(self, tokens: Int[Array, "B M"], parents: Int[Array, "B M"],
            scores: Float[Array, "B M"]) -> Proposal:
    """The likeliest of all candidates, likeliest first.

    None is likelier than its parent; and of equals, the earlier goes first: so
    all ancestors are there, and stand before.
    """
    chosen = lax.top_k(scores, self.nodes)[1]
    place = jnp.zeros_like(tokens).at[
        jnp.arange(len(tokens))[:, None], chosen].set(
            jnp.arange(self.nodes)[None])
    parent = jnp.take_along_axis(parents, chosen, axis=1)
    parent = jnp.take_along_axis(place, parent, axis=1).at[:, 0].set(-1)
    kinds = jnp.maximum(chosen - 1, 0) % self.width
    return Proposal(jnp.take_along_axis(tokens, chosen, axis=1),
                    GrownTree(parent, self.depth), kinds=kinds)
