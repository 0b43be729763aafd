# SPDX-License-Identifier: Apache-2.0
"""Speculative continuation: the first layers run ahead while the last finish.

The layers lie on the stages of a pipeline (`jaxspec.pipeline`). In each tick
every stage takes one token of every row and passes the stream on. At the end of
the first stage a head guesses what follows the token there, and in the next
tick that guess enters; at the end of the last stage the model says what really
follows the token there. Where the token behind it was guessed wrong, all that
is on its way behind it is drained, and the right one enters in the next tick.

So a right guess brings a token a tick, a wrong one a token in as many ticks as
there are stages, which is what a pipeline brings that waits for each token
(`guess=False`, the same program). The text is that of plain decoding either
way: what the last stage says depends on the settled text and on noise of
request and position alone, and guesses decide only when it is said.

It is a loop of its own and no drafter of `jaxspec.loop`: a step there begins
when the last one has ended, and here several tokens of a row are under way,
each in other layers. `loop.init`, `prefill`, `insert` and `release` serve both.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxspec import sampling, sharding, stages
from jaxspec.base import (
  Counters,
  DecodeState,
  Drafter,
  Proposal,
  Sequences,
  Verifier,
)
from jaxspec.caches import Place
from jaxspec.drafters.early_exit import EarlyExit
from jaxspec.heads import ExitHead
from jaxspec.loop import pin
from jaxspec.models.transformer import Transformer
from jaxspec.pipeline import AXIS, Pipeline, StageCache, on_stages
from jaxspec.tree import chain, root


@struct.dataclass
class Flow:
  """What is on its way through the stages.

  What was guessed stands in the rows' texts beyond their lengths.

  Attributes:
    x: what enters each stage in the next tick; the first embeds a token.
    at: the position of that token, or -1.
    heard: keys and values of the head's attention, on the first stage.
    ticks: in which each row's request took part.
    worked: stages that took a token of it, over all ticks.
    wasted: those of them whose token was drained.
  """

  x: Float[Array, "S B 1 D"]
  at: Int[Array, "stages B"]
  heard: StageCache | None
  ticks: Int[Array, "B"]
  worked: Int[Array, "B"]
  wasted: Int[Array, "B"]

  def split(self) -> list[bool]:
    """Which of its leaves are split over the stages."""
    heard = [] if self.heard is None else self.heard.split()
    return [True, False, *heard, False, False, False]


@struct.dataclass
class LayerStream(Drafter):
  """What guesses, at the end of the first stage, and for which pipeline.

  Attributes:
    guess: whether it does; else each token waits for the last one.
    cache_dtype: of the keys and values of the head's attention.
  """

  pipeline: Pipeline
  head: ExitHead
  guess: Bool[Array, ""]
  cache_dtype: str = struct.field(pytree_node=False, default="float32")

  tree = chain(1)

  @property
  def taps(self):
    return (self.head.layer,) if self.head.depth else ()

  def init_cache(self, rows: int, capacity: int, dtype: Any) -> StageCache:
    """An empty cache of the pipeline's model."""
    p = self.pipeline
    return StageCache.empty(p.model.config, p.layers, rows, capacity, dtype)

  def init(self, model, rows, capacity):
    p, heard = self.pipeline, None
    count = len(p.layers)
    x = jax.eval_shape(lambda model: model.embed(
        jnp.zeros((rows, 1), jnp.int32)), p.model)
    if self.head.depth:
      heard = StageCache.empty(
          self.head.config, (1,) + (0,) * (count - 1), rows, capacity,
          jnp.dtype(self.cache_dtype))
    zeros = jnp.zeros(rows, jnp.int32)
    return Flow(
        sharding.constrain(jnp.zeros((count, *x.shape), x.dtype), "stages",
                           *[None] * x.ndim),
        sharding.constrain(jnp.full((count, rows), -1, jnp.int32), None, None),
        heard, zeros, zeros, zeros)

  def insert(self, model, state, rows, prefix, request):
    # The last committed token is what enters first.
    at = state.at.at[:, rows].set(-1, mode="drop")
    heard = state.heard
    if heard is not None:
      whole = EarlyExit(self.head, ((0,),), cache_dtype=self.cache_dtype).read(
          model, prefix.features[0], prefix.length)
      heard = heard.insert(rows, whole.cache, request.limit)

    def clear(x):
      return x.at[rows].set(0, mode="drop")
    return Flow(state.x, at.at[0, rows].set(prefix.length, mode="drop"), heard,
                clear(state.ticks), clear(state.worked), clear(state.wasted))


