# SPDX-License-Identifier: Apache-2.0
"""Hydra's heads begin as Medusa's do, and see each token where it stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.heads import HydraHeads, MedusaHeads


def random_heads(model, seed=0, **settings):
  """Heads that say something of their own."""
  made = HydraHeads.init(model, **settings)
  rng = np.random.default_rng(seed)
  return made.replace(
      up=jnp.asarray(rng.standard_normal(made.up.shape) * 0.4, jnp.float32),
      token_norm=jnp.asarray(1 + 0.3 * rng.standard_normal(
          made.token_norm.shape), jnp.float32))


def said_by(model, made, x, tokens):
  """Logits of head `len(tokens) - 1`, by the formula."""
  def norm(y, weight):
    return y / np.sqrt(np.mean(y * y) + model.config.norm_eps) * weight

  number, count = len(tokens) - 1, made.count
  # The pairs of head and token, in the order in which they are kept.
  pairs = [(head, place) for place in range(count)
           for head in range(place, count)]
  z = norm(np.asarray(x), np.asarray(made.state_norm))
  inner = np.asarray(made.state[number]) @ z
  for place, token in enumerate(tokens):
    e = np.asarray(model.embed(jnp.asarray([[int(token)]])))[0, 0]
    weight = np.asarray(made.drafted[pairs.index((number, place))])
    inner = inner + weight @ norm(e, np.asarray(made.token_norm))
  y = z + np.asarray(made.up[number]) @ (inner / (1 + np.exp(-inner)))
  return np.asarray(model.unembed(jnp.asarray(y, jnp.float32)[None, None],
                                  made.rows))[0, 0]


@pytest.mark.parametrize("tokens", [None, range(1, 64, 2)])
def test_heads_are_their_formula(small, tokens):
  made = random_heads(small, heads=3, rank=4, tokens=tokens)
  rng = np.random.default_rng(1)
  x = rng.standard_normal((5, small.config.width)).astype(np.float32)
  following = rng.integers(0, 64, (5, 3))
  found = list(made.say(small, jnp.asarray(x), jnp.asarray(following)))
  assert len(found) == made.count == 3
  for number, logits in enumerate(found):
    for row in range(5):
      np.testing.assert_allclose(
          logits[row],
          said_by(small, made, x[row], following[row, :number + 1]),
          atol=2e-4)


def test_untrained_heads_say_what_untrained_medusa_heads_say(small):
  x = 3 * jax.random.normal(jax.random.key(0), (4, small.config.width))
  following = jnp.arange(8).reshape(4, 2)
  for one, other in zip(
      HydraHeads.init(small, heads=2, rank=4).say(small, x, following),
      MedusaHeads.init(small, heads=2).say(small, x, following), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-3)
    np.testing.assert_array_equal(jnp.argsort(one), jnp.argsort(other))
