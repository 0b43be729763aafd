# SPDX-License-Identifier: Apache-2.0
"""Decoders with one known bug each, and the test that must tell them apart.

A tiny model has few enough texts that the law of all of them can be written
down from plain forward passes. `sample` counts which of them the decoding loop
produces; `p_value` says how well the two agree. A test of that kind is worth
what it catches, so every bug of `BUGS` must make it fail:

  JAX_PLATFORMS=cpu python -m tests.jaxspec.mutants

prints the kill table.

`BUGS` are those of any decoder, judged with the exact verifier. `DRAFT_BUGS`
are those of draft probabilities, which it has none of: they are judged with
the rejection verifier and drafters that draw what they draft.
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
from jaxspec.base import Drafter, Proposal, Verdict
from jaxspec.caches import Fresh, Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.models.layers import Rope
from jaxspec.models.transformer import Config, Transformer, random_source
from jaxspec.options import Options, as_request
from jaxspec.tree import Tree, branching, chain
from jaxspec.verifiers import rejection
from jaxspec.verifiers.exact import deepest, ending, exact, follow
from jaxspec.verifiers.rejection import Rejection
from tests.jaxspec import warping

VOCAB, LENGTH = 8, 4
ROWS = 8192
PROMPT = (1, 6)
ALPHA = 1e-6
# A tree, and how noisy its drafts are. The stubborn one always drafts what is
# likeliest: that pushes a decoder which is too lenient away from the law.
DRAFTERS = {"chain": (chain(2), 1.0), "tree": (branching((2, 1)), 1.0),
            "stubborn": (branching((2, 1)), 0.0)}
# The same for those that draw with noise of their own and report their law;
# and whether siblings are drawn with replacement.
DRAWING = {"drawn chain": (chain(2), 0.4, False),
           "drawn tree": (branching((3, 1)), 0.25, False),
           "with replacement": (branching((3, 1)), 1.0, True)}
SAMPLERS = {
    "cool": Options(max_new_tokens=LENGTH, temperature=0.7, top_p=0.8),
    "warm": Options(max_new_tokens=LENGTH, temperature=1.4, top_p=0.95,
                    top_k=7),
    "min_p": Options(max_new_tokens=LENGTH, temperature=1.2, min_p=0.15),
    "penalties": Options(
        max_new_tokens=LENGTH, temperature=0.8, top_p=0.9,
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias={2: 0.7}),
    # Nothing is ruled out, so that no answer alone gives a bug away.
    "open": Options(max_new_tokens=LENGTH, temperature=0.8),
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
    at = Place.of(jnp.broadcast_to(jnp.arange(count)[None], (rows, count)),
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
class Bigram(Drafter):
  """A drafter that is right about half the time.

  It draws from a table of the last token alone, with the request's own noise,
  as drafters do that mean to say what the model will; siblings take the best,
  the second best, ... One that is `honest` draws with noise of its own and
  reports the law.

  Attributes:
    noise: what the noise is multiplied by, which is the temperature.
    replacement: whether siblings are drawn with replacement.
  """

  table: Any
  noise: Any
  tree: Tree = struct.field(pytree_node=False)
  honest: bool = struct.field(pytree_node=False, default=False)
  replacement: bool = struct.field(pytree_node=False, default=False)

  def propose(self, model, seq, request, state):
    tokens = [seq.tail()[:, 0]]
    for node, parent in enumerate(self.tree.parents[1:], start=1):
      rank = self.tree.children[parent].tolist().index(node)
      position = seq.length[:, None] + self.tree.depths[parent]
      noise = self.draft_noise(request.sampling.key, position, rank,
                               model.vocab)
      best = jnp.argsort(-(self.table[tokens[parent]] + noise[:, 0]), axis=-1)
      rank = 0 if self.replacement else rank
      tokens.append(best[:, rank].astype(jnp.int32))
    tokens = jnp.stack(tokens, axis=1)
    probs = self.report(tokens) if self.honest else None
    return Proposal(tokens, self.tree, probs=probs,
                    replacement=self.replacement), state

  def draft_noise(self, key, position, rank, vocab):
    """Of the children of a node, if they are the largest of one noise."""
    if not self.honest:
      return self.noise * sampling.gumbel(key, position[:, 0], vocab)[:, None]
    stream = 1 + rank * self.replacement

    def own(key, position):
      return jax.random.gumbel(jax.random.fold_in(
          jax.random.fold_in(key, position), stream), (vocab,))
    return self.noise * jax.vmap(jax.vmap(own, (None, 0)))(key, position)

  def report(self, tokens):
    """At each node, the law its children were drawn from."""
    return jax.nn.softmax(self.table[tokens] / self.noise, axis=-1)


def bigram(drafter: str) -> Bigram:
  """Its table: the average of what the model says behind each token."""
  table = [model_logits()[:, 1:][texts()[:, :-1] == token].mean(axis=0)
           for token in range(VOCAB)]
  tree, noise, *drawn = (DRAFTERS | DRAWING)[drafter]
  return Bigram(jnp.asarray(np.array(table)), jnp.float32(noise), tree,
                bool(drawn), *drawn)


@dataclasses.dataclass
class Sample:
  """How often each answer came, and what was drafted for them."""

  counts: np.ndarray
  accepted: int
  drafted: int


def sample(drafter: str, sampler: str, size: int, *, bug: str | None = None,
           seed: int = 0, verifier: Any = exact) -> Sample:
  """Decodes `size` answers with the loop, each from a seed of its own.

  Args:
    bug: one of `BUGS` or `DRAFT_BUGS`, "none" for the same program with no bug
      switched on, or None for the package as it is.
    verifier: of the package as it is; where there are bugs, one for drafters
      that draw, the other for those that do not.
  """
  options = SAMPLERS[sampler]
  tokens = np.tile(np.array(PROMPT, np.int32), (ROWS, 1))
  lengths = np.full(ROWS, len(PROMPT), np.int32)
  prefix = loop.prefill(model(), (), tokens, lengths, chunk=64,
                        dtype=jnp.dtype(jnp.float32))
  request = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (ROWS, *x.shape[1:])),
      as_request([options], [len(PROMPT)], (), vocab=VOCAB, stops=1, biases=1))
  bugs = DRAFT_BUGS if drafter in DRAWING else BUGS
  batch = program(verifier if bug is None else bugs is DRAFT_BUGS)
  number = 0 if bug is None else [*bugs].index(bug)
  batches = -(-size // ROWS)
  found = [jax.device_get(batch(
      model(), bigram(drafter), prefix, request,
      np.uint32((seed * batches + i) * ROWS), np.int32(number)))
           for i in range(batches)]
  counts, accepted, drafted = (np.sum(x, axis=0) for x in zip(*found))
  return Sample(counts, int(accepted), int(drafted))


@functools.cache
def program(kind: Any) -> Callable:
  """One batch of answers, compiled once for all samplers and all bugs.

  Args:
    kind: the verifier of the package as it is; or, for a program with all bugs
      in it, of which an integer says which is switched on, whether they are
      those of draft probabilities. So a bug is judged beside a correct decoder
      that is the very same program.
  """
  planted = {False: planted_anywhere, True: planted_in_drafts}.get(
      kind, lambda bug: _package(kind))

  @jax.jit
  def batch(model, drafter, prefix, request, first_seed, bug):
    seeds = jnp.arange(ROWS, dtype=jnp.uint32) + first_seed
    own = request.replace(sampling=request.sampling.replace(
        key=jax.vmap(jax.random.key)(seeds)))
    with planted(bug) as verifier:
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

  compiled = {}

  def run(*args):
    shape = jax.tree.structure(args)
    if shape not in compiled:
      # What an earlier program traced within, its bugs among it, is not this
      # one's.
      jax.clear_caches()
      # A third of the time to compile, and as fast.
      compiled[shape] = batch.lower(*args).compile(
          {"xla_backend_optimization_level": 1})
    return compiled[shape](*args)
  return run


@contextlib.contextmanager
def _package(verifier) -> Iterator[Callable]:
  # A function of its own, so that no earlier trace is taken for this one.
  yield lambda *args: verifier(*args)


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


def beginning(cells: np.ndarray, tokens: int = 1) -> np.ndarray:
  """The same, of the first tokens alone; of one, what most projects test."""
  return cells.reshape(VOCAB**tokens, -1).sum(axis=1)


def joint_p_value(counts: np.ndarray, probs: np.ndarray) -> float:
  """Of the answers, and of their first two and three tokens, the worst.

  Fewer tokens are fewer cells, of which each has more to say. Three looks are
  paid for threefold.
  """
  return min(1.0, 3 * min(
      p_value(beginning(counts, n), beginning(probs, n)) for n in (2, 3, 4)))


# The bugs. A verifier, or a change to what some part of the step is given.

def bonus_shift(proposal, laws):
  """The next token is taken from the node before the last accepted one."""
  verdict = exact(proposal, laws)
  before = jnp.take_along_axis(
      verdict.path, jnp.maximum(verdict.kept - 2, 0)[:, None], axis=1)
  return verdict.replace(next_token=laws.draw(before[:, 0]))


def reused_noise(proposal, laws):
  """Every position of a request draws with the same noise."""
  return exact(proposal, laws.replace(positions=0 * laws.positions))


def leniency(proposal, laws):
  """Two drafts in a hundred stand although they were not sampled."""
  def sample(node):
    child = jnp.asarray(proposal.tree.children[:, 0])[node]
    rows = jnp.arange(len(node))
    at = laws.positions[rows, node] + 1000
    key = jax.vmap(jax.random.fold_in)(laws.sampling.key, at)
    lucky = jax.vmap(jax.random.uniform)(key) < 0.02
    return jnp.where(lucky & (child >= 0),
                     proposal.tokens[rows, jnp.maximum(child, 0)],
                     laws.draw(node))
  return follow(proposal, sample)


def any_sibling(proposal, laws):
  """Where one sibling was sampled, the first of them is taken."""
  def sample(node):
    own = laws.draw(node)
    children = jnp.asarray(proposal.tree.children)[node]          # [B W]
    tokens = jnp.take_along_axis(proposal.tokens, jnp.maximum(children, 0),
                                 axis=1)
    hit = jnp.any((tokens == own[:, None]) & (children >= 0), axis=1)
    return jnp.where(hit, tokens[:, 0], own)
  return follow(proposal, sample)


def noise_by_node(proposal, laws):
  """Noise depends on the node, not on the position alone.

  The one bug here that no law can show, because each token is still a fair
  sample; it breaks "same seed, same tokens", and the test of that kills it.
  """
  node = jnp.arange(proposal.tree.size)[None]
  return exact(proposal, laws.replace(positions=laws.positions * 64 + node))


def stale_keys(path, nodes):
  """The keys written are those of each accepted node's successor."""
  return jnp.minimum(path + 1, nodes - 1)


