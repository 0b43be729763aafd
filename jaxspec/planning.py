# SPDX-License-Identifier: Apache-2.0
"""Programs compiled for devices that are not there, and what they will cost.

The programs that a `Generator` runs are lowered from shapes and compiled for a
named topology: no weights, no device. The compiler says what fits; its own
output says what is computed, moved and exchanged (`jaxspec.hlo`); published
figures say how long that takes at least (`jaxspec.roofline`).
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxspec import (
  caches,
  drafters,
  executables,
  hlo,
  libtpu,
  loop,
  roofline,
  sharding,
  verifiers,
)
from jaxspec.base import DecodeState
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.errors import InputError, nearest
from jaxspec.generator import BIASES, CHUNK, STOPS, buckets
from jaxspec.kernels import choose, on
from jaxspec.models import architectures, families
from jaxspec.models.transformer import Config, Transformer, abstract_source
from jaxspec.options import Options, as_request
from jaxspec.profiling import SCOPES
from jaxspec.quantization import quantize

_GIB = 1 << 30
# Names of topologies by the names of GPUs, and what XLA wants to know of them.
_GPUS = {"h100": ("NVIDIA H100 80GB HBM3", 3352320000000, 84929347584),
         "h200": ("NVIDIA H200", 4800000000000, 151397597184)}
# Heads as they are where none are named, by drafter.
_UNTRAINED: dict[str, tuple[str, Callable[[Config], dict[str, Any]]]] = {
    "medusa": ("medusa", lambda c: dict(heads=4, blocks=1)),
    "hydra": ("hydra", lambda c: dict(heads=4, rank=c.width)),
    "early_exit": ("exit", lambda c: dict(
        layer=max(c.depth // 3, 1), mlp=c.width, attention=False)),
    "eagle": ("eagle", lambda c: dict(
        taps=sorted({2 % c.depth, c.depth // 2, max(c.depth - 3, 0)}),
        mlp=c.mlp)),
}


@dataclasses.dataclass(frozen=True)
class Setup:
  """What is to run, and on what.

  Attributes:
    config: of the model.
    topology: devices by name, see `devices`.
    mesh: devices along each axis.
    prompt: tokens of a prompt, for the time it takes to read.
    dtype: of the weights. `int8` is a model whose matrices have eight bits
      (`jaxspec.quantization`); all else is bfloat16.
    cache_dtype: of keys and values; None for what `Generator` takes.
  """

  config: Config
  topology: str
  mesh: tuple[tuple[str, int], ...] = ()
  drafter: str = "autoregressive"
  verifier: str = "exact"
  rows: int = 1
  capacity: int = 2048
  prompt: int = 512
  dtype: str = "bfloat16"
  cache: str = "contiguous"
  cache_dtype: str | None = None
  kernels: str | None = None

  @property
  def wide(self) -> Any:
    """The type of all that is not rounded."""
    return jnp.dtype("bfloat16" if self.dtype == "int8" else self.dtype)

  @property
  def devices(self) -> int:
    return math.prod(size for _, size in self.mesh)

  def said(self) -> str:
    """In words."""
    mesh = " ".join(f"{axis}={size}" for axis, size in self.mesh) or "one"
    return (f"{self.topology}, mesh {mesh}, {self.drafter}, {self.dtype}, "
            f"rows {self.rows}, capacity {self.capacity}")


def abstract(config: Config, setup: Setup, mesh: Any) -> Transformer:
  """A model of shapes, as a setup wants its weights."""
  model = Transformer(config, abstract_source(setup.wide, mesh))
  return quantize(model) if setup.dtype == "int8" else model


# What is planned for.


def read_config(name: str) -> Config:
  """The sizes of a model: no weight is read, and none is fetched.

  Args:
    name: a published architecture, a path, or a hub id.
  """
  path = pathlib.Path(name).expanduser()
  if name in architectures.names() and not path.exists():
    return architectures.sizes(name)
  from jaxspec.checkpoint import hf, open_checkpoint  # pulls in file formats
  if (path / "config.json").is_file():
    return families.config(hf.read_json(path / "config.json"))
  if path.exists():
    with open_checkpoint(name) as opened:
      return opened.config
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    raise InputError(
        f"no model {name!r} is found; pass a folder, a hub id such as "
        f"org/name, or one of {', '.join(architectures.names())}."
        + nearest(name, architectures.names()))
  import huggingface_hub  # Loaded when the network is asked for.
  try:
    file = huggingface_hub.hf_hub_download(name, "config.json")
  except Exception as e:  # Many kinds: HTTP, offline, gated, disk.
    reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
    raise InputError(
        f"the config of {name!r} cannot be fetched from the hub "
        f"({reason.rstrip('.')}); check the id and the network, or pass a "
        "folder") from e
  return families.config(hf.read_json(pathlib.Path(file)))


@functools.cache
def devices(topology: str) -> tuple[Any, ...]:
  """The devices of a topology, none of which need be there.

  Args:
    topology: `v5e:4x4`, `v6e:2x4`, `v5p:2x2x1` or `tpu7x:2x2x1` and others
      that libtpu knows; `h100:8` or `h200:1`; `cpu:8`, of this process.

  Raises:
    InputError: there is no such topology, or no compiler for it.
  """
  kind, _, shape = topology.partition(":")
  if kind == "cpu":
    found = jax.devices("cpu")
    count = _positive(shape, topology)
    if count > len(found):
      raise InputError(f"topology {topology}: this process has {len(found)} "
                       "CPU devices; ask for as many, or set "
                       f"XLA_FLAGS=--xla_force_host_platform_device_count="
                       f"{count}")
    return tuple(found[:count])
  from jax.experimental import topologies
  if kind in _GPUS:
    return tuple(_gpus(topologies, kind, _positive(shape, topology)))
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(f"topology {topology} needs the compiler for TPUs; pip "
                     "install jax[tpu]")
  libtpu.set_flags()
  more: dict[str, Any] = {}
  if kind == "v4":                 # one device a chip
    more["chip_config_name"] = "megacore"
  if set(shape.split("x")) == {"1"}:
    more["chips_per_host_bounds"] = (1, 1, 1)
  try:
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **more)
  except Exception as e:  # Whatever libtpu thinks of the name.
    raise InputError(
        f"topology {topology!r} is unknown to libtpu ({_first_line(e)}); use "
        "one such as v5e:4x4, v6e:2x4, v5p:2x2x1, h100:8 or cpu:8") from e
  return tuple(found.devices)


def _positive(text: str, topology: str) -> int:
  if not text.isdigit() or not int(text):
    raise InputError(f"topology {topology!r} must end in a number of devices, "
                     "as in h100:8")
  return int(text)


def _gpus(topologies: Any, kind: str, count: int) -> list[Any]:
  found = [name for name in ("xla_cuda13", "xla_cuda12")
           if _has(f"jax_plugins.{name}")]
  if not found:
    version = jax.__version__
    raise InputError(
        f"topology {kind}:{count} needs the compiler for GPUs; pip install "
        f"--no-deps jax-cuda13-pjrt=={version} jax-cuda13-plugin=={version}")
  name, bandwidth, memory = _GPUS[kind]
  target = f"""gpu_device_info {{ threads_per_block_limit: 1024
      threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: 233472 threads_per_core_limit: 2048
      core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {bandwidth} l2_cache_size: 52428800
      clock_rate_ghz: 1.98 device_memory_size: {memory}
      shared_memory_per_block_optin: 232448
      cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536
      registers_per_block_limit: 65536 }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
      runtime_version {{ major: 13 }} device_description_str: "{name}" """
  try:
    return list(topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{count}",
        target_config=target).devices)
  except Exception as e:  # The plugin's own words for what it lacks.
    raise InputError(f"topology {kind}:{count} cannot be made: "
                     f"{_first_line(e)}") from e


def _has(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


# Programs.


class Blueprint:
  """The programs of a `Generator`, of shapes alone.

  Attributes:
    model, drafter: their leaves are shapes, where they will lie.
    state: of all rows.
  """

  def __init__(self, setup: Setup, mesh: Mesh | None = None):
    """For a setup, or for its programs on another mesh."""
    self.setup, config = setup, setup.config
    if mesh is None:
      mesh = sharding.make_mesh(dict(setup.mesh), devices(setup.topology))
    self.mesh = mesh
    if mesh.shape.get("stage", 1) > 1:
      raise InputError("a plan for the mesh axis stage is not made; use tensor "
                       "or data")
    sharding.check(mesh, kv_heads=config.kv_heads, mlp=config.mlp,
                   **({"experts": config.experts} if config.experts else {}))
    if caches.parse(setup.cache)[0] is ContiguousCache:
      sharding.check(mesh, slots=setup.capacity)
    self.cache_dtype = caches.stored_in(mesh, setup.wide, setup.cache_dtype)
    self.verifier = verifiers.parse(setup.verifier)
    self._target = choose(setup.kernels, mesh)
    self.model = abstract(config, setup, mesh)
    self.drafter = self._make_drafter(setup.drafter)

  @functools.cached_property
  def state(self) -> DecodeState:
    setup = self.setup
    kind, options = caches.parse(setup.cache)

    def begin(model: Any, drafter: Any) -> DecodeState:
      cache = model.init_cache(kind, setup.rows, setup.capacity,
                               self.cache_dtype, **options)
      return loop.init(model, drafter, cache, capacity=setup.capacity,
                       stops=STOPS, biases=BIASES)

    with self.here():
      return placed(begin, self.model, self.drafter)

  def here(self) -> Any:
    """Within, programs are for the devices of this plan."""
    return on(self.mesh, self._target)

  def _make_drafter(self, text: str) -> Any:
    name, _, options = text.partition(":")
    if name == "layer_stream":
      raise InputError("a plan for drafter layer_stream is not made; use "
                       "another drafter")

    def load(path: str) -> tuple[Any, Any]:
      source = abstract_source(self.setup.wide, self.mesh)
      return Transformer(read_config(path), source), None

    target = drafters.Target(
        self.model, None, load, getattr(self.verifier, "honest", False),
        self.cache_dtype.name)
    if name not in _UNTRAINED or re.search(r"\bheads=", options):
      return drafters.parse(text, target)
    kind, settings = _UNTRAINED[name]
    said = dict(format=1, kind=kind, **settings(self.model.config))
    given = [option for option in options.split(",") if option]
    for option in list(given):
      key, _, value = option.partition("=")
      if key == "layer" and value.isdigit():
        said["layer"] = int(value)
        given.remove(option)
    with tempfile.TemporaryDirectory() as folder:
      (pathlib.Path(folder) / "config.json").write_text(json.dumps(said))
      given.append(f"heads={folder}")
      return drafters.parse(f"{name}:{','.join(given)}", target)

  @property
  def taps(self) -> tuple[int, ...]:
    return self.drafter.taps

  def lower(self, program: str) -> Any:
    """One program, ready to be compiled.

    Args:
      program: `decode`, the whole loop; `plain`, the same without drafts;
        `prefill`, of as many prompts as there are rows; `propose` and
        `verify`, the halves of a step that `stream` runs.
    """
    with self.here():
      return getattr(self, f"_{program}")()

  def _decode(self) -> Any:
    return loop.decode.lower(
        self.model, self.drafter, self.verifier, self.state,
        self.array((), jnp.int32), self.array((), bool))

  def _plain(self) -> Any:
    setup = dataclasses.replace(self.setup, drafter="autoregressive")
    return Blueprint(setup, self.mesh).lower("decode")

  def _prefill(self) -> Any:
    rows, bucket = self.setup.rows, self.setup.prompt
    if bucket > CHUNK:
      bucket = -(-bucket // CHUNK) * CHUNK
    return loop.prefill.lower(
        self.model, self.taps, self.array((rows, bucket), jnp.int32),
        self.array((rows,), jnp.int32), chunk=CHUNK, dtype=self.cache_dtype)

  def _propose(self) -> Any:
    return loop.propose.lower(self.model, self.drafter, self.state)

  def _verify(self) -> Any:
    proposal, _ = jax.eval_shape(loop.propose, self.model, self.drafter,
                                 self.state)
    return loop.settle.lower(
        self.model, self.drafter, self.verifier, self.state,
        jax.tree.map(lambda x: self.array(x.shape, x.dtype), proposal))

  def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
    """A small array, alike on all devices."""
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))


def stored_in(setup: Setup) -> str:
  """The type of keys and values of a setup."""
  mesh = sharding.make_mesh(dict(setup.mesh), devices(setup.topology))
  return caches.stored_in(mesh, setup.wide, setup.cache_dtype).name


def placed(make: Callable[..., Any], *given: Any) -> Any:
  """The shapes of what `make` gives, where a compiled program puts them."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      jax.eval_shape(make, *given),
      jax.jit(make).lower(*given).compile().output_shardings)


