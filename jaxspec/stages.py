# SPDX-License-Identifier: Apache-2.0
"""The walk of one step: propose, score, verify, commit, observe.

Each stage is a `jax.named_scope`, so that a profile reads like this file. No
drafter, verifier or model is imported here; they are received.
"""

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
  scores = score(model, drafter.taps, state.seq.cache, proposal)
  verdict = verify(verifier, state, proposal, scores)
  state, verdict, emission = commit(state, proposal, scores, verdict)
  return observe(model, drafter, state, proposal, scores, verdict), emission


@jax.named_scope("score")
def score(model: Model, taps: tuple[int, ...], cache: Cache,
          proposal: Proposal) -> Scores:
  """One pass over all nodes, from the head start or from the embedding.

  Every layer attends to the committed prefix and, along the tree, to the
  fresh nodes.
  """
  tree = proposal.tree
  start = proposal.head_start
  if start is None:
    start = HeadStart(model.embed(proposal.tokens),
                      model.init_fresh(cache, tree.size), 0)
  at = Place(cache.length[:, None] + tree.depths[None],
             jnp.asarray(tree.mask))
  x, fresh, below, features = start.x, start.fresh, start.depth, []
  for cut in (*taps, model.depth):
    x, fresh = model.extend(x, cache, fresh, at, layers=range(below, cut))
    features.append(x)
    below = cut
  return Scores(proposal.tokens, model.unembed(x), tuple(features), fresh)


@jax.named_scope("verify")
def verify(verifier: Verifier, state: DecodeState, proposal: Proposal,
           scores: Scores) -> Verdict:
  """One path a row; finished rows keep nothing."""
  seq, tree = state.seq, proposal.tree
  history = sampling.History(
      seq.tokens, seq.prompt_length, seq.length, proposal.tokens,
      jnp.asarray(tree.mask))
  logits = sampling.warp(scores.logits, state.request.sampling, history)
  positions = seq.length[:, None] + tree.depths[None]
  verdict = verifier(proposal, logits, state.request.sampling, positions)
  return verdict.replace(kept=jnp.where(state.done, 0, verdict.kept))


@jax.named_scope("commit")
def commit(state: DecodeState, proposal: Proposal, scores: Scores,
           verdict: Verdict) -> tuple[DecodeState, Verdict, Emission]:
  """Writes the accepted path into the text and the cache.

  What follows an end token, or the request's limit, is dropped here; the
  verdict is cut accordingly. A row for which the cache has no room gets
  nothing more and is finished.
  """
  seq, path = state.seq, verdict.path
  # What the step says: the accepted nodes, then the next token.
  nodes = jnp.pad(path[:, 1:], ((0, 0), (0, 1)))
  index = jnp.arange(path.shape[1])[None]
  emitted = jnp.where(
      index < verdict.kept[:, None] - 1,
      jnp.take_along_axis(proposal.tokens, nodes, axis=1),
      verdict.next_token[:, None])
  wanted, done = finish(state.request, seq.length, emitted, verdict.kept)
  cache = seq.cache.commit(scores.fresh, path, wanted)
  kept = cache.length - seq.cache.length       # none where there is no room
  done |= kept < wanted
  logprobs = record(state, scores.logits, path, emitted, kept)
  verdict = verdict.replace(kept=kept, next_token=jnp.take_along_axis(
      emitted, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0])
  counters = count(state.counters, proposal, kept)
  emission = Emission(seq.length, emitted, kept, settled=True)
  seq = Sequences(write(seq.tokens, emitted, seq.length, kept),
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


def record(state: DecodeState, logits: Float[Array, "B N V"],
           path: Int[Array, "B P"], emitted: Int[Array, "B P"],
           kept: Int[Array, "B"]) -> Float[Array, "B C"]:
  """Notes the model's log-probability of every committed token."""
  def noted(buffer):
    return write(buffer, sampling.log_probability(logits, path, emitted),
                 state.seq.length, kept)
  return jax.lax.cond(jnp.any(state.request.wants_logprobs), noted,
                      lambda buffer: buffer, state.logprobs)


def count(counters: Counters, proposal: Proposal,
          kept: Int[Array, "B"]) -> Counters:
  """Adds one step to the counters of the rows that took part."""
  took_part = kept > 0
  depth = jnp.arange(1, counters.drafted.shape[1] + 1)[None]
  at_depth = (proposal.tree.depths[:, None] == depth).astype(jnp.int32)
  nodes = proposal.alive.astype(jnp.int32) @ at_depth          # [B P-1]
  return Counters(
      counters.passes + took_part,
      counters.nodes + jnp.sum(nodes, axis=1) * took_part,
      counters.drafted + ((nodes > 0) & took_part[:, None]),
      counters.accepted + (depth < kept[:, None]))


def write(buffer: Array, values: Array, start: Int[Array, "B"],
          kept: Int[Array, "B"]) -> Array:
  """`buffer[b, start[b]:start[b] + kept[b]] = values[b, :kept[b]]`."""
  index = jnp.arange(values.shape[1])[None]
  slots = jnp.where(index < kept[:, None], start[:, None] + index,
                    buffer.shape[1])
  rows = jnp.arange(buffer.shape[0])[:, None]
  return buffer.at[rows, slots].set(values, mode="drop")
