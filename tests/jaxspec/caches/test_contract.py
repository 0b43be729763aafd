# SPDX-License-Identifier: Apache-2.0
"""One contract for every cache in the folder.

Random schedules of trees, ragged commits, inserts and releases run beside a
plain record of what was committed. After every round each cache must attend
as a contiguous cache written afresh from that record does.
"""

import functools
import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxspec.caches
from jaxspec import sharding
from jaxspec import tree as trees
from jaxspec.caches import Cache, Fresh, Place
from jaxspec.caches.contiguous import ContiguousCache

pytestmark = pytest.mark.usefixtures("quick_compiles")

WINDOWS = (None, 5, 8)
ROWS, CAPACITY, KV_HEADS, HEADS, SIZE = 4, 24, 2, 4, 8
TREES = (trees.chain(6), trees.branching((2, 2)))     # as many nodes in both


def discover():
  folder = pathlib.Path(jaxspec.caches.__file__).parent
  for file in sorted(folder.glob("[a-z]*.py")):
    module = importlib.import_module(f"jaxspec.caches.{file.stem}")
    for name, kind in inspect.getmembers(module, inspect.isclass):
      if name.endswith("Cache") and kind is not Cache and (
          kind.__module__ == module.__name__):
        yield pytest.param(kind, id=name)


every_cache = pytest.mark.parametrize("kind", list(discover()))
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def make(kind, windows=WINDOWS, rows=ROWS, capacity=CAPACITY,
         dtype=jnp.float32, size=SIZE, page=4):
  # Small pages, where there are pages, so that boundaries are crossed.
  has_pages = "page" in inspect.signature(kind.empty).parameters
  options = {"page": page} if has_pages else {}
  return kind.empty(windows, rows, capacity, KV_HEADS, size, dtype, **options)


def poison(cache):
  """A NaN in every slot, as the worst an earlier request may leave."""
  def spoil(buffer):
    return jnp.full_like(buffer, jnp.nan)
  return cache.replace(k=tuple(map(spoil, cache.k)),
                       v=tuple(map(spoil, cache.v)))


def numbers(rng, shape, dtype):
  return jnp.asarray(rng.normal(size=shape), dtype)


def random_fresh(rng, nodes, dtype, rows=ROWS):
  shape = (rows, nodes, KV_HEADS, SIZE)
  def layers():
    return tuple(numbers(rng, shape, dtype) for _ in WINDOWS)
  return Fresh(layers(), layers())


class Record:
  """What each row has committed: per layer, keys and values by position."""

  def __init__(self):
    empty = np.zeros((0, KV_HEADS, SIZE), np.float32)
    self.rows = [[[empty, empty] for _ in WINDOWS] for _ in range(ROWS)]

  def extend(self, row, k, v, nodes):
    for layer, both in enumerate(self.rows[row]):
      for side, values in enumerate((k[layer], v[layer])):
        both[side] = np.concatenate(
            [both[side], np.asarray(values[row], np.float32)[nodes]])

  def clear(self, row):
    self.rows[row] = Record().rows[row]

  def lengths(self, rows=range(ROWS)):
    return jnp.array([len(self.rows[r][0][0]) for r in rows], jnp.int32)

  def contiguous(self, dtype, rows=range(ROWS), capacity=CAPACITY):
    def layer(i, side):
      full = np.zeros((len(rows), KV_HEADS, capacity, SIZE), np.float32)
      for target, row in enumerate(rows):
        values = self.rows[row][i][side]
        full[target, :, :len(values)] = np.moveaxis(values, 0, 1)
      return jnp.asarray(full, dtype)
    def layers(side):
      return tuple(layer(i, side) for i in range(len(WINDOWS)))
    return ContiguousCache(layers(0), layers(1), self.lengths(rows))


def attend(cache, query, fresh, tree):
  return _attend(cache, query, fresh, tree.depths, tree.mask)


@jax.jit
def _attend(cache, query, fresh, depths, mask):
  at = Place.of(cache.length[:, None] + depths[None], mask)
  return [cache.attend(i, query, fresh, at, scale=0.3, window=window)
          for i, window in enumerate(WINDOWS)]


commit = jax.jit(lambda cache, *args: cache.commit(*args))
insert = jax.jit(lambda cache, *args: cache.insert(*args))
release = jax.jit(lambda cache, rows: cache.release(rows))


def check(cache, record, rng, dtype):
  np.testing.assert_array_equal(cache.length, record.lengths())
  tree = TREES[rng.integers(len(TREES))]
  fresh = random_fresh(rng, tree.size, dtype)
  query = numbers(rng, (ROWS, tree.size, HEADS, SIZE), dtype)
  got = attend(cache, query, fresh, tree)
  wanted = attend(record.contiguous(dtype), query, fresh, tree)
  for a, b in zip(got, wanted):
    np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32),
        atol=1e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("dtype, kind", [
    pytest.param(dtype, *kind.values, id=f"{dtype.__name__}-{kind.id}",
                 # (Below every cache holds both.)
                 marks=() if dtype == jnp.float32 or kind.id == "PagedCache"
                 else pytest.mark.slow)
    for dtype in (jnp.float32, jnp.bfloat16) for kind in discover()])
