# SPDX-License-Identifier: Apache-2.0
"""Time to the first token, shown and settled, with early exit and without.

  python -m experiments.ttft --prompts=question.jsonl --heads=FOLDER

Real prompts by category, and chats cut or joined to given lengths, are read
in turns:

  plain        chunk by chunk through all layers, then plain decoding
  layer-major  all chunks through the layers below the head, which speaks; then
               prompt and drafts together through the rest (`jaxspec.opening`)
  chunk-major  the same head, but the prompt goes chunk by chunk through all
               layers, and the last chunk alone through the lower ones first

Each is timed until what would be shown is there: the provisional token, the
first settled token, the 4th and the 8th. Nobody is always first, a sample in
which something was compiled or others kept the processor busy is taken again,
and times are compared request by request.

How early a head can speak is where it was put; what it knows is how often it
must be taken back. So every provisional token is kept with its confidence
beside the settled one: how many are shown, and how many of these are taken
back, follows for every threshold, with exact 95 % intervals. The control is a
table of first tokens, of all requests or of those of one category, which needs
no computation at all; it is judged on requests that it has not seen.

What is finished is kept beside the output, and the same command goes on from
there.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import machine
from experiments.exactness import Journal
from experiments.prompts import chat_ids
from experiments.provisional import (
  PLACES,
  PLAIN,
  Costs,
  Method,
  plot,
  summarise,
  table,
)
from experiments.speculation import read_prompts
from jaxspec import heads as heads_lib
from jaxspec import loop, opening, profiling
from jaxspec.base import HeadStart, Sequences
from jaxspec.caches import Place
from jaxspec.confidence import confidence
from jaxspec.drafters.early_exit import EarlyExit
from jaxspec.errors import InputError
from jaxspec.options import Options, as_request

FLAGS = flags.FLAGS
WIDTHS = (64, 128, 256, 512, 1024, 2048)
_STOPS, _BIASES = 16, 64


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string("model", "smollm2-135m", "what is decoded with")
  flags.DEFINE_string("dtype", "bfloat16", "of the weights")
  flags.DEFINE_string(
      "prompts", None, "JSON lines with `turns` and `category`", required=True)
  flags.DEFINE_list("heads", None, "folders with a head each", required=True)
  flags.DEFINE_string(
      "output", "experiments/results/ttft.json",
      "where the result goes; the plot goes beside it")
  flags.DEFINE_list("batches", ["1", "8"], "rows that are begun together")
  flags.DEFINE_list("temperatures", ["0"], "of sampling")
  flags.DEFINE_list("drafts", ["1", "3"], "lengths of the chains drafted")
  flags.DEFINE_integer("count", 40, "prompts of each category with one row")
  flags.DEFINE_integer("batch_count", 8, "of each category with several rows")
  flags.DEFINE_list("lengths", [str(w) for w in WIDTHS],
                    "of prompts that are cut or joined")
  flags.DEFINE_integer("repeats", 5, "prompts of each such length")
  flags.DEFINE_integer(
      "most_tokens", 4096, "rows times length, of those; more is left out")
  flags.DEFINE_integer("chunk", 512, "positions of a chunk")
  flags.DEFINE_float(
      "threshold", None, "confidence from which on a token is shown; what was "
      "calibrated for the head by default, else 0.5")
  flags.DEFINE_enum("measure", "top", ["top", "margin", "entropy"],
                    "of confidence, where none is stored")
  flags.DEFINE_integer("retries", 2, "of a sample that was disturbed")
  flags.DEFINE_float(
      "max_foreign", 0.2, "cores that others may keep busy during a sample")


@jax.jit
def through_last_chunk(model, drafter, tokens, length, request, prefix):
  """The last chunk, as far as the head; behind it nothing is known yet.

  Args:
    prefix: what `loop.prefill` made of all chunks before, with the drafter's
      taps; every prompt ends with the last chunk.
  """
  rows, before = prefix.tokens.shape
  count = tokens.shape[1] - before
  x, at = model.embed(tokens[:, before:]), _placed(rows, before, count)
  x, fresh = model.extend(x, prefix.cache,
                          model.init_fresh(prefix.cache, count), at,
                          layers=range(drafter.head.layer))
  draft = drafter.read(
      model, jnp.concatenate([prefix.features[0], x], axis=1), length - 1)
  cache = prefix.cache.replace(length=length - 1)
  walk = drafter.look(
      model, Sequences(tokens, length, length, cache), request, draft,
      HeadStart(x[:, -1:], model.init_fresh(cache, drafter.size),
                drafter.head.layer))
  return walk.tokens[:, 1], x, fresh


@jax.jit
def through_rest(model, drafter, prefix, x, fresh):
  """The last chunk through the other layers; the likeliest first token."""
  rows, before = prefix.tokens.shape
  x, _ = model.extend(x, prefix.cache, fresh,
                      _placed(rows, before, x.shape[1]),
                      layers=range(drafter.head.layer, model.depth))
  return jnp.argmax(model.unembed(x[:, -1:])[:, 0], axis=-1)


def _placed(rows: int, start: int, count: int) -> Place:
  return Place.of(
      start + jnp.broadcast_to(jnp.arange(count)[None], (rows, count)),
      jnp.tril(jnp.ones((count, count), bool)))


@functools.partial(jax.jit, static_argnames=("measure",))
def confidences(model, drafter, seen, coefficients, *, measure):
  """How sure the head was of each draft of a chain, `[R drafts]`.

  What a stream knows when it shows them; here apart from what is timed.
  """
  head, length, drafts = drafter.head, seen.seq.length, drafter.height
  rows, padded = seen.x.shape[:2]
  at = length[:, None] + jnp.arange(drafts)[None]
  x = jnp.pad(seen.x, ((0, 0), (0, drafts), (0, 0))).at[
      jnp.arange(rows)[:, None], at].set(seen.proposal.head_start.x[:, 1:])
  x = jnp.take_along_axis(head.attended(x), (at - 1)[..., None], axis=1)
  logits = head(model, x).reshape(rows * drafts, -1)
  if measure == "learned":
    place = jnp.broadcast_to(jnp.arange(drafts)[None], (rows, drafts))
    sure = confidence(logits, measure, place.reshape(-1),
                      coefficients)
  else:
    sure = confidence(logits, measure)
  return sure.reshape(rows, drafts)


class Bench:
  """A model, and a batch for plain decoding and for each method."""

  def __init__(self, model: Any, methods: Sequence[Method], rows: int, *,
               capacity: int, chunk: int, eos_ids: Sequence[int] = (),
               **settings: Any):
    """Programs are compiled when they are first run."""
    from jaxspec.generator import Generator
    self.model, self.rows, self.chunk = model, rows, chunk
    self.eos_ids = tuple(eos_ids)
    self.methods = {m.name: m for m in methods}
    drafters = {PLAIN: "autoregressive",
                **{m.name: m.drafter for m in methods}}
    self.generators = {
        name: Generator(model, drafter=drafter, rows=rows, capacity=capacity,
                        **settings)
        for name, drafter in drafters.items()}
    self.dtype = self.generators[PLAIN].cache_dtype
    self._states: dict[str, Any] = {}

  def run(self, name: str, texts: Sequence[Sequence[int]], width: int,
          options: Sequence[Options]) -> dict[str, Any]:
    """Begins requests, waits for eight tokens, and tells when they came.

    Args:
      name: "plain" or one of the methods.
      width: that prompts are padded to.
    """
    made = self.generators[name]
    state = self._states.pop(name, None)
    if state is None:
      state = made._init()
    jax.block_until_ready(state)
    tokens, lengths = padded(texts, width)
    request = as_request(options, lengths.tolist(), self.eos_ids,
                         vocab=self.model.vocab, stops=_STOPS, biases=_BIASES)
    where = np.arange(self.rows, dtype=np.int32)
    start = time.perf_counter()

    def since() -> float:
      return time.perf_counter() - start

    found: dict[str, Any] = {}
    if name == PLAIN:
      prefix = loop.prefill(self.model, (), tokens, lengths, chunk=self.chunk,
                            dtype=self.dtype)
      state = loop.insert(self.model, made.drafter, made.verifier, state,
                          where, prefix, request)
    else:
      seen = opening.glimpse(self.model, made.drafter, tokens, lengths,
                             request, chunk=self.chunk, dtype=self.dtype)
      jax.block_until_ready(seen.walk.tokens)
      found["provisional"] = since()
      seen = opening.go_on(self.model, made.drafter, seen)
      jax.block_until_ready(seen.proposal.tokens)
      found["drafted"] = since()
      state, _ = opening.settle(
          self.model, made.drafter, made.verifier, state, where, seen,
          chunk=self.chunk)
    settled: dict[int, list[float | None]] = {
        k: [None] * self.rows for k in PLACES}
    while True:
      jax.block_until_ready((state.seq.tokens, state.seq.length))
      now = since()
      length, done = (np.array(x) for x in jax.device_get(
          (state.seq.length, state.done)))
      for place, times in settled.items():
        for row, count in enumerate(length - lengths):
          if times[row] is None and count >= place:
            times[row] = now
      if np.all(done | (length - lengths >= PLACES[-1])):
        break
      state = loop.decode(self.model, made.drafter, made.verifier, state,
                          np.int32(1), np.bool_(True))
    found["settled"] = {str(k): times for k, times in settled.items()}
    if name != PLAIN:
      method = self.methods[name]
      found["below"] = self.below(method)
      found["sure"] = np.asarray(confidences(
          self.model, made.drafter, seen, method.coefficients,
          measure=method.measure)).astype(float).tolist()
      found["guessed"] = np.asarray(seen.proposal.tokens)[:, 1:].tolist()
      found["drafts"] = np.array(state.counters.nodes).tolist()
      found["accepted"] = np.array(
          state.counters.accepted).sum(axis=1).tolist()
    whole = np.array(state.seq.tokens)
    found["tokens"] = [whole[row, n:min(end, n + PLACES[-1])].tolist()
                       for row, (n, end) in enumerate(zip(lengths, length))]
    self._states[name] = state
    return found

  def control(self, name: str, texts: Sequence[Sequence[int]],
              options: Sequence[Options]) -> dict[str, Any]:
    """The same head where prompts are read chunk by chunk.

    Prompts are equally long and of several whole chunks. Settled is the
    likeliest token, of which nothing is kept; so this is a little less work.
    """
    drafter = self.generators[name].drafter
    tokens, lengths = padded(texts, len(texts[0]))
    before = tokens.shape[1] - self.chunk
    if before <= 0 or before % self.chunk or len(set(lengths.tolist())) > 1:
      raise InputError(f"prompts of {sorted(set(lengths.tolist()))} tokens are "
                       f"not several chunks of {self.chunk}; cut them so")
    request = as_request(options, lengths.tolist(), self.eos_ids,
                         vocab=self.model.vocab, stops=_STOPS, biases=_BIASES)
    head = tokens[:, :before], np.full_like(lengths, before)
    start = time.perf_counter()
    prefix = loop.prefill(self.model, drafter.taps, *head, chunk=self.chunk,
                          dtype=self.dtype)
    guess, x, fresh = through_last_chunk(
        self.model, drafter, tokens, lengths, request, prefix)
    jax.block_until_ready(guess)
    shown = time.perf_counter() - start
    first = jax.block_until_ready(
        through_rest(self.model, drafter, prefix, x, fresh))
    settled = time.perf_counter() - start
    chunks = tokens.shape[1] // self.chunk
    return {"provisional": shown, "settled": {"1": [settled] * self.rows},
            "below": (chunks - 1 + self.below(self.methods[name])) / chunks,
            "guessed": np.asarray(guess)[:, None].tolist(),
            "tokens": np.asarray(first)[:, None].tolist()}

  def below(self, method: Method) -> float:
    """The share of the layers that lie below the head."""
    return method.drafter.head.layer / self.model.depth


def padded(texts: Sequence[Sequence[int]], width: int
           ) -> tuple[np.ndarray, np.ndarray]:
  """Texts as one array, and their lengths."""
  tokens = np.zeros((len(texts), width), np.int32)
  for row, text in zip(tokens, texts):
    row[:len(text)] = text
  return tokens, np.array([len(text) for text in texts], np.int32)


def undisturbed(sample: Callable[[], dict[str, Any]], retries: int,
                max_foreign: float) -> dict[str, Any]:
  """A sample in which nothing was compiled and others were quiet.

  The last one counts where they never were; it says so.
  """
  tries = warm = 0
  while True:
    with profiling.count_compiles() as compiles, machine.ForeignLoad() as load:
      found = sample()
    if compiles.count:
      warm += 1
      if warm > 4:
        raise RuntimeError("every sample compiles something; none counts")
      continue
    quiet = load.cores is None or load.cores <= max_foreign
    if quiet or tries >= retries:
      return {**found, "foreign_cores": load.cores, "quiet": quiet}
    tries += 1


def measure(bench: Bench, texts: Sequence[Sequence[int]],
            options: Sequence[Options], turn: int, *, retries: int,
            max_foreign: float) -> dict[str, Any]:
  """One batch of requests by every method, in turns."""
  width = next((w for w in WIDTHS if w >= max(map(len, texts))), None)
  if width is None:
    raise InputError(f"a prompt of {max(map(len, texts))} tokens is longer "
                     f"than {WIDTHS[-1]}; leave it out")
  # Of several whole chunks, so that chunks can be compared with layers.
  whole = (not options[0].temperature and len(set(map(len, texts))) == 1
           and len(texts[0]) > bench.chunk
           and len(texts[0]) % bench.chunk == 0)
  jobs: dict[str, Callable[[], dict[str, Any]]] = {
      PLAIN: lambda: bench.run(PLAIN, texts, width, options)}
  heads = set()
  for name, method in bench.methods.items():
    jobs[name] = functools.partial(bench.run, name, texts, width, options)
    if whole and method.head not in heads:
      heads.add(method.head)
      jobs[f"{method.head}, chunk-major"] = functools.partial(
          bench.control, name, texts, options)
  names = list(jobs)
  shift = turn % len(names)
  found = {name: undisturbed(jobs[name], retries, max_foreign)
           for name in [*names[shift:], *names[:shift]]}
  return {"prompt_tokens": list(map(len, texts)), "width": width,
          "rows": len(texts), "methods": {name: found[name] for name in names}}


# What is run.


def calibrated(folder: str) -> dict[str, Any]:
  """What is stored beside a head of when to show what it says."""
  config = json.loads((pathlib.Path(folder) / "config.json").read_text())
  return config.get("calibration") or {}


def chats(tokenizer: Any, prompts: dict[str, list[str]], longest: int
          ) -> dict[str, list[list[int]]]:
  """Each category's prompts as chats; longer ones are left out."""
  found = {}
  for category, texts in prompts.items():
    ids = [tokenizer.encode(tokenizer.render(
        [{"role": "user", "content": text}]), special=False) for text in texts]
    found[category] = [i for i in ids if len(i) <= longest]
  return found


