# SPDX-License-Identifier: Apache-2.0
"""Figures of streams side by side: from records to lines, a table, a plot."""

import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
PLAIN = "apart"


def middle(values: Sequence[float]) -> float | None:
  """The median, if there is one."""
  return statistics.median(values) if values else None


def of(records: Sequence[Record], section: str) -> list[Record]:
  return [r for r in records if r["section"] == section]


def differ(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]
           ) -> int:
  """Texts that are not the same, as far as both go."""
  return sum(any(a != b for a, b in zip(x, y)) for x, y in zip(one, other))


def throughput(records: Sequence[Record]) -> list[dict[str, Any]]:
  """Tokens a second of all streams together, for each way to write them."""
  lines = []
  races = [r for r in of(records, "race") if r["task"] == "answer"]
  for count in dict.fromkeys(r["streams"] for r in races):
    some = [r for r in races if r["streams"] == count]
    for name in some[0]["methods"]:
      if "," in name:
        continue
      own = [r["methods"][name] for r in some]
      tokens = [r["rows"] * count for r in some]

      def faster(than: str, some=some, name=name) -> float | None:
        return middle([r["methods"][than]["seconds"]
                       / r["methods"][name]["seconds"] for r in some])
      lines.append({
          "streams": count, "method": name, "samples": len(some),
          "quiet": sum(m["quiet"] for m in own),
          "tokens_per_second": middle([t / m["seconds"]
                                       for t, m in zip(tokens, own)]),
          "ms_per_pass": middle([1e3 * m["seconds"] / m["passes"]
                                 for m in own]),
          "passes_per_token": sum(m["passes"] for m in own) / sum(tokens),
          "of_separate": faster("separate"),
          "of_sequential": faster("sequential"),
          "texts": count * len(some),
          "texts_that_differ": sum(
              differ(r["methods"][name]["texts"],
                     r["methods"]["sequential"]["texts"]) for r in some),
      })
  return lines


def speculation(records: Sequence[Record]) -> list[dict[str, Any]]:
  """Drafted rows against plain ones, for each task and drafter."""
  lines, races = [], of(records, "race")
  for count, task in dict.fromkeys((r["streams"], r["task"]) for r in races):
    some = [r for r in races if (r["streams"], r["task"]) == (count, task)]
    for name in some[0]["methods"]:
      if not name.startswith(f"{PLAIN}, "):
        continue
      own = [r["methods"][name] for r in some]
      plain = [r["methods"][PLAIN] for r in some]
      passes = sum(m["passes"] for m in own)
      rows = sum(r["rows"] for r in some)
      seconds = sum(m["seconds"] for m in own) / passes
      lines.append({
          "streams": count, "task": task,
          "drafter": name.removeprefix(f"{PLAIN}, "), "samples": len(some),
          "quiet": sum(m["quiet"] for m in own),
          "rows_per_pass": rows / passes,
          "tokens_per_pass": count * rows / passes,
          "accepted": sum(m["accepted"] for m in own)
          / max(1, sum(m["drafted"] for m in own)),
          "ms_per_pass": 1e3 * seconds,
          # What a pass costs of a plain one: as many rows it must bring.
          "pays_from_rows_per_pass": seconds * sum(
              m["passes"] for m in plain) / sum(m["seconds"] for m in plain),
          "speed": middle([a["seconds"] / b["seconds"]
                           for a, b in zip(plain, own)]),
          "texts": count * len(some),
          "texts_that_differ": sum(
              differ(a["texts"], b["texts"]) for a, b in zip(plain, own)),
      })
  return lines


def delays(records: Sequence[Record]) -> list[dict[str, Any]]:
  """From the last word of a question to its answer's first and last.

  Of those that are answered: a model that is taught silence may keep it.
  """
  some, lines = of(records, "delay"), []
  for name in some[0]["methods"] if some else ():
    asked = [r["methods"][name] for r in some]
    own = [m for m in asked if m["rows"] is not None]
    if not own:
      continue
    lines.append({
        "method": name, "questions": len(asked), "answered": len(own),
        "quiet": sum(m["quiet"] for m in own),
        "first_rows": middle([m["rows"][0] for m in own]),
        "first_ms": middle([1e3 * m["seconds"][0] for m in own]),
        "last_rows": middle([m["rows"][1] for m in own]),
        "last_ms": middle([1e3 * m["seconds"][1] for m in own]),
        "answer_tokens": middle([len(m["answer"]) for m in own]),
        "passes_per_useful_token": sum(m["passes"] for m in own) / sum(
            m["useful"] for m in own),
        "passes": sum(m["passes"] for m in own)})
  return lines


def interrupts(records: Sequence[Record]) -> list[dict[str, Any]]:
  """How soon words stand in the table, and change what is written."""
  some, lines = of(records, "interrupt"), []
  for stride in dict.fromkeys(r["stride"] for r in some):
    own = [r for r in some if r["stride"] == stride]
    stops = [1e3 * r["stop_seconds"] for r in own
             if r["stop_seconds"] is not None]
    lines.append({
        "stride": stride, "samples": len(own),
        "quiet": sum(r["quiet"] for r in own),
        "row_ms": middle([1e3 * r["row_seconds"] for r in own]),
        "rows_waited": middle([r["rows_waited"] for r in own]),
        "most_rows_waited": max(r["rows_waited"] for r in own),
        "ms": middle([1e3 * r["seconds"] for r in own]),
        "most_ms": max(1e3 * r["seconds"] for r in own),
        "call_ms": middle([1e3 * r["call_seconds"] for r in own]),
        "changed_after": {
            str(n): sum(r["changed_after"] == n for r in own)
            for n in dict.fromkeys(r["changed_after"] for r in own)},
        "equal_before": sum(r["rows_equal_before"] == r["rows_before"]
                            for r in own),
        "stop_ms": middle(stops)})
  return lines


