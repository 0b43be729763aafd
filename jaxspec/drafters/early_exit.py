# SPDX-License-Identifier: Apache-2.0
"""Early exit: the lower layers and a head draft, the rest of them verify.

The model's own lower layers take the root and every draft, one depth of the
tree after another, and a head on top of them says what follows. The proposal
is a head start: verification takes up where drafting ended, so that no layer
runs twice on a token (LayerSkip, arXiv:2404.16710). Drafts are drawn with the
noise of the model's own samples, so that a head that knows the law says the
very token.

Two thresholds on the head's confidence: below `stop` it drafts no further,
which is a matter of speed; below `show` no draft is shown before it is
settled, which is a matter of what is taken back.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxspec import heads as heads_lib
from jaxspec import naming, sampling
from jaxspec.base import (
  Drafter,
  HeadStart,
  Model,
  Proposal,
  Request,
  Sequences,
)
from jaxspec.caches import Cache, Fresh, Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.confidence import MEASURES, signs, sureness, told
from jaxspec.errors import InputError, nearest
from jaxspec.heads import NEVER, ExitHead
from jaxspec.models.transformer import Transformer
from jaxspec.tree import Choices, Tree, closed, from_paths

_CHUNK = 512


@struct.dataclass
class ExitState:
  """What the attention of a head has read; nothing where it has none.

  Attributes:
    cache: of the committed text.
    fresh: of the nodes of the last proposal.
  """

  cache: Cache | None = None
  fresh: Fresh | None = None


@struct.dataclass
class EarlyExit(Drafter):
  """Drafts what the head says, depth by depth.

  Attributes:
    choices: the ranks taken on the way to each node.
    stop: a row drafts no further where the head's confidence is less.
    show: a draft is shown before it is settled if it is live, and the
      confidence with which it was drafted is at least this, as is that of all
      between it and the root.
    show_first: the same of the first token of an answer.
    measure: of confidence, see `jaxspec.confidence`.
    coefficients: of the measure `learned`.
    cache_dtype: of the keys and values of the head's attention.
  """

  head: ExitHead
  choices: Choices = struct.field(pytree_node=False)
  show: Any = 0.0
  show_first: Any = 0.0
  coefficients: Float[Array, "F"] | None = None
  stop: float = struct.field(pytree_node=False, default=0.0)
  measure: str = struct.field(pytree_node=False, default="top")
  cache_dtype: str = struct.field(pytree_node=False, default="float32")

  paced = True
  stepwise = True
  opens = True

  @classmethod
  def build(cls, target: Any, heads: Any = "", layer: Any = 0, length: Any = 4,
            widths: Any = "", stop: Any = 0.0, show: Any = None,
            show_first: Any = None, measure: Any = "") -> "EarlyExit":
    """For the target.

    Args:
      heads: a folder with a trained head, or the name of one that is shipped
        for the model; nothing for the one that suits it best.
      layer: in its place, how many layers lie below the plain early exit.
      length: tokens of a chain.
      widths: in its place, how many children the nodes of each depth have, as
        in `[3;2;1]`: a tree.
      stop: the least confidence with which a row drafts further.
      show: the least confidence with which a draft is shown before it is
        settled; above 1 none is. By default what the head was calibrated to,
        or else 0.
      show_first: the same of the first token of an answer; by default what
        the head was calibrated to, or else `show`.
      measure: of confidence; by default the one the head was calibrated for,
        or else `top`.
    """
    naming.whole("early_exit", "length", length, 1, 64)
    stop = naming.number("early_exit", "stop", stop, 0, 1)
    for name, value in (("show", show), ("show_first", show_first)):
      if value is not None:
        naming.number("early_exit", name, value, 0, NEVER)
    if measure and measure not in MEASURES:
      raise InputError(f"early_exit: measure {measure!r} is unknown; there are "
                       f"{', '.join(MEASURES)}.{nearest(measure, MEASURES)}")
    stored = exit_head("early_exit", target.model, heads, layer)
    head, known = stored.heads, stored.calibration
    measure = measure or (known.measure if known else "top")
    fits = known if known and known.measure == measure else None
    if measure == "learned" and not fits:
      raise InputError("early_exit: measure learned needs a head that was "
                       "calibrated with it; run python -m jaxspec calibrate "
                       "--measure=learned")
    if known and not fits and show is None:
      raise InputError(f"early_exit: {heads} is calibrated for measure="
                       f"{known.measure}, and {measure} is asked for; say what "
                       "may be shown, as in show=0.5, or calibrate it again")
    if show_first is None:
      show_first = fits.first if fits else show
    if show is None:
      show = fits.later if fits else 0.0
    coefficients = None
    if fits and fits.coefficients:
      coefficients = jnp.asarray(fits.coefficients, jnp.float32)
    choices = _bushy(str(widths)) if widths else tuple(
        (0,) * d for d in range(1, length + 1))
    return cls(head, choices, float(show), float(show_first or 0.0),
               coefficients, stop, measure, target.cache_dtype)

  @property
  def taps(self):
    return (self.head.layer,)

  @property
  def tree(self) -> Tree:
    return from_paths(self.choices)

  @property
  def priors(self):
    widest = max(choice[-1] for choice in self.choices) + 1
    return tuple(0.5 ** (rank + 1) for rank in range(widest))

  def init(self, model, rows, capacity):
    if not self.head.depth:
      return ExitState()
    cache = self.head.init_cache(ContiguousCache, rows, capacity,
                                 jnp.dtype(self.cache_dtype))
    return ExitState(cache, self.head.init_fresh(cache, self.size))

  def insert(self, model, state, rows, prefix, request):
    if state.cache is None:
      return state
    cache = self._read(prefix.features[0], prefix.length)
    return state.replace(cache=state.cache.insert(rows, cache, request.limit))

  def read(self, model: Model, x: Float[Array, "R T D"],
           length: Int[Array, "R"]) -> ExitState:
    """The state of rows that have read texts, given what is below the head."""
    if not self.head.depth:
      return ExitState()
    cache = self._read(x, length)
    return ExitState(cache, self.head.init_fresh(cache, self.size))

  def begin(self, state: ExitState, rows: Int[Array, "R"], new: ExitState,
            request: Request) -> ExitState:
    """Puts the state of such rows into a batch."""
    if state.cache is None:
      return state
    return ExitState(
        state.cache.insert(rows, new.cache, request.limit),
        jax.tree.map(lambda b, n: b.at[rows].set(n, mode="drop"),
                     state.fresh, new.fresh))

  def plan(self, rows: int) -> Proposal:
    tokens = jnp.zeros((rows, self.size), jnp.int32)
    return Proposal(tokens, self.tree, kinds=jnp.broadcast_to(
        self._ranks()[None], tokens.shape))

  def propose(self, model, seq, request, state, most=None):
    walk = self.look(model, seq, request, state, None, most)
    return self.go_on(model, seq, request, state, walk, most)

  def look(self, model: Model, seq: Sequences, request: Request,
           state: ExitState, begun: HeadStart | None = None,
           most: Int[Array, ""] | None = None) -> "_Walk":
    """Begins a proposal: the root, and what the head says behind it.

    Args:
      begun: the root, where it has been through the lower layers.
      most: nodes that are wanted; None for all.
    """
    rows = len(seq.length)
    x = jax.eval_shape(model.embed, seq.tail())
    walk = _Walk(
        tokens=jnp.zeros((rows, self.size), jnp.int32).at[:, :1].set(
            seq.tail()),
        confidence=jnp.zeros((rows, self.size), jnp.float32),
        x=jnp.zeros((rows, self.size, x.shape[-1]), x.dtype),
        fresh=model.init_fresh(seq.cache, self.size), own=state.fresh,
        live=jnp.ones(rows, jnp.int32), wants=jnp.ones(rows, bool))
    if begun is not None:
      walk = walk.replace(x=walk.x.at[:, :1].set(begun.x), fresh=begun.fresh)
    return self._go(model, seq, request, state, walk, 0, most,
                    taken=begun is not None)

  def go_on(self, model: Model, seq: Sequences, request: Request,
            state: ExitState, walk: "_Walk",
            most: Int[Array, ""] | None = None
            ) -> tuple[Proposal, ExitState]:
    """Finishes a proposal that `look` began."""
    tree, limit = self.tree, self.size if most is None else most
    for depth in range(1, tree.height + 1):
      first = int(np.argmax(tree.depths == depth))

      def go(walk, depth=depth):
        return self.deepen(model, seq, request, state, walk, depth, most)
      walk = lax.cond(jnp.any(walk.wants) & (first < limit), go,
                      lambda walk: walk, walk)
    return self.close(seq, state, walk, most)

  def deepen(self, model: Model, seq: Sequences, request: Request,
             state: ExitState, walk: "_Walk", depth: int,
             most: Int[Array, ""] | None = None) -> "_Walk":
    """Takes the drafts of one depth through the lower layers, and drafts the
    next behind them; see `go_on`, which does so as long as a row wants it."""
    return self._go(model, seq, request, state, walk, depth, most)

  def close(self, seq: Sequences, state: ExitState, walk: "_Walk",
            most: Int[Array, ""] | None = None
            ) -> tuple[Proposal, ExitState]:
    """Makes a proposal of a walk that goes no further."""
    tree = self.tree
    live = walk.live if most is None else jnp.minimum(walk.live, most)
    # Rows that stop need no pass as wide as the tree.
    ends = np.cumsum(np.bincount(tree.depths)).tolist() if self.stop else ()
    return self.plan(len(seq.length)).replace(
        tokens=walk.tokens, live=live, shown=self.shown(seq, walk),
        sizes=tuple(ends),
        head_start=HeadStart(walk.x, walk.fresh, self.head.layer)
    ), state.replace(fresh=walk.own)

  def shown(self, seq: Sequences, walk: "_Walk") -> Int[Array, "B"]:
    """How many drafts, on the path of first children, may be shown."""
    path = [0]
    while (child := int(self.tree.children[path[-1], 0])) > 0:
      path.append(child)
    nodes = np.array(path[1:])
    opening = ((seq.length == seq.prompt_length)[:, None]
               & (self.tree.depths[nodes] == 1)[None])
    least = jnp.where(opening, self.show_first, self.show)
    sure = ((walk.confidence[:, nodes] >= least)
            & (nodes[None] < walk.live[:, None]))
    return jnp.sum(jnp.cumprod(sure.astype(jnp.int32), axis=1), axis=1)

  def observe(self, model, seq, state, proposal, scores, verdict):
    if state.cache is None:
      return state
    return state.replace(cache=state.cache.commit(
        state.fresh, verdict.path, verdict.kept))

  def _go(self, model: Model, seq: Sequences, request: Request,
          state: ExitState, walk: "_Walk", depth: int,
          most: Int[Array, ""] | None, taken: bool = False) -> "_Walk":
    """Takes one depth of the tree through the lower layers, and lets the head
    fill the next.

    Args:
      taken: whether the lower layers have done so.
    """
    tree = self.tree
    level = np.flatnonzero(tree.depths == depth)
    below = np.flatnonzero(tree.depths == depth + 1)
    first = int(level[0])
    positions = seq.cache.length[:, None] + tree.depths[None]
    at = Place.of(positions, jnp.asarray(tree.mask[level]), first)
    if taken:
      x = walk.x[:, level]
    else:
      x, fresh = model.extend(
          model.embed(walk.tokens[:, level]), seq.cache, walk.fresh, at,
          layers=range(self.head.layer))
      walk = walk.replace(fresh=fresh, x=lax.dynamic_update_slice_in_dim(
          walk.x, x, first, axis=1))
    if state.cache is not None:
      x, own = self.head.extend(x, state.cache, walk.own, at, layers=range(1))
      walk = walk.replace(own=own)
    if not len(below):
      return walk

    def say(walk):
      return self._say(model, seq, request, positions, walk, level, below, x)
    if most is None:
      return say(walk)
    return lax.cond(below[0] < most, say, lambda walk: walk, walk)

  def _say(self, model: Model, seq: Sequences, request: Request,
           positions: Int[Array, "B N"], walk: "_Walk", level: np.ndarray,
           below: np.ndarray, y: Float[Array, "B T D"]) -> "_Walk":
    """Fills the next depth of the tree with what the head says."""
    tree, rank, tokens = self.tree, self._ranks(), walk.tokens
    parents = np.unique(np.array(tree.parents)[below])
    y = y[:, np.searchsorted(level, parents)]
    families = [np.array([n for n in below if tree.parents[n] == parent])
                for parent in parents]
    counts = [int(rank[children].max()) + 1 for children in families]
    sure, most = walk.confidence, max(counts)

    def by_logits():
      """What is said behind each parent, and with which signs."""
      logits = self.head(model, y)
      history = sampling.History(
          seq.tokens, seq.prompt_length, seq.length, tokens,
          jnp.broadcast_to(jnp.asarray(tree.mask),
                           (*tokens.shape, tree.size)))
      said = []
      for column, (parent, count) in enumerate(zip(parents, counts)):
        law = sampling.warp(
            self.head.spread(logits[:, column], model.vocab),
            request.sampling, history, jnp.full_like(walk.live, parent))
        some = sampling.draws(law, request.sampling, positions[:, parent] + 1,
                              count)
        said.append(jnp.pad(some, ((0, 0), (0, most - count))))
      return jnp.stack(said, axis=1), signs(logits)

    def by_forecast():
      """The same without logits, where nothing has to be done to them."""
      noise = sampling.words(request.sampling.key, positions[:, parents] + 1)
      what = self.head.forecast(model, y, most, noise,
                                request.sampling.temperature)
      shape = (len(tokens), len(parents))
      known = told(what.top, what.margin, what.entropy,
                   len(self.head.sayable(model)))
      return (what.tokens.reshape(*shape, most), known.reshape(*shape, 3))

    if self.head.forecasts(model, most):
      said, found = lax.cond(sampling.bare(request.sampling, model.vocab),
                             by_forecast, by_logits)
    else:
      said, found = by_logits()
    for column, (parent, children) in enumerate(zip(parents, families)):
      tokens = tokens.at[:, children].set(said[:, column, rank[children]])
      place = positions[:, parent] + 1 - seq.prompt_length
      sure = sure.at[:, children[0]].set(sureness(
          found[:, column], self.measure, place, self.coefficients))
    # The first node of a depth is on the likeliest path.
    wants = walk.wants & (sure[:, below[0]] >= self.stop)
    return walk.replace(
        tokens=tokens, confidence=sure, wants=wants,
        live=jnp.where(wants, int(below[-1]) + 1, walk.live))

  def _ranks(self) -> Int[np.ndarray, "N"]:
    """Of each node among its siblings; nodes as `from_paths` puts them."""
    paths = sorted(closed(self.choices), key=lambda c: (len(c), c))
    return np.array([0, *(path[-1] for path in paths)], np.int32)

  def _read(self, features: Float[Array, "R T D"], length: Int[Array, "R"]
            ) -> ContiguousCache:
    """The cache of the head's attention behind each prompt."""
    count = min(features.shape[1], _CHUNK)
    room = -(-features.shape[1] // count) * count
    features = jnp.pad(features, ((0, 0), (0, room - features.shape[1]),
                                  (0, 0)))

    def body(i, cache):
      x = lax.dynamic_slice_in_dim(features, i * count, count, axis=1)
      nth = jnp.broadcast_to(jnp.arange(count)[None], x.shape[:2])
      at = Place.of(cache.length[:, None] + nth,
                    jnp.tril(jnp.ones((count, count), bool)))
      _, fresh = self.head.extend(x, cache, self.head.init_fresh(cache, count),
                                  at, layers=range(1))
      return cache.commit(fresh, nth, jnp.clip(length - i * count, 0, count))

    cache = self.head.init_cache(ContiguousCache, len(length), room,
                                 jnp.dtype(self.cache_dtype))
    chunks = (jnp.max(length) + count - 1) // count
    return lax.fori_loop(0, chunks, body, cache)


@struct.dataclass
class _Walk:
  """A proposal in the making.

  Attributes:
    confidence: with which each node was drafted; 0 for the root, for what is
      not drafted yet, and for all but the first of siblings.
    x: below the exit, of every node that was taken there.
    fresh: keys and values of the lower layers.
    own: of the head's attention.
    wants: rows that draft further.
  """

  tokens: Int[Array, "B N"]
  confidence: Float[Array, "B N"]
  x: Float[Array, "B N D"]
  fresh: Fresh
  own: Fresh | None
  live: Int[Array, "B"]
  wants: Bool[Array, "B"]


def exit_head(owner: str, model: Transformer, heads: Any, layer: Any
              ) -> heads_lib.Stored:
  """The head that options of `owner` ask for: trained, or the plain exit.

  Args:
    heads: a folder with a trained head, or the name of one that is shipped for
      the model; nothing for the one that suits it best.
    layer: in its place, how many layers lie below the plain early exit.
  """
  if heads and layer:
    raise InputError(f"{owner} takes heads=FOLDER, a trained head, or layer=N, "
                     "the plain early exit, and not both")
  if not layer:
    return heads_lib.load(heads_lib.find(str(heads), model, "exit"), model,
                          "exit")
  naming.whole(owner, "layer", layer, 1, model.depth - 1)
  return heads_lib.Stored(ExitHead.init(model, layer=layer))


def _bushy(text: str) -> Choices:
  """All choices of so many children at each depth."""
  try:
    widths = [int(width) for width in text.split(";")]
  except ValueError:
    widths = [0]
  size = 1
  for width in reversed(widths):
    size = 1 + width * size
  if min(widths) < 1 or len(widths) > 64 or size > 513:
    raise InputError("early_exit: widths must be a few positive integers, as "
                     f"in [3;2;1], that make at most 512 nodes, got {text!r}")
  choices, level = [], [()]
  for width in widths:
    level = [(*path, rank) for path in level for rank in range(width)]
    choices += level
  return tuple(choices)
