# SPDX-License-Identifier: Apache-2.0
"""Same seed, same tokens: is speculation token for token plain decoding?

  python -m experiments.exactness --prompts=question.jsonl

Prompts (chats, their message cut) are decoded plainly, one at a time, and
again with a drafter, greedily and sampled with a seed each, over the three
caches, one row and many rows that are refilled in a permuted order. The
window cache gets the same weights with a sliding window on every other layer,
so that its rings go round, and is held to plain decoding of that model.

Passes of other shapes round differently, so a near tie may fall the other
way. A difference is excused only if at its position the change of logits that
it takes is below the rounding gap: the largest difference, over the same
texts, between logits of the plain one-row pass and of the combination's own
pass. What it takes is the gap between the two best scores, noise included,
or, for a token that top-p ruled out, the way to its threshold. Exit status 1
if one difference is not excused, or if nothing drafted was accepted.

What is finished is kept beside the output, and the same command goes on from
there.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments import machine

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string("model", "smollm2-135m", "what is decoded with")
  flags.DEFINE_multi_string(
      "prompts", None, "JSON lines with `turns`, `prompt` or `messages`; may "
      "be repeated", required=True)
  flags.DEFINE_integer("count", 200, "prompts, evenly from all files")
  flags.DEFINE_integer("prompt_tokens", 112, "a longer prompt is cut")
  flags.DEFINE_integer("new_tokens", 24, "decoded at most")
  flags.DEFINE_integer("rows", 8, "of the larger batch")
  flags.DEFINE_integer("window", 32, "positions a layer with a window sees")
  flags.DEFINE_integer("single_share", 3, "with one row, each cache gets every "
                       "n-th prompt, so that n = 3 gives each prompt one cache")
  flags.DEFINE_integer("bfloat16_share", 2, "bfloat16 gets every n-th prompt")
  flags.DEFINE_integer("texts", 24, "that the rounding gap is measured on")
  flags.DEFINE_string("drafter", "prompt_lookup", "what speculates")
  flags.DEFINE_float("temperature", 0.8, "of the sampled answers")
  flags.DEFINE_float("top_p", 0.9, "of the sampled answers")
  flags.DEFINE_string("output", "experiments/results/exactness.json",
                      "where the result goes")


# What is run.


@dataclasses.dataclass(frozen=True)
class Combination:
  """One way to decode a share of the prompts.

  Attributes:
    windowed: whether every other layer has a window.
    step: prompts `offset`, `offset + step` and so on are decoded.
  """

  dtype: str = "float32"
  windowed: bool = False
  cache: str = "contiguous"
  rows: int = 1
  drafter: str = "autoregressive"
  sampled: bool = False
  step: int = 1
  offset: int = 0

  @property
  def speculative(self) -> bool:
    return self.drafter != "autoregressive"

  def __str__(self) -> str:
    share = f", 1/{self.step} of the prompts" if self.step > 1 else ""
    return (f"{self.dtype} {'sampled' if self.sampled else 'greedy'}, "
            f"{self.cache} cache{', window' if self.windowed else ''}, "
            f"{self.rows} row{'s' if self.rows > 1 else ''}, "
            f"{self.drafter}{share}")

  def indices(self, count: int) -> range:
    return range(self.offset, count, self.step)


def plan(drafter: str, rows: int, single_share: int, bfloat16_share: int
         ) -> list[tuple[Combination, Combination | None]]:
  """All combinations, each behind the plain one it is compared with.

  In bfloat16 plain decoding with many rows is among them: it says what of the
  divergence is the batch and what is speculation.
  """
  found: list[tuple[Combination, Combination | None]] = []
  for windowed in (False, True):
    for sampled in (False, True):
      plain = Combination(windowed=windowed, sampled=sampled)
      found.append((plain, None))
      for cache in ("window",) if windowed else ("contiguous", "paged"):
        one = dataclasses.replace(plain, cache=cache, drafter=drafter)
        offset = ("contiguous", "paged", "window").index(cache) % single_share
        found += [
            (dataclasses.replace(one, rows=rows), plain),
            (dataclasses.replace(one, step=single_share, offset=offset), plain)]
  for sampled in (False, True):
    plain = Combination("bfloat16", sampled=sampled, step=bfloat16_share)
    found.append((plain, None))
    found += [(dataclasses.replace(plain, **changes), plain) for changes in (
        {"rows": rows}, {"drafter": drafter},
        {"rows": rows, "drafter": drafter})]
  return found


def read_chats(tokenizer: Any, paths: Iterable[str], count: int, length: int
               ) -> list[list[int]]:
  """Token ids of `count` chats, each of at most `length` tokens.

  A long message is cut; what the chat template puts around it stays whole.
  """
  from jaxspec.apps.decode import read_prompts
  mark = "\x00message\x00"
  head, _, tail = tokenizer.render(
      [{"role": "user", "content": mark}]).partition(mark)
  head, tail = (tokenizer.encode(part, special=False) for part in (head, tail))
  texts = []
  for path in paths:
    for prompt in read_prompts(types.SimpleNamespace(
        prompt=None, prompts=path, resume=False)):
      texts.append(prompt if isinstance(prompt, str)
                   else prompt[0]["content"])
  count = min(count, len(texts))
  return [[*head, *tokenizer.encode(texts[i * len(texts) // count],
                                    special=False)[:length - len(head)
                                                   - len(tail)], *tail]
          for i in range(count)]


class Models:
  """The model in one precision at a time, and generators that share it."""

  def __init__(self, name: str, window: int, capacity: int):
    self._name, self._window, self._capacity = name, window, capacity
    self._dtype: str | None = None

  def __call__(self, one: Combination) -> Any:
    """A generator that decodes as `one` says."""
    from jaxspec.apps import launch
    from jaxspec.generator import Generator
    if one.dtype != self._dtype:
      self._loaded = None                              # not two at a time
      with launch.progress("loading") as on_progress:
        self._loaded = Generator.load(self._name, dtype=one.dtype,
                                      on_progress=on_progress)
      self._dtype = one.dtype
    loaded: Any = self._loaded
    model = loaded.model
    if one.windowed:
      model = with_windows(model, self._window)
    return Generator(
        model, loaded.tokenizer, drafter=one.drafter, rows=one.rows,
        capacity=self._capacity, cache=one.cache, mesh=loaded.mesh,
        eos_ids=loaded.eos_ids)


def with_windows(model: Any, window: int | None) -> Any:
  """The model, every other layer of which sees `window` positions."""
  from flax import nnx
  model = nnx.merge(*nnx.split(model))                 # the same arrays
  model.config = dataclasses.replace(model.config, windows=tuple(
      None if layer % 2 else window for layer in range(model.config.depth)))
  return model


class Journal:
  """What is finished, a line each, by a digest of all that decides it."""

  def __init__(self, path: str | os.PathLike, settings: Any):
    self.path, self._settings = pathlib.Path(path), settings
    self._found = {}
    if self.path.exists():
      for line in self.path.read_text().splitlines():
        try:
          key, record = json.loads(line)
        except ValueError:                 # the last line may be cut short
          continue
        self._found[key] = record

  def get(self, name: Any, make: Callable[[], Any]) -> Any:
    """The record called `name`, made now unless it is there."""
    text = json.dumps([self._settings, name], sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    if key not in self._found:
      record = json.loads(json.dumps(make()))
      self.path.parent.mkdir(parents=True, exist_ok=True)
      with self.path.open("a") as file:
        file.write("\n" + json.dumps([key, record]))
      self._found[key] = record
    return self._found[key]


def code() -> str:
  """A digest of the code under test: results of other code do not count."""
  import jaxspec
  import pallas_kernels
  digest = hashlib.sha256()
  for package in (jaxspec, pallas_kernels):
    folder = pathlib.Path(package.__file__).parent
    for path in sorted(folder.rglob("*.py")):
      digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


# Decoding.


def decode(generator: Any, one: Combination,
           prompts: Sequence[Sequence[int]], options: Any) -> dict[str, Any]:
  """Decodes the combination's prompts; many rows in a permuted order.

  Args:
    options: called with the index of a prompt.
  """
  from jaxspec import metrics
  from jaxspec.apps import launch
  order = np.array(one.indices(len(prompts)))
  if one.rows > 1:
    order = np.random.default_rng(len(prompts)).permutation(order)
  begun = time.perf_counter()
  done = 0
  with launch.progress("decoding") as on_progress:
    def on_completion(at, completion):
      nonlocal done
      done += 1
      if on_progress:
        on_progress("", done, len(order))
    completions = generator.generate(
        [prompts[i] for i in order], [options(int(i)) for i in order],
        on_completion=on_completion)
  for completion in completions:
    completion.stats.reconcile()
  stats = metrics.total(completion.stats for completion in completions)
  answers = {int(i): completion.token_ids
             for i, completion in zip(order, completions)}
  return {
      "answers": dict(sorted(answers.items())),
      "drafted": stats.drafted, "accepted": stats.accepted,
      "passes": stats.passes, "tokens": stats.new_tokens,
      "ended": sum(c.finish_reason == "stop" for c in completions),
      "seconds": round(time.perf_counter() - begun, 1),
  }


def follow(generator: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
           ) -> Iterator[list[np.ndarray]]:
  """Logits of given answers, in passes of the generator's own shape.

  As many rows as it has are read and then led along their answers, as many
  nodes a pass as its drafter proposes; every node is committed, so that keys
  and values have this shape's rounding too.

  Args:
    texts: prompts and answers.

  Yields:
    For `rows` texts at a time, of each the logits [n V] that its answer's
    tokens were taken from.
  """
  import jax
  import jax.numpy as jnp

  from jaxspec import loop
  from jaxspec.generator import CHUNK
  rows, nodes = generator.rows, generator.drafter.height + 1
  for at in range(0, len(texts), rows):
    group = texts[at:at + rows]
    full = [*group, *group[:1] * (rows - len(group))]
    size = max(len(prompt) for prompt, _ in full)
    steps = -(-(max(len(answer) for _, answer in full) - 1) // nodes)
    bucket = next(b for b in generator._buckets if b >= size)
    prompts = np.zeros((rows, bucket), np.int32)
    answers = np.zeros((rows, steps * nodes), np.int32)
    for i, (prompt, answer) in enumerate(full):
      prompts[i, :len(prompt)] = prompt
      answers[i, :len(answer) - 1] = answer[:-1]
    with jax.set_mesh(generator.mesh):
      prefix = loop.prefill(
          generator.model, (), jnp.asarray(prompts),
          jnp.array([len(prompt) for prompt, _ in full], jnp.int32),
          chunk=CHUNK, dtype=generator.cache_dtype)
      state = generator._init()
      logits, cache = _begin(
          generator.model, state.seq.cache, prefix,
          jnp.full(rows, generator.capacity, jnp.int32))
      found = [np.asarray(logits)]
      for step in range(steps):
        logits, cache = _advance(
            generator.model, cache,
            jnp.asarray(answers[:, step * nodes:(step + 1) * nodes]))
        found.append(np.asarray(logits))
    found = np.concatenate(found, axis=1)
    yield [found[i, :len(answer)] for i, (_, answer) in enumerate(group)]


def _compiled(function):
  """`function` under `jax.jit`, its cache (second argument) donated."""
  @functools.cache
  def made():
    import jax
    return jax.jit(function, donate_argnums=1)
  return lambda *args: made()(*args)


@_compiled
def _begin(model, cache, prefix, reserve):
  import jax.numpy as jnp
  cache = cache.insert(jnp.arange(len(reserve)), prefix.cache, reserve)
  return model.unembed(prefix.last[:, None]), cache


@_compiled
def _advance(model, cache, tokens):
  import jax.numpy as jnp

  from jaxspec import stages
  from jaxspec.base import Proposal
  from jaxspec.drafters.autoregressive import Autoregressive
  from jaxspec.tree import chain, root
  rows, nodes = tokens.shape
  proposal = Proposal(tokens, chain(nodes - 1) if nodes > 1 else root())
  logits, scores = stages.score(model, Autoregressive(), cache, proposal)
  path = jnp.broadcast_to(jnp.arange(nodes)[None], (rows, nodes))
  cache = cache.commit(scores.fresh, path, jnp.full(rows, nodes, jnp.int32))
  return logits, cache


# Judging.


def rounding(plain: Any, other: Any,
             texts: Sequence[tuple[Sequence[int], Sequence[int]]]
             ) -> dict[str, Any]:
  """How far logits of two generators' passes are apart, over `texts`."""
  a = [logits for group in follow(plain, texts) for logits in group]
  b = [logits for group in follow(other, texts) for logits in group]
  off = np.concatenate([np.abs(x - y).max(axis=-1) for x, y in zip(a, b)])
  return {"gap": float(off.max()), "median": float(np.median(off)),
          "positions": len(off)}


