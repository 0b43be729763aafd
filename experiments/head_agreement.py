# SPDX-License-Identifier: Apache-2.0
"""How often heads say what their model will say, on text they never saw.

  python -m experiments.head_agreement --prompts=question.jsonl --heads=A,B

The model answers the prompts greedily, and each head is asked at every place
of every answer; what stands there is what it should have said. Beside the
heads stand the untrained ones at the same layers, which are the plain early
exit (the logit lens), and tables that need no computation: the likeliest first
token, and the likeliest token behind the one before, learnt from the other
half of the answers. For Medusa heads the places they look ahead are told
apart: the first of them foretells the token behind the model's next.

Behind each confidence threshold stands how much a head would show and how much
of that would be taken back. First tokens have exact 95 % intervals. Tokens of
one answer are alike, so that intervals of all tokens come from drawing whole
answers anew.

The answers are kept beside the output, and the same command goes on from
there.
"""

import functools
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import machine, rates
from experiments.exactness import Journal
from experiments.speculation import read_prompts
from jaxspec import heads as heads_lib
from jaxspec import loop
from jaxspec.confidence import confidence
from jaxspec.heads import ExitHead, MedusaHeads

FLAGS = flags.FLAGS
# First places of answers that are told apart.
PLACES = (0, 1, 2, 4, 8, 16, 32)
THRESHOLDS = tuple(np.round(np.arange(0, 1, 0.05), 2)) + (0.975, 0.99)
WIDTHS = (128, 256, 512, 1024, 2048)


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string("model", "smollm2-135m", "what answers")
  flags.DEFINE_string("dtype", "bfloat16", "of the weights")
  flags.DEFINE_string(
      "prompts", None, "JSON lines with `turns` and `category`", required=True)
  flags.DEFINE_list("heads", [], "folders of heads, of kind exit or medusa")
  flags.DEFINE_list("layers", [], "of further untrained heads")
  flags.DEFINE_string(
      "output", "experiments/results/head_agreement.json",
      "where the result goes; the plot goes beside it")
  flags.DEFINE_integer("count", 40, "prompts of each category")
  flags.DEFINE_integer("prompt_tokens", 1024, "a longer prompt is left out")
  flags.DEFINE_integer("new_tokens", 64, "of an answer at most")
  flags.DEFINE_integer("rows", 8, "answers made side by side")
  flags.DEFINE_enum("measure", "top", ["top", "margin", "entropy"],
                    "of confidence")


def answer(generator: Any, prompts: dict[str, list[list[int]]],
           new_tokens: int, journal: Journal,
           say: Callable[[str], None] = print) -> list[dict[str, Any]]:
  """The model's greedy answers, those that are there not made again."""
  found = []
  for category, texts in prompts.items():
    for start in range(0, len(texts), generator.rows):
      some = texts[start:start + generator.rows]

      def make(some=some):
        from jaxspec.options import Options
        return [c.token_ids for c in generator.generate(
            some, Options(max_new_tokens=new_tokens))]
      answers = journal.get([category, some, new_tokens], make)
      found += [{"category": category, "prompt": p, "answer": a}
                for p, a in zip(some, answers) if a]
    say(f"{category}: {len(texts)} answers")
  return found


@functools.partial(jax.jit, static_argnames=("places", "measure", "dtype"))
def ask(model, heads, tokens, length, start, *, places, measure, dtype):
  """What heads say behind each token before a place, and how sure they are.

  Args:
    heads: by name.
    tokens: a prompt and its answer, `[1 T]`.
    start: tokens of the prompt, `[1]`.
    places: of the answer, at most.

  Returns:
    By name, tokens and confidences, `[ahead places]` each; under "model" what
    the model itself says in this pass.
  """
  taps = tuple(sorted({model.depth} | {
      h.layer for h in heads.values() if isinstance(h, ExitHead)}))
  prefix = loop.prefill(model, taps, tokens, length,
                        chunk=tokens.shape[1], dtype=dtype)
  seen = dict(zip(taps, prefix.features))
  at = (start - 1)[:, None] + jnp.arange(places)[None]

  def here(x):
    return jnp.take_along_axis(x, at[..., None], axis=1)

  def told(head, logits):
    """Of `[1 places W]`."""
    best = jnp.argmax(logits[0], axis=-1)
    ids = None if head is None else head.tokens
    return (best if ids is None else ids[...][best],
            confidence(logits[0], measure))

  top = here(seen[model.depth])
  found = {"model": [told(None, model.unembed(top))]}
  for name, head in heads.items():
    if isinstance(head, ExitHead):
      x = here(head.attended(seen[head.layer]))
      found[name] = [told(head, head(model, x))]
    else:
      y = head(top)
      found[name] = [told(head, head.logits(model, y[:, :, n]))
                     for n in range(head.count)]
  return {name: tuple(map(jnp.stack, zip(*some)))
          for name, some in found.items()}


