# SPDX-License-Identifier: Apache-2.0
"""The walk of one step: propose, score, verify, commit, observe.

Each stage is a `jax.named_scope`, so that a profile reads like this file. No
drafter, verifier or model is imported here; they are received.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspec import sampling
from jaxspec.base import (
  Counters,
  DecodeState,
  Drafter,
  Emission,
  HeadStart,
  Model,
  Proposal,
  Request,
  Scores,
  Sequences,
  Verdict,
  Verifier,
)
from jaxspec.caches import Cache, Place


def step(model: Model, drafter: Drafter, verifier: Verifier,
         state: DecodeState) -> tuple[DecodeState, Emission]:
  """One pass of the model over one proposal."""
  proposal, state = propose(model, drafter, state)
  return settle(model, drafter, verifier, state, proposal)


@jax.named_scope("propose")
def propose(model: Model, drafter: Drafter, state: DecodeState
            ) -> tuple[Proposal, DecodeState]:
  """Asks the drafter for tokens on its tree."""
  proposal, draft = drafter.propose(
      model, state.seq, state.request, state.draft)
  return proposal, state.replace(draft=draft)


def settle(model: Model, drafter: Drafter, verifier: Verifier,
           state: DecodeState, proposal: Proposal
           ) -> tuple[DecodeState, Emission]:
  """Scores a proposal, commits what stands, and tells the drafter."""
  scores, verdict = examine(model, drafter, verifier, state, proposal)
  state, verdict, emission = commit(state, proposal, scores, verdict)
  return observe(model, drafter, state, proposal, scores, verdict), emission


def examine(model: Model, drafter: Drafter, verifier: Verifier,
            state: DecodeState, proposal: Proposal) -> tuple[Scores, Verdict]:
  """Scores and verifies, in a pass as narrow as the live nodes allow.

  Nodes beyond it were never seen by the model; what is said of them is 0.
  """
  def narrow(nodes):
    few = proposal.first(nodes)
    logits, scores = score(model, drafter, state.seq.cache, few)
    verdict = verify(verifier, state, few, logits)
    if nodes == proposal.tree.size:
      return scores, verdict

    def widen(x, size):
      return jnp.pad(x, [(0, 0), (0, size - x.shape[1])]
                     + [(0, 0)] * (x.ndim - 2))
    longest = proposal.tree.height + 1
    return (jax.tree.map(lambda x: widen(x, proposal.tree.size), scores),
            verdict.replace(path=widen(verdict.path, longest),
                            logprobs=widen(verdict.logprobs, longest)))

  if not proposal.sizes:
    return narrow(proposal.tree.size)
  return jax.lax.switch(
      width(proposal, state.done),
      [functools.partial(narrow, nodes) for nodes in proposal.sizes])


def width(proposal: Proposal, done: Bool[Array, "B"]) -> Int[Array, ""]:
  """Which of `sizes` is the smallest that holds every live node."""
  live = jnp.sum(proposal.alive, axis=1)
  most = jnp.max(jnp.where(done, 1, live))
  if proposal.least is not None:
    most = jnp.maximum(most, proposal.least)
  return jnp.sum(jnp.asarray(proposal.sizes[:-1]) < most)


@jax.named_scope("score")
def score(model: Model, drafter: Drafter, cache: Cache, proposal: Proposal
          ) -> tuple[Float[Array, "B N V"], Scores]:
  """One pass over all nodes, from the head start or from the embedding.

  Every layer attends to the committed prefix and, along the tree, to the
  fresh nodes.

  Returns:
    The logits behind every node, and what is kept of the pass.
  """
  tree = proposal.tree
  start = proposal.head_start
  if start is None:
    start = HeadStart(model.embed(proposal.tokens),
                      model.init_fresh(cache, tree.size), depth=0)
  at = Place.of(cache.length[:, None] + proposal.depths,
                jnp.asarray(tree.mask))
  x, fresh, below, features = start.x, start.fresh, start.depth, []
  for cut in (*drafter.taps, model.depth):
    x, fresh = model.extend(x, cache, fresh, at, layers=range(below, cut))
    features.append(x)
    below = max(below, cut)         # a head start may lie above a tap
  logits = model.unembed(x)
  top = sampling.top(logits, drafter.ranks)
  return logits, Scores(top, tuple(features), fresh)


@jax.named_scope("verify")
def verify(verifier: Verifier, state: DecodeState, proposal: Proposal,
           logits: Float[Array, "B N V"]) -> Verdict:
  """One path a row; finished rows keep nothing."""
  seq, request = state.seq, state.request
  history = sampling.History(seq.tokens, seq.prompt_length, seq.length,
                             proposal.tokens, proposal.mask)
  positions = seq.length[:, None] + proposal.depths
  verdict = verifier(proposal, sampling.Laws(
      logits, request.sampling, history, positions))

  def noted():
    said = emitted(proposal, verdict)
    return sampling.log_probability(logits, verdict.path, said)
  return verdict.replace(
      kept=jnp.where(state.done, 0, verdict.kept),
      logprobs=jax.lax.cond(
          jnp.any(request.wants_logprobs), noted,
          lambda: jnp.zeros(verdict.path.shape, jnp.float32)))


def emitted(proposal: Proposal, verdict: Verdict) -> Int[Array, "B P"]:
  """What a verdict says: the accepted nodes, then the next token."""
  nodes = jnp.pad(verdict.path[:, 1:], ((0, 0), (0, 1)))
  index = jnp.arange(verdict.path.shape[1])[None]
  return jnp.where(
      index < verdict.kept[:, None] - 1,
      jnp.take_along_axis(proposal.tokens, nodes, axis=1),
      verdict.next_token[:, None])


@jax.named_scope("commit")
def commit(state: DecodeState, proposal: Proposal, scores: Scores,
           verdict: Verdict) -> tuple[DecodeState, Verdict, Emission]:
  """Writes the accepted path into the text and the cache.

  What follows an end token, or the request's limit, is dropped here; the
  verdict is cut accordingly. A row for which the cache has no room gets
  nothing more and is finished.
  """
  seq, path = state.seq, verdict.path
  said = emitted(proposal, verdict)
  wanted, done = finish(state.request, seq.length, said, verdict.kept)
  cache = seq.cache.commit(scores.fresh, path, wanted)
  kept = cache.length - seq.cache.length       # none where there is no room
  done |= kept < wanted
  logprobs = write(state.logprobs, verdict.logprobs, seq.length, kept)
  verdict = verdict.replace(kept=kept, next_token=jnp.take_along_axis(
      said, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0])
  counters = count(state.counters, proposal, verdict, state.done)
  emission = Emission(seq.length, said, kept, settled=True)
  seq = Sequences(write(seq.tokens, said, seq.length, kept),
                  seq.prompt_length, seq.length + kept, cache)
  state = state.replace(seq=seq, done=state.done | done, logprobs=logprobs,
                        counters=counters)
  return state, verdict, emission


@jax.named_scope("observe")
def observe(model: Model, drafter: Drafter, state: DecodeState,
            proposal: Proposal, scores: Scores,
            verdict: Verdict) -> DecodeState:
  """Lets the drafter learn from the verdict."""
  return state.replace(draft=drafter.observe(
      model, state.seq, state.draft, proposal, scores, verdict))


def finish(request: Request, length: Int[Array, "B"],
           emitted: Int[Array, "B P"], kept: Int[Array, "B"]
           ) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
  """Cuts what is emitted after an end token or the limit.

  Returns:
    How many tokens stay, and which rows are now finished.
  """
  kept = jnp.minimum(kept, request.limit - length)
  ends = jnp.any(emitted[..., None] == request.stops[:, None], axis=-1)
  ends &= jnp.arange(emitted.shape[1])[None] < kept[:, None]
  stopped = jnp.any(ends, axis=1)
  kept = jnp.where(stopped, jnp.argmax(ends, axis=1) + 1, kept)
  return kept, stopped | (length + kept >= request.limit)


def count(counters: Counters, proposal: Proposal, verdict: Verdict,
          done: Bool[Array, "B"]) -> Counters:
  """Adds one step to the counters of the rows that took part.

  Args:
    done: rows that were finished before it.
  """
  kept = verdict.kept
  took_part = kept > 0
  depth = jnp.arange(1, counters.drafted.shape[1] + 1)[None]
  drafted = proposal.alive & (proposal.depths > 0)
  nodes = jnp.sum(
      drafted[..., None] & (proposal.depths[..., None] == depth[None]),
      axis=1, dtype=jnp.int32)                                   # [B P-1]
  used = verdict.walked(counters.used.shape[1]).at[:, 0].set(False)
  scored = proposal.tree.size
  if proposal.sizes:
    scored = jnp.asarray(proposal.sizes)[width(proposal, done)]
  return Counters(
      counters.passes + took_part,
      counters.nodes + jnp.sum(nodes, axis=1) * took_part,
      counters.drafted + ((nodes > 0) & took_part[:, None]),
      counters.accepted + (depth < kept[:, None]),
      counters.used + used, counters.scored + scored * took_part)


def write(buffer: Array, values: Array, start: Int[Array, "B"],
          kept: Int[Array, "B"]) -> Array:
  """`buffer[b, start[b]:start[b] + kept[b]] = values[b, :kept[b]]`."""
  index = jnp.arange(values.shape[1])[None]
  slots = jnp.where(index < kept[:, None], start[:, None] + index,
                    buffer.shape[1])
  rows = jnp.arange(buffer.shape[0])[:, None]
  return buffer.at[rows, slots].set(values, mode="drop")