def batches(rows: int, chats: dict[str, list[list[int]]],
            lengths: dict[int, list[list[int]]], count: int, repeats: int,
            most_tokens: int) -> Iterator[tuple[str, str, int, list[Any]]]:
  """What is begun together: kind, group, number and prompts."""
  for length, texts in lengths.items():
    if rows * length <= most_tokens:
      for number in range(repeats):
        yield "length", str(length), number, [
            texts[(number + k * repeats) % len(texts)] for k in range(rows)]
  for category, texts in chats.items():
    texts = texts[:count] if rows == 1 else sorted(texts[:count], key=len)
    for at in range(0, len(texts) - rows + 1, rows):
      yield "category", category, at // rows, texts[at:at + rows]


def load_methods(model: Any, folders: Sequence[str], drafts: Sequence[int], *,
                 cache_dtype: str, measure: str, threshold: float | None
                 ) -> list[Method]:
  """Each head with each number of drafts.

  Args:
    measure: of confidence, where nothing is stored beside the head.
    threshold: None for what is stored, or else 0.5.
  """
  found = []
  for folder in folders:
    head = heads_lib.load(folder, model, "exit").heads
    stored = calibrated(folder)
    name, weights = pathlib.Path(folder).name, stored.get("coefficients")
    first, later = (stored.get(key, 0.5) if threshold is None else threshold
                    for key in ("first", "later"))
    for count in drafts:
      choices = tuple((0,) * d for d in range(1, count + 1))
      found.append(Method(
          f"{name}, {count} draft{'s' * (count > 1)}", name, count,
          EarlyExit(head, choices, cache_dtype=cache_dtype),
          stored.get("measure", measure),
          None if weights is None else tuple(weights), first, later))
  return found