def size(tree: Any) -> int:
  """Bytes that arrays take on one device."""
  return sum(map(_bytes_on_a_device, jax.tree.leaves(tree)))


def _bytes_on_a_device(x: Any) -> int:
  if not hasattr(x, "shape"):
    return 4                     # a number
  shape = x.shape
  if isinstance(getattr(x, "sharding", None), NamedSharding):
    shape = x.sharding.shard_shape(shape)
  count = math.prod(shape)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return 8 * count
  return x.dtype.itemsize * count


# What became of them.


@dataclasses.dataclass
class Program:
  """A compiled program.

  Attributes:
    seconds: it took to compile.
    arguments, outputs, temporaries, code: bytes on each device; `outputs` are
      those that take no argument's place.
    costs: by named scope, of a step where it is a loop of steps.
    operations: what these are the sum of.
    refused: what the compiler said, where it does not fit.
  """

  name: str
  seconds: float = 0.0
  arguments: float = 0.0
  outputs: float = 0.0
  temporaries: float = 0.0
  code: float = 0.0
  costs: dict[str, hlo.Cost] = dataclasses.field(default_factory=dict)
  refused: str = ""
  compiled: Any = dataclasses.field(default=None, repr=False, compare=False)
  operations: list[hlo.Operation] = dataclasses.field(
      default_factory=list, repr=False, compare=False)

  @property
  def cost(self) -> hlo.Cost:
    return hlo.total(self.costs)


