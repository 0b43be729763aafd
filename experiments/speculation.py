# SPDX-License-Identifier: Apache-2.0
"""What each drafter gives on real prompts, and what it costs.

  python -m experiments.speculation --prompts=question.jsonl

Spec-Bench's prompts are decoded category by category (its eight MT-Bench
categories as one), by every drafter in turns, prompt by prompt, so that a
change of the machine's mood meets them all. Only decoding is timed; a prompt
is read once for all of them. One row is decoded to its end. Several rows are
decoded for so many steps in which all of them run, as they do where finished
rows are refilled: else a batch would end with its slowest row. In greedy
decoding every drafter's text must be that of plain decoding, up to near ties
that other widths round otherwise; how many texts differ, as far as both go, is
counted.

Beside each measured speed stands the expected one: tokens a pass, over what
passes of its widths cost by the measured cost curve, proposing left out.

What is finished is kept beside the output, and the same command goes on from
there.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments import machine

FLAGS = flags.FLAGS
PLAIN = "autoregressive"
# Spec-Bench's own; whatever else a prompt is of is MT-Bench's.
CATEGORIES = ("translation", "summarization", "qa", "math_reasoning", "rag")


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string("model", "smollm2-135m", "what is decoded with")
  flags.DEFINE_string(
      "prompts", None, "JSON lines with `turns` and `category`", required=True)
  flags.DEFINE_string(
      "output", "experiments/results/speculation.json",
      "where the result goes; the plot goes beside it")
  flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "of the weights")
  flags.DEFINE_list("batches", ["1", "8"], "rows decoded side by side")
  flags.DEFINE_list("temperatures", ["0", "0.7"], "of sampling")
  flags.DEFINE_integer("count", 8, "prompts of each category")
  flags.DEFINE_integer("single_count", 5, "of these with one row")
  flags.DEFINE_integer(
      "prompt_tokens", 1024, "a longer prompt is cut")
  flags.DEFINE_integer("new_tokens", 64, "decoded at most")
  flags.DEFINE_integer("steps", 32, "that several rows are decoded for")
  flags.DEFINE_integer(
      "repeats", 5, "of a batch of several rows, of which the median counts, "
      "for plain decoding and what is meant to come close to it")
  flags.DEFINE_multi_string(
      "drafter", [
          "prompt_lookup",
          "recycling:nodes=12",
          "union:drafters=[prompt_lookup;recycling],nodes=12",
          "adaptive:drafter=[prompt_lookup]",
          "adaptive:drafter=[union:drafters=[prompt_lookup;recycling],nodes=12]"
          ",sizes=[1;2;4;8;12]",
      ], "what is compared with plain decoding; may be repeated")
  flags.DEFINE_multi_string(
      "aside", [
          "prompt_lookup:branches=3,nodes=12",
          "lookahead",
          "draft_model:model=[self:int8],length=4",
          "cascade:models=[self:layers=0-15+18-29;self:int8],length=4",
      ], "compared too, but greedily, of one row and in the first dtype alone; "
      "`--aside=` for none")


def read_prompts(path: str, count: int) -> dict[str, list[str]]:
  """The first turns of `count` prompts of each category, evenly drawn."""
  found: dict[str, list[str]] = {name: [] for name in (*CATEGORIES, "mt_bench")}
  for line in pathlib.Path(path).read_text().splitlines():
    if line.strip():
      record = json.loads(line)
      name = record["category"]
      found[name if name in CATEGORIES else "mt_bench"].append(
          record["turns"][0])
  return {name: [texts[i * len(texts) // count] for i in range(count)]
          for name, texts in found.items() if len(texts) >= count}


def new_tokens(rows: int) -> int:
  """Most tokens of an answer; of several rows none shall end."""
  return FLAGS.new_tokens if rows == 1 else 13 * FLAGS.steps


class Bench:
  """One model in one precision, and a batch for each drafter."""

  def __init__(self, dtype: str, rows: int, drafters: Sequence[str]):
    """Loads the model; programs are compiled when they are first run."""
    from jaxspec.generator import Generator
    capacity = FLAGS.prompt_tokens + new_tokens(rows)
    self.rows, self.tokenizer, shared = rows, None, None
    self.generators: dict[str, Any] = {}
    for text in (PLAIN, *drafters):
      if shared is None:
        made = Generator.load(FLAGS.model, dtype=dtype, drafter=text,
                              rows=rows, capacity=capacity)
        shared, self.tokenizer = made.model, made.tokenizer
        self.eos = made.eos_ids
      else:
        made = Generator(shared, self.tokenizer, drafter=text, rows=rows,
                         capacity=capacity, eos_ids=self.eos)
      self.generators[text] = made
    self._states: dict[str, Any] = {}

  def ids(self, text: str) -> list[int]:
    """A prompt as a chat; of a long one the end."""
    def chat(message):
      return self.tokenizer.encode(self.tokenizer.render(
          [{"role": "user", "content": message}]), special=False)

    whole = chat(text)
    if len(whole) > FLAGS.prompt_tokens:
      room = FLAGS.prompt_tokens - len(chat("")) - 8   # for new seams
      kept = self.tokenizer.encode(text, special=False)[-room:]
      whole = chat(self.tokenizer.decode(kept))
    return whole

  def read(self, batch: Sequence[Sequence[int]]
           ) -> tuple[Any, dict[tuple[int, ...], Any]]:
    """Reads a prompt for each row, once for all drafters of the same taps."""
    import jax.numpy as jnp

    from jaxspec import loop
    lengths = np.array([len(ids) for ids in batch], np.int32)
    width = next(n for n in (64, 128, 256, 512, 1024, 2048)
                 if n >= lengths.max())
    tokens = np.zeros((len(batch), width), np.int32)
    for row, ids in zip(tokens, batch):
      row[:len(ids)] = ids
    plain = self.generators[PLAIN]
    every = {tuple(made.drafter.taps) for made in self.generators.values()}
    return lengths, {
        taps: loop.prefill(plain.model, taps, tokens, lengths, chunk=512,
                           dtype=jnp.dtype(plain.cache_dtype))
        for taps in sorted(every)}

  def decode(self, drafter: str, prefixes: Any, lengths: Any, options: Any,
             width: int | None = None, steps: int = 2**30) -> dict[str, Any]:
    """Decodes a batch and tells what it took.

    Args:
      width: the width of each pass of an adaptive drafter, by its number;
        None lets it choose.
      steps: at most so many are taken.
    """
    import jax
    import jax.numpy as jnp

    from jaxspec import loop
    from jaxspec.options import as_request
    made = self.generators[drafter]
    state = self._states.pop(drafter, None)
    if state is None:
      state = made._init()
    request = as_request(options, lengths, made.eos_ids,
                         vocab=made.config.vocab, stops=16, biases=64)
    state = loop.insert(made.model, made.drafter, made.verifier, state,
                        np.arange(self.rows, dtype=np.int32),
                        prefixes[tuple(made.drafter.taps)], request)
    jax.block_until_ready(state)
    part = made.drafter
    if width is not None:
      part = part.replace(forced=jnp.asarray(width, jnp.int32))
    with machine.ForeignLoad() as load:
      start = time.perf_counter()
      state = loop.decode(made.model, part, made.verifier, state,
                          np.int32(steps), np.bool_(True))
      passes = np.asarray(state.counters.passes)
      seconds = time.perf_counter() - start
    counters = jax.device_get(vars(state.counters))
    text = np.asarray(state.seq.tokens)
    ends = np.asarray(state.seq.length)
    self._states[drafter] = state
    return {
        "seconds": seconds, "foreign_cores": load.cores,
        "texts": [text[row, lengths[row]:ends[row]].tolist()
                  for row in range(self.rows)],
        "passes": passes.tolist(), "steps": int(passes.max()),
        "scored": counters["scored"].tolist(),
        "drafted": counters["nodes"].tolist(),
        "drafted_by_position": counters["drafted"].sum(axis=0).tolist(),
        "accepted_by_position": counters["accepted"].sum(axis=0).tolist(),
    }

  def cost_curve(self, drafter: str, prefixes: Any, lengths: Any,
                 options: Any) -> dict[int, float]:
    """Seconds of a pass of each width of an adaptive drafter."""
    sizes = self.generators[drafter].drafter.sizes
    found = {size: [] for size in sizes}
    for repeat in range(6):
      for number, size in enumerate(sizes):
        run = self.decode(drafter, prefixes, lengths, options, number, 8)
        if repeat and run["steps"]:            # the first compiles
          found[size].append(run["seconds"] / run["steps"])
    self._states.pop(drafter)
    return {size: statistics.median(times) for size, times in found.items()}


def sections() -> Iterator[tuple[str, int]]:
  """What is loaded one after another."""
  for dtype in FLAGS.dtypes:
    for rows in map(int, FLAGS.batches):
      yield dtype, rows


def measure(dtype: str, rows: int, prompts: dict[str, list[str]]
            ) -> dict[str, Any]:
  """All drafters, categories and temperatures of one section."""
  import jax.numpy as jnp

  from jaxspec.generator import Options
  first = (dtype, rows) == next(sections()) and rows == 1
  aside = [text for text in FLAGS.aside if text] if first else []
  bench = Bench(dtype, rows, [*FLAGS.drafter, *aside])
  runs, curve = [], {}
  adaptive = next((d for d in reversed(FLAGS.drafter)
                   if d.startswith("adaptive")), None)
  for temperature in map(float, FLAGS.temperatures):
    for category, texts in prompts.items():
      texts = texts[:FLAGS.single_count] if rows == 1 else texts
      batches = [texts[i:i + rows] for i in range(0, len(texts), rows)]
      for number, batch in enumerate(batches):
        if len(batch) < rows:
          continue
        lengths, prefixes = bench.read([bench.ids(t) for t in batch])
        options = [Options(
            max_new_tokens=new_tokens(rows), temperature=temperature,
            ignore_eos=rows > 1, seed=1000 * number + row)
            for row in range(rows)]
        steps = 2**30 if rows == 1 else FLAGS.steps
        if not runs:
          for text in bench.generators:                        # compiles
            bench.decode(text, prefixes, lengths, options, steps=steps)
          if adaptive is not None:
            curve = bench.cost_curve(adaptive, prefixes, lengths, options)
            told = np.array(list(curve.values()), np.float32)
            for made in bench.generators.values():
              sizes = getattr(made.drafter, "sizes", ())
              if sizes:
                costs = np.interp(sizes, list(curve), told)
                made.drafter = made.drafter.replace(
                    costs=jnp.asarray(costs, jnp.float32))
        order = [PLAIN, *FLAGS.drafter, *(aside if not temperature else [])]
        tries: dict[str, list[dict[str, Any]]] = {text: [] for text in order}
        for repeat in range(1 if rows == 1 else FLAGS.repeats):
          close = [text for text in order
                   if not repeat or text.startswith((PLAIN, "adaptive"))]
          shift = (number + repeat) % len(close)
          for text in [*close[shift:], *close[:shift]]:
            tries[text].append(bench.decode(text, prefixes, lengths, options,
                                            steps=steps))
        for text, some in tries.items():
          some.sort(key=lambda run: pace([run]))
          runs.append({
              "drafter": text, "category": category,
              "temperature": temperature, "batch": number,
              "all_seconds": [run["seconds"] for run in some],
              **some[len(some) // 2]})
      print(f"{dtype} batch {rows} temperature {temperature:g} {category}: "
            + ", ".join(
                f"{short(d)} {speed(runs, d, category, temperature):.2f}"
                for d in order if d != PLAIN), flush=True)
  return {"dtype": dtype, "rows": rows, "cost_curve": curve, "runs": runs}


def pace(runs: list[dict[str, Any]]) -> float:
  """Seconds a token, over some runs."""
  tokens = sum(len(t) - 1 for r in runs for t in r["texts"])
  return sum(r["seconds"] for r in runs) / max(tokens, 1)


def short(drafter: str) -> str:
  """A drafter's name without its options, but for what it is made of."""
  return (drafter.replace("drafters=", "").replace("drafter=", "")
          .replace(":[", "[").replace(",nodes=", " "))


