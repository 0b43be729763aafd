# SPDX-License-Identifier: Apache-2.0
"""Kernels on the card that is here: right, and how near to the floor?

  python -m experiments.kernels_gpu            # on a GPU; a TPU will do
  python -m experiments.kernels_gpu --dry_run  # anywhere, on little of it

- `ops`: every case of every op: its results beside those of XLA's
  implementation, its time beside XLA's and beside the least time that the
  card's published bandwidth and rate allow.
- `attention`: one layer of Llama-3-8B, 1 to 64 nodes behind 4032 tokens, beside
  `jax.nn.dot_product_attention` and, where they can be had, cuDNN, jax's own
  decoding kernel and tokamax.
- `model`: Llama-3-8B with random weights made on the card: plain decoding at
  one row, as a share of bandwidth, and a pass of N nodes beside one of 1.

What fails is written down with its reason, and the rest goes on.
"""

import dataclasses
import functools
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import machine
from jaxspec.caches import Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.generator import Generator
from jaxspec.models.layers import Rope
from jaxspec.models.transformer import Config, Transformer
from jaxspec.options import Options
from pallas_kernels import floors, pack, timing, tree_attention
from pallas_kernels.case import Case, collect
from pallas_kernels.target import CHIPS, Chip, Target, aim, of

FLAGS = flags.FLAGS
PARTS = ("ops", "attention", "model")
NODES = (1, 2, 4, 8, 16, 32, 64)
# Of the largest value; half precision has 8 bits.
TOLERANCE = 0.02


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_boolean("dry_run", False, "small shapes, kernels interpreted")
  flags.DEFINE_list("parts", list(PARTS), "what is measured")
  flags.DEFINE_list("op", [], "ops by name; all, if none is named")
  flags.DEFINE_integer("repeats", 7, "measurements, of which the median counts")
  flags.DEFINE_string("output", "experiments/results/kernels_gpu.json",
                      "where the result goes")


@dataclasses.dataclass(frozen=True)
class Card:
  """What is measured on, and how carefully.

  Attributes:
    target: what kernels are told.
    chip: its published figures.
    clock: `pallas_kernels.timing.measure` with its settings.
  """

  target: Target
  chip: Chip
  clock: Callable[..., float]

  @classmethod
  def here(cls, repeats: int) -> "Card":
    """The first device of this machine."""
    target = of(jax.devices()[0])
    chip = next((chip for kind, chip in CHIPS.items()
                 if target.kind.startswith(kind)), None)
    if chip is None:
      raise SystemExit(
          f"nothing is known of {target.kind!r}; enter its figures in "
          "pallas_kernels/target.py, or use --dry_run")
    return cls(target, chip, functools.partial(timing.measure, repeats=repeats))

  @classmethod
  def dry(cls) -> "Card":
    """A TPU that is interpreted: times mean nothing."""
    kind = "TPU v5 lite"
    return cls(Target("tpu", kind, interpret=True), CHIPS[kind],
               functools.partial(timing.measure, repeats=1, seconds=0.0))


# Ops.


def measure_op(case: Case, card: Card) -> dict[str, Any]:
  """One case: what the kernel gives, and what it takes."""
  least = floors.floor(case, card.target.kind, card.chip)
  found: dict[str, Any] = {
      "op": case.op, "case": case.name, "implementation": card.target.platform,
      "floor_seconds": least.seconds, "bound": least.bound}
  kernel = functools.partial(case.call, implementation=card.target.platform)
  reference = functools.partial(case.call, implementation="xla")
  with aim(card.target):
    try:
      jax.eval_shape(kernel, *case.arguments)
    except NotImplementedError as e:
      return {**found, "refuses": str(e)}
    arrays = case.sample(0)
    theirs = jax.jit(reference)(*arrays)
    found |= compare(jax.jit(kernel)(*arrays), theirs)
    del theirs
    found["seconds"] = card.clock(kernel, arrays, case.donated)
    found["xla_seconds"] = card.clock(reference, arrays, case.donated)
  found["share_of_floor"] = least.seconds / found["seconds"]
  found["times_xla"] = found["xla_seconds"] / found["seconds"]
  return found


