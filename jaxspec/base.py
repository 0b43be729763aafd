# SPDX-License-Identifier: Apache-2.0
"""The nouns of decoding, and the protocols of what plugs into the loop.

Dimensions, everywhere: B rows, T tokens in this call, N nodes of a tree (root
included), P longest path (root included), S cache slots, C token slots, L
layers, D model width, H query heads, G key/value heads, K head size, F MLP
width, V vocabulary, R rows being inserted.

The one invariant: `cache.length == length - 1`. The last committed token is
always the next root; its keys are not yet written.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxspec.caches import Cache, Fresh, Place
from jaxspec.sampling import Laws, Sampling
from jaxspec.tree import GrownTree, Tree


@runtime_checkable
class Model(Protocol):
  """What the loop asks of a language model."""

  depth: int
  vocab: int

  def init_fresh(self, cache: Cache, nodes: int) -> Fresh: ...

  def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]: ...

  def extend(self, x: Float[Array, "B T D"], cache: Cache, fresh: Fresh,
             at: Place, *, layers: range
             ) -> tuple[Float[Array, "B T D"], Fresh]: ...

  def unembed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]: ...


@struct.dataclass
class HeadStart:
  """A proposal that has already been through the first `depth` layers."""

  x: Float[Array, "B N D"]
  fresh: Fresh
  depth: int = struct.field(pytree_node=False)


@struct.dataclass
class Proposal:
  """Tokens on a tree; node 0 is the last committed token.

  Attributes:
    live: how many leading nodes of each row mean anything; None for all.
    replacement: whether siblings were drawn independently, each from the whole
      law of `probs`. Else each was drawn from what its elders had left of it,
      as the largest of perturbed logits are.
    sizes: node counts that a pass is compiled for, ascending, the last one all
      N. A step takes the smallest that holds every live node. Empty for N
      alone.
    least: a pass is at least this many nodes wide, whatever is live.
    probs: at each node, the law its children were drawn from, where they were
      drawn and a verifier wants to know; None where drafts are no matter of
      chance. It is honest if siblings stand in the order in which they were
      drawn, and if nothing depends on a drawn token but what is behind it:
      a draft that is left out because it is unlikely makes the law another.
    kinds: for each node, which of the drafter's kinds of guess it is (see
      `Drafter.priors`); None if there is one kind.
    chances: that the path to each node is accepted, where the drafter knows
      better than its kinds tell.
    shown: how many nodes behind the root, on the path of first children, the
      drafter is sure enough of to show them before they are settled; None for
      all that are live.
  """

  tokens: Int[Array, "B N"]
  tree: Tree | GrownTree
  live: Int[Array, "B"] | None = None
  least: Int[Array, ""] | None = None
  probs: Float[Array, "B N V"] | None = None
  kinds: Int[Array, "B N"] | None = None
  chances: Float[Array, "B N"] | None = None
  shown: Int[Array, "B"] | None = None
  head_start: HeadStart | None = None
  replacement: bool = struct.field(pytree_node=False, default=False)
  sizes: tuple[int, ...] = struct.field(pytree_node=False, default=())

  @property
  def alive(self) -> Bool[Array, "B N"]:
    """Which nodes may be accepted."""
    node = jnp.arange(self.tree.size)[None]
    if self.live is None:
      return jnp.broadcast_to(node >= 0, self.tokens.shape)
    return node < self.live[:, None]

  @property
  def kind(self) -> Int[Array, "B N"]:
    """`kinds`, also where there is one."""
    return jnp.zeros_like(self.tokens) if self.kinds is None else self.kinds

  # The topology, row by row, whether it is static or data.

  @property
  def parents(self) -> Int[Array, "B N"]:
    return jnp.broadcast_to(jnp.asarray(self.tree.parents), self.tokens.shape)

  @property
  def depths(self) -> Int[Array, "B N"]:
    return jnp.broadcast_to(jnp.asarray(self.tree.depths), self.tokens.shape)

  @property
  def mask(self) -> Bool[Array, "B N N"]:
    return jnp.broadcast_to(jnp.asarray(self.tree.mask),
                            (*self.tokens.shape, self.tree.size))

  @property
  def leads(self) -> Bool[Array, "B N"]:
    """Live nodes on the path of first children, what is believed in most."""
    parents, node = self.parents, jnp.arange(self.tree.size)
    # A node leads if no earlier one has the same parent; so must its ancestors.
    rivals = ((parents[:, :, None] == parents[:, None])
              & (node[:, None] > node[None])[None])
    leads = self.alive & ~jnp.any(rivals, axis=-1)
    return leads & ~jnp.any(self.mask & ~leads[:, None], axis=-1)

  def path_to(self, node: Int[Array, "B"]) -> Int[Array, "B P"]:
    """The nodes from the root to `node`; what lies beyond it is 0."""
    on_path = jnp.take_along_axis(self.mask, node[:, None, None], axis=1)
    depth = jnp.arange(self.tree.height + 1)[None, :, None]
    return jnp.argmax(on_path & (self.depths[:, None] == depth), axis=-1
                      ).astype(jnp.int32)

  def first(self, nodes: int) -> "Proposal":
    """The proposal of the leading nodes alone."""
    def cut(x):
      return None if x is None else x[:, :nodes]

    start = self.head_start
    if start is not None:
      start = start.replace(x=cut(start.x), fresh=start.fresh.first(nodes))
    live = None if self.live is None else jnp.minimum(self.live, nodes)
    return self.replace(
        tokens=cut(self.tokens), tree=self.tree.first(nodes), live=live,
        probs=cut(self.probs), kinds=cut(self.kinds),
        chances=cut(self.chances), head_start=start, sizes=())


@struct.dataclass
class Scores:
  """What the model said of every node, its logits left out.

  Logits are large, and gone once they are verified. Of nodes that were not
  live in any row, everything may be 0.

  Attributes:
    top: the likeliest tokens behind each node, best first, as many as the
      drafter's `ranks`.
    features: the residual stream below each tapped layer, then the top.
  """

  top: Int[Array, "B N ranks"]
  features: tuple[Float[Array, "B N D"], ...]
  fresh: Fresh


@struct.dataclass
class Verdict:
  """One path a row.

  Attributes:
    path: nodes from the root on; meaningless from `kept` on.
    kept: accepted nodes and the root; 0 for a finished row.
    next_token: the correction or bonus token that follows the path.
    logprobs: log-probability of each token this emits under the model itself,
      before any warp; noted by the `verify` stage where a request wants it.
  """

  path: Int[Array, "B P"]
  kept: Int[Array, "B"]
  next_token: Int[Array, "B"]
  logprobs: Float[Array, "B P"] | None = None

  def walked(self, nodes: int) -> Bool[Array, "B N"]:
    """Which of the tree's nodes are on the path, the root among them."""
    step = jnp.arange(self.path.shape[1])[None] < self.kept[:, None]
    here = self.path[..., None] == jnp.arange(nodes)[None, None]
    return jnp.any(step[..., None] & here, axis=1)