def picked(runs: list[dict[str, Any]], drafter: str, category: str | None,
           temperature: float) -> list[dict[str, Any]]:
  return [r for r in runs if r["drafter"] == drafter
          and r["temperature"] == temperature
          and category in (None, r["category"])]


def speed(runs: list[dict[str, Any]], drafter: str, category: str | None,
          temperature: float) -> float:
  """Seconds a token of plain decoding over those of a drafter."""
  return (pace(picked(runs, PLAIN, category, temperature))
          / pace(picked(runs, drafter, category, temperature)))


def summary(section: dict[str, Any]) -> list[dict[str, Any]]:
  """One line for each drafter, category and temperature."""
  runs, rows = section["runs"], section["rows"]
  curve = {int(size): cost for size, cost in section["cost_curve"].items()}
  lines = []
  for temperature in sorted({r["temperature"] for r in runs}):
    for drafter in dict.fromkeys(r["drafter"] for r in runs):
      for category in (None, *dict.fromkeys(r["category"] for r in runs)):
        some = picked(runs, drafter, category, temperature)
        if not some:
          continue
        plain = {(r["category"], r["batch"]): r["texts"] for r in picked(
            runs, PLAIN, category, temperature)}
        passes = sum(sum(r["passes"]) for r in some)
        tokens = sum(len(t) - 1 for r in some for t in r["texts"])
        drafts = sum(r["drafted_by_position"][0] for r in some
                     if r["drafted_by_position"])
        accepted = [sum(column) for column in zip(
            *(r["accepted_by_position"] for r in some))]
        width = sum(sum(r["scored"]) for r in some) / max(passes, 1)
        expected = None
        if curve:
          cost = np.interp(width, list(curve), list(curve.values()))
          expected = float(tokens / max(passes, 1) * curve[1] / cost)
        lines.append({
            "dtype": section["dtype"], "rows": rows, "drafter": drafter,
            "temperature": temperature, "category": category or "all",
            "speed": speed(runs, drafter, category, temperature),
            "expected_speed": expected,
            "tokens_per_pass": tokens / max(passes, 1),
            "mean_width": width,
            "tokens_per_second": tokens / sum(r["seconds"] for r in some),
            "acceptance_by_position": [a / max(drafts, 1) for a in accepted],
            "texts_that_differ": sum(
                any(x != y for x, y in zip(a, b)) for r in some for a, b in zip(
                    r["texts"], plain[r["category"], r["batch"]])),
            "texts": sum(len(r["texts"]) for r in some),
        })
  return lines


