# SPDX-License-Identifier: Apache-2.0
"""Token recycling: what the model once thought would follow.

A pass over a tree tells the likeliest successors of every node, and all but
one are thrown away. Kept by token, they are the next trees (Token Recycling,
arXiv:2408.08696). The table has one entry a token of the vocabulary, whatever
stood before it, and belongs to a row.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Int

from jaxspec import naming, sharding
from jaxspec.base import Drafter, Proposal
from jaxspec.tree import Tree, best_choices, in_order, prune


@struct.dataclass
class Recycling(Drafter):
  """Drafts a tree from a table of the likeliest successors of each token.

  Attributes:
    nodes: most nodes of the tree, its root included.
    ranks: how many successors of a token are kept.
    depth: no node is deeper.
  """

  nodes: int = struct.field(pytree_node=False, default=32)
  ranks: int = struct.field(pytree_node=False, default=8)
  depth: int = struct.field(pytree_node=False, default=6)

  def __post_init__(self):
    for name, low, high in (("nodes", 2, 512), ("ranks", 1, 64),
                            ("depth", 1, 64)):
      naming.whole("recycling", name, getattr(self, name), low, high)

  @property
  def priors(self):
    return chances(self.ranks)

  @property
  def tree(self) -> Tree:
    return self._nodes[0]

  @property
  def _nodes(self) -> tuple[Tree, Int[np.ndarray, "N"]]:
    return likeliest(self.nodes, self.ranks, self.depth)

  def init(self, model, rows, capacity):
    return jnp.full((rows, model.vocab, self.ranks), -1, jnp.int32)

  def insert(self, model, state, rows, prefix, request):
    # What followed each token of the prompt, the last time it did.
    slot = jnp.arange(1, prefix.tokens.shape[1])[None]
    latest = jnp.zeros((len(rows), model.vocab), jnp.int32).at[
        jnp.arange(len(rows))[:, None], prefix.tokens[:, :-1]].max(
            jnp.where(slot < prefix.length[:, None], slot, 0))
    said = jnp.take_along_axis(prefix.tokens, latest, axis=1)
    table = jnp.full((len(rows), *state.shape[1:]), -1, jnp.int32)
    table = table.at[..., 0].set(jnp.where(latest > 0, said, -1))
    return state.at[rows].set(table, mode="drop")

  def propose(self, model, seq, request, state):
    tree, ranks = self._nodes
    rows = jnp.arange(len(state))[:, None]
    tokens = jnp.full((len(state), tree.size), -1, jnp.int32)
    tokens = tokens.at[:, :1].set(seq.tail())
    for depth in range(1, tree.height + 1):
      level = np.flatnonzero(tree.depths == depth)
      above = tokens[:, np.array(tree.parents)[level]]
      said = state[rows, jnp.maximum(above, 0), ranks[level][None]]
      tokens = tokens.at[:, level].set(jnp.where(above >= 0, said, -1))
    # Where the table has nothing the tree has no node.
    known = tokens >= 0
    grown, order = prune(tree, known)
    tokens = jnp.maximum(jnp.take_along_axis(tokens, order, axis=1), 0)
    return Proposal(
        tokens, grown, live=jnp.sum(known, axis=1, dtype=jnp.int32),
        kinds=jnp.asarray(ranks)[order]), state

  def observe(self, model, seq, state, proposal, scores, verdict):
    tokens, size = proposal.tokens, proposal.tree.size
    rows = jnp.arange(len(state))[:, None]
    taken = verdict.walked(size)
    # Of nodes that say the same, one that was accepted is heard first, for it
    # is the text; then the later, which on a path is the deeper.
    say = jnp.where(proposal.alive & (verdict.kept > 0)[:, None],
                    jnp.arange(size)[None] + jnp.where(taken, size, 0), -1)
    outdone = jnp.any((tokens[:, :, None] == tokens[:, None])
                      & (say[:, :, None] < say[:, None]), axis=-1)
    heard = jnp.where((say >= 0) & ~outdone, tokens, state.shape[1])
    # Whole on each device of a row, or XLA would part the ranks among them
    # and gather the table in every step.
    top = sharding.constrain(scores.top, "rows", None, None)
    return sharding.constrain(state.at[rows, heard].set(top, mode="drop"),
                              "rows", None, None)


def chances(ranks: int) -> tuple[float, ...]:
  """How often the successor of each rank is right, or nearly."""
  return tuple(0.5 * (rank + 1) ** -1.7 for rank in range(ranks))


@functools.cache
def likeliest(nodes: int, ranks: int, depth: int
              ) -> tuple[Tree, Int[np.ndarray, "N"]]:
  """The tree of the likeliest paths, best first, and each node's rank."""
  chosen = best_choices(np.array([chances(ranks)] * depth), nodes - 1)
  return (in_order(chosen),
          np.array([0, *(choice[-1] for choice in chosen)], np.int32))
