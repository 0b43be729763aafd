# SPDX-License-Identifier: Apache-2.0
"""EAGLE's layer: which features it reads, and on what it is taught.

What it says in use, its drafter's tests hold.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import distillation, heads
from jaxspec.caches import Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.corpus import Text
from jaxspec.heads import EagleHead

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("depth, taps", [
    (1, (0, 0, 1)), (2, (0, 1, 2)), (4, (1, 2, 2)), (32, (2, 16, 29))])
def test_taps_are_low_middle_and_high(depth, taps):
  assert heads.default_taps(depth) == taps


def test_it_is_taught_on_its_own_outputs(small):
  """Behind each start, what a whole pass over its inputs gives."""
  head = EagleHead.init(small, taps=(0, 2), mlp=8, tokens=range(3, 60))
  text = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
  batch = distillation.batch_of([Text(row.tolist(), 1) for row in text], 12)
  seen = distillation.see(small, {"eagle": head}, batch)
  at = distillation.spots(batch, distillation.Recipe())
  told = [(ahead, np.asarray(logits).reshape(2, 12, -1))
          for ahead, logits in head.foretell(small, seen, at)]
  assert [ahead for ahead, _ in told] == [1, 2, 3]
  true = head.fuse([seen[tap] for tap in head.taps])
  after = jnp.asarray(np.pad(text[:, 1:], ((0, 0), (0, 1))))
  for start in (0, 7):
    features = true
    for last, (_, logits) in enumerate(told, start=start):
      x, said = whole_pass(small, head, features, after)
      np.testing.assert_allclose(logits[:, start], said[:, last], atol=1e-4)
      features = features.at[:, last + 1].set(x[:, last])


@jax.jit
def whole_pass(model, head, features, after):
  """Of which nothing sees what is behind it."""
  rows, count = after.shape
  cache = head.init_cache(ContiguousCache, rows, 0, jnp.float32)
  at = Place.of(jnp.broadcast_to(jnp.arange(count)[None], (rows, count)),
                jnp.tril(jnp.ones((count, count), bool)))
  x, _ = head.extend(head.join(model, features, after), cache,
                     head.init_fresh(cache, count), at, layers=range(1))
  return x, head.logits(model, x)
