# SPDX-License-Identifier: Apache-2.0
"""Decoders with one known bug each, and the test that must tell them apart.

A tiny model has few enough texts that the law of all of them can be written
down from plain forward passes. `sample` counts which of them the decoding loop
produces; `p_value` says how well the two agree. A test of that kind is worth
what it catches, so every bug of `MUTANTS` must make it fail:

  python -m tests.jaxspec.mutants

prints the kill table.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxspec import loop, sampling, stages
from jaxspec.base import Proposal, Verdict
from jaxspec.caches import Fresh, Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.models.layers import Rope
from jaxspec.models.transformer import Config, Transformer, random_source
from jaxspec.options import Options, as_request
from jaxspec.tree import Tree, branching, chain
from jaxspec.verifiers.exact import exact, match
from tests.jaxspec import warping

VOCAB, LENGTH = 8, 4
ROWS = 4096
PROMPT = (1, 6)
ALPHA = 1e-6
TREES = {"chain": chain(2), "tree": branching((2, 1))}
SAMPLERS = {
    "cool": Options(max_new_tokens=LENGTH, temperature=0.7, top_p=0.8),
    "warm": Options(max_new_tokens=LENGTH, temperature=1.4, top_p=0.95,
                    top_k=7),
    "min_p": Options(max_new_tokens=LENGTH, temperature=1.2, min_p=0.15),
    "penalties": Options(
        max_new_tokens=LENGTH, temperature=0.8, top_p=0.9,
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias={2: 0.7}),
}


@functools.cache
def model() -> Transformer:
  """Small enough to enumerate; its attention matters to its next token."""
  config = Config(
      family="llama", vocab=VOCAB, width=16, depth=2, heads=2, kv_heads=2,
      head_size=8, mlp=16, context=64, tied=False, ropes=(Rope(100.0),) * 2,
      windows=(None,) * 2)
  return Transformer(config, random_source(1, scale=0.8))


@functools.cache
def texts() -> np.ndarray:
  """Every answer there can be, `[V^L, L]`; the row number is its cell."""
  return np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)),
                  np.int32)


@functools.cache
def model_logits() -> np.ndarray:
  """Logits before each token of every answer, `[V^L, L, V]`, by one pass."""
  whole = np.concatenate(
      [np.tile(np.array(PROMPT, np.int32), (len(texts()), 1)),
       texts()[:, :-1]], axis=1)

  @jax.jit
  def forward(model, tokens):
    rows, count = tokens.shape
    cache = model.init_cache(ContiguousCache, rows, 0, jnp.float32)
    at = Place(jnp.broadcast_to(jnp.arange(count)[None], (rows, count)),
               jnp.tril(jnp.ones((count, count), bool)))
    x, _ = model.extend(
        model.embed(tokens), cache, model.init_fresh(cache, count), at,
        layers=range(model.depth))
    return model.unembed(x)

  return np.asarray(forward(model(), whole))[:, len(PROMPT) - 1:]


@functools.cache
def law(sampler: str) -> np.ndarray:
  """The probability of every answer, from plain forwards and NumPy warps."""
  options, logits = SAMPLERS[sampler], model_logits().astype(np.float64)
  total = np.ones(len(texts()))
  # Answers that begin alike share their next token's law.
  for at in range(LENGTH):
    for start in range(0, len(texts()), VOCAB ** (LENGTH - at)):
      block = slice(start, start + VOCAB ** (LENGTH - at))
      probs = warping.probabilities(
          logits[start, at], options, PROMPT, texts()[start, :at])
      total[block] *= probs[texts()[block, at]]
  return total


@struct.dataclass
class Bigram:
  """A drafter that is right about half the time.

  It draws from a table of the last token alone, with the request's own noise,
  as drafters that sample do; siblings take the best, the second best, ...
  """

  table: Any
  tree: Tree = struct.field(pytree_node=False)

  taps = ()

  @property
  def height(self):
    return self.tree.height

  def init(self, model, rows, capacity):
    return ()

  def insert(self, model, state, rows, prefix):
    return state

  def propose(self, model, seq, request, state):
    tokens = [seq.tail()[:, 0]]
    for node, parent in enumerate(self.tree.parents[1:], start=1):
      rank = self.tree.children[parent].tolist().index(node)
      position = seq.length[:, None] + self.tree.depths[parent]
      noise = sampling.gumbel(request.sampling.key, position, model.vocab)
      best = jnp.argsort(-(self.table[tokens[parent]] + noise[:, 0]), axis=-1)
      tokens.append(best[:, rank].astype(jnp.int32))
    return Proposal(jnp.stack(tokens, axis=1), self.tree), state

  def observe(self, model, seq, state, proposal, scores, verdict):
    return state


def bigram(tree: str) -> Bigram:
  """Its table: the average of what the model says behind each token."""
  table = [model_logits()[:, 1:][texts()[:, :-1] == token].mean(axis=0)
           for token in range(VOCAB)]
  return Bigram(jnp.asarray(np.array(table)), TREES[tree])


@dataclasses.dataclass
class Sample:
  """How often each answer came, and what was drafted for them."""

  counts: np.ndarray
  accepted: int
  drafted: int


def sample(tree: str, sampler: str, size: int, *, mutant: str | None = None,
           seed: int = 0) -> Sample:
  """Decodes `size` answers with the loop, each from a seed of its own."""
  drafter, options = bigram(tree), SAMPLERS[sampler]
  tokens = np.tile(np.array(PROMPT, np.int32), (ROWS, 1))
  lengths = np.full(ROWS, len(PROMPT), np.int32)
  prefix = loop.prefill(model(), drafter.taps, tokens, lengths, chunk=64,
                        dtype=jnp.dtype(jnp.float32))
  request = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (ROWS, *x.shape[1:])),
      as_request([options], [len(PROMPT)], (), vocab=VOCAB, stops=1, biases=1))
  with MUTANTS[mutant]() if mutant else _honest() as verifier:

    @jax.jit
    def batch(model, drafter, prefix, request, number):
      seeds = jnp.arange(ROWS, dtype=jnp.uint32) + number * jnp.uint32(ROWS)
      own = request.replace(sampling=request.sampling.replace(
          key=jax.vmap(jax.random.key)(seeds)))
      state = loop.init(
          model, drafter,
          model.init_cache(ContiguousCache, ROWS, 16, jnp.float32),
          capacity=16, stops=1, biases=1)
      state = loop.insert(model, drafter, verifier, state,
                          jnp.arange(ROWS), prefix, own)
      state = loop.decode(model, drafter, verifier, state,
                          jnp.int32(2**30), jnp.bool_(True))
      answer = state.seq.tokens[:, len(PROMPT):len(PROMPT) + LENGTH]
      cell = answer @ (VOCAB ** jnp.arange(LENGTH)[::-1])
      return (jnp.zeros(VOCAB**LENGTH, jnp.int32).at[cell].add(1),
              jnp.sum(state.counters.accepted), jnp.sum(state.counters.nodes))

    batches = -(-size // ROWS)
    found = [jax.device_get(batch(model(), drafter, prefix, request,
                                  np.uint32(seed * batches + i)))
             for i in range(batches)]
  counts, accepted, drafted = (np.sum(x, axis=0) for x in zip(*found))
  return Sample(counts, int(accepted), int(drafted))


def p_value(counts: np.ndarray, probs: np.ndarray) -> float:
  """Pearson's chi-square; cells that expect fewer than five are pooled.

  An answer that is ruled out is in no pool: one of them is one too many.
  """
  from scipy import stats
  if np.any(counts[probs == 0]):
    return 0.0
  expected = probs * counts.sum()
  rare = expected < 5
  observed = np.append(counts[~rare], counts[rare].sum())
  wanted = np.append(expected[~rare], expected[rare].sum())
  observed, wanted = observed[wanted > 0], wanted[wanted > 0]
  statistic = np.sum((observed - wanted)**2 / wanted)
  return float(stats.chi2.sf(statistic, len(wanted) - 1))


def first_token(cells: np.ndarray) -> np.ndarray:
  """The same, of the first token alone: what most projects test."""
  return cells.reshape(VOCAB, -1).sum(axis=1)


# The bugs. Each is a context in which the loop is traced; it gives a verifier
# that is a function of its own, so that no trace of another one is reused.

@contextlib.contextmanager
def _honest() -> Iterator[Callable]:
  yield lambda *args: exact(*args)


@contextlib.contextmanager
def bonus_shift() -> Iterator[Callable]:
  """The next token is taken from the node before the last accepted one."""
  def verifier(proposal, logits, options, positions):
    samples = sampling.draw(logits, options, positions)
    verdict = match(proposal, samples)
    before = jnp.take_along_axis(
        verdict.path, jnp.maximum(verdict.kept - 2, 0)[:, None], axis=1)
    return verdict.replace(next_token=jnp.take_along_axis(
        samples, before, axis=1)[:, 0])
  yield verifier


@contextlib.contextmanager
def stale_keys() -> Iterator[Callable]:
  """The keys written are those of each accepted node's successor."""
  honest = ContiguousCache.commit

  def commit(self, fresh: Fresh, path, kept):
    return honest(self, fresh, jnp.minimum(path + 1, fresh.k[0].shape[1] - 1),
                  kept)
  with mock.patch.object(ContiguousCache, "commit", commit):
    yield lambda *args: exact(*args)


