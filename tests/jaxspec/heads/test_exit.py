# SPDX-License-Identifier: Apache-2.0
"""The proposal head is the plain early exit until it is trained.

Held here: for every family's peculiarities and any vocabulary; that each of
its parts counts once it is not zero; that its attention sees earlier positions
and nothing else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.caches import Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.heads import ExitHead
from jaxspec.models.transformer import Transformer, random_source
from tests.conftest import tiny_config

CONFIGS = {
    "plain": tiny_config(depth=3),
    "untied, biased": tiny_config(depth=3, tied=False, qkv_bias=True),
    "like gemma": tiny_config(
        depth=3, windows=(4, 4, None), post_norms=True, qk_norm=True,
        embed_scale=3.0, logits_cap=5.0),
    "experts": tiny_config(depth=3, experts=4, experts_per_token=2)}


def stream(model, layer, rows=2, count=6):
  """Below a layer, for some tokens."""
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, model.vocab, (rows, count)), jnp.int32)
  cache = model.init_cache(ContiguousCache, rows, 0, jnp.float32)
  x, _ = model.extend(model.embed(tokens), cache,
                      model.init_fresh(cache, count), causal(rows, count),
                      layers=range(layer))
  return x


def causal(rows, count):
  return Place.of(jnp.broadcast_to(jnp.arange(count)[None], (rows, count)),
                  jnp.tril(jnp.ones((count, count), bool)))


@pytest.mark.medium
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_untrained_it_is_the_plain_early_exit(name, attention):
  model = Transformer(CONFIGS[name], random_source(0))
  head = ExitHead.init(model, layer=2, attention=attention)
  x = stream(model, 2)
  np.testing.assert_allclose(
      head(model, head.attended(x)), model.unembed(x), atol=1e-5)


def test_some_tokens_are_a_part_of_all():
  model = Transformer(CONFIGS["like gemma"], random_source(0))
  x, ids = stream(model, 1), [3, 5, 40]
  some = ExitHead.init(model, layer=1, tokens=[40, 3, 5, 5])
  np.testing.assert_allclose(some(model, x), model.unembed(x)[..., ids],
                             atol=1e-5)
  assert some.tokens[...].tolist() == ids


@pytest.mark.parametrize("part", [
    "norm", "lens", "gate", "up", "down", "final_norm", "layers.0.attn_norm",
    "layers.0.qkv", "layers.0.out"])
def test_every_part_counts(part):
  model = Transformer(CONFIGS["plain"], random_source(0))
  random = random_source(5)

  def logits(part):
    def source(path, shape, axes, wanted=None):
      weight = random(path, shape, axes, wanted)
      return weight * (1 + 0.5 * (np.arange(weight.size) % 3).reshape(
          weight.shape) * (path == part))
    head = ExitHead(model, source, layer=1, mlp=8, attention=True)
    return head(model, head.attended(stream(model, 1)))

  assert np.max(np.abs(logits(part) - logits("none"))) > 1e-3


def test_attention_sees_what_was_before():
  model = Transformer(CONFIGS["plain"], random_source(0))
  head = ExitHead(model, random_source(5), layer=1, mlp=8, attention=True)
  x = stream(model, 1)
  other = x.at[:, 3].add(jax.random.normal(jax.random.key(0), x[:, 3].shape))
  moved = np.abs(head.attended(x) - head.attended(other)).max(axis=(0, 2))
  assert np.all(moved[:3] == 0) and np.all(moved[3:] > 1e-4)