def examine(model: Any, heads: dict[str, Any],
            answers: Sequence[dict[str, Any]], *, places: int,
            measure: str = "top", dtype: Any = jnp.float32,
            on_text: Callable[[int, int], None] | None = None
            ) -> list[dict[str, Any]]:
  """Whether each head was right, by text, head, look-ahead and place.

  Returns:
    For each answer its category, and by head a list of `(ahead, place, right,
    sure)`; `ahead` is 0 for what tells the very next token.
  """
  found = []
  for number, one in enumerate(answers, 1):
    prompt, said = one["prompt"], one["answer"][:places]
    whole = [*prompt, *said]
    # The last places may lie beyond the answer.
    width = next(w for w in (*WIDTHS, 2 * len(whole) + places)
                 if w >= len(prompt) + places)
    tokens = np.zeros((1, width), np.int32)
    tokens[0, :len(whole)] = whole
    told = jax.device_get(ask(
        model, heads, tokens, np.array([len(whole)], np.int32),
        np.array([len(prompt)], np.int32), places=places, measure=measure,
        dtype=dtype))
    marks = {}
    for name, (ids, sure) in told.items():
      first = 1 if isinstance(heads.get(name), MedusaHeads) else 0
      marks[name] = [
          (first + n, place, bool(ids[n, place - first - n] == said[place]),
           float(sure[n, place - first - n]))
          for n in range(len(ids)) for place in range(first + n, len(said))]
    found.append({"category": one["category"], "marks": marks})
    if on_text:
      on_text(number, len(answers))
  return found