@contextlib.contextmanager
def reused_noise() -> Iterator[Callable]:
  """Every position of a request draws with the same noise."""
  yield lambda proposal, logits, options, positions: exact(
      proposal, logits, options, 0 * positions)


@contextlib.contextmanager
def warp_order() -> Iterator[Callable]:
  """Top-p looks at probabilities before temperature."""
  honest = sampling.warp

  def warp(logits, options, history):
    cut = honest(logits, options.replace(
        temperature=jnp.ones_like(options.temperature)), history)
    return cut / options.temperature[:, None, None]
  with mock.patch.object(sampling, "warp", warp):
    yield lambda *args: exact(*args)


@contextlib.contextmanager
def leniency() -> Iterator[Callable]:
  """Two drafts in a hundred stand although they were not sampled."""
  def verifier(proposal, logits, options, positions):
    samples = sampling.draw(logits, options, positions)
    first = proposal.tree.children[:, 0]
    child = proposal.tokens[:, np.maximum(first, 0)]
    key = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(
        options.key, positions + 1000)
    lucky = jax.vmap(jax.vmap(jax.random.uniform))(key) < 0.02
    return match(proposal, jnp.where(lucky & (first >= 0)[None], child,
                                     samples))
  yield verifier


@contextlib.contextmanager
def filter_skipped() -> Iterator[Callable]:
  """Verification forgets top-k, top-p and min-p."""
  with _verify_with(lambda options: options.replace(
      top_k=0 * options.top_k, top_p=jnp.ones_like(options.top_p),
      min_p=0 * options.min_p)):
    yield lambda *args: exact(*args)