def margin(logits: np.ndarray, ours: int, theirs: int, options: Any,
           position: int) -> dict[str, Any]:
  """The change of logits it takes to say `theirs` instead of `ours`.

  Args:
    logits: of the plain pass [V].
    ours: what it said.
    position: where the token stands in the text.

  Returns:
    `margin`; whether it is that of the way to top-p's threshold (`by_top_p`);
    and the `top2` gap, between the two best scores, noise included. Margin and
    gap count in units of logits, whatever the temperature.
  """
  import jax.numpy as jnp

  from jaxspec import sampling
  from jaxspec.options import as_request
  z = logits.astype(np.float64)
  if not options.temperature:
    best = np.partition(z, -2)[-2:]
    return {"margin": float(abs(z[ours] - z[theirs])),
            "by_top_p": False, "top2": float(best[1] - best[0])}
  one = as_request([options], [1], (), vocab=len(z), stops=1, biases=1)
  nothing = jnp.zeros((1, 1), jnp.int32)
  warped = np.asarray(sampling.warp(
      jnp.asarray(logits)[None], one.sampling, sampling.History(
          nothing, nothing[0], nothing[0] + 1, nothing,
          jnp.ones((1, 1, 1), bool)), nothing[0]))[0]
  noise = np.asarray(sampling.gumbel(
      one.sampling.key, jnp.full(1, position), len(z)))[0]
  z = z / options.temperature
  probs = np.exp(z - z.max())
  probs /= probs.sum()

  def to_threshold(token):
    """How far log-odds of what is likelier than it are from those of top-p."""
    above = min(probs[z > z[token]].sum(), 1 - 1e-12)
    if above <= 0 or options.top_p >= 1:
      return math.inf                       # nothing can rule it out
    return abs(math.log(above / (1 - above))
               - math.log(options.top_p / (1 - options.top_p)))

  scores = z + noise
  gap = abs(scores[ours] - scores[theirs])
  enters = 0.0 if np.isfinite(warped[theirs]) else to_threshold(theirs)
  if not enters:
    wins = min(gap, to_threshold(ours))
  else:
    wins = 0.0 if scores[theirs] > scores[ours] else gap
  best = np.partition(np.where(np.isfinite(warped), scores, -np.inf), -2)[-2:]
  most = max(enters, wins)
  return {"margin": float(most * options.temperature),
          "by_top_p": bool(most != gap),
          "top2": float((best[1] - best[0]) * options.temperature)}


