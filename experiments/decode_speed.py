# SPDX-License-Identifier: Apache-2.0
"""Decoding speed beside transformers and llama.cpp, on one machine.

  python -m experiments.decode_speed --prompts=question.jsonl
  python -m experiments.decode_speed --prompts=... --coldstart

The same weights and the same real prompts (Spec-Bench's `turns`, as a chat of
exactly 128 tokens) go to every engine, one process each; the engines take
turns, one repetition at a time, so that a change of the machine's mood meets
them all. Repetition r has prompts of its own, the same for every engine, for
what speculation gives depends on the text. A sample during which others kept
the processor busy is taken again. Medians go to a JSON file, a plot and a
table in Markdown.
"""

import json
import os
import pathlib
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import app, flags

from experiments import machine
from experiments.prompts import chat_ids

_MODEL = flags.DEFINE_string("model", "smollm2-135m", "what is decoded with")
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "JSON lines with `turns`, `prompt` or `messages`",
    required=True)
_OUTPUT = flags.DEFINE_string(
    "output", "experiments/results/decode_speed.json",
    "where the result goes; the plot goes beside it")
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "rows decoded side by side")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 128, "of each prompt")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "decoded behind each")
_REPEATS = flags.DEFINE_integer("repeats", 5, "samples of each engine")
_RETRIES = flags.DEFINE_integer("retries", 2, "of a sample that was disturbed")
_MAX_FOREIGN = flags.DEFINE_float(
    "max_foreign", 0.15, "cores that others may keep busy during a sample")
_THREADS = flags.DEFINE_integer("threads", 2, "of torch and of llama.cpp")
_ENGINES = flags.DEFINE_list(
    "engines", [], "run only engines whose name contains one of these")
_COMPILED = flags.DEFINE_bool(
    "compiled", False, "also torch.compile, which takes a minute each")
_CAPACITY = flags.DEFINE_integer(
    "capacity", None, "cache slots a row; just enough by default")
_COLDSTART = flags.DEFINE_bool(
    "coldstart", False, "time fresh processes to their first token instead")

PRECISIONS = ("f32", "bf16", "f16", "q8_0", "q4_1")
_TORCH = {"f32": "float32", "bf16": "bfloat16"}


# Prompts.


def read_prompts(path: str) -> list[str]:
  """The first user message of each line."""
  found = []
  for line in pathlib.Path(path).read_text().splitlines():
    if not line.strip():
      continue
    record = json.loads(line)
    if "turns" in record:
      found.append(record["turns"][0])
    elif "messages" in record:
      found.append(record["messages"][0]["content"])
    else:
      found.append(record["prompt"])
  return found


# Engines in their processes.