def test_attends_as_a_fresh_contiguous_cache(kind, dtype):
  rng = np.random.default_rng(0)
  cache, record = make(kind, dtype=dtype), Record()
  assert cache.dtype == dtype
  rounds = 0
  for _ in range(40):
    event = rng.choice(["commit", "commit", "commit", "insert", "release"])
    if event == "commit":
      tree = TREES[rng.integers(len(TREES))]
      fresh = random_fresh(rng, tree.size, dtype)
      node = rng.integers(tree.size, size=ROWS)
      kept = rng.integers(tree.depths[node] + 2)
      kept = np.minimum(kept, CAPACITY - np.asarray(record.lengths()))
      path = tree.paths[node]
      cache = commit(cache, fresh, jnp.asarray(path),
                     jnp.asarray(kept, jnp.int32))
      for row in range(ROWS):
        record.extend(row, fresh.k, fresh.v, path[row, :kept[row]])
      rounds += (kept > 0).any() and (kept == 0).any()
    elif event == "insert":
      # A bucket of two, of which the second may be a dummy.
      capacity = int(rng.choice([4, CAPACITY + 8]))
      rows = rng.permutation(ROWS)[:2]
      count = rng.integers(0, min(capacity, CAPACITY) + 1, size=2)
      fresh = random_fresh(rng, CAPACITY, dtype)
      for row, length in zip(rows, count):
        record.clear(row)
        record.extend(row, fresh.k, fresh.v, np.arange(length))
      prefix = record.contiguous(dtype, rows, capacity)
      if rng.integers(2):
        record.clear(rows[1])
        cache = release(cache, jnp.arange(ROWS) == rows[1])
        rows[1] = ROWS + 3
      cache = insert(cache, jnp.asarray(rows), prefix,
                     jnp.full(2, CAPACITY, jnp.int32))
    else:
      rows = rng.integers(3, size=ROWS) == 0
      cache = release(cache, jnp.asarray(rows))
      for row in np.flatnonzero(rows):
        record.clear(row)
    check(cache, record, rng, dtype)
  assert rounds > 3


@every_cache
@dtypes
def test_nothing_stale_can_be_read(kind, dtype):
  """NaN everywhere but in what is committed."""
  rng = np.random.default_rng(0)
  record, tree = Record(), TREES[0]
  rows = jnp.arange(ROWS)
  full = jnp.full(ROWS, CAPACITY, jnp.int32)
  # An earlier generation of requests leaves NaN in every slot it had.
  cache = make(kind, dtype=dtype)
  nans = poison(ContiguousCache.empty(WINDOWS, ROWS, CAPACITY, KV_HEADS, SIZE,
                                      dtype))
  cache = insert(cache, rows, nans.replace(length=full), full)
  cache = release(cache, rows < 2)
  cache = release(cache, rows >= 0)
  check(cache, record, rng, dtype)
  # Rows that begin with nothing, and rows that begin with a prefix whose
  # padding is NaN.
  fresh = random_fresh(rng, CAPACITY, dtype)
  for row, length in ((1, 3), (2, 7)):
    record.extend(row, fresh.k, fresh.v, np.arange(length))
  prefix = record.contiguous(dtype, (1, 2), CAPACITY + 8)
  beyond = (jnp.arange(CAPACITY + 8)[None]
            >= prefix.length[:, None])[:, None, :, None]
  prefix = prefix.replace(
      k=tuple(jnp.where(beyond, jnp.nan, x) for x in prefix.k),
      v=tuple(jnp.where(beyond, jnp.nan, x) for x in prefix.v))
  cache = insert(cache, jnp.array([1, 2]), prefix, full[:2])
  check(cache, record, rng, dtype)
  nodes = jnp.arange(tree.size)[None]
  for kept in ((2, 0, 3, 1), (0, 0, 0, 0), (7, 5, 2, 7)):
    fresh = random_fresh(rng, tree.size, dtype)
    # Rejected nodes may hold anything, too.
    spoilt = [tuple(x.at[jnp.arange(ROWS)[:, None],
                         jnp.where(nodes >= jnp.array(kept)[:, None], nodes,
                                   tree.size)].set(
                                 jnp.nan, mode="drop") for x in side)
              for side in (fresh.k, fresh.v)]
    path = jnp.broadcast_to(nodes, (ROWS, tree.size))
    cache = commit(cache, Fresh(*spoilt), path, jnp.array(kept, jnp.int32))
    for row in range(ROWS):
      record.extend(row, fresh.k, fresh.v, np.arange(kept[row]))
    check(cache, record, rng, dtype)


