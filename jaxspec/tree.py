# SPDX-License-Identifier: Apache-2.0
"""The topology of a proposal: which node follows which.

A `Tree` is static and hashable, so that each topology is one compiled
program; everything derived from it is a NumPy constant. A `GrownTree` is data:
one program serves all topologies of as many nodes.

In both, parents come before their children. So the leading nodes of a tree are
a tree, and a drafter that puts the best nodes first can be asked for fewer.
"""

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# Nodes of a tree, each by the ranks taken on the way to it.
Choices = tuple[tuple[int, ...], ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Tree:
  """Nodes in topological order; node 0, the root, is the last committed token.

  Attributes:
    parents: the parent of each node. `parents[0] == -1`, and every other
      parent comes before its child.
  """

  parents: tuple[int, ...]

  def __post_init__(self):
    if not self.parents or self.parents[0] != -1:
      raise ValueError(f"the root's parent must be -1, got {self.parents[:1]}")
    for node, parent in enumerate(self.parents[1:], start=1):
      if not 0 <= parent < node:
        raise ValueError(f"parent of node {node} must be in [0, {node}), "
                         f"got {parent}")

  @property
  def size(self) -> int:
    """Number of nodes, the root included (N)."""
    return len(self.parents)

  @property
  def height(self) -> int:
    """Most tokens that can be accepted in one step."""
    return int(self.depths.max())

  @functools.cached_property
  def depths(self) -> Int[np.ndarray, "N"]:
    """Distance of each node from the root, which is its position there."""
    depths = np.zeros(self.size, np.int32)
    for node, parent in enumerate(self.parents[1:], start=1):
      depths[node] = depths[parent] + 1
    return depths

  @functools.cached_property
  def mask(self) -> Bool[np.ndarray, "N N"]:
    """`mask[i, j]`: node i sees node j, its ancestor or itself."""
    mask = np.eye(self.size, dtype=bool)
    for node, parent in enumerate(self.parents[1:], start=1):
      mask[node] |= mask[parent]
    return mask

  @functools.cached_property
  def paths(self) -> Int[np.ndarray, "N P"]:
    """The nodes from the root to each node; what lies beyond it is 0."""
    paths = np.zeros((self.size, self.height + 1), np.int32)
    for node, parent in enumerate(self.parents[1:], start=1):
      paths[node] = paths[parent]
      paths[node, self.depths[node]] = node
    return paths

  @functools.cached_property
  def children(self) -> Int[np.ndarray, "N W"]:
    """The children of each node in order, padded with -1."""
    lists = [[] for _ in self.parents]
    for node, parent in enumerate(self.parents[1:], start=1):
      lists[parent].append(node)
    width = max(1, *map(len, lists))
    return np.array([c + [-1] * (width - len(c)) for c in lists], np.int32)

  def first(self, nodes: int) -> "Tree":
    """The tree of the leading nodes."""
    return Tree(self.parents[:nodes])


@struct.dataclass
class GrownTree:
  """A tree a row, found on the device.

  Attributes:
    parents: as in `Tree`; a node that is not used is a child of the root.
    height: no node is deeper.
  """

  parents: Int[Array, "B N"]
  height: int = struct.field(pytree_node=False)

  @property
  def size(self) -> int:
    return self.parents.shape[1]

  @property
  def depths(self) -> Int[Array, "B N"]:
    return jnp.sum(self.mask, axis=-1, dtype=jnp.int32) - 1

  @property
  def mask(self) -> Bool[Array, "B N N"]:
    node = jnp.arange(self.size)
    seen = (jnp.eye(self.size, dtype=bool)[None]
            | (self.parents[..., None] == node[None, None]))
    reach = 1
    while reach < self.height:        # twice as far with every round
      seen = jnp.einsum("bij,bjk->bik", *[seen.astype(jnp.float32)] * 2) > 0
      reach *= 2
    return seen

  def first(self, nodes: int) -> "GrownTree":
    """The tree of the leading nodes."""
    return self.replace(parents=self.parents[:, :nodes])


def grow(tokens: Int[Array, "B M"], parents: Int[Array, "B M"],
         chances: Float[Array, "B M"], *, nodes: int, height: int
         ) -> tuple[GrownTree, Int[Array, "B N"], Float[Array, "B N"],
                    Int[Array, "B M"]]:
  """Joins candidates into one tree of the likeliest nodes.

  Candidates that say the same behind the same path become one node.

  Args:
    tokens: of each candidate; candidate 0 is the root.
    parents: an earlier candidate, or -1 for the root.
    chances: that it is accepted if its parent is, by its own drafter; 0 for a
      candidate that is none.
    nodes: of the tree, root included (N), at most M.
    height: no candidate is deeper.

  Returns:
    The tree, likeliest nodes first; its tokens; the chance that the path to
    each node is accepted, 0 for a node that is none; and the node that each
    candidate became, `nodes` for one that was left out.
  """
  rows, count = tokens.shape
  index = jnp.arange(count)
  parents = jnp.maximum(parents, 0)
  chances = chances.at[:, 0].set(1.0)

  def up(values):
    return jnp.take_along_axis(values, parents, axis=1)

  # Level by level: two candidates are one if they say the same and their
  # parents are one. A chance that several drafters see is their surest's.
  same = jnp.broadcast_to(index[None], tokens.shape)
  depth = (index > 0)[None].astype(jnp.int32) * jnp.ones_like(tokens)
  for _ in range(height - 1):
    depth = jnp.where(index[None] > 0, up(depth) + 1, 0)
  path = jnp.where(index[None] == 0, 1.0, 0.0) * jnp.ones_like(chances)
  for level in range(1, height + 1):
    here = (depth == level) & (chances > 0)
    parent = up(same)
    twins = (here[:, :, None] & here[:, None]
             & (parent[:, :, None] == parent[:, None])
             & (tokens[:, :, None] == tokens[:, None]))          # [B M M]
    same = jnp.where(here, jnp.argmax(twins, axis=-1), same)
    best = jnp.max(jnp.where(twins, chances[:, None], 0.0), axis=-1)
    above = jnp.take_along_axis(path, parent, axis=1)
    path = jnp.where(here, above * jnp.minimum(best, 1.0), path)
  first = same == index[None]
  path = jnp.where(first, path, 0.0)
  # Likeliest first. A child is never likelier than its parent, and comes
  # later where it is as likely, so that the order is topological.
  order = jnp.argsort(-path, axis=1, stable=True)[:, :nodes]
  chosen = jnp.take_along_axis(path, order, axis=1)
  place = jnp.full_like(same, nodes).at[
      jnp.arange(rows)[:, None], order].set(jnp.where(
          chosen > 0, jnp.arange(nodes)[None], nodes))
  place = jnp.take_along_axis(place, same, axis=1)
  parent = jnp.take_along_axis(up(place), order, axis=1)
  parent = jnp.where(chosen > 0, parent, 0).at[:, 0].set(-1)
  return (GrownTree(parent, height),
          jnp.take_along_axis(tokens, order, axis=1), chosen, place)


def prune(tree: Tree, kept: Bool[Array, "B N"]
          ) -> tuple[GrownTree, Int[Array, "B N"]]:
  """Moves the nodes that are not wanted behind the others.

  Args:
    kept: which nodes are wanted: the root, and of no node without its parent.

  Returns:
    The tree, the wanted nodes first and in their order; and which node of
    `tree` each of its nodes is.
  """
  order = jnp.argsort(~kept, axis=1, stable=True)
  place = jnp.argsort(order, axis=1)
  parents = jnp.asarray(np.maximum(tree.parents, 0))[order]
  parents = jnp.take_along_axis(place, parents, axis=1)
  kept = jnp.take_along_axis(kept, order, axis=1)
  parents = jnp.where(kept, parents, 0).at[:, 0].set(-1)
  return GrownTree(parents, tree.height), order


def root() -> Tree:
  """The tree that guesses nothing."""
  return Tree((-1,))


def chain(length: int) -> Tree:
  """A root followed by `length` drafted tokens in a row."""
  return Tree(tuple(range(-1, length)))


def branching(widths: Sequence[int]) -> Tree:
  """Every node at depth d has `widths[d]` children; breadth first."""
  parents, level = [-1], [0]
  for width in widths:
    start = len(parents)
    parents += [node for node in level for _ in range(width)]
    level = list(range(start, len(parents)))
  return Tree(tuple(parents))


def from_paths(choices: Sequence[Sequence[int]]) -> Tree:
  """A sparse tree from Medusa-style choices (arXiv:2401.10774).

  Args:
    choices: each names a node by the rank taken at each depth, e.g. `(0, 2)`
      is the third child of the first child of the root. Missing ancestors
      are added. Nodes are ordered by depth, then by rank.
  """
  return in_order(sorted(closed(choices), key=lambda c: (len(c), c)))


def closed(choices: Sequence[Sequence[int]]) -> Choices:
  """Each choice once, in order, with its missing ancestors before it."""
  return tuple(dict.fromkeys(
      tuple(c[:i + 1]) for c in choices for i in range(len(c))))


def in_order(choices: Sequence[Sequence[int]]) -> Tree:
  """As `from_paths`, but nodes stand in the order they are named in."""
  return _in_order(closed(choices))


@functools.lru_cache
def _in_order(named: Choices) -> Tree:
  index = {choice: i for i, choice in enumerate(itertools.chain([()], named))}
  return Tree((-1, *(index[choice[:-1]] for choice in named)))


def best_choices(accuracy: Float[np.ndarray, "heads K"], nodes: int
                 ) -> Choices:
  """The choices that are likeliest to be right, best first (arXiv:2401.10774).

  Takes node after node, each time the one whose path is likeliest of all that
  follow what is already taken. Since no path is likelier than its beginning,
  these are the likeliest of all.

  Args:
    accuracy: how often the choice of each rank is right, at each depth.
    nodes: how many at most, the root left out; what is never right is none.
  """
  waiting: list[tuple[float, int, tuple[int, ...]]] = []

  def offer(chance, choice):
    if len(choice) < len(accuracy):
      for rank, share in enumerate(accuracy[len(choice)].tolist()):
        if chance * share > 0:
          heapq.heappush(waiting, (-chance * share, len(choice) + 1,
                                   (*choice, rank)))

  offer(1.0, ())
  taken = []
  while waiting and len(taken) < nodes:
    chance, _, choice = heapq.heappop(waiting)
    taken.append(choice)
    offer(-chance, choice)
  return tuple(taken)
