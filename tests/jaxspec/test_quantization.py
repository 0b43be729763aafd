# SPDX-License-Identifier: Apache-2.0
"""A model in eight bits: near the original, and a model like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from jaxspec import loop, sharding
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.models.transformer import (
  Transformer,
  abstract_source,
  random_source,
)
from jaxspec.quantization import quantize
from pallas_kernels import QArray
from tests.jaxspec import batches

KINDS = {
    "tied": dict(),
    "untied": dict(tied=False, qkv_bias=True, qk_norm=True, post_norms=True),
    "experts": dict(experts=4, experts_per_token=2)}


def nbytes(model) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(model))


def logits(model):
  tokens, lengths = batches.padded(batches.prompts(4))
  prefix = loop.prefill(model, (), tokens, lengths, chunk=512,
                        dtype=jnp.dtype(jnp.float32))
  return np.asarray(model.unembed(prefix.last[:, None]))[:, 0]


@pytest.mark.medium
@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=pytest.mark.slow if kind == "untied" else ())
    for kind in KINDS])
def test_logits_are_near(kind):
  model = Transformer(tiny_config(depth=2, **KINDS[kind]), random_source(0))
  small = quantize(model)
  should, is_ = logits(model), logits(small)
  assert np.abs(is_ - should).max() < 0.15 * should.std()
  assert np.abs(is_ - should).max() > 0
  assert not model.config.tied or small.lm_head[...].shape == (64, 32)


def test_what_is_rounded_and_what_is_shared(small):
  eight = quantize(small)
  for block in eight.layers:
    for name in ("qkv", "out", "gate", "up", "down"):
      assert isinstance(getattr(block, name)[...], QArray), name
  for one, other in ((small.embedding, eight.embedding),
                     (small.layers[1].mlp_norm, eight.layers[1].mlp_norm)):
    assert (one[...].unsafe_buffer_pointer()
            == other[...].unsafe_buffer_pointer())
  matrices = sum(getattr(block, name)[...].nbytes for block in small.layers
                 for name in ("qkv", "out", "gate", "up", "down"))
  head = small.embedding[...].nbytes
  # A quarter, and a scale for each channel of 32 or 48 values.
  assert nbytes(eight) - (nbytes(small) - matrices) < 0.4 * (matrices + head)
  again = quantize(eight)
  np.testing.assert_array_equal(again.layers[0].qkv[...].values,
                                eight.layers[0].qkv[...].values)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_alone_are_rounded_to_shapes(kind):
  """Split as the weights are."""
  config = tiny_config(depth=1, **KINDS[kind])
  mesh = sharding.make_mesh({"tensor": 2})
  should = quantize(Transformer(config, random_source(
      0, put=lambda x, axes: sharding.place(x, axes, mesh))))
  is_ = quantize(Transformer(config, abstract_source(jnp.float32, mesh)))
  assert jax.tree.structure(should) == jax.tree.structure(is_)
  for one, other in zip(jax.tree.leaves(should), jax.tree.leaves(is_)):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


@pytest.mark.medium
def test_it_decodes_as_any_model_does(small):
  eight = quantize(small)
  state = batches.run(eight, Autoregressive(), batches.prompts(4),
                      batches.SAMPLED)
  assert [len(a) for a in batches.answers(state)] == [24] * 4
  batches.check_cache(eight, state)
