# SPDX-License-Identifier: Apache-2.0
"""What a head says, against the meaning in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import pack, proposal_head
from pallas_kernels.noise import bits, gumbel
from tests.pallas_kernels.head.made import made

pytestmark = pytest.mark.usefixtures("quick_compiles")

EPS = 1e-5


def meant(x, norm, unembedding, *, count, logits_soft_cap=None, tokens=None,
          flags=None, keys=None, temperature=None):
  """Everything of `Forecast`, row by row and token by token."""
  x, norm, unembedding = (np.asarray(a, np.float64)
                          for a in (x, norm, unembedding))
  y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * norm
  logits = y @ unembedding.T
  if logits_soft_cap is not None:
    logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
  ids = np.arange(len(unembedding)) if tokens is None else np.asarray(tokens)
  said = []
  for b, row in enumerate(logits):
    some = np.flatnonzero(flags[b]) if flags is not None else range(len(row))
    best = max(row[v] for v in some)
    total = best + np.log(sum(np.exp(row[v] - best) for v in some))
    p = sorted((np.exp(row[v] - total) for v in some), reverse=True)
    scores = row
    if temperature is not None and temperature[b] > 0:
      # All the noise there is for this row, and then the ids it can say.
      noise = np.asarray(jax.random.gumbel(keys[b], (int(max(ids)) + 1,)))
      scores = row / temperature[b] + noise[ids]
    order = sorted(some, key=lambda v: (-scores[v], v))[:count]
    short = count - len(order)
    said.append(([int(ids[v]) for v in order] + [-1] * short,
                 [row[v] for v in order] + [-np.inf] * short, total, p[0],
                 p[0] - (p[1] if len(p) > 1 else 0),
                 -sum(q * np.log(q) for q in p if q > 0)))
  return [np.array(field) for field in zip(*said)]


def close(found, expected, atol):
  for a, b in zip(jax.tree.leaves(found), expected):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.medium
@pytest.mark.parametrize("rows, width, vocab, count", [
    (1, 8, 1, 1), (1, 16, 40, 1), (5, 24, 300, 8), (64, 8, 70, 3)])
@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_law_in_a_few_numbers(rows, width, vocab, count, cap, masked):
  x, norm, unembedding = made(0, rows, width, vocab)
  draw = np.random.default_rng(1)
  flags = draw.random((rows, vocab)) < 0.2
  flags[np.arange(rows), draw.integers(0, vocab, rows)] = True
  found = proposal_head(
      x, norm, unembedding, eps=EPS, count=count, logits_soft_cap=cap,
      allowed=pack(flags) if masked else None)
  close(found, meant(x, norm, unembedding, count=count, logits_soft_cap=cap,
                     flags=flags if masked else None), 2e-5)


@pytest.mark.parametrize("trimmed", [False, True])
def test_draws_are_those_of_jax(trimmed):
  """With jax's own noise at each token's id; a row at zero says the best."""
  x, norm, unembedding = made(2, 6, 16, 90)
  tokens = np.sort(np.random.default_rng(3).permutation(5000)[:90])
  tokens = jnp.asarray(tokens) if trimmed else None
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(4),
                                                 jnp.arange(6))
  temperature = jnp.array([0.0, 0.3, 1.0, 2.0, 0.0, 50.0])
  found = proposal_head(
      x, norm, unembedding, eps=EPS, count=4, tokens=tokens,
      noise=jax.random.key_data(keys), temperature=temperature)
  close(found, meant(x, norm, unembedding, count=4, tokens=tokens, keys=keys,
                     temperature=np.asarray(temperature)), 2e-5)


def test_of_equal_tokens_the_first_comes_first():
  x, norm, unembedding = made(5, 2, 8, 50)
  unembedding = unembedding[np.arange(50) % 5]
  found = proposal_head(x, norm, unembedding, eps=EPS, count=8)
  assert (np.diff(found.tokens[:, :8]) == 5).all()
  np.testing.assert_allclose(found.margin, 0, atol=1e-7)


def test_a_row_that_may_say_nothing():
  x, norm, unembedding = made(6, 2, 8, 50)
  found = proposal_head(x, norm, unembedding, eps=EPS, count=2,
                        allowed=pack(np.arange(100).reshape(2, 50) >= 50))
  assert found.tokens[0].tolist() == [-1, -1]
  assert found.log_sum_exp[0] == -jnp.inf
  assert [found.top[0], found.margin[0], found.entropy[0]] == [0, 0, 0]
  assert found.entropy[1] > 0.5


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_noise_is_jax_s_bit_for_bit(seed, position):
  key = jax.random.fold_in(jax.random.key(seed), position)
  words, index = jax.random.key_data(key), jnp.arange(1000)
  assert (bits(words[0], words[1], index).astype(jnp.uint32)
          == jax.random.bits(key, (1000,))).all()
  assert (gumbel(words[0], words[1], index)
          == jax.random.gumbel(key, (1000,))).all()


@pytest.mark.parametrize("changes, message", [
    (dict(count=0), "count must be from 1 to 40, got 0"),
    (dict(count=41), "count must be from 1 to 40, got 41"),
    (dict(temperature=jnp.ones(2)), "noise and temperature come together")])
def test_what_makes_no_sense(changes, message):
  x, norm, unembedding = made(0, 2, 8, 40)
  with pytest.raises(ValueError, match=message):
    proposal_head(x, norm, unembedding, eps=EPS, **changes)