def compare(ours: Any, theirs: Any) -> dict[str, Any]:
  """How far results are apart.

  Returns:
    `error`, the largest difference of floats as a share of the largest value;
    `equal`, the share of integers that are the same; `right`, whether both are
    as they should be.
  """
  error, same, count = 0.0, 0, 0
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    if not jnp.issubdtype(b.dtype, jnp.floating):
      same, count = same + int(jnp.sum(a == b)), count + b.size
      continue
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    finite = jnp.isfinite(b)
    if not bool(jnp.array_equal(finite, jnp.isfinite(a))):
      error = math.inf
      continue
    off = jnp.max(jnp.abs(jnp.where(finite, a - b, 0.0)), initial=0.0)
    most = jnp.max(jnp.abs(jnp.where(finite, b, 0.0)), initial=1e-30)
    error = max(error, float(off / most))
  equal = same / count if count else 1.0
  return {"error": error, "equal": equal,
          "right": error <= TOLERANCE and equal >= 0.99}


def measure_ops(cases: Sequence[Case], card: Card) -> list[dict[str, Any]]:
  """All cases, one after another."""
  return [_careful({"op": case.op, "case": case.name},
                   functools.partial(measure_op, case, card))
          for case in cases]


def smallest(cases: Sequence[Case]) -> list[Case]:
  """Of each op the case that moves least."""
  found: dict[str, Case] = {}
  for case in cases:
    if case.op not in found or case.least_bytes < found[case.op].least_bytes:
      found[case.op] = case
  return list(found.values())


# Attention.


@dataclasses.dataclass(frozen=True)
class Layer:
  """Attention of one layer; by default Llama-3-8B's."""

  rows: int = 1
  heads: int = 32
  kv_heads: int = 8
  size: int = 128
  held: int = 4032               # with 64 nodes, a size that others like
  dtype: Any = jnp.bfloat16


