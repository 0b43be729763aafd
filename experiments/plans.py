# SPDX-License-Identifier: Apache-2.0
"""What published models take and give on slices that nobody here owns.

  python -m experiments.plans
  python -m experiments.plans --only=llama3-8b --stale=keep

Each line of the table is compiled as `python -m jaxspec plan` compiles it, for
hardware that is not there, and is held against two counts by hand: of the
bytes of weights and cache, and of the products and bytes of a decoding step.
Most lines are counted from few layers (`plan --few_layers`), which takes
minutes for all of them; what that is worth, the lines that are compiled whole
say. What fits is the decoding loop; with --prefill the program that reads
prompts is compiled too, which takes several times as long. The result file is
its own journal: what it holds of the same sources is not made again, and each
line says which commit made it.

The first line is a public figure's: 70 billion weights in eight bits on 16
chips of v5e with 8 rows are said to give 159 tokens/s a row, 85 % of the
bandwidth of all chips together. See `against_the_public_figure`.
"""

import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from experiments import machine
from jaxspec.apps.plan import WITHOUT_DEVICE

FLAGS = flags.FLAGS
_GIB = 1 << 30


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string(
      "only", "", "lines whose model or topology begin so; all by default")
  flags.DEFINE_enum(
      "stale", "remake", ["remake", "keep"],
      "what becomes of lines that other sources made")
  flags.DEFINE_boolean(
      "prefill", False, "whether reading prompts is compiled too")
  flags.DEFINE_string(
      "output", "experiments/results/plans.json",
      "where the result goes; the picture goes beside it")


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of the table.

  Attributes:
    mesh: as `data=2,tensor=8`; the one that takes least memory, if empty.
    whole: whether all layers are compiled.
    remedies: whether changes that make it fit are looked for.
    kernels: as for decode. Those of a GPU do not say what they cost.
    drafter: as for decode; heads have the usual size.
  """

  model: str
  topology: str
  mesh: str = ""
  rows: int = 8
  dtype: str = "bfloat16"
  whole: bool = False
  remedies: bool = False
  capacity: int = 2048
  prompt: int = 512
  kernels: str | None = None
  drafter: str = "autoregressive"

  @property
  def key(self) -> str:
    return ",".join(f"{k}={v}" for k, v in dataclasses.asdict(self).items()
                    if k != "drafter" or self.speculates)

  @property
  def speculates(self) -> bool:
    return self.drafter != "autoregressive"

  @property
  def sources(self) -> str:
    """A digest of the sources that make it: a drafter is found by name."""
    from pallas_kernels import records  # pulls in jax, which reads variables
    return "-".join(
        records.sources((module,), packages=("jaxspec", "pallas_kernels"))[:8]
        for module in ("experiments.plans", "jaxspec.drafters."
                       + self.drafter.partition(":")[0]))

  @property
  def axes(self) -> tuple[tuple[str, int], ...]:
    """The mesh as a plan takes it; empty where none is named."""
    return tuple((axis, int(n)) for axis, n in (
        part.split("=") for part in self.mesh.split(",") if part))


PUBLIC = Line("llama3.1-70b", "v5e:4x4", "tensor=8,sequence=2", dtype="int8")
# One of each model first, the dearest last.
LINES = [
    PUBLIC,
    Line("llama3-8b", "v5e:2x2"),
    Line("llama3-70b", "v6e:2x4"),
    Line("mixtral-8x7b", "v6e:2x2"),
    Line("qwen3-30b-a3b", "v6e:2x2"),
    Line("qwen3-8b", "v5p:2x2x1"),
    Line("llama3-8b", "h100:1", kernels="xla"),
    Line("llama3-70b", "h100:8", kernels="xla"),
    Line("llama3-8b", "v5e:1x1"),
    Line("qwen3-8b", "h100:1", kernels="xla"),
    Line("mixtral-8x7b", "h100:8", kernels="xla"),
    Line("qwen3-30b-a3b", "h100:1", kernels="xla"),
    Line("qwen3-30b-a3b", "h100:8", "expert=2,tensor=4", kernels="xla"),
    Line("llama3-70b", "v5p:2x2x1"),
    Line("llama3-70b", "v5e:4x4"),
    Line("llama3-70b", "v5e:4x4", "tensor=8,sequence=2"),
    Line("qwen3-8b", "v5e:2x2"),
    Line("mixtral-8x7b", "v5e:2x4"),
    Line("qwen3-30b-a3b", "v5e:2x4", "expert=2,tensor=4"),
    Line("llama3-8b", "v5e:16x16", rows=256),
    Line("llama3-70b", "v6e:16x16", rows=256),
    Line("llama3-70b", "v5p:4x4x8", rows=128),
    Line("qwen3-8b", "v6e:1x1"),
    Line("llama3-8b", "v6e:1x1"),
    Line("llama3-8b", "v5p:2x2x1"),
    Line("mixtral-8x7b", "v5p:2x2x1"),
    Line("qwen3-30b-a3b", "v5p:2x2x1"),
    Line("qwen3-30b-a3b", "v5e:16x16", "data=32,expert=2,tensor=4", rows=256),
    Line("llama3-8b", "v5e:2x2", whole=True),
    Line("qwen3-8b", "v5e:1x1", remedies=True),
    Line("mixtral-8x7b", "v5e:2x2", remedies=True),
    Line("qwen3-30b-a3b", "v5e:2x2", remedies=True),
    Line("llama3-8b", "v6e:2x2", drafter="prompt_lookup:length=7"),
    Line("llama3-8b", "v6e:2x2", drafter="medusa"),
    Line("llama3-8b", "h100:1", kernels="xla",
         drafter="prompt_lookup:length=7"),
    Line("llama3-8b", "h100:1", kernels="xla", drafter="medusa"),
]
# Of lines with drafts, the rates at which one is accepted behind accepted ones.
ACCEPTANCE = (0.4, 0.6, 0.8)


# By hand.


def products(config: Any, tokens: int, slots: int, nodes: int) -> float:
  """Operations of a pass: `tokens` of all rows, each attending to `slots` and
  to the `nodes` of its row."""
  c = config
  heads = c.heads * c.head_size
  mlp = 3 * c.width * c.mlp * (c.experts_per_token or 1)
  layer = c.width * (2 * heads + 2 * c.kv_heads * c.head_size + c.experts) + mlp
  attention = 2 * heads * (slots + nodes)
  return 2.0 * tokens * (c.depth * (layer + attention) + c.vocab * c.width)


def step_bytes(setup: Any) -> float:
  """Bytes that a step reads on a device: weights and cache, once.

  Of the embedding a few rows are read, unless it is the unembedding too.
  """
  from jaxspec import planning
  config, sizes = setup.config, dict(setup.mesh)
  split = sizes.get("tensor", 1)
  embedding = 0 if config.tied else config.vocab * config.width * 2 / (
      split if config.vocab % split == 0 else 1)
  return planning.estimate(setup) - embedding


def examine(line: Line, names: Sequence[str] = ("decode",)
            ) -> dict[str, Any]:
  """One line: the plan of these programs, and what is counted by hand.

  With drafts, the pass over all nodes is what is counted, without the heads;
  and what decoding without drafts takes is planned beside it.
  """
  from jaxspec import planning
  config = planning.read_config(line.model)
  setup = planning.Setup(
      config, line.topology,
      line.axes or planning.default_mesh(config, line.topology, line.rows),
      rows=line.rows, capacity=line.capacity, prompt=line.prompt,
      dtype=line.dtype, kernels=line.kernels, drafter=line.drafter)
  start = time.perf_counter()
  plan = planning.make(setup, [*names, *["plain"] * line.speculates],
                       scaled=not line.whole)
  found = plan.as_dict()
  del found["setup"]["config"]
  hand = planning.estimate(setup)
  found |= dict(
      line=dataclasses.asdict(line), key=line.key, said=setup.said(),
      seconds=time.perf_counter() - start, weights_and_cache_by_hand=hand,
      weights_and_cache_to_hand=(plan.weights + plan.cache) / hand)
  decode = plan.programs["decode"]
  if not decode.refused:
    shards = math.prod(dict(setup.mesh).values())
    wanted = products(config, setup.rows * plan.nodes, setup.capacity,
                      plan.nodes) / shards
    counted = decode.costs["score"] if line.speculates else decode.cost
    found |= dict(
        held_to_hand=decode.arguments / (hand + plan.draft),
        flops_to_hand=counted.all_flops / wanted,
        bytes_to_hand=counted.bytes / step_bytes(setup),
        uncounted=sorted(set(decode.cost.uncounted)))
    if line.speculates and plan.timed:
      found["at_acceptance"] = {
          str(rate): dict(
              tokens_per_pass=plan.tokens_per_pass([rate]),
              tokens_per_second_per_row=plan.per_second([rate]),
              times_plain=plan.per_second([rate]) * plan.plain().seconds)
          for rate in ACCEPTANCE}
  if line.remedies and not plan.fits:
    found["remedies"] = [
        dict(change=words, free_bytes=other.free, fits=other.fits)
        for words, other in planning.remedies(setup, names=names, scaled=True)]
  return found


def against_the_public_figure(found: dict[str, Any]) -> dict[str, Any]:
  """Why a plan says less than what is published for these chips.

  The public figure is 85 % of what all 16 chips read together, so that each
  reads a sixteenth of the weights. Here the MLP and the vocabulary are split
  over 16, and slots over two, but heads over `tensor`, which must divide the
  eight key/value heads: of attention's weights, a sixth of all, each chip reads
  an eighth.
  """
  from jaxspec import planning, roofline
  config = planning.read_config(PUBLIC.model)
  setup = planning.Setup(config, "", rows=0, dtype="int8")
  embedding = 2 * config.vocab * config.width
  read = planning.estimate(setup) - embedding
  own = planning.estimate(dataclasses.replace(
      setup, mesh=PUBLIC.axes)) - embedding / 16
  chip = roofline.chip("TPU v5 lite")
  assert chip is not None
  spread = 16 * chip.bandwidth / read
  step = found["roofline"]["step"]
  return dict(
      published_tokens_per_second_per_row=159.0, published_of_bandwidth=0.85,
      weights_read_bytes=read,
      if_each_chip_read_a_sixteenth=spread,
      published_to_that=159.0 / spread,
      plan_tokens_per_second_per_row=found["tokens_per_second_per_row"],
      plan_step=step,
      weights_each_chip_reads_bytes=own,
      if_weights_were_all=chip.bandwidth / own,
      of_the_step=dict(memory=step["memory"] / step["seconds"],
                       interconnect=step["interconnect"] / step["seconds"]))


def table(runs: list[dict[str, Any]]) -> str:
  """Markdown."""
  parts = ["| model | devices | mesh | rows | GiB free of | weights + cache | "
           "working | step | limit | tokens/s a row | compiled in | code |",
           "|---|---|---|---:|---:|---:|---:|---:|---|---:|---:|---|"]
  for run in runs:
    setup, sizes = run["setup"], run["bytes"]
    room = run["capacity_bytes"] or 0
    mesh = " ".join(f"{a}={n}" for a, n in setup["mesh"].items())
    step = run.get("roofline", {}).get("step")
    dtype = "" if setup["dtype"] == "bfloat16" else f" {setup['dtype']}"
    drafter = "" if setup["drafter"] == "autoregressive" else (
        f", {setup['drafter']}")
    speeds = [f"{run['tokens_per_second_per_row']:.0f}" if step else ""]
    if run.get("at_acceptance"):
      speeds = [f"{one['tokens_per_second_per_row']:.0f} at {rate}"
                for rate, one in run["at_acceptance"].items()]
    free = (room - run["needs_bytes"]) / _GIB
    fits = f"{free:.1f}" if run["fits"] else f"**no: {free:.1f}**"
    held = (sizes["weights"] + sizes["cache"]) / _GIB
    parts.append(
        f"| {run['line']['model']}{dtype}{drafter}"
        f"{' (whole)' * run['line']['whole']} "
        f"| {setup['topology']} | {mesh} | {setup['rows']} "
        f"| {fits} of {room / _GIB:.2f} | {held:.2f} "
        f"| {sizes['working'] / _GIB:.2f} | "
        + (f"{1e3 * step['seconds']:.2f} ms | {step['limit']} | "
           f"{', '.join(speeds)} | " if step else "| | | ")
        + f"{run['programs']['decode']['compile_seconds']:.0f} s "
        f"| {(run.get('commit') or 'not known')[:9]} |")
  return "\n".join(parts)


def plot(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Memory of a device, and what a step takes at least."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  figure, (memory, step) = plt.subplots(
      1, 2, sharey=True, figsize=(11, 1.5 + 0.3 * len(runs)),
      layout="constrained")
  labels = [f"{r['line']['model']} {r['setup']['dtype']} "
            f"{r['setup']['topology']}" + (
                f" {r['setup']['drafter'].partition(':')[0]}"
                if r["setup"]["drafter"] != "autoregressive" else "")
            for r in runs]
  left = [0.0] * len(runs)
  for name in ("weights", "cache", "working", "code"):
    widths = [run["bytes"][name] / _GIB for run in runs]
    memory.barh(range(len(runs)), widths, left=left, label=name)
    left = [a + b for a, b in zip(left, widths)]
  for i, run in enumerate(runs):
    if run["capacity_bytes"]:
      memory.plot([run["capacity_bytes"] / _GIB] * 2, [i - 0.45, i + 0.45],
                  "k--")
  memory.set_yticks(range(len(runs)), labels, fontsize=7)
  memory.invert_yaxis()
  memory.set_xlabel("GiB on each device; dashed, what there is")
  memory.legend(fontsize="small")
  for offset, part in zip((-0.27, 0, 0.27),
                          ("memory", "arithmetic", "interconnect")):
    step.barh([i + offset for i, r in enumerate(runs) if "roofline" in r],
              [1e3 * r["roofline"]["step"][part] for r in runs
               if "roofline" in r], height=0.27, label=part)
  step.set_xlabel("milliseconds of a step, at least")
  step.legend(fontsize="small")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def is_made(row: dict[str, Any] | None, names: Sequence[str], source: str,
            keep: bool) -> bool:
  """Whether a line need not be made again.

  Args:
    row: what the result file holds of it.
    keep: whether it may be of other sources.
  """
  return (row is not None and set(names) <= set(row["programs"])
          and (keep or row.get("sources") == source))


def main(argv: list[str]) -> None:
  del argv
  for name, value in WITHOUT_DEVICE.items():
    os.environ.setdefault(name, value)
  from jaxspec.errors import InputError
  output = pathlib.Path(FLAGS.output)
  known: dict[str, dict[str, Any]] = {}
  if output.exists():
    known = {run["key"]: run for run in json.loads(output.read_text())["runs"]}
  names = ("decode", "prefill") if FLAGS.prefill else ("decode",)
  skipped: dict[str, str] = {}
  # All at once: a file may change while this is at work.
  commit, source = machine.commit(), {line: line.sources for line in LINES}
  for line in LINES:
    wanted = f"{line.model} {line.topology}"
    if FLAGS.only and not any(
        part.startswith(FLAGS.only) for part in wanted.split()):
      continue
    if is_made(known.get(line.key), names, source[line], FLAGS.stale == "keep"):
      continue
    try:
      known[line.key] = examine(line, names) | dict(
          commit=commit, sources=source[line])
    except InputError as e:              # a compiler that is not there
      skipped[wanted] = str(e)
      print(f"{wanted}: {e}", flush=True)
      continue
    runs = [known[line.key] for line in LINES if line.key in known]
    more = {}
    if PUBLIC.key in known:
      more["against_the_public_figure"] = against_the_public_figure(
          known[PUBLIC.key])
    machine.write(str(output), runs, skipped=skipped, table=table(runs), **more)
    print(table([known[line.key]]).splitlines()[-1], flush=True)
  runs = [known[line.key] for line in LINES if line.key in known]
  print(table(runs))
  if runs:
    plot(runs, output.with_suffix(".png"))


if __name__ == "__main__":
  define_flags()
  app.run(main)
