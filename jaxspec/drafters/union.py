# SPDX-License-Identifier: Apache-2.0
"""Union: what several drafters propose, in one tree of the likeliest nodes.

Each drafter's guesses are weighed by how often guesses of their kind, at their
depth, were right in this request so far. What two of them say is one node.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from jaxspec import naming
from jaxspec.acceptance import Acceptance, outcome
from jaxspec.base import Drafter, Proposal
from jaxspec.drafters import parse
from jaxspec.errors import InputError
from jaxspec.tree import grow


@struct.dataclass
class _State:
  """Each drafter's own, what was learned, and the last candidates."""

  inner: tuple[Any, ...]
  acceptance: Acceptance
  kinds: Int[Array, "B M"]
  depths: Int[Array, "B M"]
  node: Int[Array, "B M"]


@struct.dataclass
class Union(Drafter):
  """Joins the proposals of `drafters` under a budget of nodes.

  Attributes:
    nodes: of the tree, root included.
  """

  drafters: tuple[Any, ...]
  nodes: int = struct.field(pytree_node=False, default=16)

  @classmethod
  def build(cls, target, drafters="prompt_lookup;recycling", nodes=16):
    """See `drafters.parse`; `drafters` are texts for it."""
    parts = tuple(parse(part, target)
                  for part in naming.split(str(drafters), ";"))
    for part in parts:
      if part.whole:
        raise InputError(f"union: {type(part).__name__.lower()} cannot be "
                         "joined with others; use it alone")
    most = 1 + sum(part.size - 1 for part in parts)
    if len(parts) < 2:
      raise InputError("union: drafters must be at least two, as in "
                       f"[prompt_lookup;recycling], got {drafters!r}")
    if not isinstance(nodes, int) or not 2 <= nodes <= most:
      raise InputError("union: nodes must be a whole number in "
                       f"[2, {most}], got {nodes!r}")
    return cls(parts, nodes)

  @property
  def size(self):
    return self.nodes

  @property
  def height(self):
    return min(self.nodes - 1, max(part.height for part in self.drafters))

  @property
  def taps(self):
    return tuple(sorted({tap for part in self.drafters for tap in part.taps}))

  @property
  def ranks(self):
    return max(part.ranks for part in self.drafters)

  @property
  def priors(self):
    return tuple(p for part in self.drafters for p in part.priors)

  costly = True                    # joining takes its time

  @property
  def coupled(self):
    return any(part.coupled for part in self.drafters)

  @property
  def _deepest(self):
    return max(part.height for part in self.drafters)

  def init(self, model, rows, capacity):
    candidates = 1 + sum(part.size - 1 for part in self.drafters)
    zeros = jnp.zeros((rows, candidates), jnp.int32)
    return _State(
        tuple(part.init(model, rows, capacity) for part in self.drafters),
        Acceptance.unknown(rows, self._deepest, self.priors, shared=False),
        zeros, zeros, zeros)

  def insert(self, model, state, rows, prefix, request):
    inner = tuple(
        part.insert(model, own, rows, prefix.replace(
            features=self._tapped(part, prefix.features)), request)
        for part, own in zip(self.drafters, state.inner))
    return state.replace(inner=inner,
                         acceptance=state.acceptance.begin(rows))

  def propose(self, model, seq, request, state):
    columns, inner, first, kind = [], [], 0, 0
    for part, own in zip(self.drafters, state.inner):
      made, own = part.propose(model, seq, request, own)
      inner.append(own)
      # Behind the one root come the nodes of one drafter after another.
      parents = jnp.where(made.parents > 0, made.parents + first, 0)
      columns.append([x[:, 1:] for x in (
          made.tokens, parents, made.kind + kind, made.depths, made.alive)])
      first += part.size - 1
      kind += len(part.priors)
    tokens, parents, kinds, depths, alive = (
        jnp.concatenate([jnp.zeros_like(xs[0][:, :1]), *xs], axis=1)
        for xs in zip(*columns))
    tokens = tokens.at[:, :1].set(seq.tail())
    chances = jnp.where(alive, state.acceptance.of(kinds, depths), 0.0)
    tree, tokens, chances, node = grow(
        tokens, parents, chances, nodes=self.nodes, height=self._deepest)
    tree = tree.replace(height=self.height)
    live = jnp.sum(chances > 0, axis=1, dtype=jnp.int32)
    proposal = Proposal(tokens, tree, live=live, chances=chances)
    return proposal, state.replace(inner=tuple(inner), kinds=kinds,
                                   depths=depths, node=node)

  def observe(self, model, seq, state, proposal, scores, verdict):
    # Whoever said what a node says is judged by it.
    judged, right = (
        jnp.take_along_axis(jnp.pad(x, ((0, 0), (0, 1))), state.node, axis=1)
        for x in outcome(proposal, verdict))
    acceptance = state.acceptance.judge(state.kinds, state.depths, judged,
                                        right)
    inner = tuple(
        part.observe(model, seq, own, proposal, scores.replace(
            top=scores.top[..., :part.ranks],
            features=self._tapped(part, scores.features)), verdict)
        for part, own in zip(self.drafters, state.inner))
    return state.replace(inner=inner, acceptance=acceptance)

  def _tapped(self, part, features):
    """Of the features at all taps, those of one drafter; then the rest."""
    at = {tap: x for tap, x in zip(self.taps, features)}
    return (*(at[tap] for tap in part.taps), *features[len(self.taps):])
