# SPDX-License-Identifier: Apache-2.0
"""The topology of a proposal: which node follows which.

A `Tree` is static and hashable, so that each topology is one compiled
program; everything derived from it is a NumPy constant.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int


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
  wanted = {tuple(c[:i + 1]) for c in choices for i in range(len(c))}
  ordered = sorted(wanted, key=lambda choice: (len(choice), choice))
  index = {choice: i for i, choice in enumerate(itertools.chain([()], ordered))}
  return Tree((-1, *(index[choice[:-1]] for choice in ordered)))