class Worker:
  """An engine in a process of its own.

  Attributes:
    weight_bytes: what one pass reads.
    load_seconds: how long it took to come up.
  """

  def __init__(self, name: str, spec: dict[str, Any]):
    """Starts it; `ready` waits until it is there."""
    self.name, self.spec = name, spec
    self._errors = tempfile.TemporaryFile("w+")
    self._process = subprocess.Popen(
        [sys.executable, "-m", "experiments.engines", json.dumps(spec)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        text=True)

  @property
  def pid(self) -> int:
    return self._process.pid

  def ready(self, seconds: float = 300) -> None:
    """Waits for the engine."""
    hello = self._hear(seconds)
    self.weight_bytes = hello["weight_bytes"]
    self.load_seconds = hello["load_seconds"]

  def run(self, prompts, new_tokens: int, seconds: float = 900) -> dict:
    """One repetition."""
    assert self._process.stdin
    print(json.dumps({"prompts": prompts, "new_tokens": new_tokens}),
          file=self._process.stdin, flush=True)
    return self._hear(seconds)

  def close(self) -> None:
    """Lets it end by itself, and ends it where it does not."""
    assert self._process.stdin and self._process.stdout
    try:
      self._process.stdin.close()
    except BrokenPipeError:
      pass
    try:
      self._process.wait(20)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._errors.close()

  def _hear(self, seconds: float) -> dict[str, Any]:
    pipe = self._process.stdout
    assert pipe
    if not select.select([pipe], [], [], seconds)[0]:
      raise RuntimeError(f"{self.name}: no answer in {seconds:.0f} s")
    line = pipe.readline()
    answer = json.loads(line) if line else {
        "error": f"ended with code {self._process.wait()}"}
    if "error" in answer:
      self._errors.seek(0)
      tail = self._errors.read()[-2000:]
      raise RuntimeError(f"{self.name}: {answer['error']}\n{tail}")
    return answer


def contenders(rows: int, compiled: bool = False
               ) -> dict[str, dict[str, Any]]:
  """What is run with `rows` rows, by name: engine, variant and precision."""
  found: dict[str, dict[str, Any]] = {}
  for precision, dtype in _TORCH.items():
    for drafter, label in (("autoregressive", "plain"),
                           ("prompt_lookup", "prompt lookup")):
      found[f"jaxspec {label} {precision}"] = {
          "engine": "jaxspec", "dtype": dtype, "drafter": drafter}
  for precision, dtype in _TORCH.items():
    modes = ["eager", "static", *(["compiled"] if compiled else []),
             *(["lookup"] if rows == 1 else [])]
    for mode in modes:
      label = "prompt lookup" if mode == "lookup" else mode
      found[f"transformers {label} {precision}"] = {
          "engine": "transformers", "dtype": dtype, "mode": mode}
  for precision in PRECISIONS:
    found[f"llama.cpp plain {precision}"] = {
        "engine": "llama.cpp", "kind": precision}
  return found


def measure(workers: Sequence[Worker], prompts: Sequence[list[list[int]]],
            new_tokens: int, *, retries: int, max_foreign: float,
            say: Callable[[str], None] = print) -> list[dict[str, Any]]:
  """Samples every engine once per entry of `prompts`, in turns.

  A disturbed sample is taken again, `retries` times; every sample is kept,
  the disturbed ones with `clean` false.
  """
  samples = []
  for number, rows in enumerate(prompts):
    turn = number % len(workers)           # nobody is always first
    for worker in [*workers[turn:], *workers[:turn]]:
      for _ in range(retries + 1):
        with machine.ForeignLoad([worker.pid]) as load:
          result = worker.run(rows, new_tokens)
        clean = load.cores is None or load.cores <= max_foreign
        samples.append(sample(worker.name, number, result, clean=clean,
                              foreign=load.cores, busy=load.own))
        if clean:
          break
      one = samples[-1]
      say(f"  {number + 1}/{len(prompts)} {worker.name:34} "
          f"{one['tokens_per_second']:7.1f} tok/s"
          + ("" if one["clean"] else f"  (disturbed, {one['foreign']:.2f})"))
  return samples


def sample(name: str, number: int, result: dict[str, Any],
           **more: Any) -> dict[str, Any]:
  """What is kept of one repetition."""
  rows, new = len(result["tokens"]), len(result["tokens"][0])
  decode = result["seconds"] - result["first_seconds"]
  return {
      "name": name, "repetition": number, **more,
      "tokens_per_second": rows * (new - 1) / decode,
      "first_seconds": result["first_seconds"],
      "decode_seconds": decode,
      "passes": result["passes"],
      "tokens_per_pass": (new - 1) / result["passes"],
      "peak_mb": result["peak_mb"],
      **{key: result[key] for key in ("drafted", "accepted")
         if key in result},
      "tokens": result["tokens"],
  }


def summarise(samples: Iterable[dict[str, Any]], rows: int,
              specs: dict[str, dict[str, Any]], weight_bytes: dict[str, int],
              bandwidth: float) -> list[dict[str, Any]]:
  """The median of each engine, over clean samples where there are three.

  `same_tokens` is the share of the tokens up to which an answer equals that
  of the first engine of the same precision, or of any, in the same
  repetition.
  """
  groups: dict[str, list[dict[str, Any]]] = {}
  for one in samples:
    groups.setdefault(one["name"], []).append(one)
  references: dict[str, list[dict[str, Any]]] = {}
  found = []
  for name, all_of_it in groups.items():
    clean = [one for one in all_of_it if one["clean"]]
    used = clean if len(clean) >= 3 else all_of_it
    def median(key, used=used):
      return statistics.median(one[key] for one in used)
    engine, _, rest = name.partition(" ")
    variant, _, precision = rest.rpartition(" ")
    reference = references.setdefault(precision, references.get(
        next(iter(references), ""), all_of_it))
    rate = weight_bytes[name] * statistics.median(
        one["passes"] / one["decode_seconds"] for one in used)
    found.append({
        "name": name, "engine": engine, "variant": variant,
        "precision": precision, "rows": rows, "spec": specs[name],
        "samples": len(used), "clean_samples": len(clean),
        "tokens_per_second": median("tokens_per_second"),
        "lowest": min(one["tokens_per_second"] for one in used),
        "highest": max(one["tokens_per_second"] for one in used),
        "first_ms": 1e3 * median("first_seconds"),
        "tokens_per_pass": median("tokens_per_pass"),
        "peak_mb": max(one["peak_mb"] for one in all_of_it),
        "weight_bytes": weight_bytes[name],
        "bandwidth_fraction": rate / bandwidth,
        "same_tokens": _same(all_of_it, reference),
    })
  return found


def _same(samples, reference) -> float:
  """How far answers go along with those of the reference, as a share."""
  expected = {one["repetition"]: one["tokens"] for one in reference}
  shares = []
  for one in samples:
    for got, wanted in zip(one["tokens"], expected[one["repetition"]]):
      until = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b),
                   len(wanted))
      shares.append(until / len(wanted))
  return statistics.mean(shares)


