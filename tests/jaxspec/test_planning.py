# SPDX-License-Identifier: Apache-2.0
"""A plan says what its programs are, and what they cost, and is right.

Programs for CPUs are planned here, for that is quick and can be checked; what
programs for TPUs exchange is in `test_collectives.py`.
"""

import dataclasses
import json
import math
import re
import threading

import jax
import pytest

from jaxspec import planning
from jaxspec.errors import InputError
from jaxspec.models import architectures, families
from jaxspec.planning import Setup
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compiles")


def setup(config=None, **changes) -> Setup:
  settings = dict(rows=2, capacity=64, prompt=16, dtype="float32")
  return Setup(config or tiny_config(), "cpu:1", (("tensor", 1),),
               **(settings | changes))


def matrices(config) -> int:
  """Elements of all matrices that a token is multiplied with."""
  c = config
  heads = c.heads * c.head_size
  mlp = 3 * c.mlp * (c.experts_per_token or 1) + c.experts
  layer = c.width * (2 * heads + 2 * c.kv_heads * c.head_size + mlp)
  return c.depth * layer + c.vocab * c.width


def test_sizes_and_memory_are_those_of_the_compiler():
  config = tiny_config()
  some = setup(config, rows=2)
  plan = planning.make(some)
  assert planning.programs(some) == tuple(plan.programs) == (
      "decode", "prefill")
  norms = (2 * config.depth + 1) * config.width
  assert plan.weights == 4 * (matrices(config) + norms)    # tied
  cache = 2 * 2 * config.depth * 64 * config.kv_heads * config.head_size * 4
  assert cache <= plan.cache <= cache + 8 * 64
  memory = plan.programs["decode"].compiled.memory_analysis()
  assert plan.held == pytest.approx(memory.argument_size_in_bytes, rel=0.02)
  assert plan.programs["decode"].temporaries == memory.temp_size_in_bytes
  assert plan.fits and plan.capacity is None and plan.needs > plan.held
  assert json.loads(json.dumps(plan.as_dict([0.5])))["bytes"]["weights"]