def measure_attention(layer: Layer, nodes: int, card: Card
                      ) -> list[dict[str, Any]]:
  """Ours and others that attend from `nodes` to a prefix and each other."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32), layer.dtype)

  rows, held, scale = layer.rows, layer.held, layer.size ** -0.5
  query = draw(rows, nodes, layer.heads, layer.size)
  key, value = (draw(rows, layer.kv_heads, held, layer.size) for _ in range(2))
  fresh = [draw(rows, nodes, layer.kv_heads, layer.size) for _ in range(2)]
  slots = jnp.tile(jnp.arange(held)[None], (rows, 1))
  positions = jnp.tile(held + jnp.arange(nodes)[None], (rows, 1))
  seen = pack(np.tri(nodes, dtype=bool))

  def ours(query, key, value, fresh_key, fresh_value, *,
           implementation=card.target.platform):
    return tree_attention(
        query, key, value, fresh_key, fresh_value, slot_positions=slots,
        positions=positions, fresh_positions=positions, seen=seen, scale=scale,
        implementation=implementation)

  arrays = (query, key, value, *fresh)
  # Others want slots before heads, and one array of keys; given, not timed.
  whole = tuple(jnp.concatenate([jnp.swapaxes(old, 1, 2), new], axis=1)
                for old, new in zip((key, value), fresh))
  mask = jnp.tile(jnp.concatenate(
      [jnp.ones((nodes, held), bool), jnp.tri(nodes, dtype=bool)],
      axis=1)[None, None], (rows, 1, 1, 1))

  def jaxs(implementation):
    return lambda query, key, value: jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale,
        implementation=implementation)

  def decoding(query, key, value):
    from jax.experimental.pallas.ops.gpu import decode_attention
    if nodes > 1:
      raise NotImplementedError("it takes one token")
    spare = -key.shape[1] % 2048     # it splits keys into 16 parts of blocks
    key, value = (jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0)))
                  for x in (key, value))
    return decode_attention.gqa(
        query[:, 0], key, value, sm_scale=scale,
        kv_seq_len=jnp.full((rows,), held + nodes, jnp.int32))[:, None]

  def tokamaxs(query, key, value):
    import tokamax
    return tokamax.dot_product_attention(query, key, value, mask=mask,
                                         scale=scale)

  reference = None
  runs = []
  for name, call, given in (
      ("ours, xla", functools.partial(ours, implementation="xla"), arrays),
      ("ours", ours, arrays),
      ("jax.nn, xla", jaxs("xla"), (query, *whole)),
      ("jax.nn, cudnn", jaxs("cudnn"), (query, *whole)),
      ("jax decode_attention", decoding, (query, *whole)),
      ("tokamax", tokamaxs, (query, *whole))):
    def run(call=call, given=given):
      nonlocal reference
      with aim(card.target):
        result = jax.jit(call)(*given)
        reference = result if reference is None else reference
        return {**compare(result, reference),
                "seconds": card.clock(call, given)}
    runs.append(_careful({"nodes": nodes, "held": held, "name": name}, run))
  moved = layer.rows * 2 * held * layer.kv_heads * layer.size * 2
  for one in runs:
    if "seconds" in one:
      one["share_of_bandwidth"] = moved / card.chip.bandwidth / one["seconds"]
  return runs


# The model.


def llama_3_8b() -> Config:
  """Its sizes."""
  return Config(
      family="llama", vocab=128256, width=4096, depth=32, heads=32, kv_heads=8,
      head_size=128, mlp=14336, ropes=(Rope(5e5),) * 32, windows=(None,) * 32,
      context=8192)


def tiny() -> Config:
  """A model for a dry run."""
  return Config(
      family="llama", vocab=256, width=64, depth=2, heads=4, kv_heads=2,
      head_size=16, mlp=128, ropes=(Rope(1e4),) * 2, windows=(None,) * 2,
      context=512)


def device_source(dtype: Any) -> Callable[..., Any]:
  """Random weights, made where they stay."""
  @functools.partial(jax.jit, static_argnums=(1, 2))
  def normal(key, shape, dtype):
    return (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(dtype)

  def source(path, shape, axes, wanted=None):
    del axes
    if path.endswith("norm"):
      return jnp.ones(shape, wanted or dtype)
    return normal(jax.random.key(zlib.crc32(path.encode())), shape,
                  jnp.dtype(wanted or dtype))
  return source


def pass_bytes(model: Transformer, held: int) -> int:
  """What one pass reads: weights once, and the keys and values held.

  Of the embedding it reads a row a token, unless it is the unembedding too.
  """
  c = model.config
  weights = sum(x.nbytes for x in jax.tree.leaves(model))
  if not c.tied:
    weights -= model.embedding[...].nbytes
  itemsize = model.embedding[...].dtype.itemsize
  return weights + 2 * c.depth * held * c.kv_heads * c.head_size * itemsize


def measure_decode(model: Transformer, card: Card, target: Target, *,
                   prompt: int, tokens: int) -> dict[str, Any]:
  """Plain decoding of one row, without the prompt: two lengths are told apart.
  """
  short, long = tokens // 4, tokens
  capacity = prompt + long
  with aim(target):
    generator = Generator(model, rows=1, capacity=capacity)
    ids = [np.random.default_rng(0).integers(
        0, model.config.vocab, prompt).tolist()]

    def clock(count):
      start = time.perf_counter()
      generator.generate(ids, Options(max_new_tokens=count, ignore_eos=True))
      return time.perf_counter() - start

    clock(short)                                     # compiles
    each = max(1e-9, float(np.median(
        [clock(long) - clock(short) for _ in range(3)])) / (long - short))
  moved = pass_bytes(model, prompt + (short + long) // 2)
  return {"prompt": prompt, "tokens": tokens, "seconds_per_token": each,
          "pass_bytes": moved,
          "share_of_bandwidth": moved / card.chip.bandwidth / each}


def measure_passes(model: Transformer, card: Card, target: Target, *,
                   held: int, nodes: Sequence[int]) -> list[dict[str, Any]]:
  """A pass of N nodes, a chain, behind `held` tokens."""
  dtype = model.embedding[...].dtype
  cache = model.init_cache(ContiguousCache, 1, held + max(nodes), dtype)
  cache = cache.replace(length=jnp.full((1,), held, jnp.int32))

  def score(tokens, cache, model):
    count = tokens.shape[1]
    at = Place.of(held + jnp.arange(count)[None], jnp.tri(count, dtype=bool))
    x, _ = model.extend(model.embed(tokens), cache,
                        model.init_fresh(cache, count), at,
                        layers=range(model.depth))
    return model.unembed(x)

  runs = []
  for count in nodes:
    tokens = jnp.arange(count, dtype=jnp.int32)[None] % model.config.vocab

    def run(tokens=tokens):
      with aim(target):
        return {"seconds": card.clock(score, (tokens, cache, model))}
    runs.append(_careful({"nodes": count, "held": held}, run))
  one = runs[0].get("seconds", math.nan)
  for each in runs:
    if "seconds" in each:
      each["times_one_node"] = each["seconds"] / one
      each["share_of_bandwidth"] = pass_bytes(
          model, held) / card.chip.bandwidth / each["seconds"]
  return runs


def measure_model(config: Config, dtype: Any, card: Card,
                  targets: dict[str, Target], *, held: int, tokens: int,
                  nodes: Sequence[int]) -> dict[str, Any]:
  """Decoding and verification, for each of some targets."""
  found: dict[str, Any] = {}
  model = Transformer(config, device_source(dtype))
  for name, one in targets.items():
    found[name] = {
        "decode": _careful({}, functools.partial(
            measure_decode, model, card, one, prompt=held, tokens=tokens)),
        "passes": measure_passes(model, card, one, held=held, nodes=nodes)}
  return found


# What is shown.


def table(results: dict[str, Any]) -> str:
  """In Markdown."""
  lines = []
  if "ops" in results:
    lines += ["| op | case | right | error | us | XLA us | of the floor |",
              "|---|---|---|--:|--:|--:|--:|"]
    for r in results["ops"]:
      said = r.get("refuses") or r.get("failed")
      cells = ([said, "", "", "", ""] if said else [
          "yes" if r["right"] else "NO", f"{r['error']:.1e}",
          f"{1e6 * r['seconds']:.1f}", f"{1e6 * r['xla_seconds']:.1f}",
          f"{r['share_of_floor']:.0%}"])
      lines.append("| " + " | ".join([r["op"], r["case"], *cells]) + " |")
    lines.append("")
  if "attention" in results:
    lines += ["| nodes | attention | us | of bandwidth | error |",
              "|--:|---|--:|--:|--:|"]
    for r in results["attention"]:
      said = r.get("failed")
      lines.append(f"| {r['nodes']} | {r['name']} | " + (
          f"{said} | | |" if said else f"{1e6 * r['seconds']:.1f} | "
          f"{r['share_of_bandwidth']:.0%} | {r['error']:.1e} |"))
    lines.append("")
  for name, found in results.get("model", {}).items():
    decode = found["decode"]
    lines.append(f"{name}: " + (
        decode.get("failed") or
        f"{1e3 * decode['seconds_per_token']:.2f} ms a token, "
        f"{decode['share_of_bandwidth']:.0%} of bandwidth"))
    lines += [f"  a pass of {r['nodes']}: " + (
        r.get("failed") or f"{1e3 * r['seconds']:.2f} ms, "
        f"{r['times_one_node']:.3f} of one node") for r in found["passes"]]
  return "\n".join(lines)


def _careful(about: dict[str, Any], body: Callable[[], dict[str, Any]]
             ) -> dict[str, Any]:
  """What `body` finds; or why it fails, so that the rest goes on."""
  try:
    return {**about, **body()}
  except Exception as e:               # another's library may raise anything
    first = (str(e).strip().splitlines() or [""])[0]
    return {**about, "failed": f"{type(e).__name__}: {first}"[:300]}


def main(argv: Sequence[str]) -> None:
  """Measures, writes after each part, and prints."""
  del argv
  dry = FLAGS.dry_run
  card = Card.dry() if dry else Card.here(FLAGS.repeats)
  results: dict[str, Any] = {}
  device = jax.devices()[0]
  path = pathlib.Path(FLAGS.output)

  def save():
    machine.write(str(path), results, device=device.device_kind, dry_run=dry,
                  target=dataclasses.asdict(card.target)["kind"])

  if "ops" in FLAGS.parts:
    cases = collect(FLAGS.op)
    results["ops"] = measure_ops(smallest(cases) if dry else cases, card)
    save()
  if "attention" in FLAGS.parts:
    layer = (Layer(heads=4, kv_heads=2, held=256) if dry else Layer())
    results["attention"] = [
        run for nodes in ((1, 8) if dry else NODES)
        for run in measure_attention(layer, nodes, card)]
    save()
  if "model" in FLAGS.parts:
    targets = {"xla": dataclasses.replace(of(device), implementation="xla")}
    if dry:           # interpreted, a whole model would take too long
      config, dtype, sizes = tiny(), jnp.float32, dict(
          held=64, tokens=16, nodes=(1, 8))
    else:
      targets = {"kernels": card.target, **targets}
      config, dtype, sizes = llama_3_8b(), jnp.bfloat16, dict(
          held=1024, tokens=256, nodes=NODES)
    results["model"] = measure_model(config, dtype, card, targets, **sizes)
    save()
  print(table(results))
  print(path)


if __name__ == "__main__":
  define_flags()
  app.run(main)