def filter_skipped(options):
  """Verification forgets top-k, top-p and min-p."""
  return options.replace(
      top_k=0 * options.top_k, top_p=jnp.ones_like(options.top_p),
      min_p=0 * options.min_p)


def wrong_temperature(options):
  """Verification forgets the temperature."""
  return options.replace(temperature=jnp.ones_like(options.temperature))


def warp_order(warp, logits, options, *where):
  """Top-p looks at probabilities before temperature."""
  cut = warp(logits, wrong_temperature(options), *where)
  return cut / options.temperature[:, None]


BUGS: dict[str, Callable] = {
    "none": exact,
    **{f.__name__: f for f in (
        bonus_shift, reused_noise, leniency, any_sibling, noise_by_node,
        stale_keys, filter_skipped, wrong_temperature, warp_order)}}
VERIFIERS = 6                        # so many of them, from the first on
# A chain has no siblings, and the other is not a matter of law.
HARMLESS = {("any_sibling", "chain"),
            *(("noise_by_node", drafter) for drafter in DRAFTERS)}


@contextlib.contextmanager
def planted_anywhere(bug: Any) -> Iterator[Callable]:
  """The step with every bug in it, of which number `bug` is switched on."""
  warp, verify, commit = sampling.warp, stages.verify, ContiguousCache.commit

  def when(name, changed, honest):
    on = bug == [*BUGS].index(name)
    return jax.tree.map(lambda c, h: jnp.where(on, c, h), changed, honest)

  def buggy_warp(*args):
    return when("warp_order", warp_order(warp, *args), warp(*args))

  def buggy_verify(verifier, state, proposal, logits) -> Verdict:
    options = state.request.sampling
    for change in (filter_skipped, wrong_temperature):
      options = when(change.__name__, change(options), options)
    return verify(verifier, state.replace(
        request=state.request.replace(sampling=options)), proposal, logits)

  def buggy_commit(self, fresh: Fresh, path, kept):
    nodes = fresh.k[0].shape[1]
    return commit(self, fresh,
                  when("stale_keys", stale_keys(path, nodes), path), kept)

  def verifier(*args):
    return jax.lax.switch(jnp.where(bug < VERIFIERS, bug, 0),
                          [*BUGS.values()][:VERIFIERS], *args)

  with (mock.patch.object(sampling, "warp", buggy_warp),
        mock.patch.object(stages, "verify", buggy_verify),
        mock.patch.object(ContiguousCache, "commit", buggy_commit)):
    yield verifier