CONFIGS = {
    "llama": tiny_config(),
    "qwen3": tiny_config(family="qwen3", qk_norm=True, tied=False),
    "qwen2": tiny_config(family="qwen2", qkv_bias=True),
    "gemma2": tiny_config(
        family="gemma2", post_norms=True, attention_cap=50.0, logits_cap=30.0,
        windows=(16, None) * 2, activation="gelu_pytorch_tanh"),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_arithmetic_is_the_closed_form(family):
  """Prompts are read without the unembedding."""
  config = CONFIGS[family]
  plan = planning.make(setup(config), ["prefill"])
  tokens, c = 2 * 16, config
  attention = 4 * tokens * c.depth * 16 * c.heads * c.head_size
  wanted = 2 * tokens * (matrices(c) - c.vocab * c.width) + attention
  found = plan.programs["prefill"].cost.all_flops
  assert found == pytest.approx(wanted, rel=0.02)


SIZES = dict(width=512, heads=8, head_size=128, mlp=1024, vocab=1024, depth=1)
# Experts that do not fit into VMEM: what does is kept there over all steps.
EXPERTS = dict(experts=32, experts_per_token=2, width=2048, mlp=4096)
slow = pytest.mark.slow


@pytest.mark.parametrize("changes, kernels", [
    (dict(), "tpu"),
    pytest.param(dict(), "xla", marks=slow),
    pytest.param(dict(family="qwen2", qkv_bias=True), "tpu", marks=slow),
    pytest.param(dict(family="qwen3", qk_norm=True), "tpu", marks=slow),
    pytest.param(dict(family="gemma2", post_norms=True, attention_cap=50.0,
                      logits_cap=30.0, activation="gelu_pytorch_tanh"), "tpu",
                 marks=slow),
    pytest.param(dict(family="mixtral", **EXPERTS), "tpu", marks=slow),
    pytest.param(dict(family="qwen3_moe", qk_norm=True, **EXPERTS), "tpu",
                 marks=slow)],
    ids=lambda x: x.get("family", "llama") if isinstance(x, dict) else x)
def test_a_step_on_a_tpu_is_the_closed_form(tpu_compiler, changes, kernels):
  """What kernels say of themselves is what they are for: each weight and all
  of the cache once."""
  c = tiny_config(**(SIZES | changes))
  rows, slots = 8, 1024
  some = dataclasses.replace(
      setup(c, rows=rows, capacity=slots, dtype="bfloat16", kernels=kernels),
      topology="v5e:1x1")
  plan = planning.make(some, ["decode"])
  score = plan.programs["decode"].costs["score"]
  attention = 4 * rows * (slots + 1) * c.heads * c.head_size
  assert not score.uncounted
  assert score.all_flops == pytest.approx(
      2 * rows * matrices(c) + attention, rel=0.02)
  every = 3 * c.width * c.mlp * (c.experts or 1) + c.width * c.experts
  held = matrices(c) + every - 3 * c.width * c.mlp * (
      c.experts_per_token or 1) - c.width * c.experts
  cache = 2 * 2 * rows * c.kv_heads * slots * c.head_size
  assert score.bytes == pytest.approx(2 * held + cache, rel=0.02)


def test_eight_bits_are_planned_for():
  config = tiny_config(tied=False)
  wide = setup(config, dtype="bfloat16")
  small = dataclasses.replace(wide, dtype="int8")
  plan = planning.make(small, ["decode"])
  # A byte each, and a scale for each output; the table of embeddings stays.
  count, c = matrices(config), config
  outputs = c.vocab + c.depth * (
      (c.heads + 2 * c.kv_heads) * c.head_size + 2 * c.width + 2 * c.mlp)
  norms = (2 * c.depth + 1) * c.width
  assert plan.weights == count + 4 * outputs + 4 * norms + (
      2 * c.vocab * c.width)
  assert plan.weights < planning.estimate(wide)
  assert planning.estimate(dataclasses.replace(small, rows=0)) == plan.weights
  assert plan.programs["decode"].cost.flops["s8"] == pytest.approx(
      2 * 2 * count, rel=0.02)
  with pytest.raises(InputError, match="decode loads none"):
    planning.keep(small, "folder")


def test_few_layers_tell_what_all_take():
  config = tiny_config(depth=8, width=64, mlp=128)
  whole, scaled = (
      planning.make(setup(config), ["prefill"], scaled=scaled)
      for scaled in (False, True))
  assert scaled.scaled and not whole.scaled
  assert scaled.weights == whole.weights and scaled.cache == whole.cache
  program, other = whole.programs["prefill"], scaled.programs["prefill"]
  assert other.cost.all_flops == pytest.approx(program.cost.all_flops)
  assert other.arguments == pytest.approx(program.arguments, rel=0.02)
  assert other.cost.bytes == pytest.approx(program.cost.bytes, rel=0.05)


def test_what_shrinks_with_layers_does_not_shrink_below_nothing(monkeypatch):
  """Of two and three layers, temporaries of 50 and 40 bytes."""
  def make(some, names, workers):
    depth = some.config.depth
    return planning.Plan(
        some, "cpu", None, 10.0 * depth, 0, 0, 0, 0, 1, 0,
        {"decode": planning.Program(
            "decode", arguments=depth, outputs=0, code=5 * depth,
            temporaries=70.0 - 10 * depth)})
  monkeypatch.setattr(planning, "make", make)
  plan = planning._scaled(setup(tiny_config(depth=80)), ["decode"], 1)
  decode = plan.programs["decode"]
  assert decode.temporaries == 40 and decode.arguments == 80
  assert plan.weights == 800 and plan.code == 400


def test_layers_that_repeat():
  assert planning.period(tiny_config()) == 1
  assert planning.period(tiny_config(windows=(8, None, 8, None))) == 2
  assert planning.period(tiny_config(windows=(8, None, None, None))) == 4


@pytest.mark.parametrize("drafter, nodes", [
    ("medusa:tree=mc_sim_7b_63,nodes=9", 9), ("early_exit:layer=2,length=3", 4),
    ("eagle:tree=chain,depth=3", 4), ("hydra:nodes=5", 5)])
def test_heads_need_no_weights(drafter, nodes):
  """Those that are not named are of the usual size."""
  blueprint = planning.Blueprint(setup(drafter=drafter))
  assert blueprint.drafter.size == nodes
  assert planning.size(blueprint.drafter) > 0
  assert all(isinstance(x, jax.ShapeDtypeStruct)
             for x in jax.tree.leaves(blueprint.drafter)
             if x is not None and getattr(x, "ndim", 0) > 1)


@pytest.mark.medium
def test_halves_of_a_step_are_the_step():
  config = tiny_config(depth=1)
  some = setup(config, drafter="medusa:tree=mc_sim_7b_63,nodes=4")
  assert planning.programs(some) == ("decode", "prefill", "plain", "verify",
                                     "propose")
  plan = planning.make(some, ["decode", "verify", "propose"])
  decode, verify = plan.programs["decode"], plan.programs["verify"]
  assert decode.costs["observe"].all_flops > 0           # the heads
  tokens, attended = 2 * 4, 64 + 4
  wanted = 2 * tokens * matrices(config) + 4 * tokens * attended * (
      config.heads * config.head_size)
  for program in (decode, verify):
    assert program.costs["score"].all_flops == pytest.approx(wanted, rel=0.02)
  assert not plan.programs["propose"].cost.all_flops


def test_tokens_a_pass():
  plan = planning.Plan(setup(), "cpu", None, 0, 0, 0, 0, 0, 4, 3, {})
  assert plan.tokens_per_pass([0.5]) == 1 + 0.5 + 0.25 + 0.125
  assert plan.tokens_per_pass([0.6, 0.3]) == pytest.approx(1.9)
  plain = dataclasses.replace(plan, height=0)
  assert plain.tokens_per_pass([0.5]) == 1


def test_time_is_what_published_figures_say():
  from jaxspec.hlo import Cost
  cost = Cost(bytes=819e6, flops={"bf16": 197e9})
  plan = planning.Plan(
      setup(), "TPU v5 lite", 16e9, 8e9, 1e9, 0, 0, 0, 1, 0,
      {"decode": planning.Program("decode", costs={"score": cost})})
  assert plan.step().memory == pytest.approx(1e-3)
  assert plan.step().arithmetic == pytest.approx(1e-3)
  assert plan.per_second([0.0]) == pytest.approx(1000)
  assert plan.free == 7e9
  cost.flops["bf16"] *= 2
  assert plan.step().limit == "arithmetic"
  cost.bytes *= 10
  assert plan.step().limit == "bandwidth"


def test_meshes_spread_all_devices():
  config = architectures.sizes("llama3-70b")
  found = planning.meshes(config, 16, 8)
  assert found[0] == (("data", 2), ("tensor", 8))
  assert all(math.prod(n for _, n in mesh) == 16 for mesh in found)
  experts = planning.meshes(architectures.sizes("qwen3-30b-a3b"), 8, 1)
  assert (("expert", 2), ("tensor", 4)) in experts
  assert planning.meshes(config, 3, 8) == []
  # Where there are not enough heads, over slots: last, with all heads.
  assert found[-1] == (("tensor", 8), ("sequence", 2))
  split = (("tensor", 8), ("sequence", 2))
  assert planning.meshes(config, 16, 1, 2048) == [split]
  assert planning.meshes(config, 16, 1, 2047) == []


@pytest.mark.medium
def test_slots_are_split_and_with_them_the_mlp():
  config = tiny_config(mlp=64, vocab=64)
  wide, split = (dataclasses.replace(
      setup(config), topology=f"cpu:{count}", mesh=mesh) for count, mesh in (
          (2, (("tensor", 2),)), (4, (("tensor", 2), ("sequence", 2)))))
  plans = [planning.make(one, ["decode"]) for one in (wide, split)]
  for plan in plans:
    assert plan.weights + plan.cache == pytest.approx(
        planning.estimate(plan.setup), rel=0.01)
  assert plans[1].cache < 0.6 * plans[0].cache
  saved = plans[0].weights - plans[1].weights
  assert saved == 4 * (config.depth * 3 * 64 + 64) * config.width / 4
  with pytest.raises(InputError, match="slots are not divisible by mesh axis "
                     "sequence=3"):
    planning.make(dataclasses.replace(
        setup(config), topology="cpu:3", mesh=(("sequence", 3),)), ["decode"])


def test_an_estimate_is_weights_and_cache():
  config = architectures.sizes("llama3-70b")
  some = Setup(config, "v5e:4x4", (("tensor", 8),), rows=8)
  cache = 2 * 8 * 80 * 2048 * 128 * 2
  assert planning.estimate(some) == pytest.approx(
      2 * 70.55e9 / 8 + cache, rel=0.001)


@pytest.mark.parametrize("name, billions", [
    ("smollm2-135m", 0.1345), ("llama3-8b", 8.03), ("llama3-70b", 70.55),
    ("llama3.1-405b", 405.8), ("qwen3-8b", 8.19), ("qwen3-30b-a3b", 30.5),
    ("qwen3-235b-a22b", 235.1), ("mixtral-8x7b", 46.7), ("mistral-7b", 7.25),
    ("gemma2-9b", 9.24)])
def test_architectures_have_the_published_number_of_parameters(name, billions):
  some = Setup(architectures.sizes(name), "cpu:1", rows=0, dtype="bfloat16")
  assert planning.estimate(some) / 2e9 == pytest.approx(billions, rel=0.005)


def test_a_config_is_read_from_a_folder(tmp_path):
  said = dict(
      model_type="llama", hidden_size=32, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
      vocab_size=64, max_position_embeddings=128, rope_theta=1e4)
  (tmp_path / "config.json").write_text(json.dumps(said))
  assert planning.read_config(str(tmp_path)) == families.config(said)
  with pytest.raises(InputError, match="Did you mean 'llama3-70b'"):
    planning.read_config("llama3-70")


@pytest.mark.parametrize("topology, words", [
    ("cpu:99", "this process has 8"), ("cpu:x", "a number of devices"),
    ("h100:0", "a number of devices")])
def test_topologies_that_cannot_be(topology, words):
  with pytest.raises(InputError, match=words):
    planning.devices(topology)


def test_a_missing_compiler_is_named(monkeypatch):
  monkeypatch.setattr(planning, "_has", lambda module: False)
  with pytest.raises(InputError, match=(
      f"--no-deps jax-cuda13-pjrt=={jax.__version__}")):
    planning.devices("h200:2")
  monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match="jax.tpu."):
    planning.devices("v6e:9x9")