@every_cache
def test_rows_do_not_notice_their_neighbours(kind):
  """What is done to other rows leaves a row's bits alone."""
  rng = np.random.default_rng(1)
  tree = trees.chain(3)
  fresh = random_fresh(rng, 4, jnp.float32)
  query = numbers(rng, (ROWS, 4, HEADS, SIZE), jnp.float32)
  path = jnp.broadcast_to(jnp.arange(4)[None], (ROWS, 4))
  cache = make(kind)
  cache = commit(cache, fresh, path, jnp.full(ROWS, 4, jnp.int32))
  before = attend(cache, query, fresh, tree)
  only = jnp.arange(ROWS) == 2
  cache = commit(cache, fresh, path, jnp.where(only, 0, 3))
  cache = release(cache, ~only)
  prefix = Record().contiguous(jnp.float32, (0,)).replace(
      length=jnp.array([9], jnp.int32))
  cache = insert(cache, jnp.array([0]), prefix, jnp.array([20]))
  after = attend(cache, query, fresh, tree)
  for a, b in zip(before, after):
    np.testing.assert_array_equal(a[2], b[2])


@every_cache
def test_on_a_mesh(kind):
  rng = np.random.default_rng(2)
  record = Record()
  path = jnp.broadcast_to(jnp.arange(4)[None], (ROWS, 4))
  with jax.set_mesh(sharding.make_mesh(
      {"data": 2, "tensor": 2, "sequence": 2})):
    cache = jax.jit(functools.partial(make, kind))()
    split = ("tensor", "sequence") if kind is ContiguousCache else ("tensor",)
    assert cache.k[0].sharding.spec[1:] == split
    for kept in ((4, 0, 1, 2), (3, 3, 4, 0), (1, 2, 3, 4)):
      fresh = random_fresh(rng, 4, jnp.float32)
      cache = commit(cache, fresh, path, jnp.array(kept, jnp.int32))
      spec = cache.k[0].sharding.spec[1:]
      assert tuple(name for name in spec if name) == split
      for row in range(ROWS):
        record.extend(row, fresh.k, fresh.v, np.arange(kept[row]))
      check(cache, record, rng, jnp.float32)
    # Rows of two data shards, one of neither.
    for row, length in ((3, 9), (0, 6)):
      record.clear(row)
      record.extend(row, fresh.k, fresh.v, np.arange(length) % 4)
    prefix = record.contiguous(jnp.float32, (3, 0, 1), 16)
    full = jnp.full(3, CAPACITY, jnp.int32)
    cache = insert(cache, jnp.array([3, 0, ROWS]), prefix, full)
    check(cache, record, rng, jnp.float32)
    one = record.contiguous(jnp.float32, (3,), 16)
    for row in (2, ROWS):
      cache = insert(cache, jnp.array([row]), one, full[:1])
    record.rows[2] = [list(both) for both in record.rows[3]]
    check(cache, record, rng, jnp.float32)


@every_cache
@pytest.mark.parametrize("rows", [1, 8])
def test_a_loop_keeps_the_cache_in_place(kind, rows):
  """Donated to a `while_loop` that attends, commits and releases.

  In float32: XLA:CPU converts a whole bfloat16 cache to write into it.
  """
  windows, capacity, size, nodes = (None,) * 4, 512, 32, 4
  dtype = jnp.float32
  leaves, kind_of = jax.tree.flatten(
      make(kind, windows, rows, capacity, dtype, size, page=64))
  shape = (rows, nodes, KV_HEADS, size)
  query = jax.ShapeDtypeStruct((*shape[:2], HEADS, size), dtype)

  def loop(leaves, query):
    cache = jax.tree.unflatten(kind_of, leaves)
    def step(carry):
      cache, query = carry
      at = Place.of(cache.length[:, None] + jnp.arange(nodes)[None],
                    jnp.tril(jnp.ones((nodes, nodes), bool)))
      fresh = Fresh.empty(len(windows), *shape[:2], KV_HEADS, size, dtype)
      for layer in range(len(windows)):
        new = query[:, :, :KV_HEADS]
        fresh = fresh.write(layer, 0, new, new)
        query = query + cache.attend(layer, query, fresh, at, scale=0.3)
      kept = jnp.sum(query[:, :, 0, 0] > 0, axis=1, dtype=jnp.int32)
      path = jnp.broadcast_to(jnp.arange(nodes)[None], shape[:2])
      cache = cache.commit(fresh, path, kept)
      return cache.release(cache.length > capacity - nodes), query
    return jax.tree.leaves(lax.while_loop(
        lambda carry: jnp.all(carry[1] < 1e9), step, (cache, query)))

  memory = jax.jit(loop, donate_argnums=0).lower(
      leaves, query).compile().memory_analysis()
  held = sum(x.nbytes for x in leaves if x.ndim == 4)
  layer = held / len(windows)
  assert memory.alias_size_in_bytes >= held
  # What one layer reads at a time, and no copy of the whole.
  assert memory.temp_size_in_bytes < 2.5 * layer, (
      memory.temp_size_in_bytes / layer)