def main(argv: list[str]) -> None:
  """Runs what is not yet there, and writes everything."""
  del argv
  from jaxspec.generator import Generator
  made = Generator.load(FLAGS.model, dtype=FLAGS.dtype)
  lengths = sorted(map(int, FLAGS.lengths))
  drafts = list(map(int, FLAGS.drafts))
  stored = {pathlib.Path(f).name: calibrated(f) for f in FLAGS.heads}
  if len(stored) < len(FLAGS.heads):
    raise app.UsageError("each folder of --heads needs a name of its own")
  methods = load_methods(
      made.model, FLAGS.heads, drafts, cache_dtype=made.cache_dtype.name,
      measure=FLAGS.measure, threshold=FLAGS.threshold)
  costs = {m.name: Costs.of(made.model, m.drafter.head) for m in methods}
  prompts = read_prompts(FLAGS.prompts, FLAGS.count)
  natural = chats(made.tokenizer, prompts, WIDTHS[-1])
  plenty = [text for texts in prompts.values() for text in texts]
  most = FLAGS.repeats * max(map(int, FLAGS.batches))
  swept = {n: chat_ids(made.tokenizer, plenty, n, most) for n in lengths}
  output = pathlib.Path(FLAGS.output)
  journal = Journal(output.with_name(output.name + ".records"), [
      machine.commit(), FLAGS.model, FLAGS.dtype, FLAGS.heads,
      [digest(f) for f in FLAGS.heads], FLAGS.drafts, FLAGS.chunk,
      [[m.measure, m.coefficients] for m in methods], FLAGS.max_foreign,
      FLAGS.retries])
  records = []
  for rows in map(int, FLAGS.batches):
    bench = Bench(
        made.model, methods, rows, capacity=WIDTHS[-1] + 2 * PLACES[-1],
        chunk=FLAGS.chunk, eos_ids=made.eos_ids, mesh=made.mesh,
        cache_dtype=made.cache_dtype.name)
    count = FLAGS.count if rows == 1 else FLAGS.batch_count
    for temperature in map(float, FLAGS.temperatures):
      for turn, (kind, group, number, texts) in enumerate(batches(
          rows, natural, swept, count, FLAGS.repeats, FLAGS.most_tokens)):
        options = [Options(max_new_tokens=PLACES[-1] + max(drafts),
                           temperature=temperature, seed=number * rows + row)
                   for row in range(rows)]
        name = {"rows": rows, "temperature": temperature, "kind": kind,
                "group": group, "number": number}
        with jax.set_mesh(made.mesh):
          records.append({**name, **journal.get(
              {**name, "texts": texts}, functools.partial(
                  measure, bench, texts, options, turn,
                  retries=FLAGS.retries, max_foreign=FLAGS.max_foreign))})
        print(progress(records[-1]), flush=True)
    del bench
    jax.clear_caches()             # a process cannot hold programs without end
  summary = summarise(records, {m.name: m for m in methods}, costs)
  machine.write(
      str(output), records, calibration=stored,
      costs={name: dataclasses.asdict(c) for name, c in costs.items()},
      left_out={c: len(prompts[c]) - len(natural[c]) for c in prompts},
      summary=summary)
  plot(summary, output.with_suffix(".png"))
  journal.path.unlink()
  print(table(summary["lines"]))


def digest(folder: str) -> str:
  """Of what a head is: another one in the same folder is measured anew."""
  found = hashlib.sha256()
  for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
    found.update(path.read_bytes())
  return found.hexdigest()[:16]


def progress(record: dict[str, Any]) -> str:
  plain = record["methods"][PLAIN]["settled"]["1"][0]
  return (f"{record['rows']} x {record['prompt_tokens'][0]:4} tokens, "
          f"{record['group']} {record['number']}: plain {1e3 * plain:.0f} ms"
          + "".join(f", {name} {1e3 * m['provisional']:.0f} then "
                    f"{1e3 * m['settled']['1'][0]:.0f} ms"
                    for name, m in record["methods"].items()
                    if "provisional" in m))


if __name__ == "__main__":
  define_flags()
  app.run(main)