def judge(plain: Any, reference: dict[str, Any], found: dict[str, Any],
          prompts: Sequence[Sequence[int]], options: Any, gap: float
          ) -> list[dict[str, Any]]:
  """Every answer that differs from the reference, and whether it may.

  Args:
    plain: the generator that made the reference.
    gap: the rounding gap.
  """
  differences = []
  for index, answer in found["answers"].items():
    expected = reference["answers"][index]
    if answer == expected:
      continue
    at = next((i for i, (a, b) in enumerate(zip(answer, expected)) if a != b),
              None)
    if at is None:                          # one of them only goes on
      differences.append({
          "prompt": int(index), "position": min(len(answer), len(expected)),
          "margin": math.inf, "excused": False})
      continue
    prompt = prompts[int(index)]
    ((logits,),) = follow(plain, [(prompt, expected[:at + 1])])
    one = margin(logits[at], expected[at], answer[at], options(int(index)),
                 len(prompt) + at)
    differences.append({
        "prompt": int(index), "position": at, "plain": expected[at],
        "found": answer[at], **one, "excused": one["margin"] < gap})
  return differences


def run(combinations: Iterable[tuple[Combination, Combination | None]],
        make: Callable[[Combination], Any], prompts: Sequence[Sequence[int]],
        options: Callable[[Combination, int], Any], texts: int,
        journal: Journal, say: Callable[[str], None] = print
        ) -> list[dict[str, Any]]:
  """Decodes, compares and judges every combination.

  Args:
    make: gives the generator of a combination.
    options: of a prompt, by its index.
    texts: how many of the reference's answers the rounding gap is measured on.
  """
  runs = []
  for one, reference in combinations:
    chosen = functools.partial(options, one)

    def decoded(one=one, chosen=chosen):
      return journal.get(["decode", dataclasses.astuple(one)], lambda: decode(
          make(one), one, prompts, chosen))

    found = decoded()
    result = {"name": str(one), **dataclasses.asdict(one),
              "prompts": len(found["answers"]),
              **{k: v for k, v in found.items() if k != "answers"}}
    runs.append(result)
    if reference is None:
      say(f"{one}: {found['tokens']} tokens, {found['seconds']} s")
      continue
    plain = decoded(reference, functools.partial(options, reference))
    spread = [i * len(plain["answers"]) // texts
              for i in range(min(texts, len(plain["answers"])))]

    def measured(one=one, reference=reference, plain=plain, spread=spread):
      keys = list(plain["answers"])
      return rounding(make(reference), make(one), [
          (prompts[int(keys[i])], plain["answers"][keys[i]]) for i in spread])

    # Whatever share of the prompts it decodes, its passes have one shape.
    shape = dataclasses.replace(one, step=1, offset=0)
    result["rounding"] = journal.get(
        ["rounding", dataclasses.astuple(shape)], measured)
    gap = result["rounding"]["gap"]
    differences = journal.get(
        ["judge", dataclasses.astuple(one)], lambda: judge(
            make(reference), plain, found, prompts, chosen, gap))  # noqa: B023
    excused = sum(d["excused"] for d in differences)
    compared = sum(map(len, found["answers"].values())) - sum(
        len(found["answers"][str(d["prompt"])]) - d["position"] - 1
        for d in differences)
    result |= {
        "diverged": len(differences), "excused": excused,
        "unexcused": len(differences) - excused,
        "divergence_rate": len(differences) / len(found["answers"]),
        "divergence_rate_per_token": len(differences) / compared,
        "excused_rate": excused / len(found["answers"]),
        "differences": differences,
    }
    speculation = (f", accepted {found['accepted']}/{found['drafted']}, "
                   f"{found['tokens'] / found['passes']:.2f} tokens a pass"
                   if one.speculative else "")
    say(f"{one}: {len(found['answers'])} answers, {len(differences)} differ, "
        f"{excused} excused (rounding gap {gap:.1e}){speculation}, "
        f"{found['seconds']} s")
  return runs


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What it comes to, by precision; plain batches apart."""
  groups: dict[str, list[dict[str, Any]]] = {}
  for one in runs:
    if "diverged" in one:
      plain = one["drafter"] == "autoregressive"
      groups.setdefault(one["dtype"] + (" plain, many rows" if plain else ""),
                        []).append(one)
  return {
      name: {
          **{key: sum(one[key] for one in some) for key in (
              "prompts", "tokens", "drafted", "accepted", "passes", "diverged",
              "excused", "unexcused")},
          "by_top_p": sum(d.get("by_top_p", False) for one in some
                          for d in one["differences"]),
          "divergence_rate": sum(one["diverged"] for one in some)
                             / sum(one["prompts"] for one in some),
          "excused_rate": sum(one["excused"] for one in some)
                          / sum(one["prompts"] for one in some),
          "largest_margin": max((d["margin"] for one in some
                                 for d in one["differences"]), default=0.0),
          "rounding_gaps": [min(one["rounding"]["gap"] for one in some),
                            max(one["rounding"]["gap"] for one in some)],
      } for name, some in groups.items()}


def failures(runs: Sequence[dict[str, Any]]) -> list[str]:
  """What must not be: one sentence each."""
  found = []
  for one in runs:
    if one.get("unexcused"):
      found.append(f"{one['name']}: {one['unexcused']} differences are not "
                   "explained by rounding")
    if one["drafter"] != "autoregressive" and not one["accepted"]:
      found.append(f"{one['name']}: nothing drafted was accepted, so nothing "
                   "is shown")
  return found


def main(argv: Sequence[str]) -> None:
  """Measures and reports."""
  del argv
  from jaxspec import checkpoint
  from jaxspec.apps import launch
  from jaxspec.generator import Options
  launch.use_compilation_cache(None)
  begun = time.perf_counter()
  settings = {key: FLAGS[key].value for key in (
      "model", "count", "prompt_tokens", "new_tokens", "rows", "window",
      "single_share", "bfloat16_share", "texts", "drafter", "temperature",
      "top_p")}
  with checkpoint.open_checkpoint(FLAGS.model) as opened:
    prompts = read_chats(opened.tokenizer, FLAGS.prompts, FLAGS.count,
                         FLAGS.prompt_tokens)
  digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]

  def options(one, index):
    if not one.sampled:
      return Options(max_new_tokens=FLAGS.new_tokens)
    return Options(max_new_tokens=FLAGS.new_tokens, seed=1000 + index,
                   temperature=FLAGS.temperature, top_p=FLAGS.top_p)

  # Room for one more pass behind the end, so that blocks of slots overlap.
  capacity = FLAGS.prompt_tokens + FLAGS.new_tokens + 32
  journal = Journal(FLAGS.output + ".partial",
                    {**settings, "prompts": digest, "code": code()})
  runs = run(plan(FLAGS.drafter, FLAGS.rows,
                  min(FLAGS.single_share, len(prompts)),
                  min(FLAGS.bfloat16_share, len(prompts))),
             Models(FLAGS.model, FLAGS.window, capacity), prompts, options,
             FLAGS.texts, journal,
             say=functools.partial(print, flush=True))
  summary, failed = summarise(runs), failures(runs)
  machine.write(FLAGS.output, runs, **settings, prompts_digest=digest,
                capacity=capacity, summary=summary, failures=failed,
                seconds=round(time.perf_counter() - begun))
  journal.path.unlink(missing_ok=True)
  for name, one in summary.items():
    print(f"{name}: {one['diverged']} of {one['prompts']} answers differ "
          f"({100 * one['divergence_rate']:.2f} %), {one['excused']} excused "
          f"({100 * one['excused_rate']:.2f} %), {one['unexcused']} not; "
          f"accepted {one['accepted']} of {one['drafted']} drafted tokens")
  print(FLAGS.output)
  for line in failed:
    print(line, file=sys.stderr)
  sys.exit(1 if failed else 0)


if __name__ == "__main__":
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  define_flags()
  app.run(main)
