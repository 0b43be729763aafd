# SPDX-License-Identifier: Apache-2.0
"""Trees: everything derived from `parents`, against walks up the tree."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.tree import (
  GrownTree,
  Tree,
  best_choices,
  branching,
  chain,
  closed,
  from_paths,
  grow,
  in_order,
  root,
)

# Published beside Medusa's heads (github.com/FasterDecoding/Medusa,
# medusa_choices.py): `mc_sim_7b_63`, in its own order.
MEDUSA = [
    (0,), (0, 0), (1,), (0, 1), (2,), (0, 0, 0), (1, 0), (0, 2), (3,), (0, 3),
    (4,), (0, 4), (2, 0), (0, 5), (0, 0, 1), (5,), (0, 6), (6,), (0, 7),
    (0, 1, 0), (1, 1), (7,), (0, 8), (0, 0, 2), (3, 0), (0, 9), (8,), (9,),
    (1, 0, 0), (0, 2, 0), (1, 2), (0, 0, 3), (4, 0), (2, 1), (0, 0, 4),
    (0, 0, 5), (0, 0, 0, 0), (0, 1, 1), (0, 0, 6), (0, 3, 0), (5, 0), (1, 3),
    (0, 0, 7), (0, 0, 8), (0, 0, 9), (6, 0), (0, 4, 0), (1, 4), (7, 0),
    (0, 1, 2), (2, 0, 0), (3, 1), (2, 2), (8, 0), (0, 5, 0), (1, 5), (1, 0, 1),
    (0, 2, 1), (9, 0), (0, 6, 0), (0, 0, 0, 1), (1, 6), (0, 7, 0)]


@st.composite
def parents(draw):
  size = draw(st.integers(1, 24))
  return (-1, *(draw(st.integers(0, n - 1)) for n in range(1, size)))


def ancestry(tree, node):
  """The nodes from the root to `node`."""
  way = [node]
  while tree.parents[way[-1]] >= 0:
    way.append(tree.parents[way[-1]])
  return way[::-1]


@given(parents())
def test_against_walks_up_the_tree(parents):
  tree = Tree(parents)
  ways = [ancestry(tree, node) for node in range(tree.size)]
  assert tree.size == len(tree.parents)
  assert tree.depths.tolist() == [len(way) - 1 for way in ways]
  assert tree.height == max(len(way) for way in ways) - 1
  assert tree.mask.tolist() == [
      [other in way for other in range(tree.size)] for way in ways]
  assert tree.paths.shape == (tree.size, tree.height + 1)
  for path, way in zip(tree.paths.tolist(), ways):
    assert path == way + [0] * (len(path) - len(way))


@given(parents())
def test_children_are_in_order_and_padded(parents):
  tree = Tree(parents)
  wanted = [[n for n, p in enumerate(tree.parents) if p == parent]
            for parent in range(tree.size)]
  assert tree.children.shape == (tree.size, max(1, *map(len, wanted)))
  for found, children in zip(tree.children.tolist(), wanted):
    assert found == children + [-1] * (len(found) - len(children))


@given(parents())
def test_every_tree_is_its_own_choices(parents):
  """From the ranks of its nodes the same tree comes back, breadth first."""
  tree = Tree(parents)
  def ranks(node):
    way = ancestry(tree, node)
    return tuple(tree.children[a].tolist().index(b)
                 for a, b in zip(way, way[1:]))
  choices = [ranks(node) for node in range(1, tree.size)]
  made = from_paths(choices)
  order = sorted(range(tree.size), key=lambda n: (len(ranks(n)), ranks(n)))
  assert made.parents == (-1, *(order.index(tree.parents[n])
                                for n in order[1:]))
  # The order in which they are named does not matter.
  assert from_paths(choices[::-1]) == made


def test_types_are_those_of_constants():
  tree = branching((2, 2))
  assert {x.dtype for x in (tree.depths, tree.paths, tree.children)} == {
      np.dtype(np.int32)}
  assert tree.mask.dtype == bool
  assert isinstance(tree.height, int)


def test_root():
  tree = root()
  assert (tree.size, tree.height) == (1, 0)
  assert tree.mask.tolist() == [[True]]
  assert tree.paths.tolist() == [[0]]
  assert tree.children.tolist() == [[-1]]
  assert chain(0) == branching(()) == from_paths(()) == tree


def test_chain():
  tree = chain(4)
  assert tree.parents == (-1, 0, 1, 2, 3)
  assert tree.depths.tolist() == [0, 1, 2, 3, 4]
  np.testing.assert_array_equal(tree.mask, np.tril(np.ones((5, 5), bool)))
  assert branching((1,) * 4) == tree
  assert from_paths([(0, 0, 0, 0)]) == tree


def test_branching_is_breadth_first():
  tree = branching((2, 3))
  assert tree.parents == (-1, 0, 0, 1, 1, 1, 2, 2, 2)
  assert tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 2, 2, 2]
  assert tree.paths[8].tolist() == [0, 2, 8]
  assert tree.children.tolist()[:3] == [[1, 2, -1], [3, 4, 5], [6, 7, 8]]


def test_missing_ancestors_are_added():
  assert from_paths([(1, 0)]).parents == (-1, 0, 1)
  assert from_paths([(0, 1), (2,)]) == from_paths([(2,), (0,), (0, 1)])


def test_the_published_choices():
  tree = from_paths(MEDUSA)
  assert len(set(MEDUSA)) == 63
  assert tree.size == 64
  assert np.bincount(tree.depths).tolist() == [1, 10, 28, 23, 2]
  assert tree.height == 4
  assert tree.children[0, :10].tolist() == list(range(1, 11))
  # Medusa sorts by (depth, ranks) too and looks ancestors up by their choice.
  ordered = sorted(MEDUSA, key=lambda c: (len(c), c))
  for node, choice in enumerate(ordered, start=1):
    ancestors = [choice[:i] for i in range(1, len(choice))]
    way = [0, *(ordered.index(a) + 1 for a in ancestors), node]
    assert np.flatnonzero(tree.mask[node]).tolist() == way
    assert tree.paths[node, :len(way)].tolist() == way


def test_nodes_may_stand_in_their_own_order():
  assert closed([(1, 0), (1,), (0, 2, 1)]) == (
      (1,), (1, 0), (0,), (0, 2), (0, 2, 1))
  assert in_order([(1, 0), (1,), (0, 2, 1)]).parents == (-1, 0, 1, 0, 3, 4)
  # The published order is one: every beginning of it is a tree.
  tree = in_order(MEDUSA)
  assert closed(MEDUSA) == tuple(MEDUSA)
  assert tree.parents[:7] == (-1, 0, 1, 0, 1, 0, 2)
  assert sorted(tree.depths.tolist()) == from_paths(MEDUSA).depths.tolist()


@given(st.integers(1, 3).flatmap(lambda heads: st.integers(1, 4).flatmap(
    lambda ranks: st.lists(
        st.lists(st.sampled_from([0, 0.1, 0.25, 0.3, 0.5, 1]), min_size=ranks,
                 max_size=ranks), min_size=heads, max_size=heads))),
       st.integers(0, 30))
@settings(deadline=None)
def test_best_choices_are_the_best_of_all(accuracy, nodes):
  """And a tree, its best node first."""
  accuracy = np.array(accuracy, np.float64)
  heads, ranks = accuracy.shape

  def chance(path):
    found = 1.0
    for head, rank in enumerate(path):
      found *= float(accuracy[head, rank])
    return found
  every = [path for length in range(1, heads + 1)
           for path in itertools.product(range(ranks), repeat=length)
           if chance(path) > 0]
  every.sort(key=lambda path: (-chance(path), len(path), path))
  found = best_choices(accuracy, nodes)
  assert list(found) == every[:nodes]
  assert closed(found) == found


def test_a_grown_tree_is_what_its_rows_are():
  rng = np.random.default_rng(0)
  rows = [(-1, *(int(rng.integers(max(0, n - reach), n)) for n in range(1, 9)))
          for reach in (1, 2, 3, 9)]
  grown = GrownTree(jnp.asarray(rows, jnp.int32), height=8)
  for row, wanted in enumerate(map(Tree, rows)):
    np.testing.assert_array_equal(grown.mask[row], wanted.mask)
    np.testing.assert_array_equal(grown.depths[row], wanted.depths)
    np.testing.assert_array_equal(grown.first(5).mask[row],
                                  wanted.first(5).mask)


def test_equal_trees_are_one_program():
  """Trees are compared and hashed by their parents alone."""
  one, other = chain(3), Tree((-1, 0, 1, 2))
  _ = one.mask, one.paths                 # what is cached does not count
  assert one == other
  assert hash(one) == hash(other)
  assert len({one, other, chain(2), branching((3,))}) == 3
  with pytest.raises(AttributeError):
    one.parents = (-1,)


@pytest.mark.parametrize("parents, message", [
    ((), "root's parent must be -1"),
    ((0,), "root's parent must be -1, got \\(0,\\)"),
    ((-1, 1), "parent of node 1 must be in \\[0, 1\\), got 1"),
    ((-1, 0, 2), "parent of node 2 must be in \\[0, 2\\), got 2"),
    ((-1, -1), "parent of node 1 must be in \\[0, 1\\), got -1"),
    ((-1, 0, 3, 0), "parent of node 2 must be in \\[0, 2\\), got 3")])
def test_what_is_no_tree_is_refused(parents, message):
  with pytest.raises(ValueError, match=message):
    Tree(parents)


def trie(tokens, parents, chances, nodes):
  """Paths as tuples of tokens, each with its chance; the likeliest first."""
  paths, known = {0: ()}, {(): 1.0}
  first = {(): 0}
  for i in range(1, len(tokens)):
    above = paths.get(max(parents[i], 0))
    paths[i] = None if above is None or not chances[i] else (
        *above, tokens[i])
  for depth in range(1, len(tokens)):
    best = {}
    for i, path in paths.items():
      if path is not None and len(path) == depth:
        best[path] = max(best.get(path, 0.0), chances[i])
        first.setdefault(path, i)
    for path, chance in best.items():
      known[path] = known[path[:-1]] * chance
  order = sorted(known, key=lambda p: (-known[p], first[p]))[:nodes]
  return [(p, known[p]) for p in order], paths


@pytest.mark.medium
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_grow_against_a_trie(data):
  # Few sizes, each of which is compiled once.
  count = data.draw(st.sampled_from([2, 9]))
  parents = [-1] + [data.draw(st.integers(0, i - 1)) for i in range(1, count)]
  tokens = [9] + [data.draw(st.integers(0, 2)) for _ in range(count - 1)]
  chances = [1.0] + [data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
                     for _ in range(count - 1)]
  nodes = data.draw(st.sampled_from(sorted({2, (count + 2) // 2, count})))
  depth = [0] * count
  for i in range(1, count):
    depth[i] = depth[parents[i]] + 1
  tree, said, path, place = grow(
      *(jnp.asarray([x], t) for x, t in ((tokens, jnp.int32),
                                         (parents, jnp.int32),
                                         (chances, jnp.float32))),
      nodes=nodes, height=count - 1)
  wanted, paths = trie(tokens, parents, chances, nodes)
  alive = int(np.sum(np.asarray(path)[0] > 0))
  assert alive == len(wanted)
  found = []
  for node in range(alive):
    on_path = np.flatnonzero(np.asarray(tree.mask)[0, node])
    found.append(tuple(int(said[0, n]) for n in on_path if n))
  assert found == [p for p, _ in wanted]
  np.testing.assert_allclose(path[0, :alive], [c for _, c in wanted])
  # Parents first, and every candidate knows its node.
  assert all(int(p) < n for n, p in enumerate(tree.parents[0]))
  for i in range(count):
    at = found.index(paths[i]) if paths[i] in found else nodes
    assert int(place[0, i]) == at
  # The leading nodes are a tree.
  few = max(1, nodes // 2)
  np.testing.assert_array_equal(tree.first(few).mask,
                                np.asarray(tree.mask)[:, :few, :few])


def test_a_grown_tree_is_the_static_one_of_its_parents():
  for static in (chain(5), branching((2, 2, 1)), root()):
    grown = GrownTree(jnp.asarray([static.parents] * 2, jnp.int32),
                      static.height)
    np.testing.assert_array_equal(grown.mask[1], static.mask)
    np.testing.assert_array_equal(grown.depths[1], static.depths)
    assert grown.size == static.size
