# SPDX-License-Identifier: Apache-2.0
"""Programs are made of the kernels that are asked for, and say the same.

Held here: a generator's choice is refused where its devices cannot have it;
what the kernels of a TPU give, interpreted, is the text of XLA's programs, for
each cache, plain, drafted by a head and by prompt lookup, and so are rows of
streams; and the program of a decoding that is compiled for a TPU calls every
op's kernel, on one device and on four, with its caches in place; lowered for an
H100 it does so too.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from jaxspec import kernels, loop, planning, sharding
from jaxspec.drafters.early_exit import EarlyExit
from jaxspec.drafters.medusa import Medusa, published
from jaxspec.drafters.prompt_lookup import PromptLookup
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from jaxspec.heads import ExitHead, MedusaHeads
from jaxspec.models.transformer import Transformer, abstract_source
from jaxspec.options import Options
from jaxspec.streams import loop as rows
from jaxspec.streams.cache import empty
from jaxspec.streams.layout import Stream, StreamLayout
from jaxspec.streams.model import StreamModel
from jaxspec.streams.session import Streams
from jaxspec.verifiers.exact import exact
from pallas_kernels import errors, target
from pallas_kernels.compiling import GPU, copied
from tests.jaxspec import batches
from tests.jaxspec.streams import tables
from tests.jaxspec.test_memory import LLAMA_3_8B, placed, scalar

PROMPTS = [[5, 9, 2, 9, 5, 9, 2], [7, 1]]


def test_choices_fit_the_devices():
  mesh = sharding.make_mesh()
  assert kernels.choose(None, mesh) is None
  assert kernels.choose("xla", mesh).implementation == "xla"
  assert kernels.choose("interpret", mesh).platform == "tpu"
  with pytest.raises(InputError, match="kernels=tpu is not for the devices of "
                     "this mesh, which are cpu"):
    kernels.choose("tpu", mesh)
  with pytest.raises(InputError, match="got 'tpuu'.*tpu"):
    kernels.choose("tpuu", mesh)


def test_nothing_is_aimed_at_a_cpu():
  with kernels.on(sharding.make_mesh(), None):
    assert not kernels.wanted()
  with kernels.on(sharding.make_mesh(), target.Target("tpu", "",
                                                      implementation="xla")):
    assert not kernels.wanted()


def test_a_shape_that_a_kernel_asked_for_does_not_take_is_explained():
  goal = target.Target("tpu", "TPU v5 lite", implementation="tpu")
  with pytest.raises(InputError, match="kernels=tpu: op: tpu: odd; leave"), (
      kernels.on(sharding.make_mesh(), goal)):
    raise NotImplementedError("op: tpu: odd")


slow = pytest.mark.slow


def test_a_table_of_blocks_that_is_none_is_explained():
  with pytest.raises(InputError, match="^x.json is no JSON"), (
      kernels.on(sharding.make_mesh(), None)):
    raise errors.InputError("x.json is no JSON")


@pytest.mark.medium
@pytest.mark.parametrize("drafter, cache", [
    ("exit", "contiguous"),
    pytest.param("prompt_lookup", "paged:page=8", marks=slow),
    pytest.param("autoregressive", "window", marks=slow),
    pytest.param("autoregressive", "contiguous", marks=slow),
    pytest.param("autoregressive", "paged:page=8", marks=slow),
    pytest.param("prompt_lookup", "contiguous", marks=slow),
    pytest.param("prompt_lookup", "window", marks=slow)])
def test_interpreted_kernels_give_the_same_text(
    quick_compiles, small, drafter, cache):
  if drafter == "exit":
    drafter = EarlyExit(ExitHead.init(small, layer=1), ((0,), (0, 0)))
  found = []
  for choice in (None, "interpret"):
    made = Generator(small, rows=2, capacity=32, cache=cache, drafter=drafter,
                     kernels=choice)
    found.append(made.generate(PROMPTS, [
        Options(max_new_tokens=9), Options(max_new_tokens=9, temperature=0.8,
                                           seed=3)]))
  plain, interpreted = found
  assert [c.token_ids for c in plain] == [c.token_ids for c in interpreted]
  if drafter != "autoregressive":
    assert all(c.stats.accepted for c in interpreted)


TALK = StreamLayout((Stream("user", written=False), Stream("out"),
                     Stream("aside", reads=("out",))), silence=1,
                    keep_silence=False)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["contiguous", "paged:page=8", "window"])
def test_interpreted_kernels_give_the_same_rows(quick_compiles, small, cache):
  """One by one without kernels, and with them where some were foretold."""
  found, drafter = [], None
  for choice in (None, "interpret"):
    streams = Streams.of(
        Generator(small, capacity=32, kernels=choice), TALK, room=20,
        prefix_room=4, cache=cache, drafter=drafter)
    with streams.open(prefix=[3], given={"out": PROMPTS[0], "aside": [9]},
                      options={"out": Options(max_new_tokens=8),
                               "aside": Options(max_new_tokens=8, seed=3,
                                                temperature=0.8)}) as session:
      session.push("user", PROMPTS[1])
      found.append([row.tokens for row in session.rows(stride=4)])
    drafter = tables.Told.of(found)
  # Eight tokens behind the row in which the first word is heard.
  assert len(found[0]) == 16 and found[0] == found[1]
  assert session.accepted > 3


@pytest.fixture(scope="module")
def chips(tpu_compiler):
  """Four of v5e, which are not there."""
  return topologies.get_topology_desc(platform="tpu",
                                      topology_name="v5e:2x2").devices


@pytest.mark.parametrize("sizes, drafter", [
    pytest.param({"data": 2, "tensor": 2}, "prompt_lookup",
                 marks=pytest.mark.medium),
    pytest.param({}, "exit", marks=slow),
    pytest.param({}, "medusa", marks=slow),
    pytest.param({}, "prompt_lookup", marks=slow)])
def test_a_program_for_a_tpu_calls_the_kernels(chips, sizes, drafter):
  mesh = sharding.make_mesh(sizes, chips)
  config = LLAMA_3_8B(depth=2)
  model = Transformer(config, abstract_source(jnp.bfloat16, mesh))
  if drafter == "exit":
    head = ExitHead(model, abstract_source(jnp.bfloat16, mesh), layer=1,
                    mlp=256)
    made = EarlyExit(head, ((0,), (0, 0)), cache_dtype="bfloat16")
  elif drafter == "medusa":
    made = Medusa(MedusaHeads.make(
        model, abstract_source(jnp.bfloat16, mesh), 2, 1, 64, None),
        published("mc_sim_7b_63")[:7])
  else:
    made = PromptLookup(length=7)
  with kernels.on(mesh, kernels.choose(None, mesh)):
    state = begun(model, made, 8, 8192)
    compiled = loop.decode.lower(
        model, made, exact, state, scalar(jnp.int32, mesh),
        scalar(bool, mesh)).compile()
  memory = compiled.memory_analysis()
  wanted = {"tree_attention", "commit_kv", "fused_mlp", "accept_nodes"}
  if drafter in ("exit", "medusa"):
    wanted.add("proposal_head")
  assert not lacking(compiled, wanted)
  held = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(state))
  assert memory.alias_size_in_bytes >= held * 0.99
  # A copy of one layer's keys would not fit in.
  keys = state.seq.cache.k[0]
  assert memory.temp_size_in_bytes < keys.dtype.itemsize * np.prod(
      keys.sharding.shard_shape(keys.shape))
  # Nor is one brought into the chip's own memory, and back.
  assert not copied(compiled.as_text(), keys.sharding.shard_shape(keys.shape))


def begun(model, drafter, rows, capacity):
  """The shapes of a state, where a compiled program puts them."""
  return placed(lambda: loop.init(
      model, drafter, model.init_cache(
          batches.cache_kind("contiguous"), rows, capacity, jnp.bfloat16),
      capacity=capacity, stops=16, biases=64))


def lacking(compiled, wanted):
  """Ops whose kernel the program does not call."""
  called = {line.partition("op_name=")[2]
            for line in compiled.as_text().splitlines()
            if "tpu_custom_call" in line}
  return {op for op in wanted if not any(op in name for name in called)}


def kernels_of_gpu(text):
  """Folders of the GPU kernels that a lowered program calls, in order.

  They have no names of their own, but each call knows where it was written.
  """
  places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))

  def said(at):
    mine = places.get(at, "")
    return mine + "".join(map(said, re.findall(r"#loc\d+", mine)))

  called = re.findall(r"custom_call @mosaic_gpu.*loc\((#loc\d*)\)$", text, re.M)
  return sorted(folder for at in called for folder in set(
      re.findall(r"pallas_kernels/(\w+)/gpu\.py", said(at))))


# Of an MLP there are two.
DECODING = ["acceptance", "attention", "matmul", "matmul", "writeback"]


@pytest.mark.medium
def test_a_program_for_a_gpu_calls_the_kernels():
  """Lowered for an H100, of which no compiler is needed."""
  mesh = AbstractMesh(
      (1,) * len(sharding.MESH_AXES), sharding.MESH_AXES,
      abstract_device=AbstractDevice(GPU.kind, 132, "gpu"))
  model = Transformer(LLAMA_3_8B(depth=1), abstract_source(jnp.bfloat16, mesh))
  made = PromptLookup(length=3)
  with jax.sharding.use_abstract_mesh(mesh), target.aim(GPU):
    state = begun(model, made, 2, 1024)
    lowered = loop.decode.trace(
        model, made, exact, state, scalar(jnp.int32, mesh),
        scalar(bool, mesh)).lower(lowering_platforms=("cuda",))
  assert kernels_of_gpu(lowered.as_text(debug_info=True)) == DECODING


@pytest.mark.medium
@pytest.mark.parametrize("choice", [None, pytest.param("gpu", marks=slow)])
def test_a_plan_for_a_gpu_calls_the_kernels(choice):
  try:
    planning.devices("h100:1")
  except InputError as e:
    pytest.skip(str(e))
  plan = planning.Blueprint(planning.Setup(
      LLAMA_3_8B(depth=1), "h100:1", (("tensor", 1),), rows=2, capacity=1024,
      drafter="prompt_lookup:length=3", kernels=choice))
  text = plan.lower("decode").as_text(debug_info=True)
  assert kernels_of_gpu(text) == DECODING


@slow
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 2}])
def test_rows_for_a_tpu_call_the_kernels(chips, sizes):
  mesh = sharding.make_mesh(sizes, chips)
  model = StreamModel(Transformer(LLAMA_3_8B(depth=2), abstract_source(
      jnp.bfloat16, mesh)))
  with kernels.on(mesh, kernels.choose("tpu", mesh)):
    state = placed(lambda: rows.init(
        model, TALK, empty(
            model.backbone, TALK, batches.cache_kind("contiguous"), 8, 6144,
            jnp.bfloat16),
        room=2048, queue=64, stops=16, biases=64))
    compiled = rows.decode.lower(
        model, TALK, None, state, scalar(jnp.int32, mesh),
        scalar(jnp.int32, mesh)).compile()
  assert not lacking(compiled, {"tree_attention", "commit_kv", "fused_mlp"})
