# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: prefill, insert, decode, stream.

A batch has a fixed number of rows. Prompts are read beside it (`prefill`) and
moved into free rows (`insert`); `decode` then runs many steps in one
`lax.while_loop`, and the host hears back once per call. Every function here is
a pure function of pytrees; those that change a state take it over (donation),
so that caches stay where they are.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxspec import sampling, sharding, stages
from jaxspec.base import (
  Counters,
  DecodeState,
  Drafter,
  Emission,
  Model,
  Prefix,
  Proposal,
  Request,
  Sequences,
  Verifier,
)
from jaxspec.caches import Cache, Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.tree import root


def init(model: Model, drafter: Drafter, cache: Cache, *, capacity: int,
         stops: int, biases: int) -> DecodeState:
  """A batch in which every row is free.

  Args:
    capacity: most tokens of a prompt and its answer together.
    stops: most end tokens a request may name.
    biases: most logit biases a request may name.
  """
  rows = len(cache.length)
  zeros = jnp.zeros(rows, jnp.int32)
  # A free row is one token long, so that there is a root to score.
  seq = Sequences(jnp.zeros((rows, capacity), jnp.int32), zeros, zeros + 1,
                  cache)
  request = Request(
      sampling.defaults(rows, biases), zeros,
      jnp.full((rows, stops), -1, jnp.int32), jnp.zeros(rows, bool))
  return pin(DecodeState(
      seq, request, drafter.init(model, rows, capacity),
      jnp.ones(rows, bool), jnp.zeros((rows, capacity), jnp.float32),
      Counters.zeros(rows, drafter.height, drafter.size)))


@functools.partial(jax.jit, static_argnames=("taps", "chunk", "dtype"))
def prefill(model: Model, taps: tuple[int, ...], tokens: Int[Array, "R T"],
            length: Int[Array, "R"], *, chunk: int, dtype) -> Prefix:
  """Reads prompts into a scratch cache, `chunk` tokens at a time.

  Args:
    tokens: prompts, padded to a bucket; above `chunk`, T is a multiple of it.
      Chunks in which no prompt has a token are skipped.
    length: tokens of each prompt, at least 1.
  """
  rows, padded = tokens.shape

  def read(cache, tokens, features, last, start):
    count = tokens.shape[1]
    x, fresh = model.embed(tokens), model.init_fresh(cache, count)
    at = Place.of(
        start + jnp.broadcast_to(jnp.arange(count)[None], (rows, count)),
        jnp.tril(jnp.ones((count, count), bool)))
    below, seen = 0, []
    for cut in (*taps, model.depth):
      x, fresh = model.extend(x, cache, fresh, at, layers=range(below, cut))
      seen.append(x)
      below = cut
    features = tuple(
        lax.dynamic_update_slice_in_dim(all, new, start, axis=1)
        for all, new in zip(features, seen))
    final = length - 1 - start
    here = (final >= 0) & (final < count)
    at_last = jnp.take_along_axis(
        x, jnp.clip(final, 0, count - 1)[:, None, None], axis=1)[:, 0]
    return fresh, features, jnp.where(here[:, None], at_last, last)

  def empty(capacity):
    return model.init_cache(ContiguousCache, rows, capacity, dtype)

  width = jax.eval_shape(model.embed, tokens)
  features = tuple(jnp.zeros(width.shape, width.dtype) for _ in taps)
  last = jnp.zeros((rows, width.shape[-1]), width.dtype)
  if padded <= chunk:
    # Nothing is committed yet, so there is no prefix to attend to, and what
    # was fresh is the cache.
    fresh, features, last = read(empty(0), tokens, features, last, 0)
    k, v = (tuple(jnp.moveaxis(x, 1, 2) for x in xs)
            for xs in (fresh.k, fresh.v))
    cache = ContiguousCache(k, v, length)
    return Prefix(tokens, length, cache, features, last)

  def body(i, carry):
    cache, features, last = carry
    part = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
    fresh, features, last = read(cache, part, features, last, i * chunk)
    path = jnp.broadcast_to(jnp.arange(chunk)[None], (rows, chunk))
    kept = jnp.clip(length - i * chunk, 0, chunk)
    return cache.commit(fresh, path, kept), features, last

  chunks = (jnp.max(length) + chunk - 1) // chunk
  cache, features, last = lax.fori_loop(
      0, chunks, body, (empty(padded), features, last))
  return Prefix(tokens, length, cache, features, last)