# The bugs of draft probabilities. Each is a change to one part of the ratio
# walk or of the drafter, named as in `planted_in_drafts`.

def not_normalised(p, q):
  """The residual is no law: the next sibling's ratio is too small."""
  rest = jnp.maximum(p - q, 0)
  return jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, p)


def residual_of_the_model(p, q):
  """Behind a rejection the model's whole law is taken, p and not p - q."""
  return p


def clamped_too_late(p, q):
  """The residual is |p - q|."""
  rest = jnp.abs(p - q)
  total = jnp.sum(rest, axis=-1, keepdims=True)
  return jnp.where(total > 0, rest / total, p)


def put_back(q, token):
  """The law of the second sibling has the first still in it."""
  return q


def same_coin(key, positions, number):
  """Every position is tested with the same coin."""
  return _coins(key, 0 * positions, number)


def coin_of_the_first_sibling(key, positions, number):
  """Siblings are tested with the same coin."""
  return _coins(key, positions, 0 * number)


def draft_noise_again(keys, positions):
  """The next token is drawn with the noise of the drafts."""
  return jax.vmap(lambda key, at: jax.random.fold_in(
      jax.random.fold_in(key, at), 1))(keys, positions)


def wrong_draft_temperature(drafter, tokens):
  """Drafts are reported as if drawn at a higher temperature."""
  return jax.nn.softmax(drafter.table[tokens] / (1.5 * drafter.noise), axis=-1)


