# SPDX-License-Identifier: Apache-2.0
"""`accept_nodes` against its definition, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import accept_nodes
from pallas_kernels.noise import gumbel

pytestmark = pytest.mark.usefixtures("quick_compiles")


def call(rows=3, nodes=4, vocab=301, dtype="float32", ratio=True, seed=0):
  """Rows that draw, and greedy ones; all keyword arguments."""
  rng = np.random.default_rng(seed)
  keys = jax.random.split(jax.random.key(seed), (rows, nodes))
  logits = rng.standard_normal((2, rows, nodes, vocab)) * 3
  given = dict(
      logits=jnp.asarray(logits[0], dtype),
      temperature=jnp.asarray([0.7, 0.0, 1.3] * rows, jnp.float32)[:rows],
      noise=jax.random.key_data(keys))
  if ratio:
    given |= dict(
        draft=jax.nn.softmax(jnp.asarray(logits[1], jnp.float32)),
        drafted=jnp.asarray(rng.integers(0, vocab, (rows, nodes)), jnp.int32))
  return given, keys


def meaning(given, keys):
  logits = np.asarray(given["logits"].astype(jnp.float32), np.float64)
  rows, nodes, vocab = logits.shape
  found = {name: np.zeros((rows, nodes)) for name in (
      "token", "score", "logit", "total", "chance", "excess")}
  for at in np.ndindex(rows, nodes):
    x, warm = logits[at], float(given["temperature"][at[0]])
    noise = np.asarray(jax.random.gumbel(keys[at], (vocab,)), np.float64)
    scores = x / warm + noise if warm else x
    token = scores.argmax()
    law = np.eye(vocab)[token]
    if warm:
      law = np.exp(x / warm - (x / warm).max())
      law /= law.sum()
    found["token"][at], found["score"][at] = token, scores[token]
    found["logit"][at] = x[token]
    found["total"][at] = np.log(np.exp(x).sum())
    if "draft" in given:
      found["chance"][at] = law[int(given["drafted"][at])]
      found["excess"][at] = np.maximum(
          law - np.asarray(given["draft"][at], np.float64), 0).sum()
  return found


def check(judged, given, keys):
  wanted = meaning(given, keys)
  np.testing.assert_array_equal(judged.token, wanted["token"])
  names = ["score", "logit", "total"]
  names += ["chance", "excess"] if "draft" in given else []
  for name in names:
    np.testing.assert_allclose(getattr(judged, name), wanted[name], rtol=3e-6,
                               atol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_is_its_meaning(dtype):
  given, keys = call(dtype=dtype)
  check(accept_nodes(**given), given, keys)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), heats=st.lists(
    st.sampled_from([0.0, 0.3, 1.0, 4.0]), min_size=2, max_size=2))
def test_any_rows(seed, heats):
  given, keys = call(rows=2, nodes=2, vocab=40, seed=seed)
  given["temperature"] = jnp.asarray(heats, jnp.float32)
  check(accept_nodes(**given), given, keys)


def test_noise_is_that_of_jax_bit_for_bit():
  key = jax.random.key(5)
  words = jax.random.key_data(key)
  mine = jax.jit(lambda i: gumbel(words[0], words[1], i))(jnp.arange(5000))
  np.testing.assert_array_equal(mine, jax.jit(
      lambda: jax.random.gumbel(key, (5000,)))())


def test_parts_of_a_vocabulary_add_up():
  given, keys = call(ratio=False)
  whole = accept_nodes(**given)
  logits = given.pop("logits")
  parts = [accept_nodes(logits[..., at:at + 100], **given,
                        first=jnp.int32(at)) for at in range(0, 301, 100)]
  scores = jnp.stack([part.score for part in parts])
  tokens = jnp.stack([part.token + 100 * n for n, part in enumerate(parts)])
  best = jnp.argmax(scores, axis=0)[None]
  np.testing.assert_array_equal(
      whole.token, jnp.take_along_axis(tokens, best, axis=0)[0])


def test_refusals():
  given, _ = call()
  with pytest.raises(ValueError, match="come together"):
    accept_nodes(**{**given, "drafted": None})
  with pytest.raises(ValueError, match="exclude"):
    accept_nodes(**given, first=jnp.int32(0))
