# SPDX-License-Identifier: Apache-2.0
"""Layer-major prefill: the lower layers first, and at once a token to show.

Read chunk by chunk through all layers, a prompt gives nothing before its last
chunk has gone through the last of them. Here all of it goes through the lower
layers, and a head there says what may come first; that can be shown while the
rest of the work is still to be done. Drafts are added, and then prompt and
drafts go through the upper layers together, in which the first tokens are
settled: no layer takes a token twice, and no weight is read once more.

  glimpse    prompts through the lower layers; what the head says
  go_on      the rest of the drafts; `unfold`, the same one after another
  settle     both through the upper layers; the first tokens of the answer

The price is memory for the stream below the head, at all positions of the
prompts, and that nothing else is decoded in between.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxspec import stages
from jaxspec.base import (
  Counters,
  DecodeState,
  Emission,
  HeadStart,
  Proposal,
  Request,
  Sequences,
  Verifier,
)
from jaxspec.caches import Fresh, Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.loop import pin, provisional

Layers = tuple[Float[Array, "R G T K"], ...]


@struct.dataclass
class Glimpse:
  """Prompts that the lower layers have read.

  Attributes:
    seq: the prompts, with a cache of the lower layers; the last token of each
      is the root of the proposal, so that its keys count as not yet written.
    x: below the head, at every position.
    draft: the drafter's state of these rows.
    walk: the proposal as far as it is made.
    shown: how many drafts the drafter is sure enough of to show them.
  """

  seq: Sequences
  request: Request
  x: Float[Array, "R T D"]
  draft: Any
  walk: Any
  shown: Int[Array, "R"]
  proposal: Proposal | None = None

  def emission(self) -> Emission:
    """What the head says of the first token; nothing where it is not sure."""
    return Emission(self.seq.length, self.walk.tokens[:, 1:2],
                    jnp.minimum(self.shown, 1), settled=False)


@functools.partial(jax.jit, static_argnames=("chunk", "dtype"))
def glimpse(model: Any, drafter: Any, tokens: Int[Array, "R T"],
            length: Int[Array, "R"], request: Request, *, chunk: int,
            dtype: Any) -> Glimpse:
  """Takes prompts through the layers below the head.

  Args:
    tokens, length, chunk, dtype: as for `loop.prefill`.
  """
  depth = drafter.head.layer
  x, k, v, _ = _read(model, model.embed(tokens), length, range(depth),
                     chunk=chunk, dtype=dtype)
  cache = ContiguousCache(k, v, length - 1)      # of these layers alone
  seq = Sequences(tokens, length, length, cache)
  draft = drafter.read(model, x, length - 1)
  fresh = model.init_fresh(cache, drafter.size)
  for layer in range(depth):
    fresh = fresh.write(layer, 0, _at(k[layer], length), _at(v[layer], length))
  begun = HeadStart(_last(x, length), fresh, depth)
  walk = drafter.look(model, seq, request, draft, begun)
  return Glimpse(seq, request, x, draft, walk, drafter.shown(seq, walk))


@jax.jit
def go_on(model: Any, drafter: Any, glimpse: Glimpse) -> Glimpse:
  """Drafts as far as the drafter goes."""
  g = glimpse
  proposal, draft = drafter.go_on(model, g.seq, g.request, g.draft, g.walk)
  return g.replace(proposal=proposal, draft=draft, shown=proposal.shown)


def unfold(model: Any, drafter: Any, glimpse: Glimpse
           ) -> Iterator[tuple[Emission, Glimpse]]:
  """Drafts as `go_on` does, and tells after each depth what may be shown.

  Yields:
    What may be shown so far, whenever it is more than before. In the end, once
    more, all of it; the glimpse beside it is that of `go_on`.
  """
  shown = glimpse.emission()
  count = int(jnp.sum(shown.count))
  if count:
    yield shown, glimpse
  if drafter.stepwise:
    walk, depth = glimpse.walk, 1
    more = jnp.any(walk.wants)
    while depth <= drafter.height and bool(more):
      walk, new, more = _deepen(model, drafter, glimpse, walk, depth)
      depth += 1
      if int(jnp.sum(new.count)) > count:
        shown, count = new, int(jnp.sum(new.count))
        yield shown, glimpse
    glimpse = _close(drafter, glimpse, walk)
  else:
    glimpse = go_on(model, drafter, glimpse)
    shown = provisional(glimpse.seq, glimpse.request, glimpse.proposal,
                        _none(glimpse))
  yield shown, glimpse


@functools.partial(jax.jit, static_argnames=("depth",))
def _deepen(model, drafter, glimpse, walk, depth):
  g = glimpse
  walk = drafter.deepen(model, g.seq, g.request, g.draft, walk, depth)
  proposal, _ = drafter.close(g.seq, g.draft, walk)
  return (walk, provisional(g.seq, g.request, proposal, _none(g)),
          jnp.any(walk.wants))


def _none(glimpse: Glimpse) -> Bool[Array, "R"]:
  return jnp.zeros(len(glimpse.seq.length), bool)


@jax.jit
def _close(drafter, glimpse, walk):
  proposal, draft = drafter.close(glimpse.seq, glimpse.draft, walk)
  return glimpse.replace(walk=walk, proposal=proposal, draft=draft,
                         shown=proposal.shown)


@functools.partial(jax.jit, static_argnames=("verifier", "chunk"),
                   donate_argnames=("state",))
def settle(model: Any, drafter: Any, verifier: Verifier, state: DecodeState,
           rows: Int[Array, "R"], glimpse: Glimpse, *, chunk: int
           ) -> tuple[DecodeState, Emission]:
  """Takes prompts and drafts through the upper layers, and begins requests.

  Args:
    rows: where; an index of B or more is dropped.

  Returns:
    The state in which the first tokens are committed, and these.
  """
  g, made = glimpse, glimpse.proposal
  if made is None or made.head_start is None:
    raise ValueError("go_on comes before settle")
  start, length = made.head_start, g.seq.length
  depth, upper = start.depth, range(start.depth, model.depth)
  beside = (start.x[:, 1:], length[:, None] - 1 + made.depths[:, 1:],
            jnp.asarray(made.tree.mask)[1:, 1:])
  x, k, v, (top, fresh_k, fresh_v) = _read(
      model, g.x, length, upper, chunk=chunk, dtype=g.seq.cache.dtype,
      beside=beside)
  k, v = g.seq.cache.k + k, g.seq.cache.v + v

  def nodes(cache, lower, upper):
    """Of every layer, the root from the prompt and the drafts."""
    drafts = (*(layer[:, 1:] for layer in lower[:depth]), *upper)
    return tuple(jnp.concatenate([_at(c, length), d.astype(c.dtype)], axis=1)
                 for c, d in zip(cache, drafts))

  top = jnp.concatenate([_last(x, length), top], axis=1)
  fresh = Fresh(nodes(k, start.fresh.k, fresh_k),
                nodes(v, start.fresh.v, fresh_v))
  made = made.replace(head_start=HeadStart(top, fresh, model.depth), sizes=())
  state = _seat(drafter, state, rows, g, ContiguousCache(k, v, length - 1))

  # One step, in which the other rows rest.
  count = len(state.done)
  mine = jnp.zeros(count, bool).at[rows].set(True, mode="drop")

  def scatter(x):
    if x.shape[:1] != rows.shape:
      return x
    return jnp.zeros((count, *x.shape[1:]), x.dtype).at[rows].set(
        x, mode="drop")

  resting = state.replace(done=jnp.where(mine, state.done, True))
  new, emission = stages.settle(model, drafter, verifier, resting,
                                jax.tree.map(scatter, made))
  # The first token is the prompt's, not a pass's.
  counters = new.counters.replace(passes=new.counters.passes - (
      mine & (emission.count > 0)))
  return pin(new.replace(done=jnp.where(mine, new.done, state.done),
                         counters=counters)), emission


def _seat(drafter: Any, state: DecodeState, rows: Int[Array, "R"],
          glimpse: Glimpse, cache: ContiguousCache) -> DecodeState:
  """Puts prompts into rows; no token is there yet."""
  old, request, length = state.seq, glimpse.request, glimpse.seq.length
  capacity = old.tokens.shape[1]

  def put(batch, new):
    return jax.tree.map(lambda b, n: b.at[rows].set(n, mode="drop"),
                        batch, new)

  text = glimpse.seq.tokens[:, :capacity]
  text = jnp.pad(text, ((0, 0), (0, capacity - text.shape[1])))
  whole = old.cache.insert(rows, cache, request.limit - 1)
  held = whole.length.at[rows].get(mode="fill", fill_value=0)
  return state.replace(
      seq=Sequences(put(old.tokens, text), put(old.prompt_length, length),
                    put(old.length, length), whole),
      request=put(state.request, request),
      draft=drafter.begin(state.draft, rows, glimpse.draft, request),
      done=put(state.done, held < length - 1),
      logprobs=put(state.logprobs,
                   jnp.zeros((len(length), capacity), jnp.float32)),
      counters=put(state.counters, Counters.zeros(
          len(length), drafter.height, drafter.size)))


def _read(model: Any, x: Float[Array, "R T D"], length: Int[Array, "R"],
          layers: range, *, chunk: int, dtype: Any, beside: Any = None
          ) -> tuple[Float[Array, "R T D"], Layers, Layers, Any]:
  """Takes prompts through some layers, `chunk` positions at a time.

  Args:
    beside: drafts that go with the last chunk: what enters the layers
      `[R M D]`, their positions `[R M]`, and which see which `[M M]`. They see
      all of their prompt.

  Returns:
    What leaves the layers, their keys and values, and the same of the drafts.
  """
  rows, padded = x.shape[:2]
  first, last = layers[0], layers[-1] + 1
  shape = jax.eval_shape(
      lambda: model.init_cache(ContiguousCache, rows, padded, dtype)).k
  count = min(chunk, padded)
  nth = jnp.broadcast_to(jnp.arange(count)[None], (rows, count))

  def part(i, x, k, v, beside):
    """One chunk, `k` and `v` being what the prompt left so far."""
    positions, mask = i * count + nth, jnp.tril(jnp.ones((count, count), bool))
    if beside is not None:
      extra, places, among = beside
      x = jnp.concatenate([x, extra], axis=1)
      seen = positions < length[:, None]                      # [R count]
      more = extra.shape[1]
      mask = jnp.concatenate([
          jnp.broadcast_to(jnp.pad(mask, ((0, 0), (0, more))),
                           (rows, count, count + more)),
          jnp.concatenate([
              jnp.broadcast_to(seen[:, None], (rows, more, count)),
              jnp.broadcast_to(among[None], (rows, more, more))], axis=2)],
          axis=1)
      positions = jnp.concatenate([positions, places], axis=1)
    cache = ContiguousCache(
        _filled(k, first, model.depth), _filled(v, first, model.depth),
        jnp.minimum(length, i * count))
    x, fresh = model.extend(
        x, cache, model.init_fresh(cache, x.shape[1]),
        Place.of(positions, mask), layers=layers)
    return x, fresh.k[first:last], fresh.v[first:last]

  def split(x, k, v):
    """What is the prompt's, and what is of the drafts."""
    here, there = ([y[:, s] for y in (x, *k, *v)]
                   for s in (slice(None, count), slice(count, None)))
    def pack(ys):
      return ys[0], tuple(ys[1:1 + len(k)]), tuple(ys[1 + len(k):])
    return pack(here), pack(there)

  if padded <= chunk:
    # There is no prefix, and what was fresh is the cache.
    none = tuple(jnp.zeros((*s.shape[:2], 0, s.shape[3]), dtype)
                 for s in shape[first:last])
    (x, k, v), drafts = split(*part(0, x, none, none, beside))
    k, v = (tuple(jnp.moveaxis(y, 1, 2) for y in ys) for ys in (k, v))
    return x, k, v, drafts

  def body(i, carry, beside=None):
    out, k, v = carry
    x = lax.dynamic_slice_in_dim(out, i * count, count, axis=1)
    (x, new_k, new_v), drafts = split(*part(i, x, k, v, beside))
    cache = ContiguousCache(k, v, jnp.minimum(length, i * count)).commit(
        Fresh(new_k, new_v), nth, jnp.clip(length - i * count, 0, count))
    out = lax.dynamic_update_slice_in_dim(out, x, i * count, axis=1)
    return (out, cache.k, cache.v), drafts

  empty = tuple(jnp.zeros(s.shape, dtype) for s in shape[first:last])
  final = (jnp.max(length) - 1) // count
  carry = lax.fori_loop(0, final, lambda i, c: body(i, c)[0],
                        (x, empty, empty))
  (x, k, v), drafts = body(final, carry, beside)
  return x, k, v, drafts


def _filled(some: Layers, first: int, depth: int) -> Layers:
  """As many layers as there are, of which only `some` will be read."""
  return ((some[0],) * first + tuple(some)
          + (some[0],) * (depth - first - len(some)))


def _at(cache: Float[Array, "R G T K"], length: Int[Array, "R"]
        ) -> Float[Array, "R 1 G K"]:
  """The last position of every row."""
  at = jnp.take_along_axis(cache, (length - 1)[:, None, None, None], axis=2)
  return jnp.moveaxis(at, 1, 2)


def _last(x: Float[Array, "R T D"], length: Int[Array, "R"]
          ) -> Float[Array, "R 1 D"]:
  return jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)


__all__ = ["Glimpse", "glimpse", "go_on", "settle", "unfold"]
