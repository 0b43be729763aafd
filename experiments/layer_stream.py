# SPDX-License-Identifier: Apache-2.0
"""What guesses that run ahead give a pipeline, and where tensors win anyway.

  python -m experiments.layer_stream --heads=FOLDER

On 2, 4 and 8 virtual devices prompts are decoded by `jaxspec.layer_stream`,
with guesses and without, which is plain pipelining, and by plain decoding,
whose text it must be. Counted are ticks a token, right guesses, and the stages'
work that was drained: these are exact, and the same on any machine. Seconds are
not measured, for the devices share the cores of one processor.

What a token would take on chips is modelled instead, of one row, where reading
memory is all the work: a stage takes its bytes over the bandwidth, and what
goes from chip to chip takes hops and bytes over a link. (That this is one
token's stream and what is said of it, `tests/jaxspec/test_memory.py` reads from
the program compiled for a TPU slice.) All models are kind to the others:

  layer stream        a tick is its slowest stage, a hop for the stream, and
                      half a ring for what was said; after a wrong guess as many
                      ticks as stages, each as long as its slowest busy stage
  plain pipelining    every stage in turn, and a hop each
  tensor parallelism  all bytes over all chips, and two sums a layer, each half
                      a ring long; whether the heads can be divided is not asked

With as many rows as stages plain pipelining keeps all stages busy without a
guess, row behind row: this is for few rows.
"""

import dataclasses
import json
import os
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments import machine

FLAGS = flags.FLAGS
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper and a storm.",
    "Translate into French: The old mill stands by the river.",
    "What is 17 times 24? Explain step by step.",
    "Write a Python function that reverses a list.",
    "Summarize: The council met on Monday to discuss the new bridge. After a "
    "long debate the members agreed to build it next year.",
    "Name three countries in South America and their capitals.",
    "How do I make a good cup of tea?")


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string("model", "smollm2-135m", "what is decoded with")
  flags.DEFINE_multi_string(
      "heads", [], "a folder with a trained exit head; may be repeated")
  flags.DEFINE_multi_integer(
      "layer", [], "where a plain exit is; may be repeated. By default, and "
      "without --heads, a third of the model")
  flags.DEFINE_list("stages", ["2", "4", "8"], "stages of the pipelines")
  flags.DEFINE_list("temperatures", ["0", "0.7"], "of sampling")
  flags.DEFINE_string("prompts", None, "a file with a prompt a line")
  flags.DEFINE_integer("count", 8, "prompts, decoded side by side")
  flags.DEFINE_integer("new_tokens", 48, "decoded at most")
  flags.DEFINE_string(
      "output", "experiments/results/layer_stream.json",
      "where the result goes; the plot goes beside it")
  # Published for a TPU v5e: 819 GB/s, and 45 GB/s a link in each direction. A
  # hop of 1 us is a usual rule of thumb there; between machines it is tens.
  flags.DEFINE_float("bandwidth", 819e9,
                     "of a chip's memory, in bytes a second")
  flags.DEFINE_float("link", 45e9, "of a link, in bytes a second")
  flags.DEFINE_float("hop", 1e-6, "seconds from a chip to the next")
  flags.DEFINE_integer("context", 1024, "positions a token reads, in the model")


# What is counted.


def read_prompts(tokenizer: Any) -> list[list[int]]:
  """Prompts as chats."""
  texts = list(PROMPTS)
  if FLAGS.prompts:
    texts = pathlib.Path(FLAGS.prompts).read_text().splitlines()
  return [tokenizer.encode(tokenizer.render(
      [{"role": "user", "content": text}]), special=False)
          for text in texts[:FLAGS.count]]


