# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: what followed the same words last time.

The n-gram drafter of Saxena's prompt-lookup-decoding and of transformers
(`prompt_lookup_num_tokens`), on the device: no weights, no host.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from jaxspec.base import Drafter, Proposal
from jaxspec.errors import InputError
from jaxspec.tree import chain


@struct.dataclass
class PromptLookup(Drafter):
  """Drafts the continuation of the latest longest match of the text's end.

  Attributes:
    length: how many tokens are drafted.
    max_ngram: the longest ending that is looked for.
    min_ngram: the shortest that is believed. Below it nothing is drafted.
  """

  length: int = struct.field(pytree_node=False, default=8)
  max_ngram: int = struct.field(pytree_node=False, default=3)
  min_ngram: int = struct.field(pytree_node=False, default=1)

  def __post_init__(self):
    for name, low in (("length", 1), ("min_ngram", 1),
                      ("max_ngram", self.min_ngram)):
      value = getattr(self, name)
      if not isinstance(value, int) or not low <= value <= 64:
        raise InputError(f"prompt_lookup: {name} must be an integer in "
                         f"[{low}, 64], got {value!r}")

  @property
  def height(self):
    return self.length

  @property
  def size(self):
    return self.length + 1

  def propose(self, model, seq, request, state):
    tokens, found = jax.vmap(self.look_up)(seq.tokens, seq.length)
    tokens = jnp.concatenate([seq.tail(), tokens], axis=1)
    live = jnp.where(found, self.length + 1, 1)
    return Proposal(tokens, chain(self.length), live=live), state

  def look_up(self, tokens: Int[Array, "C"], length: Int[Array, ""]):
    """Finds the continuation in one row.

    Returns:
      The drafted tokens, and whether anything was found. A match so recent
      that its continuation runs into the end of the text is a loop, and is
      continued as one.
    """
    slots = jnp.arange(tokens.shape[0])
    last = length - 1
    run = jnp.zeros(tokens.shape, jnp.int32)     # how long a match ends here
    unbroken = slots < last
    for back in range(self.max_ngram):
      shifted = jnp.roll(tokens, back)
      unbroken &= (shifted == tokens[last - back]) & (slots >= back)
      unbroken &= back < length
      run += unbroken
    best = jnp.argmax(run * tokens.shape[0] + slots)   # longest, then latest
    found = run[best] >= self.min_ngram
    period = jnp.maximum(last - best, 1)
    return tokens[best + 1 + jnp.arange(self.length) % period], found