def test_what_makes_it_fit_is_compiled(monkeypatch):
  """With devices of a megabyte, and a model of three quarters of one."""
  monkeypatch.setattr(planning, "capacity_of", lambda topology: 1.1e6)
  monkeypatch.setattr(planning, "_SLICES", {"cpu": "1 2"})
  config = tiny_config(width=64, mlp=128, vocab=128)
  some = setup(config, rows=2, capacity=1024)
  assert planning.estimate(some) > 1.1e6
  made = []

  def make(changed):
    made.append(changed)
    return planning.Plan(changed, "cpu", 1.1e6, planning.estimate(changed), 0,
                         0, 0, 0, 1, 0, {})
  monkeypatch.setattr(planning, "make", make)
  found = planning.remedies(some)
  words = [w.partition("=")[0] for w, _ in found]
  assert "--capacity" in words and "--rows" in words
  assert made == [plan.setup for _, plan in found]
  assert all(plan.fits for _, plan in found)


def test_changes_are_of_every_sort(monkeypatch):
  """Gentle ones first: what is another law comes before what is dearer."""
  some = Setup(architectures.sizes("llama3-8b"), "v5e:1x1", (("tensor", 1),),
               rows=4)
  monkeypatch.setattr(planning, "devices", lambda topology: [None])
  words = [words for words, _ in planning.changes(some)]
  sorts = list(dict.fromkeys(w.partition("=")[0] for w in words))
  assert sorts == ["--capacity", "--rows", "--dtype", "--topology"]
  assert {"--capacity=1024", "--rows=2", "--rows=1", "--dtype=int8"} <= set(
      words)
  assert not any(words.startswith("--dtype") for words, _ in planning.changes(
      dataclasses.replace(some, dtype="int8")))


