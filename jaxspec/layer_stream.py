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
each in other layers. `prefill`, `decode` and `stream` take the places of those
in `loop`; its `init`, `insert` and `release` serve both.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxspec import naming, sampling, sharding, stages
from jaxspec.base import (
  Counters,
  DecodeState,
  Drafter,
  Emission,
  Prefix,
  Proposal,
  Sequences,
  Verifier,
)
from jaxspec.caches import Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.drafters.early_exit import EarlyExit, exit_head
from jaxspec.errors import InputError
from jaxspec.heads import ExitHead
from jaxspec.loop import pin
from jaxspec.models.transformer import Transformer
from jaxspec.pipeline import AXIS, Pipeline, StageCache, divide, on_stages
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
  """What guesses, at the end of the first stage.

  Attributes:
    guess: whether it does; else each token waits for the last one.
    cache_dtype: of the keys and values of the head's attention.
  """

  head: ExitHead
  guess: Bool[Array, ""]
  cache_dtype: str = struct.field(pytree_node=False, default="float32")

  tree = chain(1)

  @classmethod
  def on(cls, mesh: Mesh, head: ExitHead, *, guess: bool = True,
         cache_dtype: str = "float32") -> "LayerStream":
    """With the weights of the head on every stage."""
    head, guesses = jax.device_put((head, jnp.asarray(guess)),
                                   NamedSharding(mesh, PartitionSpec()))
    return cls(head, guesses, cache_dtype)

  @property
  def taps(self):
    return (self.head.layer,) if self.head.depth else ()

  def init(self, model, rows, capacity):
    count, heard = len(model.layers), None
    x = jax.eval_shape(lambda model: model.embed(
        jnp.zeros((rows, 1), jnp.int32)), model)
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


def build(model: Transformer, mesh: Mesh, *, heads: Any = "", layer: Any = 0,
          layers: Any = "", guess: Any = True, cache_dtype: str = "float32"
          ) -> tuple[Pipeline, LayerStream]:
  """Puts a model that is in memory on the stages of a mesh.

  Args:
    heads: a trained head, as for the drafter early_exit. The layers below it
      are the first stage.
    layer: in its place, how many layers lie below the plain early exit.
    layers: of each stage, as in `10;7;7;6`; if not given, the others share
      evenly what lies above the head.
    guess: False is plain pipelining.

  Raises:
    InputError: something of this does not fit the model or the mesh.
  """
  naming.whole("layer_stream", "stages of the mesh", mesh.shape.get(AXIS, 1), 2,
               model.depth)
  if type(guess) is not bool:
    raise InputError(f"layer_stream: guess must be True or False, got {guess}")
  head = exit_head("layer_stream", model, heads, layer).heads
  parts = divide(model.depth, mesh.shape[AXIS], head.layer)
  if layers:
    try:
      parts = tuple(int(part) for part in str(layers).split(";"))
    except ValueError as error:
      raise InputError("layer_stream: layers must be numbers of layers, as in "
                       f"[10;7;7;6], got {layers!r}") from error
  if parts[0] != head.layer:
    raise InputError(
        f"layer_stream: the head is made for the stream below layer "
        f"{head.layer}, and the first stage has {parts[0]} layers; use "
        f"layers=[{head.layer};...], or another head")
  return (Pipeline.of(model, parts, mesh),
          LayerStream.on(mesh, head, guess=guess, cache_dtype=cache_dtype))