@functools.partial(jax.jit, static_argnames=("verifier",),
                   donate_argnames=("state",))
def insert(model: Model, drafter: Drafter, verifier: Verifier,
           state: DecodeState, rows: Int[Array, "R"], prefix: Prefix,
           request: Request) -> DecodeState:
  """Begins requests in `rows` and commits the first token of each.

  A row for whose prompt the cache has no room ends with that token.

  Args:
    rows: an index of B or more is dropped, so that R can be a bucket.
  """
  capacity = state.seq.tokens.shape[1]
  length = prefix.length
  with jax.named_scope("first_token"):
    final = jnp.take_along_axis(prefix.tokens, length[:, None] - 1, axis=1)
    proposal = Proposal(final, root())
    logits = model.unembed(prefix.last[:, None])
    history = sampling.History(prefix.tokens, length, length, final,
                               jnp.ones((len(length), 1, 1), bool))
    first = verifier(
        proposal, sampling.Laws(logits, request.sampling, history,
                                length[:, None])).next_token[:, None]
  kept, done = stages.finish(request, length, first, jnp.ones_like(length))
  del kept                                  # the limit leaves room for one

  def fit(x):
    x = x[:, :capacity]
    return jnp.pad(x, ((0, 0), (0, capacity - x.shape[1])))

  one = jnp.ones_like(length)
  text = stages.write(fit(prefix.tokens), first, length, one)
  logprobs = stages.write(
      jnp.zeros((len(length), capacity), jnp.float32),
      sampling.log_probability(logits, jnp.zeros_like(first), first), length,
      one)

  def put(batch, new):
    return jax.tree.map(lambda b, n: b.at[rows].set(n, mode="drop"),
                        batch, new)

  old = state.seq
  # The last token's keys are never written.
  cache = old.cache.insert(rows, prefix.cache, request.limit - 1)
  held = cache.length.at[rows].get(mode="fill", fill_value=0)
  done |= held < length
  return pin(DecodeState(
      Sequences(put(old.tokens, text), put(old.prompt_length, length),
                put(old.length, length + 1), cache),
      put(state.request, request),
      drafter.insert(model, state.draft, rows, prefix, request),
      put(state.done, done), put(state.logprobs, logprobs),
      put(state.counters, Counters.zeros(
          len(length), drafter.height, drafter.size))))


@functools.partial(jax.jit, static_argnames=("verifier",),
                   donate_argnames=("state",))
def decode(model: Model, drafter: Drafter, verifier: Verifier,
           state: DecodeState, steps: Int[Array, ""],
           wait: Bool[Array, ""]) -> DecodeState:
  """Runs up to `steps` steps on the device.

  Args:
    wait: whether to go on when a row finishes. False returns at once, so that
      the row can be refilled.
  """
  running = ~state.done

  def more(carry):
    step, state = carry
    freed = jnp.any(state.done & running)
    return (step < steps) & jnp.any(~state.done) & (wait | ~freed)

  def body(carry):
    step, state = carry
    state, _ = stages.step(model, drafter, verifier, state)
    return step + 1, state

  return pin(
      lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state))[1])


@functools.partial(jax.jit, donate_argnames=("state",))
def release(state: DecodeState, rows: Bool[Array, "B"]) -> DecodeState:
  """Stops these rows where they are and frees what their caches hold."""
  seq = state.seq
  return pin(state.replace(
      done=state.done | rows,
      seq=seq.replace(cache=seq.cache.release(rows),
                      length=jnp.where(rows, 1, seq.length))))


@functools.partial(jax.jit, donate_argnames=("state",))
def propose(model: Model, drafter: Drafter, state: DecodeState
            ) -> tuple[Proposal, DecodeState]:
  """The first half of a step."""
  proposal, state = stages.propose(model, drafter, state)
  return proposal, pin(state)


@functools.partial(jax.jit, static_argnames=("verifier",),
                   donate_argnames=("state",))
def settle(model: Model, drafter: Drafter, verifier: Verifier,
           state: DecodeState, proposal: Proposal
           ) -> tuple[DecodeState, Emission]:
  """The other half: scores, verifies and commits a proposal."""
  state, emission = stages.settle(model, drafter, verifier, state, proposal)
  return pin(state), emission


