# SPDX-License-Identifier: Apache-2.0
"""Guesses run ahead through the stages; the text is that of plain decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import layer_stream, loop, sharding
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.heads import ExitHead
from jaxspec.layer_stream import LayerStream
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.pipeline import Pipeline, divide
from jaxspec.verifiers.exact import exact
from tests.conftest import tiny_config
from tests.jaxspec import batches, cycles
from tests.jaxspec.batches import GREEDY, SAMPLED

pytestmark = pytest.mark.usefixtures("quick_compiles")

TOKENS = 24
PROMPTS = batches.prompts(4)


def mesh_of(stages):
  return sharding.make_mesh({"stage": stages})


def make(model, layers, head=None, guess=True):
  head = head or ExitHead.init(model, layer=layers[0])
  return LayerStream(Pipeline.of(model, layers, mesh_of(len(layers))), head,
                     jnp.asarray(guess))


def begin(model, stream, texts, options, capacity=64):
  rows = len(texts)
  init = jax.jit(lambda stream: loop.init(
      model, stream, stream.init_cache(rows, capacity, jnp.float32),
      capacity=capacity, stops=4, biases=4))
  state = init(stream)
  tokens, lengths = batches.padded(texts)
  prefix = loop.prefill(model, stream.taps, tokens, lengths, chunk=512,
                        dtype=jnp.dtype("float32"))
  return loop.insert(model, stream, exact, state,
                     np.arange(rows, dtype=np.int32), prefix,
                     batches.requests(model, texts, options))


def go(stream, state, ticks=2**30):
  return layer_stream.decode(stream, exact, state, np.int32(ticks),
                             np.bool_(True))


def run(model, layers, texts, options, **settings):
  stream = make(model, layers, **settings)
  with jax.set_mesh(mesh_of(len(layers))):
    return go(stream, begin(model, stream, texts, options))


def test_smoke(tiny):
  opts = [dataclasses.replace(SAMPLED, seed=i) for i in range(4)]
  plain = batches.answers(batches.run(tiny, Autoregressive(), PROMPTS, opts))
  state = run(tiny, (2, 2), PROMPTS, opts)
  print(state.counters, state.draft.ticks, state.draft.worked, state.draft.wasted)
  assert batches.answers(state) == plain