@contextlib.contextmanager
def wrong_temperature() -> Iterator[Callable]:
  """Verification forgets the temperature."""
  with _verify_with(lambda options: options.replace(
      temperature=jnp.ones_like(options.temperature))):
    yield lambda *args: exact(*args)


@contextlib.contextmanager
def any_sibling() -> Iterator[Callable]:
  """Where one sibling was sampled, the first of them is taken."""
  def verifier(proposal, logits, options, positions):
    samples = sampling.draw(logits, options, positions)
    children = proposal.tree.children                              # [N W]
    tokens = jnp.where((children >= 0)[None],
                       proposal.tokens[:, np.maximum(children, 0)], -1)
    hit = jnp.any(tokens == samples[..., None], axis=-1)
    return match(proposal, jnp.where(hit, tokens[..., 0], samples))
  yield verifier


@contextlib.contextmanager
def noise_by_node() -> Iterator[Callable]:
  """Noise depends on the node, not on the position alone.

  The one bug here that no law can show, because each token is still a fair
  sample; it breaks "same seed, same tokens", and the test of that kills it.
  """
  def verifier(proposal, logits, options, positions):
    node = jnp.arange(proposal.tree.size)[None]
    return exact(proposal, logits, options, positions * 64 + node)
  yield verifier


@contextlib.contextmanager
def _verify_with(change: Callable) -> Iterator[None]:
  honest = stages.verify

  def verify(verifier, state, proposal, scores) -> Verdict:
    changed = state.replace(request=state.request.replace(
        sampling=change(state.request.sampling)))
    return honest(verifier, changed, proposal, scores)
  with mock.patch.object(stages, "verify", verify):
    yield


MUTANTS: dict[str, Callable[[], Any]] = {
    f.__name__: f for f in (
        bonus_shift, stale_keys, reused_noise, warp_order, leniency,
        filter_skipped, wrong_temperature, any_sibling, noise_by_node)}
# A chain has no siblings, and the fourth is not a matter of law.
HARMLESS = {("any_sibling", "chain"), ("noise_by_node", "chain"),
            ("noise_by_node", "tree")}


def kill_table(size: int, sampler: str = "cool") -> list[tuple]:
  """`(mutant, tree, p of the joint law, p of the first token)` of each."""
  return [judge(mutant, tree, size, sampler)
          for mutant, tree in itertools.product([None, *MUTANTS], TREES)]


@functools.cache
def judge(mutant: str | None, tree: str, size: int,
          sampler: str = "cool") -> tuple[str | None, str, float, float]:
  """One row of the table."""
  found = sample(tree, sampler, size, mutant=mutant)
  return (mutant, tree, p_value(found.counts, law(sampler)),
          p_value(first_token(found.counts), first_token(law(sampler))))


def show(rows: list[tuple], file: Any = None) -> None:
  """Prints the table."""
  print(f"{'mutant':18} {'drafter':8} {'joint law':>10} {'first token':>12}",
        file=file)
  for mutant, tree, joint, first in rows:
    word = ("killed" if joint < ALPHA else
            "not a matter of law" if (mutant, tree) in HARMLESS else
            "survives" if mutant is None else "SURVIVES")
    print(f"{mutant or 'none':18} {tree:8} {joint:10.2g} {first:12.2g}  {word}",
          file=file)


if __name__ == "__main__":
  show(kill_table(int(sys.argv[1]) if sys.argv[1:] else 2**16))