@functools.partial(jax.jit, static_argnames=("verifier",),
                   donate_argnames=("state",))
def decode(stream: LayerStream, verifier: Verifier, state: DecodeState,
           ticks: Int[Array, ""], wait: Bool[Array, ""]) -> DecodeState:
  """Runs up to `ticks` ticks on the device; under way is what is under way.

  The mesh is that of the pipeline, set with `jax.set_mesh`.

  Args:
    verifier: what says a token from the law behind a root alone.
    wait: whether to go on when a row finishes.
  """
  def run(state, stream):
    pipeline, model = stream.pipeline, stream.pipeline.mine()
    running = ~state.done

    def more(carry):
      tick, state = carry
      freed = jnp.any(state.done & running)
      return (tick < ticks) & jnp.any(~state.done) & (wait | ~freed)

    def body(carry):
      tick, state = carry
      return tick + 1, _tick(pipeline, model, stream, verifier, state)

    return lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state))[1]

  return pin(on_stages(run, state, stream))


def _tick(pipeline: Pipeline, model: Transformer, stream: LayerStream,
          verifier: Verifier, state: DecodeState) -> DecodeState:
  """One token of each row through each stage, seen from one of them."""
  seq, flow, request = state.seq, state.draft, state.request
  mine = seq.cache.mine()
  heard = None if flow.heard is None else flow.heard.mine()
  stage, last = lax.axis_index(AXIS), len(pipeline.layers) - 1
  at = jnp.where(state.done[None], -1, flow.at)                  # [S B]
  busy = at[stage] >= 0
  position = jnp.maximum(at[stage], 0)
  token = jnp.take_along_axis(seq.tokens, position[:, None], axis=1)
  place = Place.of(position[:, None], jnp.ones((1, 1), bool))
  alone = jnp.zeros_like(token)

  with jax.named_scope("layers"):
    x = jnp.where(stage == 0, model.embed(token), flow.x[0])
    cache = mine.replace(length=position)
    x, fresh = lax.cond(
        jnp.any(busy),
        lambda x: pipeline.run(model, stage, x, cache, place),
        lambda x: (x, model.init_fresh(cache, 1)), x)
    cache = cache.commit(fresh, alone, busy.astype(jnp.int32))

  def laws(logits):
    """Behind the token here, all before it being as if committed."""
    history = sampling.History(seq.tokens, seq.prompt_length, position + 1,
                               token, jnp.ones((len(token), 1, 1), bool))
    return sampling.Laws(logits, request.sampling, history,
                         position[:, None] + 1)

  def nothing(x):
    return jnp.zeros((len(token), 2), jnp.int32), own

  def guess(x):
    y, new = x, own
    if heard is not None:
      y, new = stream.head.extend(x, heard.replace(length=position), own,
                                  place, layers=range(1))
    said = laws(_whole(stream.head, model, y)).draw(alone[:, 0])
    return jnp.stack([said, jnp.zeros_like(said)], axis=1), new

  def settle(x):
    logits = model.unembed(x)
    said = verifier(Proposal(token, root()), laws(logits)).next_token
    sure = lax.cond(
        jnp.any(request.wants_logprobs),
        lambda: sampling.log_probability(logits, alone, said[:, None])[:, 0],
        lambda: jnp.zeros(len(token), jnp.float32))
    return jnp.stack([said, lax.bitcast_convert_type(sure, jnp.int32)],
                     axis=1), own

  with jax.named_scope("say"):
    own = None if heard is None else stream.head.init_fresh(heard, 1)
    guesses = stream.guess & (stage == 0)
    what = jnp.where(guesses, 1, jnp.where(stage == last, 2, 0))
    said, own = lax.switch(jnp.where(jnp.any(busy), what, 0),
                           (nothing, guess, settle), x)
    if heard is not None:
      heard = heard.replace(length=position).commit(
          own, alone, (busy & guesses).astype(jnp.int32))

  with jax.named_scope("pass_on"):
    x = lax.ppermute(x, AXIS, [(s, s + 1) for s in range(last)])
    said = lax.all_gather(said, AXIS)                            # [S B 2]

  # From here on every stage does the same.
  flow = flow.replace(x=x[None], heard=heard and flow.heard.of(heard))
  state = state.replace(seq=seq.replace(cache=seq.cache.of(cache)),
                        draft=flow)
  sure = lax.bitcast_convert_type(said[last, :, 1], jnp.float32)
  return _settle(state, at, said[0, :, 0], said[last, :, 0], sure,
                 stream.guess)


