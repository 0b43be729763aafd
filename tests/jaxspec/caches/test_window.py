# SPDX-License-Identifier: Apache-2.0
"""What a ring of slots holds, against the definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.caches.fresh import Fresh
from jaxspec.caches.window import WindowCache, held

ROWS, RING, CAPACITY = 3, 5, 32


def numbered(positions):
  """Keys or values `[B T 1 1]` that say their position."""
  return jnp.asarray(positions, jnp.float32)[:, :, None, None]


def expected(length, ring):
  slots = np.full(ring, -1)
  for position in range(length):
    slots[position % ring] = position
  return slots


def assert_holds(cache, lengths):
  for buffer, ring in ((cache.k[0], RING), (cache.v[1], CAPACITY)):
    for row, length in enumerate(lengths):
      slots = expected(length, ring)
      np.testing.assert_array_equal(
          np.asarray(buffer)[row, 0, :, 0][slots >= 0], slots[slots >= 0])
  np.testing.assert_array_equal(cache.length, lengths)


def empty():
  return WindowCache.empty((RING, None), ROWS, CAPACITY, 1, 1, jnp.float32)


@pytest.mark.parametrize("ring", [1, 2, 5, 8])
def test_held(ring):
  lengths = np.arange(3 * ring + 2)
  np.testing.assert_array_equal(
      held(jnp.asarray(lengths, jnp.int32), ring),
      [expected(n, ring) for n in lengths])


def test_rings_are_as_large_as_windows_and_no_larger_than_needed():
  cache = WindowCache.empty((RING, None, 99), 2, CAPACITY, 1, 1, jnp.float32)
  assert [k.shape[2] for k in cache.k] == [RING, CAPACITY, CAPACITY]


@pytest.mark.parametrize("count", [1, 4, 5, 12])
def test_commits_of_fewer_and_more_than_the_ring(count):
  cache, rng = empty(), np.random.default_rng(count)
  path = jnp.broadcast_to(jnp.arange(count)[None], (ROWS, count))
  lengths = np.zeros(ROWS, int)
  while True:
    kept = rng.integers(count + 1, size=ROWS)
    if (lengths + kept).max() > CAPACITY:
      break
    values = numbered(lengths[:, None] + np.arange(count)[None])
    cache = cache.commit(Fresh((values,) * 2, (values,) * 2), path,
                         jnp.asarray(kept, jnp.int32))
    lengths += kept
    assert_holds(cache, lengths)
  assert lengths.max() > 2 * RING


@pytest.mark.parametrize("capacity", [3, RING, 16, 40])
def test_insert_of_prefixes_shorter_and_longer_than_the_ring(capacity):
  lengths = np.array([capacity, 2, 0]).clip(max=CAPACITY)
  buffer = jnp.broadcast_to(
      jnp.arange(capacity, dtype=jnp.float32)[None, None, :, None],
      (ROWS, 1, capacity, 1))
  prefix = ContiguousCache((buffer,) * 2, (buffer,) * 2,
                           jnp.asarray(lengths, jnp.int32))
  cache = empty().insert(jnp.array([1, 0, 2]), prefix, jnp.full(ROWS, 9))
  assert_holds(cache, lengths[[1, 0, 2]])
  again = cache.insert(jnp.array([ROWS, 99, 7]), prefix, jnp.full(ROWS, 9))
  assert_holds(again, lengths[[1, 0, 2]])