# Reports.


def table(summaries: Sequence[dict[str, Any]]) -> str:
  """A table in Markdown, one row an engine and precision."""
  batches = sorted({one["rows"] for one in summaries})
  names = list(dict.fromkeys(one["name"] for one in summaries))
  by = {(one["name"], one["rows"]): one for one in summaries}
  head = ["engine", "weights"]
  for rows in batches:
    head += [f"batch {rows}: tokens/s", "first token", "tokens/pass",
             "of bandwidth", "peak memory"]
  lines = ["| " + " | ".join(head) + " |",
           "|---|---" + "|---:" * (len(head) - 2) + "|"]
  for name in names:
    engine, _, rest = name.partition(" ")
    variant, _, precision = rest.rpartition(" ")
    cells = [engine if variant == "plain" and engine != "jaxspec"
             else f"{engine}, {variant}", precision]
    for rows in batches:
      one = by.get((name, rows))
      cells += ["", "", "", "", ""] if one is None else [
          f"{one['tokens_per_second']:.0f}"
          + ("" if one["clean_samples"] >= 3 else "*"),
          f"{one['first_ms']:.0f} ms", f"{one['tokens_per_pass']:.2f}",
          f"{100 * one['bandwidth_fraction']:.0f} %",
          f"{one['peak_mb']:.0f} MB"]
    if engine == "jaxspec":
      cells = [f"**{cell}**" if cell else "" for cell in cells]
    lines.append("| " + " | ".join(cells) + " |")
  if any(one["clean_samples"] < 3 for one in summaries):
    lines += ["", "\\* fewer than three undisturbed samples"]
  return "\n".join(lines)


def best(summaries: Iterable[dict[str, Any]], rows: int
         ) -> dict[tuple[str, str], dict[str, Any]]:
  """The faster variant of each bar of the plot, by bar and precision.

  Transformers shows its best plain decoding, and its prompt lookup beside.
  """
  found: dict[tuple[str, str], dict[str, Any]] = {}
  for one in summaries:
    if one["rows"] != rows:
      continue
    bar = one["engine"]
    if one["engine"] == "jaxspec" or one["variant"] == "prompt lookup":
      bar += f", {one['variant']}"
    key = bar, one["precision"]
    if key not in found or (one["tokens_per_second"]
                            > found[key]["tokens_per_second"]):
      found[key] = one
  return found