@functools.partial(jax.jit, static_argnames=("taps", "chunk", "dtype"))
def prefill(model: Pipeline, taps: tuple[int, ...], tokens: Int[Array, "R T"],
            length: Int[Array, "R"], *, chunk: int, dtype: Any) -> Prefix:
  """Reads prompts, chunk by chunk from stage to stage.

  While one stage reads a chunk, the one before it reads the next.

  Args:
    taps: none, or the layers of the first stage.
    tokens, length, chunk, dtype: as for `loop.prefill`.
  """
  if any(tap != model.layers[0] for tap in taps):
    raise ValueError("what is below a layer is known where a stage ends")
  rows, padded = tokens.shape
  chunk = min(chunk, padded)
  nth = jnp.broadcast_to(jnp.arange(chunk)[None], (rows, chunk))
  mask = jnp.tril(jnp.ones((chunk, chunk), bool))
  count, stage_count = (jnp.max(length) + chunk - 1) // chunk, len(model.layers)
  x = jax.eval_shape(lambda model: model.embed(tokens), model)
  read = _Read(
      jnp.zeros((rows, chunk, x.shape[-1]), x.dtype),
      tuple(jnp.zeros(x.shape, x.dtype) for _ in taps),
      jnp.zeros((rows, x.shape[-1]), x.dtype),
      model.init_cache(ContiguousCache, rows, padded, dtype))

  def run(read, model, tokens, length):
    mine, stage = model.mine(), lax.axis_index(AXIS)

    def body(tick, read):
      at = tick - stage                          # the chunk that is here
      start = jnp.clip(at, 0, padded // chunk - 1) * chunk
      here = (at >= 0) & (at < count)
      part = lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
      x = jnp.where(stage == 0, mine.embed(part), read.x)
      cache = read.cache.mine().replace(length=jnp.minimum(length, start))
      x, fresh = lax.cond(
          here,
          lambda x: model.run(mine, x, cache, Place.of(start + nth, mask)),
          lambda x: (x, mine.init_fresh(cache, chunk)), x)
      cache = cache.commit(
          fresh, nth, jnp.where(here, jnp.clip(length - start, 0, chunk), 0))
      tapped = tuple(jnp.where(
          here & (stage == 0),
          lax.dynamic_update_slice_in_dim(old, x, start, axis=1), old)
                     for old in read.tapped)
      final = length - 1 - start
      ends = here & (final >= 0) & (final < chunk) & (stage == stage_count - 1)
      last = jnp.take_along_axis(
          x, jnp.clip(final, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
      x = lax.ppermute(x, AXIS, [(s, s + 1) for s in range(stage_count - 1)])
      return _Read(x, tapped, jnp.where(ends[:, None], last, read.last),
                   read.cache.of(cache))

    read = lax.fori_loop(0, count + stage_count - 1, body, read)
    # On all stages but one these are zero.
    tapped, last = lax.psum((read.tapped, read.last), AXIS)
    return read.replace(tapped=tapped, last=last)

  read = on_stages(run, read, model, tokens, length)
  return Prefix(tokens, length, read.cache.replace(length=length),
                read.tapped, read.last)


@struct.dataclass
class _Read:
  """Prompts on their way through the stages.

  Attributes:
    x: what enters this stage next.
    tapped: behind the first stage, at all positions.
    last: behind the last one, at the last position of each.
  """

  x: Float[Array, "R T D"]
  tapped: tuple[Float[Array, "R _ D"], ...]
  last: Float[Array, "R D"]
  cache: StageCache

  def split(self) -> list[bool]:
    return [False] * (2 + len(self.tapped)) + self.cache.split()


@functools.partial(jax.jit, static_argnames=("verifier",),
                   donate_argnames=("state",))
def decode(model: Pipeline, drafter: LayerStream, verifier: Verifier,
           state: DecodeState, ticks: Int[Array, ""],
           wait: Bool[Array, ""]) -> DecodeState:
  """Runs up to `ticks` ticks on the device; what is under way stays so.

  The mesh is that of the model, set with `jax.set_mesh`.

  Args:
    verifier: what says a token from the law behind a root alone.
    wait: whether to go on when a row finishes.
  """
  def run(state, model, drafter):
    mine = model.mine()
    running = ~state.done

    def more(carry):
      tick, state = carry
      freed = jnp.any(state.done & running)
      return (tick < ticks) & jnp.any(~state.done) & (wait | ~freed)

    def body(carry):
      tick, state = carry
      return tick + 1, _tick(model, mine, drafter, verifier, state)

    return lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state))[1]

  return pin(on_stages(run, state, model, drafter))


def _tick(pipeline: Pipeline, model: Transformer, drafter: LayerStream,
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
        lambda x: pipeline.run(model, x, cache, place),
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
      y, new = drafter.head.extend(x, heard.replace(length=position), own,
                                  place, layers=range(1))
    logits = drafter.head.spread(drafter.head(model, y), model.vocab)
    said = laws(logits).draw(alone[:, 0])
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
    own = None if heard is None else drafter.head.init_fresh(heard, 1)
    guesses = drafter.guess & (stage == 0)
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
  flow = flow.replace(x=x[None])
  if flow.heard is not None:
    flow = flow.replace(heard=flow.heard.of(heard))
  state = state.replace(seq=seq.replace(cache=seq.cache.of(cache)),
                        draft=flow)
  sure = lax.bitcast_convert_type(said[last, :, 1], jnp.float32)
  return _settle(state, at, said[0, :, 0], said[last, :, 0], sure,
                 drafter.guess)


def stream(model: Pipeline, drafter: LayerStream, verifier: Verifier,
           state: DecodeState) -> Iterator[tuple[Emission, DecodeState]]:
  """The same, tick by tick, from the host.

  Yields:
    What is settled, in ticks in which something is; then, not settled, all
    that was guessed behind it. Beside each, the state after that tick.
  """
  while not bool(jnp.all(state.done)):
    before = np.asarray(state.seq.length)
    state = decode(model, drafter, verifier, state, np.int32(1), np.bool_(True))
    emissions = emitted(state, before, len(model.layers))
    for emission in emissions:
      if bool(jnp.any(emission.count > 0)):
        yield emission, state


@functools.partial(jax.jit, static_argnames="most")
def emitted(state: DecodeState, before: Int[Array, "B"], most: int
            ) -> tuple[Emission, Emission]:
  """What is new since the texts were as long as `before`, and what is guessed.

  Args:
    most: tokens that may be guessed at once.
  """
  seq, at = state.seq, state.draft.at
  def behind(start):
    nth = start[:, None] + jnp.arange(most)[None]
    return jnp.take_along_axis(seq.tokens, nth, axis=1, mode="clip")
  guessed = jnp.where(state.done, 0, jnp.max(at, axis=0) + 1 - seq.length)
  return (Emission(before, behind(before)[:, :1], seq.length - before,
                   settled=True),
          Emission(seq.length, behind(seq.length), jnp.maximum(guessed, 0),
                   settled=False))


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
  # A guess of the last token of a text saves no tick, however right.
  judged, was_right = (
      (x & ~done).astype(jnp.int32) for x in (ahead, right))
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


__all__ = ["Flow", "LayerStream", "build", "decode", "emitted", "prefill",
           "stream"]