@jax.named_scope("settle")
def _settle(state: DecodeState, at: Int[Array, "stages B"],
            guessed: Int[Array, "B"], said: Int[Array, "B"],
            logprob: Float[Array, "B"], guess: Bool[Array, ""]) -> DecodeState:
  """Commits what the last stage said, and tells what enters the first.

  Args:
    at: the positions that the stages took in this tick, or -1.
    guessed: behind the token in the first stage.
    said: behind the one in the last.
  """
  seq, flow, request = state.seq, state.draft, state.request
  first, settles = at[0], at[-1] >= 0
  kept, done = stages.finish(request, seq.length, said[:, None],
                             settles.astype(jnp.int32))
  ahead = settles & (at[-2] >= 0)     # the token behind it is on its way
  fed = jnp.take_along_axis(seq.tokens, seq.length[:, None], axis=1,
                            mode="clip")[:, 0]
  right = ahead & (fed == said)
  drained = settles & ~right | done

  runs_on = guess & (first >= 0)
  tokens = stages.write(seq.tokens, guessed[:, None], first + 1,
                        runs_on.astype(jnp.int32))
  tokens = stages.write(tokens, said[:, None], seq.length, kept)
  # Nothing is said behind the last token of a text, so it need not enter.
  enters = jnp.where(drained, seq.length, jnp.where(runs_on, first + 1, -1))
  enters = jnp.where(done | (enters > request.limit - 2), -1, enters)
  behind = jnp.where(drained[None], -1, at[:-1])

  taken = (at >= 0).astype(jnp.int32)
  spent = jnp.arange(1, len(at))[:, None] * taken[:-1]
  flow = flow.replace(
      at=jnp.concatenate([enters[None], behind]),
      ticks=flow.ticks + ~state.done,
      worked=flow.worked + jnp.sum(taken, axis=0),
      wasted=flow.wasted + jnp.where(drained, jnp.sum(spent, axis=0), 0))
  length = seq.length + kept
  judged, was_right = ahead.astype(jnp.int32), right.astype(jnp.int32)
  c = state.counters
  counters = Counters(
      c.passes + kept, c.nodes + judged, c.drafted + judged[:, None],
      c.accepted + was_right[:, None], c.used.at[:, 1].add(was_right),
      c.scored + kept + judged)
  logprobs = stages.write(state.logprobs, logprob[:, None], seq.length, kept)
  cache = seq.cache.replace(length=length - 1)
  return state.replace(
      seq=Sequences(tokens, seq.prompt_length, length, cache), draft=flow,
      done=state.done | done, logprobs=logprobs, counters=counters)


def _whole(head: ExitHead, model: Transformer, x: Float[Array, "B 1 D"]
           ) -> Float[Array, "B 1 V"]:
  """What the head says of all tokens; what it cannot say has no chance."""
  logits = head(model, x)
  if head.tokens is None:
    return logits
  return jnp.full((*x.shape[:2], model.vocab), -jnp.inf).at[
      ..., head.tokens[...]].set(logits)


__all__ = ["Flow", "LayerStream", "decode"]
