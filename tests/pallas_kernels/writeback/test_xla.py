# SPDX-License-Identifier: Apache-2.0
"""`commit_kv` against its definition, slot by slot."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import commit_kv
from tests.pallas_kernels.writeback.places import KINDS, call, meaning, same


@pytest.mark.parametrize("kind", KINDS)
def test_writes_what_is_kept_and_nothing_else(kind):
  settings = KINDS[kind]
  buffers, fresh, path, slots, scales = call(**settings)
  paged = "pages" in settings
  found = commit_kv(buffers, fresh, path, slots, scales=scales, paged=paged)
  same(found, meaning(buffers, fresh, path, slots, scales, paged=paged))
  assert not np.array_equal(found[0][0].astype(jnp.float32),
                            buffers[0].astype(jnp.float32), equal_nan=True)
  untouched = slots[0, 0] == (buffers[0].shape[0] if paged else 1) * (
      buffers[0].shape[2])
  assert untouched                       # the first row keeps nothing


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1),
       kept=st.lists(st.integers(0, 5), min_size=3, max_size=3),
       start=st.lists(st.integers(0, 27), min_size=3, max_size=3))
def test_any_rows(seed, kept, start):
  arguments = call("float32", size=8, kept=kept, start=start, seed=seed)
  same(commit_kv(*arguments[:4]), meaning(*arguments))


def test_rounding_keeps_half_a_step():
  buffers, fresh, path, slots, scales = call(**KINDS["int8"], kept=[5, 5, 5])
  new, scales = commit_kv(buffers, fresh, path, slots, scales=scales)
  for b, p in np.ndindex(path.shape):
    slot = int(slots[b, p])
    x = np.asarray(fresh[1][b, int(path[b, p])].astype(jnp.float32))
    held = np.asarray(new[1][b, :, slot]).astype(np.float32)
    step = np.asarray(scales[1][b, :, slot])[:, None]
    assert np.all(np.abs(held * step - x) <= 0.5001 * step)
    assert np.all(np.abs(held).max(axis=-1) == 127)


def test_refusals():
  buffers, fresh, path, slots, _ = call("float32")
  with pytest.raises(ValueError, match="2 buffers for 1"):
    commit_kv(buffers, fresh[:1], path, slots)
  with pytest.raises(ValueError, match="must be alike"):
    commit_kv((buffers[0], buffers[1][:, :, :8]), fresh, path, slots)
  with pytest.raises(ValueError, match="scales belong to int8"):
    commit_kv(tuple(x.astype(jnp.int8) for x in buffers), fresh, path, slots)