def tables(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """What tables say, as `examine` tells it: each half's answers by the other's.

  `first token` says one token, at the first place alone, and `first token by
  category` one for each category; `bigram` says at every place what most often
  followed the token before it. Its confidence is how often it did.
  """
  halves: list[dict[str, dict[Any, Counter[int]]]] = []
  for half in (0, 1):
    counts: dict[str, dict[Any, Counter[int]]] = {
        "first token": {}, "first token by category": {}, "bigram": {}}
    for one in answers[half::2]:
      for name, key, token in _events(one):
        counts[name].setdefault(key, Counter())[token] += 1
    halves.append(counts)
  found = []
  for number, one in enumerate(answers):
    counts = halves[1 - number % 2]
    marks: dict[str, list[Any]] = {name: [] for name in counts}
    for name, key, token in _events(one):
      seen = counts[name].get(key, Counter())
      best = max(seen, key=lambda t, seen=seen: (seen[t], -t), default=-1)
      marks[name].append((0, len(marks[name]), best == token,
                          seen[best] / max(sum(seen.values()), 1)))
    found.append({"category": one["category"], "marks": marks})
  return found


def _events(one: dict[str, Any]) -> Iterable[tuple[str, Any, int]]:
  """Which table is asked for what, and what is right."""
  first, *rest = one["answer"]
  yield "first token", None, first
  yield "first token by category", one["category"], first
  before = one["prompt"][-1]
  for token in (first, *rest):
    yield "bigram", before, token
    before = token


def place_of(place: int) -> str:
  """The name of the places that are counted together."""
  nth = max(n for n, low in enumerate(PLACES) if low <= place)
  low = PLACES[nth]
  if nth + 1 == len(PLACES):
    return f"{low}-"
  high = PLACES[nth + 1] - 1
  return str(low) if high == low else f"{low}-{high}"


def agreement(found: Sequence[dict[str, Any]], name: str, ahead: int,
              category: str | None = None, place: str | None = None
              ) -> dict[str, Any]:
  """How often it was right, over whole answers drawn anew."""
  hits, asked = [], []
  for text in found:
    if name in text["marks"] and category in (None, text["category"]):
      some = [m for m in text["marks"][name] if m[0] == ahead
              and place in (None, place_of(m[1]))]
      hits.append(sum(m[2] for m in some))
      asked.append(len(some))
  if max(asked, default=0) <= 1:        # one token a text: independent
    return rates.rate(sum(hits), sum(asked))
  return rates.clustered(hits, asked)


def summarise(found: Sequence[dict[str, Any]], layers: dict[str, int]
              ) -> list[dict[str, Any]]:
  """Agreement by head, look-ahead, category and place."""
  categories = list(dict.fromkeys(t["category"] for t in found))
  names = list(dict.fromkeys(n for t in found for n in t["marks"]))
  places = [place_of(p) for p in PLACES]
  lines = []
  for name in names:
    for ahead in sorted({m[0] for t in found
                         for m in t["marks"].get(name, ())}):
      head = {"head": name, "layer": layers.get(name), "ahead": ahead}
      for category in (None, *categories):
        lines.append({**head, "category": category or "all", "place": "all",
                      **agreement(found, name, ahead, category)})
        lines.append({**head, "category": category or "all", "place": "0",
                      **agreement(found, name, ahead, category, "0")})
      lines += [{**head, "category": "all", "place": place,
                 **agreement(found, name, ahead, None, place)}
                for place in places[1:]]
  return [x for x in lines if x["of"]]


def retractions(found: Sequence[dict[str, Any]], name: str
                ) -> dict[str, list[dict[str, Any]]]:
  """Emission and retraction against the threshold, of what comes next.

  Of first tokens exactly; of all tokens over whole answers drawn anew.
  """
  texts = [[m for m in t["marks"][name] if m[0] == 0] for t in found
           if name in t["marks"]]
  first = [m for some in texts for m in some if m[1] == 0]
  every = []
  for threshold in THRESHOLDS:
    shown = [[m[2] for m in some if m[3] >= threshold] for some in texts]
    every.append({
        "threshold": float(threshold),
        "emission": rates.clustered([*map(len, shown)], [*map(len, texts)]),
        "retraction": rates.clustered(
            [len(s) - sum(s) for s in shown], [*map(len, shown)])})
  return {"first": [rates.at_threshold([m[3] for m in first],
                                       [m[2] for m in first], t)
                    for t in THRESHOLDS], "tokens": every}


def table(lines: Sequence[dict[str, Any]]) -> str:
  """Markdown: agreement over all categories, by place."""
  places = ["all", *(place_of(p) for p in PLACES)]
  parts = ["| head | layer | ahead | " + " | ".join(places) + " |",
           "|---|---:|---:|" + "---:|" * len(places)]
  own: dict[Any, dict[str, dict[str, Any]]] = {}
  for x in lines:
    if x["category"] == "all":
      own.setdefault((x["head"], x["layer"], x["ahead"]), {})[x["place"]] = x
  for (name, layer, ahead), by in own.items():
    parts.append(f"| {name} | {'' if layer is None else layer} | {ahead} | "
                 + " | ".join(
                     f"{by[p]['share']:.1%}" if p in by else ""
                     for p in places) + " |")
  return "\n".join(parts)


def plot(lines: Sequence[dict[str, Any]],
         curves: dict[str, dict[str, list[dict[str, Any]]]],
         path: pathlib.Path) -> None:
  """Agreement by layer and by place; emission and retraction."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
  total = [x for x in lines if x["category"] == "all"]
  for label, chosen in (
      ("untrained", [x for x in total if x["head"].startswith("untrained")]),
      ("trained", [x for x in total if x["layer"] is not None
                   and not x["head"].startswith("untrained")])):
    for place, style in (("all", "-"), ("0", "--")):
      some = sorted((x for x in chosen if x["place"] == place),
                    key=lambda x: x["layer"])
      if some:
        share = np.array([x["share"] for x in some])
        axes[0].errorbar(
            [x["layer"] for x in some], share, linestyle=style, marker="o",
            color="C0" if label == "trained" else "C7", capsize=2,
            yerr=[share - [x["low"] for x in some],
                  [x["high"] for x in some] - share],
            label=f"{label}, {'all' if place == 'all' else 'first'} tokens")
  for place, style in (("all", "-"), ("0", "--")):
    for name, color in (("bigram", "C1"),
                        ("first token by category", "C2")):
      some = [x for x in total if (x["head"], x["place"]) == (name, place)]
      if some and (name == "bigram") == (place == "all"):
        axes[0].axhline(some[0]["share"], color=color, linestyle=style,
                        label=name)
  axes[0].set(xlabel="layers below the head", ylim=(0, 1),
              title="says what the model says")
  axes[0].legend(fontsize=7)
  places = [place_of(p) for p in PLACES]
  for name, ahead in dict.fromkeys((x["head"], x["ahead"]) for x in total
                                   if x["head"] != "model"):
    by = {x["place"]: x["share"] for x in total
          if (x["head"], x["ahead"]) == (name, ahead)}
    points = [(n, by[p]) for n, p in enumerate(places) if p in by]
    if len(points) > 1:
      axes[1].plot(*zip(*points), "o-", markersize=3,
                   label=name + (f" +{ahead}" if ahead else ""))
  axes[1].set_xticks(range(len(places)), places)
  axes[1].set(xlabel="place in the answer", ylim=(0, 1), title="by place")
  axes[1].legend(fontsize=6)
  for number, (name, curve) in enumerate(curves.items()):
    for kind, style in (("first", "--"), ("tokens", "-")):
      some = [p for p in curve[kind] if p["retraction"]["share"] is not None]
      if some:
        axes[2].plot([p["emission"]["share"] for p in some],
                     [p["retraction"]["share"] for p in some], style,
                     color=f"C{number}", label=f"{name}, {kind}")
  axes[2].set(xlabel="shown", ylabel="taken back", xlim=(0, 1), ylim=(0, 1),
              title="by threshold")
  axes[2].legend(fontsize=6)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def load_heads(model: Any, folders: Sequence[str], layers: Sequence[int]
               ) -> dict[str, Any]:
  """Trained heads, and the untrained ones at their layers and at others."""
  found = {}
  for folder in folders:
    path = pathlib.Path(folder)
    kind = json.loads((path / "config.json").read_text()).get("kind")
    found[path.name] = heads_lib.load(folder, model, kind).heads
  below = {h.layer for h in found.values() if isinstance(h, ExitHead)}
  for layer in sorted(below | set(layers)):
    found[f"untrained {layer}"] = ExitHead.init(model, layer=layer)
  return found


def main(argv: list[str]) -> None:
  """Answers what is not yet answered, asks, and writes everything."""
  del argv
  from jaxspec.generator import Generator
  if len({pathlib.Path(f).name for f in FLAGS.heads}) < len(FLAGS.heads):
    raise app.UsageError("each folder of --heads needs a name of its own")
  made = Generator.load(FLAGS.model, dtype=FLAGS.dtype, rows=FLAGS.rows,
                        capacity=FLAGS.prompt_tokens + FLAGS.new_tokens)
  heads = load_heads(made.model, FLAGS.heads, list(map(int, FLAGS.layers)))
  prompts = {}
  for category, texts in read_prompts(FLAGS.prompts, FLAGS.count).items():
    ids = [made.tokenizer.encode(made.tokenizer.render(
        [{"role": "user", "content": text}]), special=False) for text in texts]
    prompts[category] = [i for i in ids if len(i) <= FLAGS.prompt_tokens]
  output = pathlib.Path(FLAGS.output)
  journal = Journal(
      output.with_suffix(".answers.jsonl"),
      [heads_lib.fingerprint(made.model), FLAGS.dtype])
  answers = answer(made, prompts, FLAGS.new_tokens, journal)

  def tell(number, count):
    if number % 20 == 0 or number == count:
      print(f"examined {number} of {count}", flush=True)

  with jax.set_mesh(made.mesh):
    found = examine(made.model, heads, answers, places=FLAGS.new_tokens,
                    measure=FLAGS.measure, dtype=made.cache_dtype,
                    on_text=tell)
  for text, more in zip(found, tables(answers)):
    text["marks"] |= more["marks"]
  lines = summarise(found, {name: h.layer for name, h in heads.items()
                            if isinstance(h, ExitHead)})
  curves = {name: retractions(found, name) for name in found[0]["marks"]
            if name != "model" and not isinstance(
                heads.get(name), MedusaHeads)}
  machine.write(str(output), found, summary=lines, retraction=curves,
                answers=hashlib.sha256(json.dumps(answers).encode()
                                       ).hexdigest()[:16])
  plot(lines, curves, output.with_suffix(".png"))
  print(table(lines))


if __name__ == "__main__":
  define_flags()
  app.run(main)
