# SPDX-License-Identifier: Apache-2.0
"""What a step of early exit runs: every layer once on every node.

  python -m experiments.early_exit_work

A step drafts a chain of d tokens with the a lower of L layers and scores it
with the others. The root and the drafts go through the lower layers one by
one, d + 1 times, and together through the upper ones, once: (d + 1) L layers
on nodes, just what one pass over d + 1 tokens takes, and layers run, as often
as their weights are read, for

  (d + 1) a / L + (L - a) / L  =  1 + d a / L   passes of the model.

Counted here in two ways, for a model's own sizes and without its weights:
where layers are called while the step is traced (each branch of a condition
once), and as floating-point operations of the program that XLA compiles, of
which each branch counts as if it were taken. The operations are compared with
those of one pass over the same chain without early exit, and with the products
that this takes: twice the weights of each layer and node, the unembedding for
each node and the head for each draft.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx, struct

from experiments import machine
from jaxspec import loop, stages
from jaxspec.base import Drafter, Proposal
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.drafters.early_exit import EarlyExit
from jaxspec.heads import ExitHead
from jaxspec.models.transformer import Config, Transformer, abstract_source
from jaxspec.tree import chain
from jaxspec.verifiers.exact import exact

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string("model", "smollm2-135m", "whose sizes count")
  flags.DEFINE_list("layers", ["5", "10", "15"], "below the head")
  flags.DEFINE_list("drafts", ["1", "2", "4", "8"], "of a step")
  flags.DEFINE_integer("capacity", 512, "slots of the cache")
  flags.DEFINE_string(
      "output", "experiments/results/early_exit_work.json",
      "where the result goes; the plot goes beside it")


@struct.dataclass
class Blank(Drafter):
  """Drafts a chain of nothing in particular, with no head start."""

  length: int = struct.field(pytree_node=False)

  @property
  def tree(self):
    return chain(self.length)

  def propose(self, model, seq, request, state):
    return Proposal(jnp.pad(seq.tail(), ((0, 0), (0, self.length))),
                    self.tree), state


@contextlib.contextmanager
def calls() -> Iterator[list[tuple[int, int]]]:
  """The layers that a model is called for, and with how many nodes."""
  found, extend = [], Transformer.extend

  def counted(self, x, cache, fresh, at, *, layers):
    if type(self) is Transformer:      # and no head
      found.extend((layer, x.shape[1]) for layer in layers)
    return extend(self, x, cache, fresh, at, layers=layers)

  Transformer.extend = counted
  try:
    yield found
  finally:
    Transformer.extend = extend


def operations(model: Any, drafter: Any, *, rows: int, capacity: int,
               compiled: bool) -> dict[str, Any]:
  """What a step runs, traced and compiled without weights.

  Args:
    compiled: whether operations of the compiled program count, or those of
      the program as it goes into the compiler.
    rows: two, since a single token of one row may be computed twice, where
      that is faster (see `layers.linear`).
  """
  def begin(model, drafter):
    return loop.init(
        model, drafter, model.init_cache(ContiguousCache, rows, capacity,
                                         jnp.float32),
        capacity=capacity, stops=1, biases=1)

  def step(model, drafter, state):
    return stages.step(model, drafter, exact, state)[0]

  state = jax.eval_shape(begin, model, drafter)
  with calls() as taken:
    lowered = jax.jit(step).lower(model, drafter, state)
  cost = (lowered.compile() if compiled else lowered).cost_analysis()
  if isinstance(cost, list):           # as in older versions
    cost = cost[0]
  nodes: Counter[int] = Counter()
  for layer, count in taken:
    nodes[layer] += count
  return {"nodes_of_layer": [nodes[n] for n in range(model.depth)],
          "calls_of_layer": [sum(1 for layer, _ in taken if layer == n)
                             for n in range(model.depth)],
          "flops": float(cost["flops"]) / rows}


def weights(part: Any) -> int:
  """Of its matrices."""
  return sum(w.size for w in jax.tree.leaves(nnx.state(part, nnx.Param))
             if w.ndim > 1)


@functools.cache
def one_pass(config: Config, drafts: int, **settings: Any) -> dict[str, Any]:
  """A pass over a chain that nothing was computed for."""
  model = Transformer(config, abstract_source(jnp.float32))
  return operations(model, Blank(drafts), **settings)


def examine(config: Config, layer: int, drafts: int, *, capacity: int,
            rows: int = 2, compiled: bool = True) -> dict[str, Any]:
  """A step of early exit beside one that drafts nothing in particular."""
  source = abstract_source(jnp.float32)
  model = Transformer(config, source)
  head = ExitHead(model, source, layer=layer, mlp=config.width)
  drafter = EarlyExit(head, tuple((0,) * d for d in range(1, drafts + 1)))
  settings = dict(rows=rows, capacity=capacity, compiled=compiled)
  own = operations(model, drafter, **settings)
  whole, plain = (one_pass(config, d, **settings) for d in (drafts, 0))
  depth, nodes = config.depth, drafts + 1
  below, above = own["nodes_of_layer"][:layer], own["nodes_of_layer"][layer:]
  unembed = 2 * config.width * config.vocab
  asking = drafts * (2 * weights(head) + unembed)
  products = nodes * (2 * weights(model.layers) + unembed)
  return {
      "layer": layer, "depth": depth, "drafts": drafts,
      "node_layers": {"below": sum(below), "above": sum(above)},
      "node_layers_wanted": {"below": nodes * layer,
                             "above": nodes * (depth - layer)},
      "once": own["nodes_of_layer"] == [nodes] * depth,
      "passes": sum(own["calls_of_layer"]) / depth,
      "passes_wanted": 1 + drafts * layer / depth,
      "flops": own["flops"], "flops_plain_pass": plain["flops"],
      "flops_one_pass_over_chain": whole["flops"],
      "flops_of_head": asking,
      # 1 where nothing is run twice.
      "relative_to_one_pass_and_head":
          own["flops"] / (whole["flops"] + asking),
      "relative_to_products": own["flops"] / (products + asking),
      "runs": {"early_exit": own, "one_pass": whole, "plain": plain}}


def table(lines: list[dict[str, Any]]) -> str:
  """Markdown."""
  parts = ["| exit | drafts | layers x nodes below + above | wanted | passes "
           "| 1 + d a/L | FLOPs | over one pass and the head |",
           "|---:|---:|---:|---:|---:|---:|---:|---:|"]
  for x in lines:
    found, wanted = x["node_layers"], x["node_layers_wanted"]
    parts.append(
        f"| {x['layer']} of {x['depth']} | {x['drafts']} "
        f"| {found['below']} + {found['above']} "
        f"| {wanted['below']} + {wanted['above']} | {x['passes']:.2f} "
        f"| {x['passes_wanted']:.2f} | {x['flops'] / 1e9:.2f} G "
        f"| {x['relative_to_one_pass_and_head']:.3f} |")
  return "\n".join(parts)


def plot(lines: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Operations of a step against drafts, found and wanted."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
  for number, layer in enumerate(dict.fromkeys(x["layer"] for x in lines)):
    own = [x for x in lines if x["layer"] == layer]
    d, color = [x["drafts"] for x in own], f"C{number}"
    axes[0].plot(d, [x["passes"] for x in own], "o", color=color,
                 label=f"exit at {layer}")
    axes[0].plot(d, [x["passes_wanted"] for x in own], "-", color=color)
    axes[1].plot(d, [x["flops"] / 1e9 for x in own], "o", color=color)
    axes[1].plot(d, [(x["flops_one_pass_over_chain"] + x["flops_of_head"])
                     / 1e9 for x in own], "-", color=color)
  axes[0].set(xlabel="drafts", title="passes, and 1 + d a/L")
  axes[0].legend(fontsize=7)
  axes[1].set(xlabel="drafts", title="GFLOPs, and of one pass and the head")
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main(argv: list[str]) -> None:
  """Counts, writes everything, and fails where something is run twice."""
  del argv
  from jaxspec import checkpoint
  with checkpoint.open_checkpoint(FLAGS.model) as opened:
    config = opened.config
  lines = []
  for layer in map(int, FLAGS.layers):
    for drafts in map(int, FLAGS.drafts):
      lines.append(examine(config, layer, drafts, capacity=FLAGS.capacity))
      jax.clear_caches()           # a process cannot hold programs without end
      print(table(lines[-1:]).splitlines()[-1], flush=True)
  output = pathlib.Path(FLAGS.output)
  machine.write(str(output), lines, model=dataclasses.asdict(config))
  plot(lines, output.with_suffix(".png"))
  print(table(lines))
  if not all(x["once"] for x in lines):
    raise SystemExit("a layer ran twice on a node, or not at all")


if __name__ == "__main__":
  define_flags()
  app.run(main)