def law_of_the_wrong_node(drafter, tokens):
  """At each node stands the law it was drawn from itself."""
  parents = np.maximum(drafter.tree.parents, 0)
  return _report(drafter, tokens[:, parents])


def greedy_drafts(noise):
  """Drafts are the likeliest tokens, reported as if they had been drawn."""
  return 0 * noise


def sibling_forgotten(proposal, laws):
  """Every sibling is tested against the model's law, not the residual."""
  if proposal.probs is None:         # nothing is drafted: the first token
    return Rejection()(proposal, laws)
  rows, size = laws.positions.shape
  parents = np.maximum(proposal.tree.parents, 0)
  nodes = jnp.broadcast_to(jnp.arange(size)[:, None], (size, rows))
  p = jax.nn.softmax(jax.vmap(laws.at, 0, 1)(nodes), axis=-1)
  def of_token(law):
    return jnp.take_along_axis(
        law[:, parents], proposal.tokens[..., None], axis=2)[..., 0]
  coins = _coins(jnp.repeat(laws.sampling.key, size),
                 laws.positions[:, parents].reshape(-1),
                 jnp.tile(jnp.arange(size), rows)).reshape(rows, size)
  node = deepest(proposal, coins * of_token(proposal.probs) < of_token(p))
  at = jnp.arange(rows), node
  leaf = jnp.asarray(proposal.tree.children[:, 0] < 0)[node]
  p = jnp.where(leaf[:, None], p[at],
                rejection.residual(p[at], proposal.probs[at]))
  return ending(proposal, node,
                rejection.last_draw(p, laws.sampling, laws.positions[at]))