@pytest.mark.medium
def test_a_refusal_is_the_compilers_and_changes_are_compiled(tpu_compiler):
  """One layer of 16.6 GiB on a chip of 15.75, and nothing is faked."""
  config = tiny_config(
      depth=1, width=8192, heads=8, kv_heads=8, head_size=128, mlp=360448,
      vocab=1024, context=4096)
  some = Setup(config, "v5e:1x1", (("tensor", 1),), rows=8, kernels="xla")
  plan = planning.make(some, ["decode"])
  assert plan.capacity == 15.75 * 2**30
  assert not plan.fits and re.search(
      r"Ran out of memory on HBM.* \(16\.6\d?G\) exceeds available HBM "
      r"\(15\.75G\)$", plan.refused)
  found = planning.remedies(some, count=2, names=["decode"])
  assert [words for words, _ in found] == [
      "--dtype=int8", "--topology=v5e:2x2 --mesh=tensor=4"]
  for _, plan in found:
    decode = plan.programs["decode"]
    memory = decode.compiled.memory_analysis()
    assert plan.fits and not decode.refused
    assert plan.held == pytest.approx(memory.argument_size_in_bytes, rel=0.02)
    assert plan.capacity and 0 < plan.free < plan.capacity


@pytest.mark.parametrize("topology, capacity", [
    ("h100:1", 0.75 * 84929347584), ("h100:8", 0.75 * 84929347584),
    ("h200:1", 0.75 * 151397597184)])