def table(lines: list[dict[str, Any]]) -> str:
  """Speeds relative to plain decoding, greedy, as Markdown."""
  keys = list(dict.fromkeys(
      (x["dtype"], x["rows"], x["temperature"]) for x in lines))
  parts = []
  for dtype, rows, temperature in keys:
    some = [x for x in lines if x["drafter"] != PLAIN and (
        x["dtype"], x["rows"], x["temperature"]) == (dtype, rows, temperature)]
    columns = list(dict.fromkeys(x["category"] for x in some))
    parts.append(
        f"\n{dtype}, batch {rows}, temperature {temperature:g}\n\n"
        f"| drafter | tokens/pass | {' | '.join(columns)} |\n"
        f"|---|---:|{'---:|' * len(columns)}")
    for drafter in dict.fromkeys(x["drafter"] for x in some):
      own = {x["category"]: x for x in some if x["drafter"] == drafter}
      parts.append(
          f"| {short(drafter)} | {own['all']['tokens_per_pass']:.2f} | "
          + " | ".join(f"{own[c]['speed']:.2f}" for c in columns) + " |")
  return "\n".join(parts)


def plot(lines: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Bars of the speed of every drafter, for each category and setting."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  greedy = [x for x in lines if x["drafter"] != PLAIN
            and x["temperature"] == min(y["temperature"] for y in lines)]
  settings = list(dict.fromkeys((x["dtype"], x["rows"]) for x in greedy))
  drafters = list(dict.fromkeys(x["drafter"] for x in greedy))
  categories = list(dict.fromkeys(x["category"] for x in greedy))
  figure, axes = plt.subplots(len(settings), 1, squeeze=False, sharex=True,
                              figsize=(10, 2.4 * len(settings)))
  for (dtype, rows), axis in zip(settings, axes[:, 0]):
    for number, drafter in enumerate(drafters):
      own = {x["category"]: x["speed"] for x in greedy if
             (x["dtype"], x["rows"], x["drafter"]) == (dtype, rows, drafter)}
      axis.bar(np.arange(len(categories)) + 0.8 * number / len(drafters) - 0.4,
               [own.get(c, 0) for c in categories], 0.8 / len(drafters),
               align="edge", label=short(drafter))
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_title(f"{dtype}, batch {rows}", fontsize=9)
    axis.set_ylabel("speed, plain = 1", fontsize=8)
    axis.set_xticks(np.arange(len(categories)), categories)
  axes[0, 0].legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
  """Runs what is not yet there, and writes everything."""
  del argv
  import jax
  prompts = read_prompts(FLAGS.prompts, FLAGS.count)
  output = pathlib.Path(FLAGS.output)
  partial = output.with_name(output.name + ".sections")
  setting = [machine.commit(), FLAGS.count, FLAGS.single_count,
             FLAGS.new_tokens, FLAGS.steps, FLAGS.repeats, FLAGS.prompt_tokens,
             FLAGS.drafter, FLAGS.aside, FLAGS.temperatures]
  done: list[dict[str, Any]] = []
  if partial.exists():
    kept = json.loads(partial.read_text())
    done = kept["sections"] if kept["setting"] == setting else []
  for dtype, rows in sections():
    if not any((s["dtype"], s["rows"]) == (dtype, rows) for s in done):
      done.append(measure(dtype, rows, prompts))
      jax.clear_caches()           # a process cannot hold programs without end
      output.parent.mkdir(parents=True, exist_ok=True)
      partial.write_text(json.dumps({"setting": setting, "sections": done}))
  lines = [line for section in done for line in summary(section)]
  for section in done:
    for run in section["runs"]:
      del run["texts"]
  machine.write(str(output), done, summary=lines)
  plot(lines, output.with_suffix(".png"))
  partial.unlink()
  print(table(lines))


if __name__ == "__main__":
  define_flags()
  app.run(main)
