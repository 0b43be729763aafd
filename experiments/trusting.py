# SPDX-License-Identifier: Apache-2.0
"""What trusting an early exit costs in quality, and what it saves.

  python -m experiments.trusting --prompts=spec_bench_dev.jsonl

Under `--verifier=trusting` whatever a head is sure enough of stands, right or
wrong. Greedy answers for several thresholds are read by the model itself, in
one pass over each: how often a token is the one that the model finds likeliest
behind what stands before it, and what it lacks to say the token, in nats, both
beside the model's own greedy answers to the same prompts. (The likeliest is
not always theirs either: rows of another batch are rounded otherwise.)

What is saved is counted, not timed: a pass of the model, and for every draft
the lower layers' share of one.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import machine, rates
from experiments.speculation import read_prompts
from jaxspec.reading import read

FLAGS = flags.FLAGS
PLAIN = "plain"


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string("model", "smollm2-135m", "what answers")
  flags.DEFINE_string("dtype", "bfloat16", "of the weights")
  flags.DEFINE_string(
      "prompts", None, "JSON lines with `turns` and `category`", required=True)
  flags.DEFINE_string("adapter", None, "to be merged into the model")
  flags.DEFINE_string("heads", "exit_10", "a folder, or a shipped head's name")
  flags.DEFINE_integer("length", 4, "drafts of a pass at most")
  flags.DEFINE_list("stops", ["0.5", "0.7", "0.8", "0.9", "0.95", "0.99"],
                    "confidences from which on a draft stands")
  flags.DEFINE_integer("count", 4, "prompts of each category")
  flags.DEFINE_integer("prompt_tokens", 1024, "a longer prompt is left out")
  flags.DEFINE_integer("new_tokens", 64, "of an answer at most")
  flags.DEFINE_integer("rows", 8, "answers made side by side")
  flags.DEFINE_string(
      "output", "experiments/results/trusting.json",
      "where the result goes; the plot goes beside it")


@jax.jit
def _judge(model, tokens):
  """Of each token but the first: is it the likeliest, and what it lacks."""
  top = read(model, tokens)[model.depth]
  logits = model.unembed(top[:, :-1])
  laws = jax.nn.log_softmax(logits, axis=-1)
  said = tokens[:, 1:]
  lack = -jnp.take_along_axis(laws, said[..., None], axis=-1)[..., 0]
  return said == jnp.argmax(logits, axis=-1), lack


def judge(model: Any, prompt: Sequence[int], answer: Sequence[int]
          ) -> tuple[list[bool], list[float]]:
  """By token of an answer, what the model that reads it thinks of it."""
  whole = [*prompt, *answer]
  width = -(-len(whole) // 128) * 128
  tokens = np.zeros((1, width), np.int32)
  tokens[0, :len(whole)] = whole
  own, lack = jax.device_get(_judge(model, tokens))
  part = slice(len(prompt) - 1, len(whole) - 1)
  return own[0, part].tolist(), lack[0, part].astype(float).tolist()


def examine(generator: Any, prompts: Sequence[Sequence[int]],
            new_tokens: int) -> list[dict[str, Any]]:
  """Greedy answers, and what the model thinks of them."""
  from jaxspec.options import Options
  found = []
  for prompt, completion in zip(prompts, generator.generate(
      [list(p) for p in prompts], Options(max_new_tokens=new_tokens))):
    own, lack = judge(generator.model, prompt, completion.token_ids)
    stats = completion.stats
    found.append({"answer": completion.token_ids, "own": own, "lack": lack,
                  "passes": stats.passes, "drafted": stats.drafted,
                  "accepted": stats.accepted})
  return found


def summarise(found: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]],
              share: float) -> dict[str, Any]:
  """One line: quality, and work.

  Args:
    share: of all layers that lie below the head.
  """
  tokens = sum(x["passes"] + x["accepted"] for x in found)
  passes, drafted = (sum(x[k] for x in found) for k in ("passes", "drafted"))
  lack = [n for x in found for n in x["lack"]]
  before = [n for x in plain for n in x["lack"]]
  return {
      "own": rates.clustered([sum(x["own"]) for x in found],
                             [len(x["own"]) for x in found]),
      "nats": float(np.mean(lack)),
      "nats_more": float(np.mean(lack) - np.mean(before)),
      "same_answers": rates.rate(sum(
          x["answer"] == y["answer"] for x, y in zip(found, plain)),
          len(found)),
      "tokens_per_pass": tokens / max(passes, 1),
      "work": (passes + drafted * share) / max(tokens, 1)}


def table(lines: dict[str, dict[str, Any]]) -> str:
  """Markdown."""
  parts = ["| sure from | tokens the model would say | nats a token | more "
           "than plain | same answers | tokens a pass | work a token |",
           "|---|---:|---:|---:|---:|---:|---:|"]
  for name, x in lines.items():
    parts.append(
        f"| {name} | {x['own']['share']:.1%} | {x['nats']:.3f} "
        f"| {x['nats_more']:+.3f} | {x['same_answers']['share']:.0%} "
        f"| {x['tokens_per_pass']:.2f} | {x['work']:.2f} |")
  return "\n".join(parts)


def plot(lines: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
  """Quality against work."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(figsize=(5, 3.6))
  for name, x in lines.items():
    share = x["own"]["share"]
    axes.errorbar(x["work"], share, fmt="o", capsize=2, label=name, yerr=[
        [share - x["own"]["low"]], [x["own"]["high"] - share]])
  axes.set(xlabel="passes' worth of layers a token",
           ylabel="tokens the model would say")
  axes.legend(fontsize=7, title="sure from")
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main(argv: list[str]) -> None:
  """Answers plainly and by trust, and writes everything."""
  del argv
  from jaxspec.generator import Generator
  made = Generator.load(
      FLAGS.model, dtype=FLAGS.dtype, adapter=FLAGS.adapter, rows=FLAGS.rows,
      capacity=FLAGS.prompt_tokens + FLAGS.new_tokens)
  prompts = []
  for texts in read_prompts(FLAGS.prompts, FLAGS.count).values():
    ids = [made.tokenizer.encode(made.tokenizer.render(
        [{"role": "user", "content": text}]), special=False) for text in texts]
    prompts += [i for i in ids if len(i) <= FLAGS.prompt_tokens]
  found = {PLAIN: examine(made, prompts, FLAGS.new_tokens)}
  lines = {PLAIN: summarise(found[PLAIN], found[PLAIN], 0.0)}
  print(table(lines), flush=True)
  for stop in FLAGS.stops:
    trusting = Generator(
        made.model, made.tokenizer, mesh=made.mesh, eos_ids=made.eos_ids,
        rows=made.rows, capacity=made.capacity, verifier="trusting",
        drafter=f"early_exit:heads={FLAGS.heads},length={FLAGS.length},"
                f"stop={stop}")
    found[stop] = examine(trusting, prompts, FLAGS.new_tokens)
    lines[stop] = summarise(
        found[stop], found[PLAIN],
        trusting.drafter.head.layer / made.model.depth)
    print(table({stop: lines[stop]}).splitlines()[-1], flush=True)
  output = pathlib.Path(FLAGS.output)
  machine.write(str(output), found, summary=lines)
  plot(lines, output.with_suffix(".png"))
  print(table(lines))


if __name__ == "__main__":
  define_flags()
  app.run(main)