def test_of_a_gpu_there_is_what_jax_takes(topology, capacity, monkeypatch):
  for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
    monkeypatch.delenv(name, raising=False)
  assert planning.capacity_of(topology) == capacity
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
  assert planning.capacity_of(topology) == pytest.approx(capacity * 0.9 / 0.75)
  assert planning.gpu_share("v5e:2x2") is None
  monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
  with pytest.raises(InputError, match="MEM_FRACTION=most is no share"):
    planning.capacity_of(topology)


def test_an_h200_has_the_published_figures():
  from jaxspec import roofline
  known = roofline.chip("NVIDIA H200")
  name, bandwidth, memory = planning._GPUS["h200"]
  assert known and name == "NVIDIA H200"
  assert known.bandwidth == bandwidth and known.memory == memory
  # It holds what an H100 does not: 70 billion weights in eight bits.
  some = Setup(architectures.sizes("llama3-70b"), "h200:1", (("tensor", 1),),
               rows=1, dtype="int8")
  held = planning.estimate(some)
  small, large = map(planning.capacity_of, ("h100:1", "h200:1"))
  assert small and large and small < held < large


def test_programs_of_several_hosts_are_not_kept(monkeypatch):
  class Device:
    def __init__(self, at):
      self.process_index = at // 8
  monkeypatch.setattr(planning, "devices", lambda topology: tuple(
      map(Device, range(16))))
  some = Setup(tiny_config(), "v5e:4x4", (("data", 16),), rows=16)
  with pytest.raises(InputError, match="its 2 hosts decode together.*"
                     "--compilation_cache_dir=FOLDER"):
    planning.keep(some, "folder")


def test_a_sweep_tries_all_meshes(monkeypatch):
  """And of what fits, the program that reads prompts."""
  made = []

  def make(some, names, scaled):
    made.append((some.mesh, *names))
    (name,) = names
    return planning.Plan(
        some, "cpu", None, planning.estimate(some), 0, 0, 0, 0, 1, 0,
        {name: planning.Program(name, refused="no" * (
            name == "decode" and some.mesh == (("data", 2),)))})
  monkeypatch.setattr(planning, "make", make)
  seen = []
  plans = planning.sweep(setup(tiny_config(depth=1)), ["cpu:2"],
                         on_plan=seen.append)
  assert [p.setup.mesh for p in plans] == [(("tensor", 2),), (("data", 2),)]
  tensor, data = plans
  assert tensor.weights < data.weights
  assert seen == plans and list(tensor.programs) == ["decode", "prefill"]
  assert made == [((("tensor", 2),), "decode"), ((("tensor", 2),), "prefill"),
                  ((("data", 2),), "decode")]


def test_a_sweep_names_what_it_leaves_out(monkeypatch):
  monkeypatch.setattr(planning, "capacity_of", lambda topology: {
      "cpu:1": 1.0, "cpu:2": 1e9, "cpu:5": 1e9}[topology])
  together = threading.Barrier(2, timeout=30)

  def make(some, names, scaled):
    if names == ("decode",):
      together.wait()              # both at once, or not at all
    if some.mesh == (("data", 2),):
      raise InputError("no data here")
    return planning.Plan(some, "cpu", 1e9, 1, 0, 0, 0, 0, 1, 0, {})
  monkeypatch.setattr(planning, "make", make)
  dropped = []
  plans = planning.sweep(
      setup(tiny_config(depth=1)), ["cpu:1", "cpu:2", "cpu:5"], workers=2,
      on_drop=lambda some, why: dropped.append((some.topology, why)))
  assert [p.setup.mesh for p in plans] == [(("tensor", 2),)]
  assert sorted(dropped) == [
      ("cpu:1", "weights and cache alone are 0.00 GiB of 0.00"),
      ("cpu:2", "no data here"),
      ("cpu:5", "no mesh spreads 2 key/value heads and 2 rows over 5 devices")]