@dataclasses.dataclass
class Plan:
  """What a setup takes and gives; bytes are those of one device.

  Attributes:
    kind: of the devices.
    capacity: bytes that programs have on one, as its compiler says.
    weights, cache, draft, text: of the model, of keys and values, of the
      drafter and its state, and of all else that a batch keeps.
    fresh: keys and values of nodes in flight, which are among the temporaries.
    height: most tokens a step accepts.
    scaled: whether it was counted from a few layers.
  """

  setup: Setup
  kind: str
  capacity: float | None
  weights: float
  cache: float
  draft: float
  text: float
  fresh: float
  nodes: int
  height: int
  programs: dict[str, Program]
  scaled: bool = False

  @property
  def held(self) -> float:
    """What stays from program to program; a TPU pads some of it."""
    found = self.weights + self.cache + self.draft + self.text
    decode = self.programs.get("decode")
    return max(found, decode.arguments if decode else 0.0)

  @property
  def working(self) -> float:
    """What the program that takes most needs beside it."""
    return max((p.temporaries + p.outputs for p in self.programs.values()
                if not p.refused), default=0.0)

  @property
  def code(self) -> float:
    return sum(p.code for p in self.programs.values())

  @property
  def needs(self) -> float:
    return self.held + self.working + self.code

  @property
  def refused(self) -> str:
    """What the compiler said, if it said no."""
    return next((p.refused for p in self.programs.values() if p.refused), "")

  @property
  def fits(self) -> bool:
    return not self.refused and (
        self.capacity is None or self.needs <= self.capacity)

  @property
  def free(self) -> float:
    """Bytes left on a device; below 0 where it does not fit."""
    if self.capacity is None:
      return math.inf
    return self.capacity - self.needs

  # Time, where figures of the chip are known.

  @property
  def timed(self) -> bool:
    return (roofline.chip(self.kind) is not None
            and not self.refused and "decode" in self.programs)

  def step(self) -> roofline.Time:
    """One round of the decoding loop."""
    costs = self.programs["decode"].costs
    return roofline.together(costs, costs, self.kind)

  def head(self) -> roofline.Time:
    """What proposing takes of it, and learning from the verdict."""
    return roofline.together(self.programs["decode"].costs,
                             ("propose", "observe"), self.kind)

  def verification(self) -> roofline.Time:
    """One pass over all nodes, its verdict and what is committed."""
    return roofline.together(self.programs["decode"].costs,
                             ("", "score", "verify", "commit"), self.kind)

  def plain(self) -> roofline.Time:
    """One pass without drafts."""
    costs = self.programs.get("plain", self.programs["decode"]).costs
    return roofline.together(costs, costs, self.kind)

  def prefill(self) -> roofline.Time | None:
    program = self.programs.get("prefill")
    if program is None or program.refused:
      return None
    return roofline.together(program.costs, program.costs, self.kind)

  def tokens_per_pass(self, acceptance: Sequence[float]) -> float:
    """Tokens of a row that a step commits, its own among them.

    Args:
      acceptance: the share of passes that accept something at each depth; or
        one number, the rate at which a draft is accepted behind accepted ones.
    """
    if not self.height:
      return 1.0
    if len(acceptance) == 1:
      rate = acceptance[0]
      return 1 + sum(rate ** d for d in range(1, self.height + 1))
    return 1 + sum(acceptance[:self.height])

  def per_second(self, acceptance: Sequence[float]) -> float:
    """Tokens a second that a row is given at most."""
    return self.tokens_per_pass(acceptance) / self.step().seconds

  def as_dict(self, acceptance: Sequence[float] = ()) -> dict[str, Any]:
    """As JSON takes it."""
    setup = dataclasses.asdict(self.setup) | {"mesh": dict(self.setup.mesh)}
    setup["config"] = {
        k: v for k, v in setup["config"].items() if k not in (
            "ropes", "windows")}
    found: dict[str, Any] = dict(
        setup=setup, device_kind=self.kind, scaled=self.scaled, fits=self.fits,
        refused=self.refused, capacity_bytes=self.capacity,
        needs_bytes=self.needs,
        bytes=dict(weights=self.weights, cache=self.cache, draft=self.draft,
                   text=self.text, working=self.working, fresh=self.fresh,
                   code=self.code),
        nodes=self.nodes, programs={
            name: dict(
                compile_seconds=p.seconds, arguments=p.arguments,
                outputs=p.outputs, temporaries=p.temporaries, code=p.code,
                refused=p.refused, bytes=p.cost.bytes, flops=p.cost.flops,
                collectives={
                    kind: dict(times=times, bytes=size)
                    for kind, (times, size) in p.cost.exchanged().items()},
                scopes={scope or "other": dict(bytes=c.bytes, flops=c.flops)
                        for scope, c in p.costs.items()})
            for name, p in self.programs.items()})
    if self.timed:
      parts = dict(step=self.step(), plain=self.plain(), head=self.head(),
                   verification=self.verification(), prefill=self.prefill())
      found["roofline"] = {
          name: dict(seconds=t.seconds, limit=t.limit, memory=t.memory,
                     arithmetic=t.arithmetic, interconnect=t.interconnect)
          for name, t in parts.items() if t is not None}
      found["tokens_per_pass"] = self.tokens_per_pass(acceptance)
      found["tokens_per_second_per_row"] = self.per_second(acceptance)
    return found


