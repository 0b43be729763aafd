# SPDX-License-Identifier: Apache-2.0
"""What `decode` needs beside weights and caches: next to nothing.

Programs are compiled from shapes alone. The state is donated, so that all of
it must come back in the same memory; and temporaries stay below two percent of
weights and caches, which leaves no room for a copy of a cache, nor of the
weights of a tenth of the layers. That holds the decision of how layers are
stored (`jaxspec/models/transformer.py`).
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jaxspec import layer_stream, loop, sharding
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.heads import ExitHead
from jaxspec.layer_stream import LayerStream
from jaxspec.models.layers import Rope
from jaxspec.models.transformer import Config, abstract_source
from jaxspec.pipeline import Pipeline
from jaxspec.planning import Blueprint, Setup, devices, placed, size
from jaxspec.verifiers.exact import exact

SHARE = 0.02


def llama(depth: int, vocab: int, width: int, heads: int, kv_heads: int,
          mlp: int, tied: bool) -> Config:
  return Config(
      family="llama", vocab=vocab, width=width, depth=depth, heads=heads,
      kv_heads=kv_heads, head_size=width // heads, mlp=mlp, tied=tied,
      ropes=(Rope(1e5),) * depth, windows=(None,) * depth, context=8192)


SMOLLM2 = functools.partial(llama, vocab=49152, width=576, heads=9, kv_heads=3,
                            mlp=1536, tied=True)
LLAMA_3_8B = functools.partial(llama, vocab=128256, width=4096, heads=32,
                               kv_heads=8, mlp=14336, tied=False)


def compile_decode(config: Config, drafter: str, *, rows: int, capacity: int,
                   dtype, mesh, kind: str = "contiguous", cache_dtype=None,
                   kernels=None):
  """The compiled loop, and how many bytes its state has on a device."""
  blueprint = Blueprint(Setup(
      config, "", drafter=drafter, rows=rows, capacity=capacity,
      dtype=jnp.dtype(dtype).name, cache=kind, kernels=kernels,
      cache_dtype=jnp.dtype(cache_dtype or dtype).name), mesh)
  return blueprint.lower("decode").compile(), size(blueprint.state)


def scalar(dtype, mesh):
  return jax.ShapeDtypeStruct(
      (), dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def compile_stream(config: Config, layers: tuple[int, ...], *, rows: int,
                   capacity: int, dtype, mesh):
  """The same of the loop over pipeline stages, whose head has attention."""
  pipeline = Pipeline.read(config, abstract_source(dtype), layers, mesh)
  head = ExitHead(pipeline.stage, abstract_source(dtype, mesh),
                  layer=layers[0], mlp=config.width, attention=True)
  stream = LayerStream(head, scalar(bool, mesh), dtype.dtype.name)

  def make():
    cache = pipeline.init_cache(ContiguousCache, rows, capacity, dtype)
    return loop.init(pipeline, stream, cache, capacity=capacity, stops=16,
                     biases=64)

  with jax.set_mesh(mesh):
    state = placed(make)
    compiled = layer_stream.decode.lower(
        pipeline, stream, exact, state, scalar(jnp.int32, mesh),
        scalar(bool, mesh)).compile()
  return compiled, size(state)


def check(compiled, state_bytes: int) -> None:
  memory = compiled.memory_analysis()
  # All of the state comes back where it was; a TPU pads small arrays.
  assert memory.alias_size_in_bytes >= state_bytes
  assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096
  share = memory.temp_size_in_bytes / memory.argument_size_in_bytes
  print(f"temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB, "
        f"{100 * share:.2f} % of {memory.argument_size_in_bytes / 1e6:.0f} MB")
  assert share < SHARE


@pytest.mark.slow
@pytest.mark.parametrize("drafter, kind", [
    ("autoregressive", "contiguous"), ("prompt_lookup", "contiguous"),
    ("prompt_lookup", "paged"), ("prompt_lookup", "window"),
    ("adaptive:drafter=[union:nodes=8],sizes=[1;4;8]", "contiguous")])
def test_smollm2_on_a_cpu(drafter, kind):
  check(*compile_decode(
      SMOLLM2(depth=30), drafter, rows=2, capacity=2048, dtype=jnp.float32,
      mesh=sharding.make_mesh(), kind=kind))


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["autoregressive", "prompt_lookup"])
def test_smollm2_in_half_precision_on_a_cpu(drafter):
  """No weight is converted: XLA:CPU computes some things in float32 alone."""
  check(*compile_decode(
      SMOLLM2(depth=30), drafter, rows=2, capacity=2048, dtype=jnp.bfloat16,
      cache_dtype=jnp.float32, mesh=sharding.make_mesh()))


@pytest.fixture(scope="module")
def v5e(tpu_compiler):
  topology = topologies.get_topology_desc(platform="tpu",
                                          topology_name="v5e:2x2")
  return sharding.make_mesh({"tensor": 4}, topology.devices)


@pytest.mark.medium
@pytest.mark.parametrize("drafter", [
    "autoregressive", pytest.param("prompt_lookup", marks=pytest.mark.slow)])
def test_llama_3_8b_on_four_v5e(v5e, drafter):
  check(*compile_decode(LLAMA_3_8B(depth=32), drafter, rows=8, capacity=2048,
                        dtype=jnp.bfloat16, mesh=v5e))


@pytest.mark.medium
def test_weights_on_tpu7x_are_read_as_they_lie(tpu_compiler):
  """Laid out anew (`jaxspec.libtpu`) they would be two fifths."""
  mesh = sharding.make_mesh({"tensor": 4}, devices("tpu7x:2x2x1")[:4])
  check(*compile_decode(LLAMA_3_8B(depth=1), "autoregressive", rows=8,
                        capacity=2048, dtype=jnp.bfloat16, mesh=mesh))


@pytest.mark.slow
def test_layer_stream_on_four_v5e(v5e):
  """And nothing goes from chip to chip but one token's stream and what is
  said of it: no weight, no keys and no values."""
  compiled, size = compile_stream(
      LLAMA_3_8B(depth=8), (1, 3, 2, 2), rows=2, capacity=8192,
      dtype=jnp.bfloat16,
      mesh=sharding.make_mesh({"stage": 4}, v5e.devices.flat))
  check(compiled, size)
  moved = re.findall(
      r"= \(?(\w+\[[\d,]*\])\S* .*?\b(collective-\w+|all-\w+|reduce-\w+)"
      r"(?:-start)?\(.*channel_id", compiled.as_text())
  assert sorted(moved) == [("bf16[2,1,4096]", "collective-permute"),
                           ("s32[4,2,2]", "all-gather")]


@pytest.mark.slow
def test_a_copied_cache_would_be_seen(v5e, monkeypatch):
  """The measure works: caches that are copied, layer by layer, fail it."""
  def copied(buffer, values, slots):
    values = jnp.moveaxis(values, 1, 2).astype(buffer.dtype)
    return jax.vmap(lambda b, v, s: b.at[:, s].set(v, mode="drop"))(
        buffer, values, slots)

  monkeypatch.setattr("pallas_kernels.writeback.xla.write_slots", copied)
  jax.clear_caches()                     # else the sound one is found there
  try:
    compiled, size = compile_decode(
        LLAMA_3_8B(depth=2), "autoregressive", rows=8, capacity=8192,
        dtype=jnp.bfloat16, mesh=v5e, kernels="xla")
  finally:
    monkeypatch.undo()
    jax.clear_caches()
  with pytest.raises(AssertionError):
    check(compiled, size)
