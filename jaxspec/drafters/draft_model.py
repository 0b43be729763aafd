# SPDX-License-Identifier: Apache-2.0
"""Drafting with a smaller model (arXiv:2211.17192, arXiv:2302.01318).

The draft model is decoded by our own stages, on a text and a cache of its own,
under the request of the row. Noise depends on the request and the position
alone, so what it samples is coupled with what the model will sample: where the
two laws agree, so do the samples. It may have a drafter itself, and that one a
model too.

Nothing is ever rolled back. Every proposal begins by taking over the committed
text, and keeps of the cache what was read of the same tokens; so it is right
after any history, such as steps in which other drafters had their turn.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxspec import loop, naming, sampling, stages
from jaxspec.base import (
  Counters,
  DecodeState,
  Drafter,
  Proposal,
  Sequences,
)
from jaxspec.caches import Cache, Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.drafters import Target, parse
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer, source_of
from jaxspec.quantization import quantize
from jaxspec.tree import chain
from jaxspec.verifiers.exact import exact

# Known tokens read in one pass. A pass has at least two to read whenever all
# of the last proposal was accepted, and more after a pause.
_WIDTH = 4
_CHUNK = 512                     # of a prompt, as everywhere
_OWN_NOISE = 0x0D4AF7


@struct.dataclass
class Nested:
  """The draft model's text as far as `cache` goes, and its drafter's state."""

  tokens: Int[Array, "B C"]
  cache: ContiguousCache
  draft: PyTree


@struct.dataclass
class DraftModel(Drafter):
  """Drafts a chain with another model.

  Attributes:
    model: the draft model; speaks the vocabulary of the one it drafts for.
    drafter: what drafts for it in turn.
    length: most tokens that are drafted.
    honest: whether drafts have noise of their own, and the law each was drawn
      from is told: what a verifier needs that compares laws, not samples.
    cache_dtype: of the draft model's keys and values.
  """

  model: Any
  drafter: Any
  length: int = struct.field(pytree_node=False, default=4)
  honest: bool = struct.field(pytree_node=False, default=False)
  cache_dtype: str = struct.field(pytree_node=False, default="float32")

  @classmethod
  def build(cls, target: Target, model: Any = "self:int8", length: Any = 4,
            drafter: Any = "autoregressive", vocab_map: Any = None
            ) -> "DraftModel":
    """Makes the drafter of options as they were written.

    Args:
      model: `self:int8` for an eight-bit copy of the model itself;
        `self:layers=0-3+26-29` for some of its layers, which shares their
        weights; `self:layers=0-3,int8` for both; or another model, as
        `Generator.load` takes it.
      length: most tokens that are drafted.
      drafter: what drafts for the draft model.
      vocab_map: a JSON file, the list of the model's id for each id of the
        draft model, -1 where there is none; for another tokenizer.

    Raises:
      InputError: names the option that does not fit.
    """
    naming.whole("draft_model", "length", length, 1, 64)
    name = str(model)
    if name == "self" or name.startswith("self:"):
      if vocab_map:
        raise InputError(f"draft_model: {name} needs no vocab_map")
      made, tokenizer = _derive(target.model, name), target.tokenizer
    else:
      made, tokenizer = _load(target, name, vocab_map)
    inner = parse(str(drafter), dataclasses.replace(
        target, model=made, tokenizer=tokenizer, honest=False))
    if inner.taps:
      raise InputError(f"draft_model: drafter {drafter} follows a text step by "
                       "step, and the draft model's is often taken back; use "
                       "one that reads the text alone, such as prompt_lookup")
    if target.honest and inner.height:
      raise InputError(f"draft_model: this verifier must know what drafts were "
                       f"drawn from, which drafter={drafter} hides; leave it "
                       "out")
    return cls(made, inner, length, target.honest, target.cache_dtype)

  costly = True

  @property
  def tree(self):
    return chain(self.length)

  def init(self, model, rows, capacity):
    cache = self.model.init_cache(ContiguousCache, rows, capacity,
                                  jnp.dtype(self.cache_dtype))
    return Nested(jnp.zeros((rows, capacity), jnp.int32), cache,
                  self.drafter.init(self.model, rows, capacity))

  def insert(self, model, state, rows, prefix, request):
    capacity = state.tokens.shape[1]
    read = loop.prefill(self.model, (), prefix.tokens, prefix.length,
                        chunk=_CHUNK, dtype=jnp.dtype(self.cache_dtype))
    tokens = prefix.tokens[:, :capacity]
    tokens = jnp.pad(tokens, ((0, 0), (0, capacity - tokens.shape[1])))
    return Nested(
        state.tokens.at[rows].set(tokens, mode="drop"),
        state.cache.insert(rows, read.cache, request.limit - 1),
        self.drafter.insert(self.model, state.draft, rows, read, request))

  def propose(self, model, seq, request, state):
    known, (rows, room) = seq.length, seq.tokens.shape
    # The last token of a request is never followed by a draft.
    drafted = request.replace(
        limit=jnp.minimum(request.limit - 1, known + self.length),
        wants_logprobs=jnp.zeros(rows, bool))
    if self.honest:
      drafted = drafted.replace(sampling=drafted.sampling.replace(
          key=jax.vmap(jax.random.fold_in, (0, None))(
              request.sampling.key, _OWN_NOISE)))
    ended = jnp.any(seq.tail() == request.stops, axis=1)
    # A released row has lost its prompt.
    idle = ended | (known >= drafted.limit) | (known <= seq.prompt_length)

    cache = _shared(state, seq)
    nested = DecodeState(
        Sequences(seq.tokens, seq.prompt_length, cache.length + 1, cache),
        drafted, state.draft, idle,
        jnp.zeros((rows, 1), jnp.float32),       # none is wanted
        Counters.zeros(rows, self.drafter.height, self.drafter.size))
    nested, law = self._catch_up(nested, known)
    laws = None
    if self.honest:
      nested, laws = self._draw(nested, law)
    else:
      nested = lax.while_loop(
          lambda nested: jnp.any(~nested.done),
          lambda nested: stages.step(self.model, self.drafter, exact,
                                     nested)[0], nested)

    text = nested.seq
    at = known[:, None] - 1 + jnp.arange(self.size)[None]
    tokens = jnp.take_along_axis(text.tokens, jnp.clip(at, 0, room - 1),
                                 axis=1)
    live = jnp.where(idle, 1, text.length - known + 1)
    return (Proposal(tokens, self.tree, live=live, probs=laws),
            Nested(text.tokens, text.cache, nested.draft))

  def _catch_up(self, nested: DecodeState, known: Int[Array, "B"]
                ) -> tuple[DecodeState, Float[Array, "B V"] | None]:
    """Reads what was committed since, and draws the first token behind it."""
    def lags(nested):
      return ~nested.done & (nested.seq.length <= known)

    def body(carry):
      nested, laws = carry
      nested, drew, logits = self._read(nested, known, lags(nested), _WIDTH)
      if laws is not None:
        laws = jnp.where(drew[:, None], _law(logits, nested), laws)
      return nested, laws

    shape = (len(known), self.model.vocab)
    laws = jnp.zeros(shape, jnp.float32) if self.honest else None
    return lax.while_loop(lambda carry: jnp.any(lags(carry[0])), body,
                          (nested, laws))

  def _draw(self, nested: DecodeState, first: Float[Array, "B V"]
            ) -> tuple[DecodeState, Float[Array, "B N V"]]:
    """Drafts the other tokens one by one, and tells the law of each."""
    def body(node, carry):
      nested, laws = carry
      nested, _, logits = self._read(
          nested, nested.seq.length, ~nested.done, 1)
      return nested, laws.at[:, node].set(_law(logits, nested))

    laws = jnp.zeros((len(first), self.size, first.shape[1]), jnp.float32)
    return lax.fori_loop(1, self.length, body,
                         (nested, laws.at[:, 0].set(first)))

  def _read(self, nested: DecodeState, known: Int[Array, "B"],
            reads: Bool[Array, "B"], width: int
            ) -> tuple[DecodeState, Bool[Array, "B"], Float[Array, "B V"]]:
    """Takes up to `width` known tokens of some rows into the cache.

    Returns:
      The state; which rows have read the last known token, and so a token
      more; and the warped logits that was drawn from.
    """
    seq, request, nth = nested.seq, nested.request, jnp.arange(width)[None]
    rows, room = seq.tokens.shape
    old = seq.cache
    slots = old.length[:, None] + nth
    tokens = jnp.take_along_axis(
        seq.tokens, jnp.minimum(slots, room - 1), axis=1)
    kept = jnp.where(reads, jnp.clip(known - old.length, 1, width), 0)
    x, fresh = self.model.extend(
        self.model.embed(tokens), old, self.model.init_fresh(old, width),
        Place.of(slots, jnp.tril(jnp.ones((width, width), bool))),
        layers=range(self.model.depth))
    cache = old.commit(fresh, jnp.broadcast_to(nth, slots.shape), kept)
    last = jnp.maximum(kept - 1, 0)[:, None]
    logits = self.model.unembed(
        jnp.take_along_axis(x, last[..., None], axis=1))[:, 0]
    final = jnp.take_along_axis(tokens, last, axis=1)
    history = sampling.History(
        seq.tokens, seq.prompt_length, cache.length, final,
        jnp.ones((rows, 1, 1), bool))
    law = sampling.warp(logits, request.sampling, history,
                        jnp.zeros_like(known))
    token = sampling.draw(law, request.sampling, cache.length)[:, None]
    drew = reads & (cache.length >= known)
    _, done = stages.finish(request, cache.length, token,
                            jnp.ones_like(known))
    text = stages.write(seq.tokens, token, cache.length,
                        drew.astype(jnp.int32))
    seq = Sequences(text, seq.prompt_length, cache.length + 1, cache)
    return (nested.replace(seq=seq, done=nested.done | drew & done), drew,
            law)


def _shared(state: Nested, seq: Sequences) -> ContiguousCache:
  """The cache as far as it holds the committed text, the last token aside."""
  differs = state.tokens != seq.tokens
  common = jnp.where(jnp.any(differs, axis=1), jnp.argmax(differs, axis=1),
                     differs.shape[1])
  # What lies beyond the length is never read.
  length = jnp.minimum(jnp.minimum(state.cache.length, common),
                       seq.length - 1)
  return state.cache.replace(length=length.astype(jnp.int32))


def _law(logits: Float[Array, "B V"], nested: DecodeState
         ) -> Float[Array, "B V"]:
  """What a token was drawn from; the likeliest alone in a greedy row."""
  likeliest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
  return jnp.where(nested.request.sampling.temperature[:, None] > 0,
                   jax.nn.softmax(logits, axis=-1), likeliest)


@struct.dataclass
class Translated:
  """A model of another vocabulary, seen in ours.

  Attributes:
    ids: its id for each of ours, -1 where it has none.
  """

  model: Any
  ids: Int[Array, "V"]

  @property
  def depth(self) -> int:
    return self.model.depth

  @property
  def vocab(self) -> int:
    return len(self.ids)

  @property
  def embedding(self) -> Any:
    return self.model.embedding

  def init_cache(self, *args: Any, **options: Any) -> Cache:
    return self.model.init_cache(*args, **options)

  def init_fresh(self, cache, nodes):
    return self.model.init_fresh(cache, nodes)

  def embed(self, tokens):
    # A token it does not have is read as its first: a bad draft, no more.
    return self.model.embed(jnp.maximum(self.ids[tokens], 0))

  def extend(self, x, cache, fresh, at, *, layers):
    return self.model.extend(x, cache, fresh, at, layers=layers)

  def unembed(self, x):
    logits = self.model.unembed(x)
    theirs = jnp.take(logits, jnp.maximum(self.ids, 0), axis=-1)
    return jnp.where(self.ids[None, None] >= 0, theirs, -jnp.inf)


def _derive(model: Any, name: str) -> Any:
  """A cheaper copy of the model itself: fewer layers, fewer bits, or both."""
  if not isinstance(model, Transformer):
    raise InputError(f"draft_model: {name} cannot be made of a model whose "
                     "vocabulary is translated; name another model")
  bits = False
  for part in filter(None, name.removeprefix("self").lstrip(":").split(",")):
    if part == "int8":
      bits = True
    elif part.startswith("layers="):
      model = select(model, naming.layers(
          "draft_model", "layers", part.removeprefix("layers="), model.depth))
    else:
      raise InputError(f"draft_model: {part!r} of {name} is unknown; write "
                       "self:int8, self:layers=0-9 or self:layers=0-9,int8")
  return quantize(model) if bits else model


def select(model: Transformer, layers: list[int]) -> Transformer:
  """A model of some layers of another, whose weights it shares."""
  c, weights = model.config, source_of(model)
  config = dataclasses.replace(
      c, depth=len(layers), ropes=tuple(c.ropes[i] for i in layers),
      windows=tuple(c.windows[i] for i in layers))

  def source(path, shape, axes, wanted=None):
    if path.startswith("layers."):
      _, layer, name = path.split(".")
      path = f"layers.{layers[int(layer)]}.{name}"
    return weights(path, shape, axes, wanted)

  return Transformer(config, source)


def _load(target: Target, name: str, vocab_map: Any) -> tuple[Any, Any]:
  """Another model, in the vocabulary of the target."""
  if target.load is None:
    raise InputError(f"draft_model: {name} cannot be read here; make the "
                     "Generator with load, or draft with self:int8")
  model, tokenizer = target.load(name)
  ours, theirs = target.model.vocab, model.vocab
  if vocab_map:
    return Translated(model, _inverse(vocab_map, theirs, ours)), None
  if None in (tokenizer, target.tokenizer):
    same = tokenizer is target.tokenizer and ours == theirs
  else:
    same = tokenizer.vocabulary == target.tokenizer.vocabulary
  if not same:
    whose = getattr(target.tokenizer, "source_name", "a model without one")
    raise InputError(
        f"draft_model: the tokenizer of {name} is not that of {whose}; draft "
        "with a model of the same tokenizer, or give vocab_map=FILE.json, the "
        "list of the model's id for each id of the draft model")
  if ours != theirs:
    # Tables are padded, to another size each.
    ids = jnp.arange(ours)
    return Translated(model, jnp.where(ids < theirs, ids, -1)), tokenizer
  return model, tokenizer


def _inverse(path: Any, theirs: int, ours: int) -> Int[Array, "V"]:
  """Reads a map from their ids to ours; gives theirs for each of ours."""
  try:
    ids = json.loads(pathlib.Path(str(path)).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(f"draft_model: vocab_map {path} cannot be read: {error}"
                     ) from error
  if not isinstance(ids, list) or len(ids) > theirs or not all(
      type(i) is int and -1 <= i < ours for i in ids):
    raise InputError(f"draft_model: vocab_map {path} must be a list of at most "
                     f"{theirs} whole numbers in [-1, {ours - 1}]")
  inverse = [-1] * ours
  for their, our in reversed(list(enumerate(ids))):
    if our >= 0:
      inverse[our] = their
  return jnp.asarray(inverse, jnp.int32)