# As the package has them, whatever is planted.
_coins, _report = sampling.coins, Bigram.report
DRAFT_BUGS = {"none": None, **{f.__name__: f for f in (
    not_normalised, residual_of_the_model, clamped_too_late, put_back,
    same_coin, coin_of_the_first_sibling, draft_noise_again,
    wrong_draft_temperature, law_of_the_wrong_node, greedy_drafts,
    sibling_forgotten)}}
_SIBLINGS = ("not_normalised", "put_back", "coin_of_the_first_sibling",
             "sibling_forgotten")
HARMLESS |= {(bug, "drawn chain") for bug in _SIBLINGS}


@contextlib.contextmanager
def planted_in_drafts(bug: Any) -> Iterator[Callable]:
  """The rejection verifier and a drafter with every bug in them."""
  names = [*DRAFT_BUGS]

  def when(name, changed, honest):
    return jnp.where(bug == names.index(name), changed, honest)

  def choice(honest, *bugs):
    def function(*args):
      value = honest(*args)
      for changed in bugs:
        value = when(changed.__name__, changed(*args), value)
      return value
    return function

  draw, noise_of = rejection.last_draw, Bigram.draft_noise

  def last_draw(p, options, positions):
    """The residual, with another noise."""
    key = draft_noise_again(options.key, positions)
    noise = jax.vmap(lambda k: jax.random.gumbel(k, (VOCAB,)))(key)
    again = jnp.argmax(jnp.log(p) + noise, axis=-1).astype(jnp.int32)
    return when("draft_noise_again", again, draw(p, options, positions))

  def draft_noise(self, *args):
    noise = noise_of(self, *args)
    return when("greedy_drafts", greedy_drafts(noise), noise)

  with (mock.patch.object(rejection, "residual", choice(
            rejection.residual, not_normalised, residual_of_the_model,
            clamped_too_late)),
        mock.patch.object(rejection, "without", choice(
            rejection.without, put_back)),
        mock.patch.object(sampling, "coins", choice(
            _coins, same_coin, coin_of_the_first_sibling)),
        mock.patch.object(rejection, "last_draw", last_draw),
        mock.patch.object(Bigram, "draft_noise", draft_noise),
        mock.patch.object(Bigram, "report", choice(
            Bigram.report, wrong_draft_temperature, law_of_the_wrong_node))):
    # (Traces are kept by function: of an old one `bug` would be another.)
    yield lambda *args: jax.lax.cond(
        bug == names.index("sibling_forgotten"),
        lambda *a: sibling_forgotten(*a), lambda *a: Rejection()(*a), *args)


def kill_table(size: int, sampler: str = "cool") -> list[tuple]:
  """`(bug, drafter, p of the joint law, p of the first token)` of each."""
  return [judge(bug, drafter, size, sampler)
          for bug, drafter in itertools.product(BUGS, DRAFTERS)]


def draft_kill_table(size: int, sampler: str = "warm") -> list[tuple]:
  """The same of the bugs of draft probabilities.

  Under samplers that rule much out, most ratios are far above 1 or 0, and no
  coin decides anything.
  """
  return [judge(bug, drafter, size, sampler)
          for bug, drafter in itertools.product(DRAFT_BUGS, [*DRAWING][:2])]


@functools.cache
def judge(bug: str | None, drafter: str, size: int, sampler: str = "cool"
          ) -> tuple[str | None, str, float, float]:
  """One row of the table."""
  found = sample(drafter, sampler, size, bug=bug)
  return (bug, drafter, joint_p_value(found.counts, law(sampler)),
          p_value(beginning(found.counts), beginning(law(sampler))))


def show(rows: list[tuple], file: Any = None) -> None:
  """Prints the table."""
  print(f"{'bug':25} {'drafter':16} {'joint law':>10} {'first token':>12}",
        file=file)
  for bug, drafter, joint, first in rows:
    word = ("killed" if joint < ALPHA else
            "not a matter of law" if (bug, drafter) in HARMLESS else
            "stands" if bug in (None, "none") else "SURVIVES")
    print(f"{bug or 'the package':25} {drafter:16} {joint:10.2g} {first:12.2g}"
          f"  {word}", file=file)


if __name__ == "__main__":
  samples = int(sys.argv[1]) if sys.argv[1:] else 2**16
  show(kill_table(samples) + draft_kill_table(samples))