# A step whose drafts are made depth by depth, each depth a program.


@jax.jit
def _look(model, drafter, state):
  walk = drafter.look(model, state.seq, state.request, state.draft)
  return walk, *_seen(drafter, state, walk)


@functools.partial(jax.jit, static_argnames=("depth",),
                   donate_argnames=("walk",))
def _deepen(model, drafter, state, walk, depth):
  walk = drafter.deepen(model, state.seq, state.request, state.draft, walk,
                        depth)
  return walk, *_seen(drafter, state, walk)


@functools.partial(jax.jit, donate_argnames=("state", "walk"))
def _close(drafter, state, walk):
  proposal, draft = drafter.close(state.seq, state.draft, walk)
  return proposal, pin(state.replace(draft=draft))


def _seen(drafter, state, walk):
  """What is shown of a proposal so far, and whether it goes on."""
  proposal, _ = drafter.close(state.seq, state.draft, walk)
  return (provisional(state.seq, state.request, proposal, state.done),
          jnp.any(walk.wants & ~state.done))


def stream(model: Model, drafter: Drafter, verifier: Verifier,
           state: DecodeState) -> Iterator[tuple[Emission, DecodeState]]:
  """The same two halves of a step, from the host.

  Drafts leave the device as soon as they are known: those of a drafter that is
  `stepwise` one depth after another, those of any other together. What the
  drafter is not sure enough of does not leave it before it is settled (see
  `Proposal.shown`). All that is pending is then settled in one pass.

  Yields:
    What is proposed, not settled; each is more than the one before and takes
    its place. Then what stands, settled. The state beside it is the one after
    that half.
  """
  while not bool(jnp.all(state.done)):
    if drafter.stepwise:
      walk, emission, more = _look(model, drafter, state)
      shown = 0
      for depth in range(1, drafter.height + 2):
        count = int(jnp.sum(emission.count))
        if count > shown:
          shown = count
          yield emission, state
        if depth > drafter.height or not bool(more):
          break
        walk, emission, more = _deepen(model, drafter, state, walk, depth)
      proposal, state = _close(drafter, state, walk)
    else:
      proposal, state = propose(model, drafter, state)
      if proposal.tree.size > 1:
        yield provisional(state.seq, state.request, proposal,
                          state.done), state
    state, emission = settle(model, drafter, verifier, state, proposal)
    yield emission, state


@jax.jit
def provisional(seq: Sequences, request: Request, proposal: Proposal,
                done: Bool[Array, "B"]) -> Emission:
  """What may be shown of a proposal before it is settled.

  Nothing behind an end token or the limit, where a text ends in any case.
  """
  tokens, count = leading(proposal)
  count, _ = stages.finish(request, seq.length, tokens, count)
  return Emission(seq.length, tokens, jnp.where(done, 0, count), settled=False)


@jax.jit
def leading(proposal: Proposal) -> tuple[Int[Array, "B P"], Int[Array, "B"]]:
  """The path of first children, what a drafter believes in most.

  Returns:
    Its tokens, and how many of them may be shown.
  """
  last = jnp.argmax(jnp.where(proposal.leads, proposal.depths, -1), axis=1)
  tokens = jnp.take_along_axis(proposal.tokens, proposal.path_to(last)[:, 1:],
                               axis=1)
  depth = jnp.take_along_axis(proposal.depths, last[:, None], axis=1)[:, 0]
  if proposal.shown is not None:
    depth = jnp.minimum(depth, proposal.shown)
  return tokens, depth


def pin(state: DecodeState) -> DecodeState:
  """Lays out what there is of each row alike, whichever program leaves it.

  XLA would choose for every program apart, and the next would be compiled
  again for what the last one chose. Keys and values are their cache's.
  """
  rows = len(state.done)

  def place(x):
    if not 0 < x.ndim < 4 or len(x) != rows:
      return x
    return sharding.constrain(x, "rows", *[None] * (x.ndim - 1))

  return jax.tree.map(place, state)


__all__ = ["decode", "init", "insert", "leading", "pin", "prefill", "propose",
           "provisional", "release", "settle", "stream"]