def decode(model: Any, prompts: Sequence[Sequence[int]], options: Any,
           eos: Sequence[int], stages: Any = None) -> Any:
  """The finished batch, decoded plainly or on stages.

  Args:
    stages: a `Pipeline`, a `LayerStream` and the mesh of both.
  """
  import jax
  import jax.numpy as jnp

  from jaxspec import layer_stream, loop, sharding
  from jaxspec.caches.contiguous import ContiguousCache
  from jaxspec.drafters.autoregressive import Autoregressive
  from jaxspec.options import as_request
  from jaxspec.verifiers.exact import exact
  engine, drafter, mesh = loop, Autoregressive(), sharding.make_mesh()
  if stages is not None:
    engine = layer_stream
    model, drafter, mesh = stages
  lengths = np.array([len(p) for p in prompts], np.int32)
  tokens = np.zeros((len(prompts), -(-lengths.max() // 32) * 32), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[:len(prompt)] = prompt
  capacity = int(tokens.shape[1]) + options[0].max_new_tokens
  dtype = jnp.dtype("float32")
  with jax.set_mesh(mesh):
    state = jax.jit(lambda model, drafter: loop.init(
        model, drafter,
        model.init_cache(ContiguousCache, len(prompts), capacity, dtype),
        capacity=capacity, stops=4, biases=1))(model, drafter)
    prefix = engine.prefill(model, drafter.taps, tokens, lengths, chunk=32,
                            dtype=dtype)
    request = as_request(options, lengths.tolist(), eos, vocab=model.vocab,
                         stops=4, biases=1)
    state = loop.insert(model, drafter, exact, state,
                        np.arange(len(prompts), dtype=np.int32), prefix,
                        request)
    return engine.decode(model, drafter, exact, state, np.int32(2**30),
                         np.bool_(True))


def answers(state: Any) -> list[list[int]]:
  tokens, start, end = map(np.asarray, (
      state.seq.tokens, state.seq.prompt_length, state.seq.length))
  return [row[a:b].tolist() for row, a, b in zip(tokens, start, end)]


def count(state: Any, stages: int) -> dict[str, Any]:
  """The account of a finished batch, over all rows; each runs as if alone."""
  flow, counters = state.draft, state.counters
  ticks, worked, wasted, settled, judged, right = (
      int(np.sum(x)) for x in (flow.ticks, flow.worked, flow.wasted,
                               counters.passes, counters.nodes,
                               counters.accepted))
  if ticks != right + stages * (settled - right):
    raise AssertionError("a tick is not accounted for")
  return {
      "settled": settled, "ticks": ticks, "guesses": judged, "right": right,
      "ticks_per_token": ticks / settled,
      "right_share": right / max(judged, 1),
      # Of all settled tokens, the first of an answer and the last included.
      "hits_per_token": right / settled,
      "wasted_share": wasted / max(worked, 1),
      "idle_share": 1 - worked / (ticks * stages)}


def measure(model: Any, heads: dict[str, Any], prompts: Sequence[Sequence[int]],
            *, stages: Sequence[int], temperatures: Sequence[float],
            new_tokens: int, eos: Sequence[int] = ()) -> list[dict[str, Any]]:
  """Counts every head on every number of stages, with guesses and without."""
  from jaxspec import sharding
  from jaxspec.layer_stream import LayerStream
  from jaxspec.options import Options
  from jaxspec.pipeline import Pipeline, divide
  options = {t: [Options(max_new_tokens=new_tokens, temperature=t, seed=s)
                 for s in range(len(prompts))] for t in temperatures}
  plain = {t: answers(decode(model, prompts, options[t], eos)) for t in options}
  runs = []
  for name, head in heads.items():
    for number in stages:
      if head.layer + number - 1 > model.depth:
        continue
      mesh = sharding.make_mesh({"stage": number})
      layers = divide(model.depth, number, head.layer)
      pipeline = Pipeline.of(model, layers, mesh)
      for guess in (False, True):
        stream = LayerStream.on(mesh, head, guess=guess)
        for t in options:
          state = decode(model, prompts, options[t], eos,
                         (pipeline, stream, mesh))
          said = answers(state)
          runs.append({
              "head": name, "stages": number, "layers": list(layers),
              "guess": guess, "temperature": t, **count(state, number),
              "texts": len(said),
              "texts_that_differ": sum(a != b for a, b in zip(said, plain[t]))})
          print(json.dumps(runs[-1]), flush=True)
  return runs


# What is modelled.


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Bytes that one token reads."""

  name: str
  depth: int
  width: int
  layer: float
  unembedding: float
  head: float

  @classmethod
  def of(cls, name: str, c: Any, context: int, head: float | None = None
         ) -> "Sizes":
    """Of a `Config`, in bfloat16, with a head as wide as the model.

    Args:
      head: bytes of another one, with its part of the unembedding.
    """
    keys = c.kv_heads * c.head_size
    layer = (c.width * (2 * c.heads * c.head_size + 2 * keys)
             + 3 * c.width * c.mlp * max(c.experts_per_token, 1)
             + 2 * keys * context)
    top = c.vocab * c.width
    own = 2 * (4 * c.width**2 + top)
    return cls(name, c.depth, c.width, 2 * layer, 2 * top, head or own)


# Llama 3.1 8B, of which no weight is here.
BIG = dict(depth=32, width=4096, heads=32, kv_heads=8, head_size=128,
           mlp=14336, vocab=128256, experts_per_token=0)


@dataclasses.dataclass(frozen=True)
class Chips:
  """What takes time, in bytes a second and seconds."""

  bandwidth: float
  link: float
  hop: float


def stage_times(sizes: Sizes, layers: Sequence[int], chips: Chips,
                guess: bool) -> list[float]:
  """Seconds that each stage works on a token."""
  work = [n * sizes.layer for n in layers]
  work[0] += sizes.head * guess
  work[-1] += sizes.unembedding
  return [w / chips.bandwidth for w in work]


def stream_time(sizes: Sizes, layers: Sequence[int], chips: Chips, hits: float
                ) -> float:
  """Seconds a token of the layer stream.

  Args:
    hits: right guesses a token.
  """
  times = stage_times(sizes, layers, chips, True)
  passing = (chips.hop * (1 + len(layers) / 2)
             + 2 * sizes.width / chips.link)
  slowest = np.maximum.accumulate(times)
  return float(hits * (slowest[-1] + passing)
               + (1 - hits) * (slowest.sum() + len(layers) * passing))


def pipeline_time(sizes: Sizes, layers: Sequence[int], chips: Chips) -> float:
  """Seconds a token of plain pipelining."""
  passing = chips.hop + 2 * sizes.width / chips.link
  return sum(stage_times(sizes, layers, chips, False)) + len(layers) * passing


def tensor_time(sizes: Sizes, count: int, chips: Chips) -> float:
  """Seconds a token of tensor parallelism over `count` chips."""
  work = (sizes.depth * sizes.layer + sizes.unembedding) / count
  ring = chips.hop * count / 2
  total = ring + 2 * sizes.width * (count - 1) / chips.link
  return work / chips.bandwidth + 2 * sizes.depth * total + ring


def crossing(sizes: Sizes, layers: Sequence[int], chips: Chips, hits: float
             ) -> float:
  """The seconds a hop must take for both to take as long; 0 if tensor
  parallelism never wins. All times are linear in it."""
  def line(time):
    at_0, at_1 = (time(dataclasses.replace(chips, hop=h)) for h in (0.0, 1.0))
    return at_0, at_1 - at_0

  a, b = line(lambda c: stream_time(sizes, layers, c, hits))
  d, e = line(lambda c: tensor_time(sizes, len(layers), c))
  if a <= d:
    return 0.0
  return (a - d) / (e - b) if e > b else float("inf")


def model_times(runs: Sequence[dict[str, Any]], models: Sequence[Sizes],
                chips: Chips) -> list[dict[str, Any]]:
  """For every run that guesses, what a token would take, by every way."""
  lines = []
  for run in runs:
    if not run["guess"]:
      continue
    for sizes in models:
      first = run["layers"][0] / sum(run["layers"])
      layers = divided(sizes.depth, run["stages"], first)
      hits = run["hits_per_token"]
      lines.append({
          "model": sizes.name, "head": run["head"], "stages": run["stages"],
          "temperature": run["temperature"], "layers": layers, "hits": hits,
          "stream": stream_time(sizes, layers, chips, hits),
          # Were every guess right: no head can do better.
          "stream_at_best": stream_time(sizes, layers, chips, 1.0),
          "pipeline": pipeline_time(sizes, layers, chips),
          "tensor": tensor_time(sizes, run["stages"], chips),
          "tensor_wins_below_hop": crossing(sizes, layers, chips, hits)})
  return lines


def divided(depth: int, stages: int, first: float) -> list[int]:
  """As many layers in the first stage as that share, the rest evenly."""
  from jaxspec.pipeline import divide
  most = depth - stages + 1
  return list(divide(depth, stages, min(max(round(depth * first), 1), most)))


# What is shown.


def table(runs: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]
          ) -> str:
  """Both as Markdown."""
  parts = ["| head | stages | temperature | ticks/token, waiting | guessing | "
           "right | work drained |", "|---|---:|---:|---:|---:|---:|---:|"]
  for run in runs:
    if not run["guess"]:
      continue
    key = ("head", "stages", "temperature")
    waits = next(r for r in runs if not r["guess"]
                 and all(r[k] == run[k] for k in key))
    parts.append(
        f"| {run['head']} | {run['stages']} | {run['temperature']:g} | "
        f"{waits['ticks_per_token']:.2f} | {run['ticks_per_token']:.2f} | "
        f"{run['right_share']:.0%} | {run['wasted_share']:.0%} |")
  parts += ["", "| model | head | stages | temperature | pipeline us/token | "
            "stream | were all right | tensor | tensor wins below a hop of |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
  for x in lines:
    parts.append(
        f"| {x['model']} | {x['head']} | {x['stages']} | {x['temperature']:g} "
        f"| {1e6 * x['pipeline']:.0f} | {1e6 * x['stream']:.0f} | "
        f"{1e6 * x['stream_at_best']:.0f} | {1e6 * x['tensor']:.0f} | "
        f"{1e6 * x['tensor_wins_below_hop']:.1f} us |")
  return "\n".join(parts)


def plot(runs: Sequence[dict[str, Any]], models: Sequence[Sizes],
         chips: Chips, path: pathlib.Path) -> None:
  """Ticks a token, counted; and seconds a token against a hop, modelled."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  coldest = min(r["temperature"] for r in runs)
  some = [r for r in runs if r["temperature"] == coldest]
  heads = list(dict.fromkeys(r["head"] for r in some))
  counts = list(dict.fromkeys(r["stages"] for r in some))
  figure, axes = plt.subplots(1, 1 + len(models), squeeze=False,
                              figsize=(4.5 * (1 + len(models)), 3.6))
  axis, bars = axes[0, 0], 1 + len(heads)
  for number, head in enumerate([None, *heads]):
    own = {r["stages"]: r for r in some
           if r["guess"] == (head is not None)
           and r["head"] == (head or heads[0])}
    at = np.arange(len(counts)) + 0.8 * number / bars - 0.4
    made = axis.bar(at, [own[c]["ticks_per_token"] if c in own else 0
                         for c in counts], 0.8 / bars, align="edge",
                    label=head or "waiting for each token")
    if head:
      axis.bar_label(made, [f"{own[c]['wasted_share']:.0%}" if c in own else ""
                            for c in counts], fontsize=6)
  axis.set_xticks(np.arange(len(counts)), [f"{c} stages" for c in counts])
  axis.set_title("counted; above the bars, work drained", fontsize=9)
  axis.set_ylabel("ticks a token")
  axis.set_ylim(top=1.3 * max(r["ticks_per_token"] for r in some))
  axis.legend(fontsize=6, loc="upper left")
  hops = np.geomspace(1e-7, 1e-3, 60)
  best = {c: max((r for r in some if r["guess"] and r["stages"] == c),
                 key=lambda r: r["hits_per_token"]) for c in counts}
  for sizes, axis in zip(models, axes[0, 1:]):
    for number, (c, run) in enumerate(best.items()):
      layers = divided(sizes.depth, c, run["layers"][0] / sum(run["layers"]))
      for style, label, time in (
          ("-", "stream", lambda chip, layers=layers, run=run, sizes=sizes:
           stream_time(sizes, layers, chip, run["hits_per_token"])),
          (":", "pipeline", lambda chip, layers=layers, sizes=sizes:
           pipeline_time(sizes, layers, chip)),
          ("--", "tensor", lambda chip, c=c, sizes=sizes:
           tensor_time(sizes, c, chip))):
        axis.loglog(1e6 * hops, [1e6 * time(dataclasses.replace(chips, hop=h))
                                 for h in hops],
                    style, color=f"C{number}", label=f"{label}, {c}")
    axis.set_title(f"modelled: {sizes.name}, guesses as counted", fontsize=9)
    axis.set_xlabel("a hop, us")
    axis.set_ylabel("us a token")
    axis.legend(fontsize=6)
  figure.tight_layout()
  figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
  """Counts, models, and writes everything."""
  del argv
  os.environ["JAX_PLATFORMS"] = "cpu"      # devices that are not there are CPUs
  import jax

  from jaxspec import heads as heads_lib
  from jaxspec.generator import Generator
  from jaxspec.heads import ExitHead
  stages = [int(s) for s in FLAGS.stages]
  jax.config.update("jax_num_cpu_devices", max(stages))
  generator = Generator.load(FLAGS.model, dtype="float32")
  model, heads = generator.model, {}
  for folder in FLAGS.heads:
    head = heads_lib.load(folder, model, "exit").heads
    heads[f"trained, layer {head.layer}"] = head
  for layer in FLAGS.layer or ([] if heads else [model.depth // 3]):
    heads[f"plain exit, layer {layer}"] = ExitHead.init(model, layer=layer)
  runs = measure(model, heads, read_prompts(generator.tokenizer), stages=stages,
                 temperatures=[float(t) for t in FLAGS.temperatures],
                 new_tokens=FLAGS.new_tokens, eos=generator.eos_ids)
  chips = Chips(FLAGS.bandwidth, FLAGS.link, FLAGS.hop)
  models = [Sizes.of(FLAGS.model, model.config, FLAGS.context),
            Sizes.of("Llama 3.1 8B", types.SimpleNamespace(**BIG),
                     FLAGS.context)]
  lines = model_times(runs, models, chips)
  output = pathlib.Path(FLAGS.output)
  machine.write(str(output), runs, chips=dataclasses.asdict(chips),
                sizes=[dataclasses.asdict(m) for m in models], modelled=lines)
  plot(runs, models, chips, output.with_suffix(".png"))
  print(table(runs, lines))


if __name__ == "__main__":
  define_flags()
  app.run(main)