def plot(summaries: Sequence[dict[str, Any]], path: str, title: str) -> None:
  """Tokens a second: a panel a batch size, a group a precision."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  colors = {"jaxspec, plain": "#7fb2e5", "jaxspec, prompt lookup": "#1f5fa8",
            "transformers": "#d9a441",
            "transformers, prompt lookup": "#a87412", "llama.cpp": "#9a9a9a"}
  batches = sorted({one["rows"] for one in summaries})
  figure, axes = plt.subplots(
      1, len(batches), figsize=(5.2 * len(batches) + 0.6, 4.2), squeeze=False)
  seen: dict[str, Any] = {}
  for axis, rows in zip(axes[0], batches):
    bars = best(summaries, rows)
    precisions = [p for p in PRECISIONS if any(q == p for _, q in bars)]
    at = 0.0
    ticks = []
    for precision in precisions:
      names = [name for name in colors if (name, precision) in bars]
      for i, name in enumerate(names):
        one = bars[name, precision]
        rate = one["tokens_per_second"]
        drawn = axis.bar(
            at + i, rate, 0.86, color=colors[name],
            yerr=[[rate - one["lowest"]], [one["highest"] - rate]],
            error_kw={"elinewidth": 0.8, "ecolor": "#404040"})
        seen.setdefault(name, drawn)
        axis.annotate(f"{rate:.0f}", (at + i, one["highest"]), (0, 2),
                      textcoords="offset points", ha="center", fontsize=8)
      ticks.append(at + (len(names) - 1) / 2)
      at += len(names) + 0.8
    axis.set_xticks(ticks, precisions)
    axis.set_title(f"batch {rows}", fontsize=10)
    axis.set_ylabel("tokens / s, all rows" if rows > 1 else "tokens / s")
    axis.spines[["top", "right"]].set_visible(False)
    axis.yaxis.grid(True, color="#e4e4e4")
    axis.set_axisbelow(True)
  figure.suptitle(title, fontsize=11)
  figure.legend(seen.values(), seen.keys(), loc="lower center",
                ncols=len(seen), frameon=False, fontsize=8)
  figure.tight_layout(rect=(0, 0.06, 1, 1))
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
  plt.close(figure)


# Cold start.


def coldstart(model: str, repeats: int) -> list[dict[str, Any]]:
  """A fresh process until the first byte of its answer is on stdout."""
  runs = []
  with tempfile.TemporaryDirectory() as folder:
    for number in range(repeats + 1):
      with machine.ForeignLoad() as load:
        first, whole = _first_byte([
            sys.executable, "-u", "-m", "jaxspec", "decode",
            f"--model={model}", "--prompt=Name the four seasons.", "--chat",
            "--max_new_tokens=16", f"--compilation_cache_dir={folder}"])
      runs.append({"cache": "warm" if number else "cold",
                   "first_seconds": first, "seconds": whole,
                   "foreign": load.cores})
      print(f"  {runs[-1]['cache']}: first token after {first:.2f} s")
  return runs


def _first_byte(command: Sequence[str]) -> tuple[float, float]:
  with tempfile.TemporaryFile("w+b") as errors:
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors,
                          bufsize=0) as process:
      assert process.stdout
      got = process.stdout.read(1)
      first = time.perf_counter() - start
      process.stdout.read()
    whole = time.perf_counter() - start
    if process.returncode or not got:
      errors.seek(0)
      raise RuntimeError(errors.read()[-2000:].decode(errors="replace"))
  return first, whole


def _prompts(count: int) -> list[list[int]]:
  from jaxspec import checkpoint
  with checkpoint.open_checkpoint(_MODEL.value) as opened:
    return chat_ids(opened.tokenizer, read_prompts(_PROMPTS.value),
                    _PROMPT_TOKENS.value, count)


def _batch(rows: int, ids: list[list[int]], bandwidth: float):
  """Everything with one batch size."""
  specs = {
      name: spec for name, spec in contenders(rows, _COMPILED.value).items()
      if not _ENGINES.value or any(part in name for part in _ENGINES.value)}
  # Speculation may look a few tokens past the end.
  capacity = _CAPACITY.value or _PROMPT_TOKENS.value + _NEW_TOKENS.value + 64
  prompts = [ids[i:i + rows] for i in range(0, len(ids), rows)]
  workers: list[Worker] = []
  print(f"batch {rows}: starting {len(specs)} engines")
  try:
    for name, spec in specs.items():
      more = {} if spec["engine"] == "jaxspec" else {"threads": _THREADS.value}
      worker = Worker(name, {**spec, **more, "model": _MODEL.value,
                             "rows": rows, "capacity": capacity})
      try:
        worker.ready()
        # Twice: what is compiled, and what is compiled when it comes again.
        for _ in range(2):
          worker.run(prompts[-1], min(8, _NEW_TOKENS.value))
        workers.append(worker)
      except RuntimeError as error:
        print(f"  left out: {error}", file=sys.stderr)
        worker.close()
    samples = measure(workers, prompts[:_REPEATS.value], _NEW_TOKENS.value,
                      retries=_RETRIES.value, max_foreign=_MAX_FOREIGN.value)
    return samples, summarise(
        samples, rows, specs, {w.name: w.weight_bytes for w in workers},
        bandwidth)
  finally:
    for worker in workers:
      worker.close()


def main(argv: Sequence[str]) -> None:
  """Measures and reports."""
  del argv
  output = pathlib.Path(_OUTPUT.value)
  if _COLDSTART.value:
    runs = coldstart(_MODEL.value, _REPEATS.value)
    warm = statistics.median(
        run["first_seconds"] for run in runs if run["cache"] == "warm")
    print(f"cold {runs[0]['first_seconds']:.2f} s, warm {warm:.2f} s "
          "to the first token")
    machine.write(str(output.with_name("coldstart.json")), runs,
                  warm_first_seconds=warm)
    return
  begun = time.perf_counter()
  rates = {n: machine.bandwidth(n) for n in (1, _THREADS.value)}
  print("memory bandwidth: " + ", ".join(
      f"{rate / 1e9:.1f} GB/s with {n} threads" for n, rate in rates.items()))
  # The last group of prompts is for warming up.
  batches = [int(rows) for rows in _BATCHES.value]
  groups = _REPEATS.value + 1
  ids = _prompts(max(batches) * groups)
  samples, summaries = {}, []
  for rows in batches:
    step = max(batches) // rows
    spread = ids if step == 1 else ids[::step][:rows * groups]
    samples[rows], found = _batch(rows, spread, max(rates.values()))
    summaries += found
  rates = {n: max(rate, machine.bandwidth(n)) for n, rate in rates.items()}
  machine.write(
      str(output), summaries, bandwidth_bytes_per_second=rates,
      prompt_tokens=_PROMPT_TOKENS.value, new_tokens=_NEW_TOKENS.value,
      threads=_THREADS.value, max_foreign=_MAX_FOREIGN.value,
      seconds=time.perf_counter() - begun,
      samples={rows: [{k: v for k, v in one.items() if k != "tokens"}
                      for one in some] for rows, some in samples.items()})
  cpu = machine.describe()
  plot(summaries, str(output.with_suffix(".png")),
       f"{_MODEL.value}, prompt {_PROMPT_TOKENS.value} + {_NEW_TOKENS.value} "
       f"tokens, greedy, {cpu['cores']} cores of {cpu['cpu']}")
  print(table(summaries))
  print(f"{output}, {output.with_suffix('.png')}; "
        f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  app.run(main)
