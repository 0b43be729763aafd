# SPDX-License-Identifier: Apache-2.0
"""Batches for the law tests: prompts in, a decode state, answers out."""

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxspec import caches, loop
from jaxspec.base import DecodeState, Drafter, Proposal, Verifier
from jaxspec.caches import Fresh, Place
from jaxspec.models.transformer import Transformer
from jaxspec.options import Options, as_request
from jaxspec.tree import Tree
from jaxspec.verifiers.exact import exact

GREEDY = Options(max_new_tokens=24)
SAMPLED = Options(
    max_new_tokens=24, temperature=0.7, top_p=0.9, top_k=40, min_p=0.05,
    repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1,
    logit_bias={3: 1.0, 5: -1.0}, seed=7)
_ROOM = 4                            # for end tokens and for biases


def cache_kinds() -> list[str]:
  """The caches there are: files of `jaxspec/caches` with a class so named."""
  found = []
  for module in pkgutil.iter_modules(caches.__path__):
    name = f"{module.name.capitalize()}Cache"
    if hasattr(importlib.import_module(f"jaxspec.caches.{module.name}"), name):
      found.append(module.name)
  return found


def cache_kind(name: str) -> Any:
  """The class of the cache in file `name`."""
  module = importlib.import_module(f"jaxspec.caches.{name}")
  return getattr(module, f"{name.capitalize()}Cache")


def prompts(count: int, vocab: int = 64, seed: int = 0) -> list[list[int]]:
  """Prompts of unlike lengths in which words recur."""
  rng = np.random.default_rng(seed)
  made = []
  for number in range(count):
    words = rng.integers(2, vocab, (3, 3)).tolist()
    text = [t for _ in range(2) for word in words for t in word]
    made.append(text[:7 + (number * 5) % 11])
  return made