@struct.dataclass
class Sequences:
  """The committed text of every row, its prompt first, and its cache."""

  tokens: Int[Array, "B C"]
  prompt_length: Int[Array, "B"]
  length: Int[Array, "B"]
  cache: Cache

  def tail(self) -> Int[Array, "B 1"]:
    """The last committed token."""
    return jnp.take_along_axis(
        self.tokens, jnp.maximum(self.length - 1, 0)[:, None], axis=1)


@struct.dataclass
class Counters:
  """What each row's current request has cost so far.

  Attributes:
    passes: passes of the model after the prompt.
    nodes: drafted nodes that were scored and might have been accepted.
    drafted: passes that drafted something at each depth below the root.
    accepted: passes that accepted something there.
    used: how often each node was accepted; the root never is.
    scored: nodes that passes were wide, live or not, roots included.
  """

  passes: Int[Array, "B"]
  nodes: Int[Array, "B"]
  drafted: Int[Array, "B depth"]
  accepted: Int[Array, "B depth"]
  used: Int[Array, "B N"]
  scored: Int[Array, "B"]

  @classmethod
  def zeros(cls, rows: int, height: int, size: int) -> "Counters":
    depth = jnp.zeros((rows, height), jnp.int32)
    row = jnp.zeros(rows, jnp.int32)
    return cls(row, row, depth, depth, jnp.zeros((rows, size), jnp.int32),
               row)


@struct.dataclass
class Request:
  """What a row was asked for; data, so that requests can be mixed.

  Attributes:
    limit: the longest the text may become, prompt included.
    stops: token ids that end it; -1 where there is none.
    wants_logprobs: whether log-probabilities are recorded.
  """

  sampling: Sampling
  limit: Int[Array, "B"]
  stops: Int[Array, "B E"]
  wants_logprobs: Bool[Array, "B"]


