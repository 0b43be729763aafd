# SPDX-License-Identifier: Apache-2.0
"""The allocator of pages, driven at random, and what happens without pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.caches.fresh import Fresh
from jaxspec.caches.paged import PagedCache
from jaxspec.errors import InputError

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROWS, PAGE, CAPACITY, PAGES, COUNT = 4, 3, 12, 11, 5


def empty(pages=PAGES):
  return PagedCache.empty((None,), ROWS, CAPACITY, 1, 1, jnp.float32,
                          page=PAGE, pages=pages)


@functools.cache
def jitted(name):
  return jax.jit(lambda cache, *args: getattr(cache, name)(*args))


def commit(cache, kept, tokens=None):
  """Commits the first `kept` of each row's `tokens [B COUNT]`."""
  if tokens is None:
    tokens = np.zeros((ROWS, COUNT))
  values = jnp.asarray(tokens, jnp.float32)[:, :, None, None]
  path = jnp.broadcast_to(jnp.arange(COUNT)[None], (ROWS, COUNT))
  return jitted("commit")(cache, Fresh((values,), (-values,)), path,
                          jnp.asarray(kept, jnp.int32))


def insert(cache, row, tokens, reserve):
  buffer = np.full((1, 1, CAPACITY + 1, 1), np.nan, np.float32)
  buffer[0, 0, :len(tokens), 0] = tokens
  prefix = ContiguousCache((jnp.asarray(buffer),), (jnp.asarray(-buffer),),
                           jnp.array([len(tokens)], jnp.int32))
  return jitted("insert")(cache, jnp.array([row], jnp.int32), prefix,
                          jnp.array([reserve], jnp.int32))


def release(cache, *rows):
  return jitted("release")(cache, jnp.isin(jnp.arange(ROWS),
                                           jnp.array(rows)))


def fork(cache, sources, targets, reserve):
  return jitted("fork")(cache, *(
      jnp.asarray(x, jnp.int32) for x in (sources, targets, reserve)))


def contents(cache, row):
  """What a row holds, and that its values belong to its keys."""
  length, table = int(cache.length[row]), np.asarray(cache.table[row])
  k, v = (np.asarray(x[0])[table, 0].reshape(-1)[:length]
          for x in (cache.k, cache.v))
  np.testing.assert_array_equal(k, -v)
  return list(k)


def check(cache):
  """What must hold after anything."""
  users, stack = np.asarray(cache.pages.users), np.asarray(cache.pages.stack)
  free, table = int(cache.pages.free), np.asarray(cache.table)
  length = np.asarray(cache.length)
  held = -(-length // PAGE)
  # Free and used pages are all pages, each once.
  assert free + (users > 0).sum() == len(users) - 1
  assert sorted([*stack[:free], *np.flatnonzero(users)]) == list(
      range(1, len(users)))
  # Each page has as many users as tables name it, and tables nothing more
  # than what is held.
  np.testing.assert_array_equal(
      users[1:], np.bincount(table.ravel(), minlength=len(users))[1:])
  for row in range(ROWS):
    assert (table[row, :held[row]] > 0).all()
    assert (table[row, held[row]:] == 0).all()
    if length[row] % PAGE:                     # the page it will write to
      assert users[table[row, held[row] - 1]] == 1
  # Every promise can be kept.
  promised = np.maximum(np.asarray(cache.reserve) - held, 0).sum()
  assert int(cache.available()) == free - promised >= 0


class Machine(RuleBasedStateMachine):
  """Random requests beside a plain record of what each row holds."""

  def __init__(self):
    super().__init__()
    self.cache = empty()
    self.rows = [[] for _ in range(ROWS)]
    self.limit = [0] * ROWS                    # the length each may count on
    self.next = 1

  def new_tokens(self, count):
    self.next += count
    return list(range(self.next - count, self.next))

  def admits(self, row, pages):
    """Whether `pages` can be promised to a row, once it is released."""
    return pages <= int(release(self.cache, row).available())

  @rule(kept=st.lists(st.integers(0, COUNT), min_size=ROWS, max_size=ROWS))
  def commit(self, kept):
    before = np.asarray(self.cache.starved)
    tokens = [self.new_tokens(COUNT) for _ in range(ROWS)]
    self.cache = commit(self.cache, kept, tokens)
    for row, starved in enumerate(np.asarray(self.cache.starved)):
      if not starved:
        self.rows[row] += tokens[row][:kept[row]]
      elif not before[row]:
        assert kept[row]
        assert len(self.rows[row]) + kept[row] > self.limit[row]

  @rule(row=st.integers(0, ROWS), length=st.integers(0, CAPACITY),
        more=st.integers(0, 6))
  def insert(self, row, length, more):
    tokens, limit = self.new_tokens(length), min(length + more, CAPACITY)
    need = self.cache.pages_needed
    if row == ROWS:
      self.cache = insert(self.cache, row, tokens, limit)
      return
    room, promised = (self.admits(row, need(n)) for n in (length, limit))
    self.cache = insert(self.cache, row, tokens, limit)
    assert bool(self.cache.starved[row]) == (not room)
    self.rows[row] = tokens if room else []
    self.limit[row] = limit if promised else 0

  @rule(source=st.integers(0, ROWS - 1), onto=st.integers(0, ROWS),
        more=st.integers(0, 6))
  def fork(self, source, onto, more):
    length = len(self.rows[source])
    limit = min(length + more, CAPACITY)
    if onto in (source, ROWS):
      self.cache = fork(self.cache, [source], [onto], [limit])
      return
    need, full = self.cache.pages_needed, length // PAGE
    room, promised = (self.admits(onto, need(n) - full)
                      for n in (length, limit))
    starved = bool(self.cache.starved[source])
    self.cache = fork(self.cache, [source], [onto], [limit])
    assert bool(self.cache.starved[onto]) == (starved or not room)
    self.rows[onto] = list(self.rows[source]) if room else []
    self.limit[onto] = limit if promised and not starved else 0

  @rule(rows=st.sets(st.integers(0, ROWS - 1)))
  def release(self, rows):
    self.cache = release(self.cache, *rows)
    for row in rows:
      self.rows[row], self.limit[row] = [], 0

  @invariant()
  def consistent(self):
    check(self.cache)
    for row in range(ROWS):
      assert contents(self.cache, row) == self.rows[row]

  def teardown(self):
    check(release(self.cache, *range(ROWS)))
    assert int(release(self.cache, *range(ROWS)).pages.free) == PAGES - 1


Machine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck))
TestAllocator = Machine.TestCase