def programs(setup: Setup) -> tuple[str, ...]:
  """The programs of a plan."""
  speculates = setup.drafter.partition(":")[0] != "autoregressive"
  return ("decode", "prefill") + (
      ("plain", "verify", "propose") if speculates else ())


def make(setup: Setup, names: Sequence[str] | None = None, *,
         workers: int = 1, scaled: bool = False) -> Plan:
  """Compiles the programs of a setup, and counts what they cost.

  Args:
    names: of the programs; None for all.
    workers: programs compiled at a time.
    scaled: counts from a few layers what all of them will cost. It takes
      seconds, and is right as far as one layer costs what another does.
  """
  if scaled:
    return _scaled(setup, names, workers)
  blueprint = Blueprint(setup)
  kind = blueprint.mesh.devices.flat[0].device_kind
  trips = _trips(setup, blueprint.drafter.height)
  # What is lowered is traced by Python, one after another.
  lowered = {name: blueprint.lower(name) for name in names or programs(setup)}
  with _compiler_settings(setup.topology), \
      concurrent.futures.ThreadPoolExecutor(workers) as pool:
    made = dict(zip(lowered, pool.map(
        lambda name: _compile(name, lowered[name], trips), lowered)))
    capacity = capacity_of(setup.topology)
  state = blueprint.state
  cache = size(state.seq.cache)
  draft = size(state.draft) + size(blueprint.drafter)
  with blueprint.here():
    fresh = jax.eval_shape(lambda: blueprint.model.init_fresh(
        state.seq.cache, blueprint.drafter.size))
  spread = {axis: blueprint.mesh.shape[axis] for axis in ("data", "tensor")}
  shards = math.prod(
      n for n, whole in ((spread["data"], setup.rows),
                         (spread["tensor"], setup.config.kv_heads))
      if whole % n == 0)
  return Plan(
      setup, kind, capacity, size(blueprint.model), cache, draft,
      size(state) - cache - size(state.draft), size(fresh) / shards,
      blueprint.drafter.size, blueprint.drafter.height, made)


