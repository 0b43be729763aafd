# SPDX-License-Identifier: Apache-2.0
"""What records of provisional tokens tell: when, how many, how often in vain.

`experiments.ttft` makes the records. A token is shown if the head was sure
enough of it and of all before it, and taken back if something else was settled
in its place. Times are compared request by request with plain decoding, so
that long prompts do not stand for all.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import rates
from jaxspec.drafters.early_exit import EarlyExit

PLAIN = "plain"
PLACES = (1, 4, 8)                    # settled tokens that are waited for
THRESHOLDS = tuple(np.round(np.arange(0, 1, 0.05), 2)) + (0.975, 0.99)


@dataclasses.dataclass(frozen=True)
class Method:
  """Early exit with one head and so many drafts.

  Attributes:
    measure, coefficients: of confidence.
    first, later: confidence from which on the first token of an answer, and
      each of the next ones, is shown.
  """

  name: str
  head: str
  drafts: int
  drafter: EarlyExit
  measure: str = "top"
  coefficients: tuple[float, ...] | None = None
  first: float = 0.5
  later: float = 0.5


def spread(values: Iterable[float | None]) -> dict[str, Any]:
  """Percentiles of what is there."""
  some = [v for v in values if v is not None]
  if not some:
    return {"count": 0}
  return {"count": len(some), **{
      f"p{p}": float(np.percentile(some, p)) for p in (50, 95, 99)}}


@dataclasses.dataclass(frozen=True)
class Asked:
  """One request by one method, beside the same request decoded plainly."""

  plain: dict[str, Any]
  own: dict[str, Any]
  row: int

  def settled(self, place: int, plain: bool = False) -> float | None:
    times = (self.plain if plain else self.own)["settled"].get(str(place))
    return None if times is None else times[self.row]

  @property
  def guessed(self) -> list[int]:
    return self.own["guessed"][self.row]

  @property
  def stood(self) -> list[bool]:
    """Which of the drafts are what was settled; behind a wrong one none is."""
    tokens = self.own["tokens"][self.row]
    right = [n < len(tokens) and tokens[n] == t
             for n, t in enumerate(self.guessed)]
    return np.logical_and.accumulate(right).tolist()

  @property
  def sure(self) -> list[float]:
    """The least confidence as far as each draft: it is shown from there on."""
    return np.minimum.accumulate(self.own["sure"][self.row]).tolist()

  def shown(self, first: float, later: float) -> list[bool]:
    """Which drafts are shown: those with all before them sure enough."""
    sure = np.array(self.own["sure"][self.row])
    least = np.where(np.arange(len(sure)) == 0, first, later)
    return np.logical_and.accumulate(sure >= least).tolist()

  @property
  def meant(self) -> list[int]:
    """Drafts for which something was settled; others never mattered."""
    return list(range(min(len(self.guessed),
                          len(self.own["tokens"][self.row]))))


def asked(records: Iterable[dict[str, Any]], method: str) -> list[Asked]:
  return [Asked(r["methods"][PLAIN], r["methods"][method], row)
          for r in records if method in r["methods"]
          for row in range(r["rows"])]


def ratio(a: float | None, b: float | None) -> float | None:
  return None if a is None or b is None else a / b


@dataclasses.dataclass(frozen=True)
class Costs:
  """Operations of one token, attention left out."""

  layer: float
  depth: int
  unembed: float
  head: float
  exit: int

  @classmethod
  def of(cls, model: Any, head: Any) -> "Costs":
    def size(part):
      return sum(2.0 * w.size for w in jax.tree.leaves(
          nnx.state(part, nnx.Param)) if w.ndim > 1)
    rows = model.vocab if head.tokens is None else len(head.tokens[...])
    unembed = 2.0 * model.config.width
    return cls(size(model.layers[0]), model.depth, unembed * model.vocab,
               size(head) + unembed * rows, head.layer)

  def waste(self, drafts: int, accepted: int) -> dict[str, float]:
    """Of drafts that fell, and of asking the head."""
    fell = drafts - accepted
    return {"lower": fell * self.exit * self.layer,
            "upper": fell * ((self.depth - self.exit) * self.layer
                             + self.unembed),
            "head": drafts * self.head}

  def plain(self, prompt: int, tokens: int) -> float:
    """Of a prompt and an answer without drafts."""
    return ((prompt + tokens - 1) * self.depth * self.layer
            + tokens * self.unembed)


def line(records: Sequence[dict[str, Any]], method: str,
         shows: Method | None, costs: Costs | None) -> dict[str, Any]:
  """What one method gave on some requests."""
  some = asked(records, method)
  found: dict[str, Any] = {
      "requests": len(some),
      "quiet": float(np.mean([x.own["quiet"] for x in some])),
      "settled_ms": {str(k): spread(
          _ms(x.settled(k)) for x in some) for k in PLACES}}
  if method == PLAIN:
    return found
  found["settled_later"] = {str(k): spread(
      _less(ratio(x.settled(k), x.settled(k, plain=True))) for x in some)
      for k in PLACES}
  found["provisional_ms"] = spread(_ms(x.own["provisional"]) for x in some)
  found["provisional_earlier"] = spread(
      1 - x.own["provisional"] / x.settled(1, plain=True) for x in some)
  # If layers were all that takes time.
  found["layers_earlier"] = float(np.mean([1 - x.own["below"] for x in some]))
  found["first_agreement"] = rates.rate(
      sum(x.stood[0] for x in some), len(some))
  found["settled_as_plain"] = rates.rate(
      sum(x.own["tokens"][x.row][:1] == x.plain["tokens"][x.row][:1]
          for x in some), len(some))
  if shows is None:
    return found
  found |= {"measure": shows.measure,
            **shown(some, shows.first, shows.later)}
  if costs:
    found["waste"] = wasted(records, method, costs)
  return found


def shown(some: Sequence[Asked], first: float, later: float
          ) -> dict[str, Any]:
  """What a stream shows, when, and for how long in vain."""
  on = [x.shown(first, later) for x in some]
  early = [x[0] for x in on]
  every = [(there[n], x.stood[n]) for x, there in zip(some, on)
           for n in x.meant]
  there = sum(a for a, _ in every)
  in_vain = [x.settled(1) - x.own["provisional"]
             for x, now in zip(some, early) if now and not x.stood[0]]
  seen = [x.own["provisional"] if now else x.settled(1)
          for x, now in zip(some, early)]
  right = [x.own["provisional"] if now and x.stood[0] else x.settled(1)
           for x, now in zip(some, early)]
  plain = [x.settled(1, plain=True) for x in some]
  return {
      "thresholds": {"first": first, "later": later},
      "first_emission": rates.rate(sum(early), len(some)),
      "first_retraction": rates.rate(len(in_vain), sum(early)),
      "token_emission": rates.rate(there, len(every)),
      "token_retraction": rates.rate(
          sum(a and not b for a, b in every), there),
      "shown_in_vain_ms": spread(map(_ms, in_vain)),
      "first_shown_ms": spread(map(_ms, seen)),
      "first_shown_earlier": spread(1 - a / b for a, b in zip(seen, plain)),
      # A token that is taken back has brought nothing.
      "first_right_earlier": spread(1 - a / b for a, b in zip(right, plain)),
      "mean_first_right_earlier": float(np.mean(
          [1 - a / b for a, b in zip(right, plain)]))}


def wasted(records: Sequence[dict[str, Any]], method: str, costs: Costs
           ) -> dict[str, Any]:
  """Operations for nothing, up to the last token that was waited for."""
  total: Counter[str] = Counter()
  plain, drafts, accepted, requests = 0.0, 0, 0, 0
  for record in records:
    own = record["methods"].get(method)
    if not own:
      continue
    for row, prompt in enumerate(record["prompt_tokens"]):
      total.update(costs.waste(own["drafts"][row], own["accepted"][row]))
      plain += costs.plain(prompt, len(own["tokens"][row]))
      drafts += own["drafts"][row]
      accepted += own["accepted"][row]
      requests += 1
  return {"drafts": drafts, "accepted": accepted,
          "flops_a_request": {k: v / requests for k, v in total.items()},
          "of_plain_decoding": sum(total.values()) / plain}


def curve(some: Sequence[Asked]) -> dict[str, list[dict[str, Any]]]:
  """Emission and retraction against the threshold, of firsts and of all."""
  every = [(x, n) for x in some for n in x.meant]
  return {
      "first": [rates.at_threshold([x.sure[0] for x in some],
                                   [x.stood[0] for x in some], t)
                for t in THRESHOLDS],
      "tokens": [rates.at_threshold([x.sure[n] for x, n in every],
                                    [x.stood[n] for x, n in every], t)
                 for t in THRESHOLDS]}


def priors(first: Sequence[tuple[str, int]]
           ) -> dict[str, list[tuple[int, float]]]:
  """What tables say of each request, learnt from all the others.

  Args:
    first: the category and the first settled token of each request.

  Returns:
    By table, the likeliest token of each request and its share.
  """
  found: dict[str, list[tuple[int, float]]] = {"unigram": [], "by_category": []}
  for table, guesses in found.items():
    keys = [c if table == "by_category" else "" for c, _ in first]
    counts: dict[str, Counter[int]] = {key: Counter() for key in keys}
    for key, (_, token) in zip(keys, first):
      counts[key][token] += 1
    for key, (_, token) in zip(keys, first):
      rest = counts[key].copy()
      rest[token] -= 1
      size = sum(rest.values())
      best = max(rest, key=lambda t, rest=rest: (rest[t], -t))
      guesses.append((best, rest[best] / size) if size else (-1, 0.0))
  return found


def compare_with_priors(records: Sequence[dict[str, Any]],
                        shows: dict[str, Method]) -> dict[str, Any]:
  """The head beside tables of first tokens, at the same retraction."""
  first = [(r["group"], r["methods"][PLAIN]["tokens"][row][0])
           for r in records for row in range(r["rows"])]
  sources: dict[str, tuple[list[float], list[bool]]] = {}
  for name, guesses in priors(first).items():
    sources[name] = ([p for _, p in guesses],
                     [g == t for (g, _), (_, t) in zip(guesses, first)])
  risks = {"5 %": 0.05, "10 %": 0.10, "20 %": 0.20}
  for name, method in shows.items():
    some = asked(records, name)
    sources[name] = ([x.sure[0] for x in some], [x.stood[0] for x in some])
    at = rates.at_threshold(*sources[name], method.first)
    if at["retraction"]["share"] is not None:
      risks[f"as {name}"] = at["retraction"]["share"]
  return {name: {"agreement": rates.rate(sum(right), len(right)),
                 "most_shown": {risk: rates.most_shown(sure, right, value)
                                for risk, value in risks.items()}}
          for name, (sure, right) in sources.items()}


def _ms(seconds: float | None) -> float | None:
  return None if seconds is None else 1e3 * seconds


def _less(value: float | None) -> float | None:
  return None if value is None else value - 1


def summarise(records: Sequence[dict[str, Any]], shows: dict[str, Method],
              costs: dict[str, Costs]) -> dict[str, Any]:
  """Lines for every setting, curves, and the control."""
  lines, curves, control = [], [], []
  settings = dict.fromkeys((r["rows"], r["temperature"], r["kind"])
                           for r in records)
  for rows, temperature, kind in settings:
    own = [r for r in records if (r["rows"], r["temperature"], r["kind"]) == (
        rows, temperature, kind)]
    setting = {"rows": rows, "temperature": temperature, "kind": kind}
    methods = list(dict.fromkeys(m for r in own for m in r["methods"]))
    groups = list(dict.fromkeys(r["group"] for r in own))
    for group in ([None, *groups] if kind == "category" else groups):
      some = [r for r in own if group in (None, r["group"])]
      for method in methods:
        if any(method in r["methods"] for r in some):
          lines.append({**setting, "group": group or "all", "method": method,
                        **line(some, method, shows.get(method),
                               costs.get(method))})
    if kind == "category":
      headed = {m: shows[m] for m in methods if m in shows}
      curves += [{**setting, "method": m, **curve(asked(own, m))}
                 for m in headed]
      control.append({**setting,
                      "sources": compare_with_priors(own, headed)})
  return {"lines": lines, "curves": curves, "priors": control}


def table(lines: Sequence[dict[str, Any]]) -> str:
  """Markdown: medians of each setting and group."""
  parts = [
      "| rows | prompts | method | provisional | 1st settled | 8th settled "
      "| shown earlier | 1st settled later | shown | taken back |",
      "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|"]

  def number(value, form, key="p50"):
    return "" if not value or value.get(key) is None else form(value[key])

  for x in lines:
    ms, percent = "{:.0f} ms".format, "{:+.1%}".format
    parts.append("| " + " | ".join([
        str(x["rows"]), f"{x['group']}" + (
            f", T={x['temperature']:g}" if x["temperature"] else ""),
        x["method"], number(x.get("provisional_ms"), ms),
        number(x["settled_ms"]["1"], ms), number(x["settled_ms"]["8"], ms),
        number(x.get("provisional_earlier"), "{:.0%}".format),
        number(x.get("settled_later", {}).get("1"), percent),
        number(x.get("first_emission"), "{:.0%}".format, "share"),
        number(x.get("first_retraction"), "{:.0%}".format, "share")]) + " |")
  return "\n".join(parts)


def plot(summary: dict[str, Any], path: pathlib.Path) -> None:
  """Times against the prompt's length; emission and retraction; priors."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
  lines = [x for x in summary["lines"] if x["kind"] == "length"]
  if lines:
    few = min(x["rows"] for x in lines)
    lines = [x for x in lines if x["rows"] == few and not x["temperature"]]
    axes[0].set_title(f"prompts of one length, {few} row(s), median")
  for number, method in enumerate(dict.fromkeys(x["method"] for x in lines)):
    own = [x for x in lines if x["method"] == method]
    color = f"C{number}"
    for key, style in (("provisional_ms", "--o"), ("settled_ms", "-s")):
      points = [(int(x["group"]), (x[key] if key != "settled_ms"
                                   else x[key]["1"])["p50"])
                for x in own if key in x]
      if points:
        axes[0].plot(*zip(*points), style, color=color, markersize=4,
                     label=f"{method}, {key.split('_')[0]}")
  axes[0].set(xscale="log", yscale="log", xlabel="tokens of the prompt",
              ylabel="ms to the first token")
  if lines:
    axes[0].legend(fontsize=6)
  curves = summary["curves"][:4]
  for number, one in enumerate(curves):
    points = [p for p in one["first"] if p["retraction"]["of"]]
    x = [p["threshold"] for p in points]
    color = f"C{number}"
    axes[1].plot(x, [p["emission"]["share"] for p in points], "--",
                 color=color, label=f"shown, {one['method']}, "
                 f"{one['rows']} row(s)")
    axes[1].plot(x, [p["retraction"]["share"] for p in points], "-",
                 color=color, label="taken back")
    axes[1].fill_between(x, [p["retraction"]["low"] for p in points],
                         [p["retraction"]["high"] for p in points],
                         color=color, alpha=0.15)
  axes[1].set(xlabel="threshold", ylim=(-0.02, 1.02), title="first tokens")
  if curves:
    axes[1].legend(fontsize=6)
  if summary["priors"]:
    sources = summary["priors"][0]["sources"]
    at = np.arange(len(sources))
    for shift, (label, get) in enumerate((
        ("agreement", lambda s: s["agreement"]),
        ("most shown, 10 % taken back",
         lambda s: s["most_shown"]["10 %"]["emission"]))):
      some = [get(s) for s in sources.values()]
      share = np.array([s["share"] for s in some])
      axes[2].bar(at + 0.4 * shift - 0.2, share, 0.4, label=label, yerr=[
          share - [s["low"] for s in some], [s["high"] for s in some] - share])
    axes[2].set_xticks(at, list(sources), rotation=20, fontsize=7)
    axes[2].set(ylim=(-0.02, 1.02), title="first tokens: the head and tables")
    axes[2].legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)