def summarise(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
  """All figures."""
  return {"throughput": throughput(records),
          "speculation": speculation(records), "delay": delays(records),
          "interrupt": interrupts(records)}


def table(summary: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  """The figures as Markdown."""
  parts = []
  for name, columns in {
      "throughput": ("streams", "method", "tokens_per_second", "ms_per_pass",
                     "passes_per_token", "of_separate", "of_sequential",
                     "texts_that_differ"),
      "speculation": ("streams", "task", "drafter", "rows_per_pass",
                      "pays_from_rows_per_pass", "speed", "ms_per_pass",
                      "texts_that_differ"),
      "delay": ("method", "questions", "answered", "first_rows", "first_ms",
                "last_rows", "last_ms", "answer_tokens",
                "passes_per_useful_token"),
      "interrupt": ("stride", "row_ms", "rows_waited", "most_rows_waited",
                    "ms", "most_ms", "call_ms", "changed_after",
                    "equal_before", "stop_ms")}.items():
    if not summary[name]:
      continue
    parts.append(f"\n{name}\n\n| "
                 + " | ".join(c.replace("_", " ") for c in columns)
                 + " |\n|" + "---|" * len(columns))
    parts += ["| " + " | ".join(_cell(line[c]) for c in columns) + " |"
              for line in summary[name]]
  return "\n".join(parts)


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
  if isinstance(value, dict):
    return ", ".join(f"{key}: {n}" for key, n in value.items())
  return "" if value is None else str(value)


def plot(summary: Mapping[str, Sequence[Mapping[str, Any]]],
         loss: Mapping[str, Mapping[str, float]] | None,
         path: pathlib.Path) -> None:
  """Speed by streams, drafted rows, delay, and the loss of each stream.

  Args:
    loss: `before` and `after` training, each by stream; None leaves it out.
  """
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  panels: list[Callable[[Any], None]] = [
      lambda axis: _speeds(axis, summary["throughput"]),
      lambda axis: _drafted(axis, summary["speculation"]),
      lambda axis: _delays(axis, summary["delay"])]
  if loss:
    panels.append(lambda axis: _losses(axis, loss))
  figure, axes = plt.subplots(1, len(panels), squeeze=False,
                              figsize=(4.4 * len(panels), 3.6))
  for draw, axis in zip(panels, axes[0]):
    draw(axis)
    axis.tick_params(labelsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _speeds(axis: Any, lines: Sequence[Mapping[str, Any]]) -> None:
  for method in dict.fromkeys(x["method"] for x in lines):
    own = [x for x in lines if x["method"] == method]
    axis.plot([x["streams"] for x in own],
              [x["tokens_per_second"] for x in own], marker="o",
              label=method)
  axis.set_xlabel("streams", fontsize=8)
  axis.set_title("tokens a second, all streams", fontsize=9)
  axis.set_ylim(bottom=0)
  if lines:
    axis.legend(fontsize=7)


def _drafted(axis: Any, lines: Sequence[Mapping[str, Any]]) -> None:
  """What rows a pass there are, and what they would have to be."""
  for task, drafter in dict.fromkeys((x["task"], x["drafter"])
                                     for x in lines):
    own = [x for x in lines if (x["task"], x["drafter"]) == (task, drafter)]
    counts = [x["streams"] for x in own]
    (line,) = axis.plot(counts, [x["rows_per_pass"] for x in own], marker="o",
                        label=f"{drafter}, {task}")
    axis.plot(counts, [x["pays_from_rows_per_pass"] for x in own],
              linestyle=":", color=line.get_color())
  axis.set_xlabel("streams; dotted: from where it pays", fontsize=8)
  axis.set_title("rows a pass, drafted", fontsize=9)
  if lines:
    axis.legend(fontsize=7)


def _delays(axis: Any, lines: Sequence[Mapping[str, Any]]) -> None:
  for number, key in enumerate(("first_ms", "last_ms")):
    axis.barh([n + 0.4 * number - 0.2 for n in range(len(lines))],
              [x[key] for x in lines], 0.38,
              label=f"{key.removesuffix('_ms')} word of the answer")
  axis.axvline(0, color="black", linewidth=0.8)
  axis.set_yticks(range(len(lines)), [x["method"] for x in lines])
  axis.set_title("ms after the last word of the question", fontsize=9)
  if lines:
    axis.legend(fontsize=7)


def _losses(axis: Any, loss: Mapping[str, Mapping[str, float]]) -> None:
  names = list(loss["before"])
  for number, when in enumerate(("before", "after")):
    axis.bar([n + 0.4 * number - 0.2 for n in range(len(names))],
             [loss[when].get(name, 0) for name in names], 0.38, label=when)
  axis.set_xticks(range(len(names)), names)
  axis.set_title("loss of each stream", fontsize=9)
  axis.legend(fontsize=7)