def padded(texts: Sequence[Sequence[int]], bucket: int = 16
           ) -> tuple[np.ndarray, np.ndarray]:
  """Texts as one array, its width a multiple of `bucket`; and their lengths."""
  lengths = np.array([len(t) for t in texts], np.int32)
  tokens = np.zeros((len(texts), -(-int(lengths.max()) // bucket) * bucket),
                    np.int32)
  for row, text in zip(tokens, texts):
    row[:len(text)] = text
  return tokens, lengths


def requests(model: Transformer, texts: Sequence[Sequence[int]],
             options: Options | Sequence[Options]) -> Any:
  """One request a text."""
  if isinstance(options, Options):
    options = [options] * len(texts)
  return as_request(options, [len(t) for t in texts], (), vocab=model.vocab,
                    stops=_ROOM, biases=_ROOM)


def empty(model: Transformer, drafter: Drafter, rows: int, *,
          kind: str = "contiguous", capacity: int = 64,
          dtype: Any = jnp.float32) -> DecodeState:
  """A batch of free rows."""
  return _empty(model, drafter, rows, kind, capacity, dtype)


# Jitted, else equal zeros would share a buffer; and here, so that tests of
# the same sizes share the program.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _empty(model, drafter, rows, kind, capacity, dtype):
  return loop.init(
      model, drafter, model.init_cache(cache_kind(kind), rows, capacity, dtype),
      capacity=capacity, stops=_ROOM, biases=_ROOM)


def begin(model: Transformer, drafter: Drafter,
          texts: Sequence[Sequence[int]], options: Options | Sequence[Options],
          *, verifier: Verifier = exact, kind: str = "contiguous",
          capacity: int = 64, dtype: Any = jnp.float32) -> DecodeState:
  """Reads prompts into a batch of as many rows."""
  state = empty(model, drafter, len(texts), kind=kind, capacity=capacity,
                dtype=dtype)
  return refill(model, drafter, state, list(range(len(texts))), texts, options,
                verifier=verifier, dtype=dtype)


def refill(model: Transformer, drafter: Drafter, state: DecodeState,
           rows: Sequence[int], texts: Sequence[Sequence[int]],
           options: Options | Sequence[Options], *,
           verifier: Verifier = exact, dtype: Any = jnp.float32) -> DecodeState:
  """Begins requests in some rows of a batch."""
  tokens, lengths = padded(texts)
  prefix = loop.prefill(model, drafter.taps, tokens, lengths, chunk=512,
                        dtype=jnp.dtype(dtype))
  return loop.insert(model, drafter, verifier, state,
                     np.array(rows, np.int32), prefix,
                     requests(model, texts, options))


def finish(model: Transformer, drafter: Drafter, state: DecodeState, *,
           verifier: Verifier = exact, steps: int = 2**30) -> DecodeState:
  """Decodes until every row is done, or for so many steps."""
  return loop.decode(model, drafter, verifier, state, np.int32(steps),
                     np.bool_(True))


def run(model: Transformer, drafter: Drafter, texts: Sequence[Sequence[int]],
        options: Options | Sequence[Options], **settings: Any) -> DecodeState:
  """From prompts to a finished batch."""
  verifier = settings.get("verifier", exact)
  state = begin(model, drafter, texts, options, **settings)
  return finish(model, drafter, state, verifier=verifier)


def texts_of(state: DecodeState) -> list[list[int]]:
  """The whole text of every row, its prompt first."""
  tokens, length = jax.device_get((state.seq.tokens, state.seq.length))
  return [row[:n].tolist() for row, n in zip(tokens, length)]


def answers(state: DecodeState) -> list[list[int]]:
  """The answer of every row."""
  return [text[n:] for text, n in
          zip(texts_of(state), state.seq.prompt_length.tolist())]


def accepted(state: DecodeState) -> int:
  """Draft tokens that were accepted and committed."""
  return int(jnp.sum(state.counters.accepted))


def drafted(state: DecodeState) -> int:
  """Draft tokens that were scored."""
  return int(jnp.sum(state.counters.nodes))


def readings(model: Transformer, cache: Any) -> list[np.ndarray]:
  """What every layer reads from a cache, whichever way it is stored.

  Sharp random queries stand just behind each row's prefix; each sees the
  prefix and a key of its own. A key or value that is missing, stale or in
  the wrong place changes some of them.
  """
  c, count = model.config, 16
  rows = len(cache.length)
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

  query = normal(rows, count, c.heads, c.head_size) * 2
  one = normal(rows, count, c.kv_heads, c.head_size) * 0.1
  fresh = Fresh((one,) * c.depth, (one,) * c.depth)
  at = Place.of(jnp.broadcast_to(cache.length[:, None], (rows, count)),
                jnp.eye(count, dtype=bool))

  return [np.asarray(x) for x in _read(cache, query, fresh, at, c)]


@functools.partial(jax.jit, static_argnames="config")
def _read(cache, query, fresh, at, config):
  return [cache.attend(layer, query, fresh, at, scale=config.scale,
                       window=config.windows[layer],
                       logits_soft_cap=config.attention_cap)
          for layer in range(config.depth)]


def check_cache(model: Transformer, state: DecodeState,
                atol: float = 1e-4) -> None:
  """The cache below `length` is a fresh prefill of the committed tokens.

  Holds for rows in use; the last committed token's keys are not yet there.
  """
  texts = texts_of(state)
  np.testing.assert_array_equal(state.seq.cache.length,
                                state.seq.length - 1)
  tokens, lengths = padded([text[:-1] for text in texts], 64)
  prefix = loop.prefill(model, (), tokens, lengths, chunk=512,
                        dtype=jnp.dtype(jnp.float32))
  for layer, (is_, should) in enumerate(zip(
      readings(model, state.seq.cache), readings(model, prefix.cache))):
    np.testing.assert_allclose(is_, should, atol=atol,
                               err_msg=f"layer {layer}")


@struct.dataclass
class Scripted(Drafter):
  """Drafts from a text that is known beforehand: an oracle, or a liar.

  Attributes:
    truth: what follows each row's prompt, as an earlier run found.
    path: the nodes of `tree` that get the truth; all others get garbage.
    shift: added to every truth; 0 is an oracle, anything else always wrong.
    live: how many leading nodes are alive; 0 for all.
    garbage: what all other nodes hold; -1 for this and that.
  """

  truth: Any
  tree: Tree = struct.field(pytree_node=False)
  path: tuple[int, ...] = struct.field(pytree_node=False)
  shift: int = struct.field(pytree_node=False, default=0)
  live: int = struct.field(pytree_node=False, default=0)
  garbage: int = struct.field(pytree_node=False, default=-1)
  taps: tuple[int, ...] = struct.field(pytree_node=False, default=())

  def propose(self, model, seq, request, state):
    rows, size = seq.tokens.shape[0], self.tree.size
    ahead = (seq.length - seq.prompt_length)[:, None]
    depths = self.tree.depths[None]
    at = jnp.clip(ahead + depths - 1, 0, self.truth.shape[1] - 1)
    right = jnp.take_along_axis(self.truth, at, axis=1) + self.shift
    wrong = right + 1 + jnp.arange(size)[None]
    if self.garbage >= 0:
      wrong = jnp.full_like(wrong, self.garbage)
    told = np.isin(np.arange(size), self.path)[None]
    tokens = jnp.where(told, right, wrong) % model.vocab
    tokens = jnp.concatenate([seq.tail(), tokens[:, 1:]], axis=1)
    live = jnp.full(rows, self.live, jnp.int32) if self.live else None
    return Proposal(tokens, self.tree, live=live), state


def truth(state: DecodeState, room: int = 64) -> jax.Array:
  """The answers of a finished batch as the script of a `Scripted`."""
  made = np.zeros((len(state.seq.length), room), np.int32)
  for row, answer in zip(made, answers(state)):
    row[:len(answer)] = answer
  return jnp.asarray(made)