def test_default_pool_lets_every_row_grow():
  cache = PagedCache.empty((None,), 3, 100, 1, 1, jnp.float32)
  assert cache.k[0].shape == (3 * 2 + 1, 1, 64, 1)
  assert cache.capacity >= 100
  assert int(cache.available()) == 6


def test_an_exhausted_pool_starves_rows_and_corrupts_none():
  cache, rows = empty(pages=6), [[] for _ in range(ROWS)]
  for step in range(6):
    tokens = step * 100 + np.arange(ROWS * COUNT).reshape(ROWS, COUNT)
    cache = commit(cache, [2, 1, 2, 3], tokens)
    for row, starved in enumerate(np.asarray(cache.starved)):
      if not starved:
        rows[row] += list(tokens[row, :[2, 1, 2, 3][row]])
    check(cache)
    assert [contents(cache, row) for row in range(ROWS)] == rows
  assert cache.starved.all()
  assert int(cache.pages.free) == 0
  # Released pages serve those that begin anew; the starved stay as they are.
  cache = release(cache, 3)
  assert not cache.starved[3]
  cache = insert(cache, 3, [1, 2], 2)
  assert contents(cache, 3) == [1, 2]
  assert cache.starved[:3].all()
  check(cache)


def test_a_row_past_its_capacity_starves():
  cache = insert(empty(), 1, list(range(CAPACITY)), CAPACITY)
  cache = commit(cache, [0, 0, 0, 0])
  assert not cache.starved.any()
  cache = commit(cache, [0, 1, 1, 0])
  np.testing.assert_array_equal(cache.starved, [False, True, False, False])
  assert contents(cache, 1) == list(range(CAPACITY))


def test_who_is_admitted_never_starves():
  """Others may take all that was not promised, and nothing else."""
  cache = empty()
  assert int(cache.available()) >= cache.pages_needed(CAPACITY)
  cache = insert(cache, 0, [1], CAPACITY)
  assert int(cache.available()) == PAGES - 1 - CAPACITY // PAGE
  for _ in range(CAPACITY - 1):
    cache = commit(cache, [1, 3, 3, 3])
    check(cache)
  assert int(cache.length[0]) == CAPACITY
  np.testing.assert_array_equal(cache.starved, [False, True, True, True])


def test_how_many_fit():
  """In order, by what is not promised; pages of others do not count."""
  cache = empty()                              # ten pages of three positions
  assert cache.fits([]) == 0
  assert cache.fits([CAPACITY, CAPACITY, 6, 1]) == 3
  assert cache.fits([CAPACITY, CAPACITY, 7, 1]) == 2
  cache = insert(cache, 0, [1], 7)
  assert cache.fits([CAPACITY, 9, 1]) == 2
  assert cache.fits([CAPACITY, CAPACITY]) == 1
  assert insert(cache, 1, list(range(CAPACITY)), CAPACITY).fits([10]) == 0
  assert release(cache, 0).fits([CAPACITY, CAPACITY, 6]) == 3


@pytest.mark.parametrize("sizes, words", [
    (dict(page=0), "page must be at least 1, got 0"),
    (dict(page=5, pages=3), "pages must be at least 4 to hold one row of 12 "
                            "tokens, got 3")])
def test_a_pool_holds_at_least_one_row(sizes, words):
  with pytest.raises(InputError, match=words):
    PagedCache.empty((None,), ROWS, CAPACITY, 1, 1, jnp.float32, **sizes)


def test_forks_that_swap_rows():
  """As in a beam search: sources are targets, and one is taken twice."""
  cache = empty()
  for row, length in enumerate((4, 5, 2, 0)):
    cache = insert(cache, row, list(range(10 * row, 10 * row + length)), 6)
  before = [contents(cache, row) for row in range(ROWS)]
  cache = fork(cache, [1, 0, 1, 3], [0, 1, 2, 3], [6, 6, 6, 6])
  check(cache)
  assert [contents(cache, row) for row in range(ROWS)] == [
      before[1], before[0], before[1], before[3]]
  table = np.asarray(cache.table)
  assert table[0, 0] == table[2, 0] and table[0, 1] != table[2, 1]
  tokens = np.arange(ROWS * COUNT).reshape(ROWS, COUNT)
  cache = commit(cache, [1, 1, 1, 0], tokens)
  check(cache)
  assert [contents(cache, row) for row in range(3)] == [
      before[1] + [0], before[0] + [5], before[1] + [10]]


@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (0, 2)])
def test_pages_are_not_lost_over_many_requests(rows):
  cache = empty()
  for _ in range(30):
    for row in rows:
      cache = insert(cache, row, [1, 2], 4)
    cache = fork(cache, [0], [3], [4])
    cache = commit(cache, [2, 2, 2, 2])
    cache = release(cache, *range(ROWS))
  assert int(cache.pages.free) == PAGES - 1
  check(cache)