def _trips(setup: Setup, height: int) -> Callable[[str], float]:
  """How often loops run that end when they are done."""
  def trips(name: str) -> float:
    if name.startswith("jit(prefill)"):
      return max(-(-setup.prompt // CHUNK), 1)
    # A verdict walks along the path that is accepted.
    return max(height, 1) if name.endswith("verify/while") else 1
  return trips


def _compile(name: str, lowered: Any, trips: Callable[[str], float]
             ) -> Program:
  start = time.perf_counter()
  try:
    compiled = _fit(lowered)
  except _TooLarge as e:
    return Program(name, time.perf_counter() - start, refused=str(e))
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  operations = hlo.operations(
      compiled.as_text(), scopes=SCOPES, trips=trips,
      step="jit(decode)/while" if name in ("decode", "plain") else None,
      # What only some requests ask for, sampling among it, is left out.
      dearest=lambda choice: "/verify/" not in choice)
  costs = hlo.by_scope(operations)
  for cost in costs.values():
    cost.collectives = _merged(cost.collectives)
  return Program(
      name, seconds, memory.argument_size_in_bytes,
      max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
      memory.temp_size_in_bytes, memory.generated_code_size_in_bytes, costs,
      compiled=compiled, operations=operations)


def _merged(found: Sequence[hlo.Collective]) -> list[hlo.Collective]:
  """Those that are alike, layer by layer, as one that happens more often."""
  times: dict[hlo.Collective, float] = {}
  for one in found:
    key = dataclasses.replace(one, times=0.0)
    times[key] = times.get(key, 0.0) + one.times
  return [dataclasses.replace(one, times=n) for one, n in times.items()]


class _TooLarge(Exception):
  """Memory is not enough; the message is the compiler's sentence."""


def _fit(lowered: Any) -> Any:
  """Compiles a program, if it fits."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise _TooLarge(_refusal(e)) from e


def _refusal(error: BaseException) -> str:
  """The sentence in which a compiler says that memory is not enough."""
  text = " ".join(str(error).split())
  found = re.search(r"(Ran out of memory.*?\))\.", text + ".")
  return found[1] if found else text[:300]


def capacity_of(topology: str) -> float | None:
  """Bytes that programs may use on a device, or None where nobody knows.

  A compiler for TPUs says it when it is asked for far too much. Of a GPU it is
  the share that jax takes (see `gpu_share`) of the smaller of two figures: the
  published size, and what the device says of itself.
  """
  share = gpu_share(topology)
  if share is not None:
    name, _, memory = _GPUS[topology.partition(":")[0]]
    known = roofline.chip(name)
    return share * min(memory, known.memory if known else memory)
  return _as_the_compiler_says(topology)


def gpu_share(topology: str) -> float | None:
  """The share of a GPU's memory that jax takes; None where it is no GPU.

  Raises:
    InputError: XLA_CLIENT_MEM_FRACTION is no share.
  """
  if topology.partition(":")[0] not in _GPUS:
    return None
  for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
    text = os.environ.get(name)
    if text:
      if not re.fullmatch(r"0?\.\d+|1(\.0*)?", text):
        raise InputError(f"{name}={text} is no share of a GPU's memory; set it "
                         "to a number such as .9, or leave it out")
      return float(text)
  return 0.75


@functools.cache
def _as_the_compiler_says(topology: str) -> float | None:
  device = devices(topology)[0]
  if device.platform != "tpu":
    return None
  mesh = Mesh(np.array([device]), ("one",))
  much = jax.ShapeDtypeStruct(
      (1 << 40,), jnp.int8, sharding=NamedSharding(mesh, PartitionSpec()))
  try:
    jax.jit(lambda x: x + 1).lower(much).compile()
  except jax.errors.JaxRuntimeError as e:
    found = re.search(r"available HBM \(([\d.]+)([KMGT])\)", str(e))
    if found:
      return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)
  return None


class _compiler_settings:
  """Programs for devices that are not there cannot be read back."""

  def __init__(self, *topologies: str, always: bool = False):
    """Args: always: nor can those that are written, once they were."""
    self._absent = always or not all(
        topology.startswith("cpu") for topology in topologies)

  def __enter__(self) -> None:
    self._cache = jax.config.jax_enable_compilation_cache
    if self._absent:
      jax.config.update("jax_enable_compilation_cache", False)

  def __exit__(self, *unused: object) -> None:
    jax.config.update("jax_enable_compilation_cache", self._cache)


# From a few layers to all of them.


def period(config: Config) -> int:
  """After how many layers they repeat themselves."""
  kinds = list(zip(config.windows, config.ropes))
  for length in range(1, config.depth + 1):
    if all(kinds[i] == kinds[i % length] for i in range(config.depth)):
      return length
  return config.depth


def shallow(config: Config, depth: int) -> Config:
  """The same model with fewer layers."""
  return dataclasses.replace(config, depth=depth, ropes=config.ropes[:depth],
                             windows=config.windows[:depth])


def _scaled(setup: Setup, names: Sequence[str] | None, workers: int) -> Plan:
  config = setup.config
  # What surrounds layers is fused with the first and the last of them, and of
  # very few all are kept in fast memory.
  few, more = 2 * period(config), 3 * period(config)
  probe = Blueprint(dataclasses.replace(setup, rows=max(
      dict(setup.mesh).get("data", 1), 1), capacity=setup.capacity))
  taps = [tap for tap in probe.taps if tap < config.depth]
  if more >= config.depth or taps:
    return make(setup, names, workers=workers)
  low, high = (make(dataclasses.replace(setup, config=shallow(config, depth)),
                    names, workers=workers) for depth in (few, more))
  if low.refused or high.refused:      # already too much
    return dataclasses.replace(high, setup=setup, scaled=True)

  def line(a: float, b: float) -> float:
    return a + (b - a) * (config.depth - few) / (more - few)

  def size(a: float, b: float) -> float:
    # What a few layers more make smaller does not shrink on, below nothing.
    return line(a, b) if b >= a else b

  def program(a: Program, b: Program) -> Program:
    return Program(
        a.name, a.seconds + b.seconds,
        **{f: size(getattr(a, f), getattr(b, f)) for f in (
            "arguments", "outputs", "temporaries", "code")},
        costs={scope: _line_of_costs(
            a.costs.get(scope, hlo.Cost()), b.costs.get(scope, hlo.Cost()),
            line) for scope in {**a.costs, **b.costs}})

  sizes = {f: line(getattr(low, f), getattr(high, f)) for f in (
      "weights", "cache", "draft", "text", "fresh")}
  return dataclasses.replace(
      high, setup=setup, scaled=True, **sizes, programs={
          name: program(low.programs[name], high.programs[name])
          for name in high.programs})


def _line_of_costs(a: hlo.Cost, b: hlo.Cost,
                   line: Callable[[float, float], float]) -> hlo.Cost:
  def count(found: hlo.Cost) -> dict[Any, float]:
    return {dataclasses.replace(c, times=0.0): c.times
            for c in _merged(found.collectives)}
  few, more = count(a), count(b)
  return hlo.Cost(
      max(line(a.bytes, b.bytes), 0.0),
      {kind: max(line(a.flops.get(kind, 0.0), b.flops.get(kind, 0.0)), 0.0)
       for kind in {**a.flops, **b.flops}},
      [dataclasses.replace(c, times=max(line(few.get(c, 0), more.get(c, 0)), 0))
       for c in {**few, **more}],
      b.uncounted)


# Programs for later.


def keep(setup: Setup, folder: str | pathlib.Path, *, workers: int = 1
         ) -> dict[str, float]:
  """Compiles the programs of a `Generator` and writes them for it.

  Prompts of one bucket, the one that holds `setup.prompt`, are provided for:
  one of them, and as many as there are rows.

  Returns:
    The seconds that each took to compile.

  Raises:
    InputError: the compiler refuses one.
  """
  if setup.dtype == "int8":
    raise InputError("programs of a model in eight bits are not kept, for "
                     "decode loads none; leave out --save, or --dtype")
  hosts = {device.process_index for device in devices(setup.topology)}
  if len(hosts) > 1:
    raise InputError(
        f"programs for {setup.topology} are not kept: its {len(hosts)} hosts "
        "decode together, and decode --executables loads programs of one "
        "process alone; leave out --save, and give decode "
        "--compilation_cache_dir=FOLDER, so that a second start is warm")
  blueprint = Blueprint(setup)
  model, drafter, state = blueprint.model, blueprint.drafter, blueprint.state
  mesh, rows = blueprint.mesh, setup.rows
  bucket = next(b for b in buckets(setup.capacity) if b >= setup.prompt)
  known = executables.identity(
      setup.config, mesh, drafter=setup.drafter, cache=setup.cache,
      kernels=setup.kernels, verifier=getattr(
          blueprint.verifier, "label", getattr(
              blueprint.verifier, "__name__", type(blueprint.verifier).__name__
          )), rows=rows, capacity=setup.capacity,
      cache_dtype=blueprint.cache_dtype.name, dtype=setup.dtype,
      tree=executables.outline(drafter))
  made: dict[str, Any] = {}
  seconds: dict[str, float] = {}

  def build(items: dict[str, tuple[Any, tuple[Any, ...]]]) -> list[Any]:
    """Compiles what is lowered; its key is that of its arguments."""
    def one(item: tuple[str, tuple[Any, tuple[Any, ...]]]) -> Any:
      name, (lowered, arguments) = item
      start = time.perf_counter()
      try:
        compiled = _fit(lowered)
      except _TooLarge as e:
        raise InputError(f"{name} does not fit {setup.topology}: {e}; plan "
                         "without --save says what would") from e
      made[executables.key(name.split()[0], arguments)] = compiled
      seconds[name] = time.perf_counter() - start
      return compiled
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
      return list(pool.map(one, items.items()))

  array, sizes = blueprint.array, sorted({1, rows})
  with _compiler_settings(setup.topology, always=True), blueprint.here():
    prompts = {n: (model, array((n, bucket), jnp.int32),
                   array((n,), jnp.int32)) for n in sizes}
    loops = (model, drafter, state, array((), jnp.int32), array((), bool))
    free = state, array((rows,), bool)
    first: dict[str, tuple[Any, tuple[Any, ...]]] = {
        f"prefill of {n}": (loop.prefill.lower(
            args[0], blueprint.taps, *args[1:], chunk=CHUNK,
            dtype=blueprint.cache_dtype), args)
        for n, args in prompts.items()}
    first["decode"] = (loop.decode.lower(
        model, drafter, blueprint.verifier, *loops[2:]), loops)
    first["release"] = loop.release.lower(*free), free
    done = build(first)
    second: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for (n, args), compiled in zip(prompts.items(), done):
      prefix = jax.tree.map(
          lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
          loop.prefill.eval_shape(
              args[0], blueprint.taps, *args[1:], chunk=CHUNK,
              dtype=blueprint.cache_dtype), compiled.output_shardings)
      # Of shapes alone: nothing can run on devices that are not there.
      request = jax.tree.map(
          lambda x: array(x.shape, x.dtype), jax.eval_shape(
              functools.partial(
                  as_request, [Options()] * n, [1] * n, (),
                  vocab=setup.config.vocab, stops=STOPS, biases=BIASES)))
      given = (model, drafter, state, array((n,), jnp.int32), prefix, request)
      second[f"insert of {n}"] = loop.insert.lower(
          model, drafter, blueprint.verifier, *given[2:]), given
    build(second)
  executables.save(folder, known, made)
  return seconds


# Which setup to take.

# Slices that can be had, from small to large.
_SLICES = {
    "v5e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "v6e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "v5p": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8",
    "tpu7x": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8",
    "h100": "1 2 4 8", "h200": "1 2 4 8",
}


def meshes(config: Config, count: int, rows: int, slots: int = 0
           ) -> list[tuple[tuple[str, int], ...]]:
  """All ways to spread a model over so many devices, each with a share.

  Most are spread over heads and experts first, for that takes least memory;
  where there are not enough heads, over slots last, for few rows.

  Args:
    slots: of a row, which must be divided where they are spread; 0 for any.
  """
  found = []
  heads = [n for n in range(count, 0, -1)
           if not (count % n or config.kv_heads % n or config.mlp % n)]
  for sequence in range(1, count + 1):
    for tensor in heads if sequence == 1 else heads[:1]:
      if (count % (tensor * sequence) or config.mlp % (tensor * sequence)
          or slots % sequence):
        continue
      rest = count // (tensor * sequence)
      for expert in range(rest, 0, -1):
        if rest % expert or (expert > 1 and (
            not config.experts or config.experts % expert)):
          continue
        data = rest // expert
        if rows % data == 0:
          sizes = (("data", data), ("expert", expert), ("tensor", tensor),
                   ("sequence", sequence))
          found.append(tuple((a, n) for a, n in sizes if n > 1)
                       or (("tensor", 1),))
  return found


def default_mesh(config: Config, topology: str, rows: int, slots: int = 0
                 ) -> tuple[tuple[str, int], ...]:
  """The first of `meshes` over all devices: that which takes least memory,
  but for slots, which are spread where nothing else can be.

  Raises:
    InputError: there is none.
  """
  count = len(devices(topology))
  found = meshes(config, count, rows, slots)
  if not found:
    raise InputError(
        f"no mesh spreads {config.kv_heads} key/value heads and {rows} rows "
        f"over the {count} devices of {topology}; name one with --mesh, or "
        f"ask for {count} rows")
  return found[0]


def estimate(setup: Setup) -> float:
  """Bytes of weights and cache on a device, counted by hand."""
  config, sizes = setup.config, dict(setup.mesh)
  mesh = jax.sharding.AbstractMesh(
      tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES),
      sharding.MESH_AXES)
  # All layers are alike, and tracing many takes seconds.
  one, two = (_weights(shallow(config, depth), setup.wide.name, setup.dtype,
                       mesh) for depth in (1, 2))
  weights = one + (config.depth - 1) * (two - one)
  rows = setup.rows // sizes.get("data", 1)
  heads = config.kv_heads // sizes.get("tensor", 1)
  split = (sizes.get("sequence", 1)
           if setup.cache.startswith("contiguous") else 1)
  slots = sum(min(window or setup.capacity, setup.capacity)
              if setup.cache.startswith("window") else setup.capacity
              for window in config.windows)
  width = jnp.dtype(setup.cache_dtype or setup.wide).itemsize
  return (weights
          + 2.0 * rows * heads * config.head_size * slots // split * width)


@functools.cache
def _weights(config: Config, wide: str, dtype: str, mesh: Any) -> int:
  setup = Setup(config, "", dtype=dtype if dtype == "int8" else wide)
  return sum(map(_bytes_on_a_device,
                 jax.tree.leaves(abstract(config, setup, mesh))))


def changes(setup: Setup) -> list[tuple[str, Setup]]:
  """What might make a setup fit, the gentlest first, and in what words."""
  found: list[tuple[str, Setup]] = []

  def change(words: str, **fields: Any) -> None:
    found.append((words, dataclasses.replace(setup, **fields)))

  config = setup.config
  if setup.dtype == "float32":
    change("--dtype=bfloat16", dtype="bfloat16")
  for mesh in meshes(config, len(devices(setup.topology)), setup.rows,
                     setup.capacity):
    if mesh != setup.mesh:
      change("--mesh=" + ",".join(f"{a}={n}" for a, n in mesh), mesh=mesh)
  capacity = setup.capacity // 2
  while capacity >= 256:
    change(f"--capacity={capacity}", capacity=capacity,
           prompt=min(setup.prompt, capacity // 2))
    capacity //= 2
  rows = setup.rows // 2
  while rows and rows % dict(setup.mesh).get("data", 1) == 0:
    change(f"--rows={rows}", rows=rows)
    rows //= 2
  if setup.dtype != "int8":
    change("--dtype=int8", dtype="int8")     # another law, though near it
  kind, _, shape = setup.topology.partition(":")
  slices = _SLICES.get(kind, "").split()
  larger = slices[slices.index(shape) + 1:] if shape in slices else []
  for other, shapes in [(kind, larger)] + [
      (k, s.split()) for k, s in _SLICES.items()
      if k not in (kind, "h100", "h200")]:
    for shape in shapes:
      topology = f"{other}:{shape}"
      for mesh in meshes(config, math.prod(map(int, shape.split("x"))) * (
          2 if other == "tpu7x" else 1), setup.rows, setup.capacity)[:1]:
        change(f"--topology={topology} --mesh="
               + ",".join(f"{a}={n}" for a, n in mesh),
               topology=topology, mesh=mesh)
  return found


def remedies(setup: Setup, count: int = 3, **how: Any
             ) -> list[tuple[str, Plan]]:
  """Changes that make a setup fit, each compiled and so proven.

  Args:
    count: so many at most, each of another sort.
    how: see `make`.
  """
  found: list[tuple[str, Plan]] = []
  sorts: set[str] = set()
  for words, changed in changes(setup):
    sort = words.partition("=")[0] + changed.topology.partition(":")[0]
    if sort in sorts:
      continue
    room = capacity_of(changed.topology)
    # What is tight by hand is too much with what programs need beside it.
    if room is None or 1.02 * estimate(changed) > room:
      continue
    try:
      plan = make(changed, **how)
    except InputError:     # such as a mesh that heads do not go over
      continue
    if plan.fits:
      sorts.add(sort)
      found.append((words, plan))
    if len(found) == count:
      break
  return found


def sweep(setup: Setup, topologies: Sequence[str], *, workers: int = 1,
          scaled: bool = False,
          on_plan: Callable[[Plan], None] = lambda plan: None,
          on_drop: Callable[[Setup, str], None] = lambda setup, why: None
          ) -> list[Plan]:
  """The decoding loop of a setup on all meshes of some topologies.

  Where that fits, the program that reads prompts is compiled too, for it may
  take more.

  Args:
    workers: setups at a time.
    scaled: see `make`.
    on_plan: called with each plan as soon as it is there.
    on_drop: called with what is not planned, and why.
  """
  some: list[Setup] = []
  for topology in topologies:
    room = capacity_of(topology)
    count = len(devices(topology))
    found = meshes(setup.config, count, setup.rows, setup.capacity)
    if not found:
      on_drop(dataclasses.replace(setup, topology=topology), (
          f"no mesh spreads {setup.config.kv_heads} key/value heads and "
          f"{setup.rows} rows over {count} devices"))
    for mesh in found:
      one = dataclasses.replace(setup, topology=topology, mesh=mesh)
      held = estimate(one)
      if room is not None and held > room:
        on_drop(one, f"weights and cache alone are {held / _GIB:.2f} GiB of "
                f"{room / _GIB:.2f}")
      else:
        some.append(one)

  def plan(one: Setup) -> Plan | InputError:
    try:
      made = make(one, ("decode",), scaled=scaled)
      if made.fits:
        more = make(one, ("prefill",), scaled=scaled)
        made = dataclasses.replace(
            made, programs={**made.programs, **more.programs})
      return made
    except InputError as e:
      return e

  plans = []
  # Around all of them: each would undo what another has set.
  with _compiler_settings(*topologies), \
      concurrent.futures.ThreadPoolExecutor(workers) as pool:
    waiting = {pool.submit(plan, one): one for one in some}
    try:
      for done in concurrent.futures.as_completed(waiting):
        made = done.result()
        if isinstance(made, Plan):
          plans.append(made)
          on_plan(made)
        else:
          on_drop(waiting[done], str(made))
    finally:
      pool.shutdown(cancel_futures=True)
  order = {one: at for at, one in enumerate(some)}
  return sorted(plans, key=lambda plan: order[plan.setup])


__all__ = ["Blueprint", "Plan", "Program", "Setup", "devices", "keep",
           "make", "placed", "programs", "read_config", "size"]