@struct.dataclass
class DecodeState:
  """Everything the loop carries.

  Attributes:
    draft: the drafter's own state.
    logprobs: log-probability of each committed token under the model itself,
      before any warp; recorded where a request wants it.
  """

  seq: Sequences
  request: Request
  draft: PyTree
  done: Bool[Array, "B"]
  logprobs: Float[Array, "B C"]
  counters: Counters


@struct.dataclass
class Emission:
  """From `start` on, the text is these tokens; a later one overwrites.

  Attributes:
    count: how many of `tokens` are meant; 0 for a finished row.
    settled: whether they are committed and will never change.
  """

  start: Int[Array, "B"]
  tokens: Int[Array, "B P"]
  count: Int[Array, "B"]
  settled: bool = struct.field(pytree_node=False)


@struct.dataclass
class Prefix:
  """Prompts that have been read, ready to be inserted into rows.

  Attributes:
    features: at the drafter's taps, for every prompt token.
    last: the top of the residual stream at each prompt's last token.
  """

  tokens: Int[Array, "R T"]
  length: Int[Array, "R"]
  cache: Cache
  features: tuple[Float[Array, "R T D"], ...]
  last: Float[Array, "R D"]


@runtime_checkable
class Drafter(Protocol):
  """Proposes what comes next. A pytree: leaves are weights, statics shape.

  What is not overridden suits a drafter without state.

  Attributes:
    taps: layers below which `observe` and `insert` want the residual stream.
    ranks: how many of the likeliest tokens behind each node `observe` wants.
    tree: of every proposal, if it is always the same.
    height: most tokens one step can accept; sizes the counters.
    size: nodes of a proposal, root included (N).
    priors: for each kind of guess the drafter makes, how often it is right,
      before anything is known.
    costly: whether proposing takes a noticeable part of a pass.
    honest: whether its proposals tell the laws they were drawn from.
    whole: whether all it proposes must be scored, and where it put it: it can
      be neither cut nor joined with others.
    paced: whether it drafts no more than it is told: `propose` takes `most`,
      a number of nodes, and `plan(rows)` is its proposal but for the tokens.
    stepwise: whether it drafts depth by depth if asked: `look`, `deepen` for
      each depth and `close` are `propose` in parts, and what is sure is shown
      after each.
    opens: whether it can draft behind a prompt that only the lower layers
      have read, see `jaxspec.opening`.
    unmeasured: whether it waits for what passes of its `sizes` cost.
    coupled: whether what one row is given may depend on others, as when they
      share a pass whose width is chosen. Their texts never do.
  """

  taps: tuple[int, ...] = ()
  ranks: int = 0
  tree: Tree
  priors: tuple[float, ...] = (0.5,)
  costly: bool = False
  honest: bool = False
  whole: bool = False
  paced: bool = False
  stepwise: bool = False
  opens: bool = False
  unmeasured: bool = False
  coupled: bool = False

  @property
  def height(self) -> int:
    return self.tree.height

  @property
  def size(self) -> int:
    return self.tree.size

  def init(self, model: Model, rows: int, capacity: int) -> PyTree:
    """The state of a batch in which no request has begun."""
    return ()

  def insert(self, model: Model, state: PyTree, rows: Int[Array, "R"],
             prefix: Prefix, request: Request) -> PyTree:
    """Begins new requests in `rows`; an index of B or more is dropped."""
    return state

  def propose(self, model: Model, seq: Sequences, request: Request,
              state: PyTree) -> tuple[Proposal, PyTree]: ...

  def observe(self, model: Model, seq: Sequences, state: PyTree,
              proposal: Proposal, scores: Scores,
              verdict: Verdict) -> PyTree:
    """Sees what became of the proposal; `seq` is already committed."""
    return state


# (proposal, warped logits, sampling, positions of the tokens to draw). It is
# hashable and comparable. What it may say of itself: `honest`, it wants to know
# `Proposal.probs`, and `needs_probs`, it cannot do without; `lossy`, the text
# is not distributed as the model's own; `final`, no draft that is live and
# leads is ever taken back; `label`, its name in statistics.
Verifier = Callable[[Proposal, Laws], Verdict]

