# SPDX-License-Identifier: Apache-2.0
"""A table of n-grams, learnt from text beforehand.

For the last few tokens it knows what mostly followed them in that text; where
it has not seen them it looks for fewer ("backoff"). A table is a file, made
with `learn` and `save`; it is read-only and shared by all rows.

A context is known by two hashes. The first says in which bucket it is, and
the second which of the few there it is; contexts that are too many for a
bucket are left out, rarest first.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import struct
from jaxtyping import Array, Int, UInt32
from safetensors import numpy

from jaxspec import naming
from jaxspec.base import Drafter, Proposal
from jaxspec.errors import InputError
from jaxspec.tree import chain

WAYS = 4                    # contexts a bucket has room for
_FORMAT = "jaxspec n-grams 1"


@struct.dataclass
class Ngram(Drafter):
  """Drafts the likeliest token behind the longest context that is known.

  Attributes:
    checks: the second hash of each context.
    following: what mostly follows it; -1 where there is no context.
    orders: tokens of the longest context.
    length: how many tokens are drafted.
  """

  checks: UInt32[Array, "buckets ways"]
  following: Int[Array, "buckets ways"]
  orders: int = struct.field(pytree_node=False)
  length: int = struct.field(pytree_node=False, default=4)

  @classmethod
  def build(cls, target, table="", length=4):
    """Reads the table in file `table`."""
    if not table:
      raise InputError("ngram needs table=FILE, made with "
                       "jaxspec.drafters.ngram.learn and save")
    naming.whole("ngram", "length", length, 1, 64)
    arrays, about = load(str(table))
    if int(about["vocab"]) != target.model.vocab:
      raise InputError(
          f"ngram: {str(table)!r} was learnt for a vocabulary of "
          f"{about['vocab']} tokens and the model has {target.model.vocab}; "
          "learn one from text in the model's own tokens")
    return cls(jnp.asarray(arrays["checks"]), jnp.asarray(arrays["following"]),
               int(about["orders"]), length)

  @property
  def tree(self):
    return chain(self.length)

  @property
  def priors(self):
    # The longer the context, the surer.
    return tuple(1 - 0.8 * 0.75 ** order for order in range(self.orders))

  def propose(self, model, seq, request, state):
    slots = seq.length[:, None] - self.orders + jnp.arange(self.orders)[None]
    text = jnp.where(
        slots >= 0, jnp.take_along_axis(seq.tokens, jnp.maximum(slots, 0),
                                        axis=1), -1)
    kinds, alive = [jnp.zeros_like(seq.length)], [seq.length > 0]
    for _ in range(self.length):
      said, order = self.look_up(text[:, -self.orders:])
      text = jnp.concatenate([text, said[:, None]], axis=1)
      kinds.append(jnp.maximum(order - 1, 0))
      alive.append(alive[-1] & (order > 0))
    tokens = text[:, self.orders - 1:]
    return Proposal(
        jnp.maximum(tokens, 0), self.tree,
        live=sum(x.astype(jnp.int32) for x in alive),
        kinds=jnp.stack(kinds, axis=1)), state

  def look_up(self, text: Int[Array, "B orders"]
              ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """What follows the end of `text`, and how many tokens of it were known."""
    said = jnp.full(len(text), -1, jnp.int32)
    found = jnp.zeros(len(text), jnp.int32)
    for order in range(1, self.orders + 1):
      context = text[:, self.orders - order:]
      bucket, check = hashes(context, len(self.checks))
      there = (self.checks[bucket] == check[:, None]) & (
          self.following[bucket] >= 0) & jnp.all(context >= 0, axis=1)[:, None]
      way = jnp.argmax(there, axis=1)
      known = jnp.any(there, axis=1)
      said = jnp.where(known, self.following[bucket, way], said)
      found = jnp.where(known, order, found)
    return said, found


def hashes(contexts: Any, buckets: int) -> tuple[Any, Any]:
  """The bucket and the check of each context, in NumPy or on the device.

  Args:
    contexts: `[n order]`, all of one order, which is hashed as well.
  """
  one = two = np.uint32(contexts.shape[1]) + contexts[:, 0].astype(
      np.uint32) * np.uint32(0)
  for place in range(contexts.shape[1]):
    token = contexts[:, place].astype(np.uint32)
    one = (one ^ token) * np.uint32(0x85EBCA6B)
    one = one ^ (one >> np.uint32(15))
    two = (two + token) * np.uint32(0xC2B2AE35)
    two = two ^ (two >> np.uint32(13))
  one = one * np.uint32(0x9E3779B1)
  return (one >> np.uint32(7)) % np.uint32(buckets), two


def learn(texts: Iterable[Sequence[int]], *, orders: int = 3,
          min_count: int = 2, size: int = 2**20) -> dict[str, np.ndarray]:
  """Counts what follows what.

  Args:
    texts: token sequences; no context reaches from one into the next.
    orders: tokens of the longest context.
    min_count: a context is kept if what mostly follows it did so as often.
    size: most contexts that there is room for.

  Returns:
    What `save` takes. Of two tokens that follow as often the smaller is kept.
  """
  tokens = [np.asarray(text, np.int32) for text in texts]
  buckets = max(size // WAYS, 1)
  found = []                                  # bucket, check, token, count
  for order in range(1, orders + 1):
    grams = [np.lib.stride_tricks.sliding_window_view(text, order + 1)
             for text in tokens if len(text) > order]
    if not grams:
      continue
    # Every gram once, its context first; of a context, the commonest gram
    # first.
    grams, counts = np.unique(np.concatenate(grams), axis=0,
                              return_counts=True)
    best = np.lexsort((grams[:, -1], -counts, *grams[:, -2::-1].T))
    grams, counts = grams[best], counts[best]
    first = np.any(grams[1:, :-1] != grams[:-1, :-1], axis=1)
    kept = np.concatenate([[True], first]) & (counts >= min_count)
    bucket, check = hashes(grams[kept][:, :-1], buckets)
    found.append((bucket, check, grams[kept][:, -1], counts[kept]))
  checks = np.zeros((buckets, WAYS), np.uint32)
  following = np.full((buckets, WAYS), -1, np.int32)
  if found:
    bucket, check, token, count = map(np.concatenate, zip(*found))
    order = np.lexsort((check, -count, bucket))
    bucket, check, token = bucket[order], check[order], token[order]
    way = np.arange(len(bucket)) - np.searchsorted(bucket, bucket)
    fits = way < WAYS
    checks[bucket[fits], way[fits]] = check[fits]
    following[bucket[fits], way[fits]] = token[fits]
  return {"checks": checks, "following": following}


def save(path: str | os.PathLike, table: dict[str, np.ndarray], *, vocab: int,
         orders: int) -> None:
  """Writes what `learn` returned, and for which vocabulary.

  Raises:
    InputError: the table says what is not in the vocabulary.
  """
  if table["following"].max() >= vocab:
    raise InputError(f"ngram: token {table['following'].max()} was learnt, "
                     f"and the vocabulary has {vocab}")
  numpy.save_file(table, path, {
      "format": _FORMAT, "vocab": str(vocab), "orders": str(orders)})


def load(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads a table, and what is said about it.

  Raises:
    InputError: there is none, or the file is something else.
  """
  try:
    with safetensors.safe_open(path, framework="np") as file:
      about = file.metadata() or {}
      table = {name: file.get_tensor(name) for name in file.keys()}
  except (OSError, safetensors.SafetensorError) as error:
    raise InputError(f"ngram: cannot read a table from {path!r}: {error}"
                     ) from error
  if about.get("format") != _FORMAT:
    raise InputError(f"ngram: {path!r} holds no table of n-grams; make one "
                     "with jaxspec.drafters.ngram.learn and save")
  return table, about
