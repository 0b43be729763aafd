# SPDX-License-Identifier: Apache-2.0
"""Lookahead decoding: the model guesses ahead of itself, and it is kept.

Jacobi iteration (arXiv:2402.02057). Columns of a window stand at the next
positions of the text, and each holds what the last passes thought would stand
there, one level a pass. A node sees the first level up to its own column and,
from there on, its own column: that is, it is the child of the node above it.
So the window is a tree, and is scored like any other. What a column says from
top to bottom is an n-gram that the model found likely; n-grams are pooled by
their first token, and those that begin with the last committed one are
further guesses, beside the window, in the same pass.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxspec import naming
from jaxspec.base import Drafter, Proposal
from jaxspec.tree import Tree


@struct.dataclass
class State:
  """What each row remembers.

  Attributes:
    window: what is thought of the positions ahead; level l of column c stands
      l + c + 1 behind the last committed token.
    pool: n-grams by their first token, modulo the buckets; the newest first,
      one behind the other, -1 where there is none.
  """

  window: Int[Array, "B levels columns"]
  pool: Int[Array, "B buckets ngrams"]


@struct.dataclass
class Lookahead(Drafter):
  """Drafts n-grams of which the model thought before, and thinks of more.

  Attributes:
    window: columns, that is, how many n-grams are found in a pass.
    levels: tokens of an n-gram behind its first.
    guesses: most n-grams that are tried in a pass.
    buckets: of the pool, each with room for as many n-grams.
  """

  window: int = struct.field(pytree_node=False, default=5)
  levels: int = struct.field(pytree_node=False, default=3)
  guesses: int = struct.field(pytree_node=False, default=5)
  buckets: int = struct.field(pytree_node=False, default=4096)

  ranks = 1
  whole = True
  # Of the window, and of the pool.
  priors = (0.08, 0.3)

  def __post_init__(self):
    for name, low, high in (("window", 1, 64), ("levels", 1, 16),
                            ("guesses", 1, 64), ("buckets", 1, 2**20)):
      naming.whole("lookahead", name, getattr(self, name), low, high)

  @property
  def tree(self) -> Tree:
    return window_and_guesses(self.window, self.levels, self.guesses)

  def init(self, model, rows, capacity):
    return State(
        jnp.zeros((rows, self.levels, self.window), jnp.int32),
        jnp.full((rows, self.buckets, self.guesses * (self.levels + 1)), -1,
                 jnp.int32))

  def insert(self, model, state, rows, prefix, request):
    tokens, length = prefix.tokens, prefix.length
    window = jnp.broadcast_to(jnp.arange(self.window)[None],
                              (len(rows), self.window))
    window = self.stray(tokens, length, window)
    pool = jnp.full((len(rows), *state.pool.shape[1:]), -1, jnp.int32)

    def read(start, pool):
      ngram = lax.dynamic_slice_in_dim(tokens, start, self.levels + 1, axis=1)
      return self.remember(pool, ngram, start + self.levels < length)

    if tokens.shape[1] > self.levels:
      pool = lax.fori_loop(0, jnp.max(length) - self.levels, read, pool)
    return State(state.window.at[rows].set(window, mode="drop"),
                 state.pool.at[rows].set(pool, mode="drop"))

  def propose(self, model, seq, request, state):
    root = seq.tail()
    # Behind an end token the model says nothing of use.
    ends = jnp.any(state.window[..., None] == request.stops[:, None, None],
                   axis=-1)
    window = jnp.where(ends, root[..., None], state.window)
    held = self.bucket(state.pool, root[:, 0])
    known = held[..., 0] == root
    # The newest first, and no gaps.
    order = jnp.argsort(~known, axis=1, stable=True)
    held = jnp.take_along_axis(held, order[..., None], axis=1)
    rows, ahead = len(root), self.levels * self.window
    tokens = jnp.concatenate([
        root, window.reshape(rows, ahead),
        jnp.maximum(held[..., 1:], 0).reshape(rows, -1)], axis=1)
    found = jnp.sum(known, axis=1, dtype=jnp.int32)
    kinds = (np.arange(self.size) > ahead).astype(np.int32)
    return Proposal(
        tokens, self.tree, live=1 + ahead + found * self.levels,
        kinds=jnp.broadcast_to(kinds[None], tokens.shape)), state

  def observe(self, model, seq, state, proposal, scores, verdict):
    rows, ahead = len(seq.length), self.levels * self.window
    shape = (rows, self.levels, self.window)
    window = proposal.tokens[:, 1:1 + ahead].reshape(shape)
    said = scores.top[:, 1:1 + ahead, 0].reshape(shape)[:, -1:]
    columns = jnp.concatenate([window, said], axis=1)   # an n-gram each
    pool = state.pool
    for column in range(self.window):
      pool = self.remember(pool, columns[:, :, column], verdict.kept > 0)
    # As far as the text has come; a level for the first token of it, and a
    # column for each other.
    here = jnp.arange(self.window)[None] + jnp.maximum(
        verdict.kept - 1, 0)[:, None]
    known = (here < self.window)[:, None]
    shifted = jnp.take_along_axis(
        columns[:, 1:], jnp.minimum(here, self.window - 1)[:, None], axis=2)
    shifted = jnp.where(known, shifted,
                        self.stray(seq.tokens, seq.length, here))
    going = (verdict.kept > 0)[:, None, None]
    return State(jnp.where(going, shifted, state.window), pool)

  def stray(self, tokens: Int[Array, "B C"], length: Int[Array, "B"],
            columns: Int[Array, "B W"]) -> Int[Array, "B L W"]:
    """Something to begin with: pieces from anywhere in the text."""
    mixed = (length[:, None] + columns).astype(jnp.uint32)
    mixed = mixed * np.uint32(0x9E3779B1)
    start = (mixed >> 8).astype(jnp.int32)[:, None]
    level = jnp.arange(self.levels)[None, :, None]
    place = (start + level) % length[:, None, None]
    return jnp.take_along_axis(
        tokens, place.reshape(len(tokens), -1), axis=1).reshape(place.shape)

  def bucket(self, pool: Int[Array, "B H E"], first: Int[Array, "B"]
             ) -> Int[Array, "B G n"]:
    """The n-grams that are kept where those beginning so are."""
    held = pool[jnp.arange(len(pool)), first % self.buckets]
    return held.reshape(len(pool), self.guesses, self.levels + 1)

  def remember(self, pool: Int[Array, "B H E"], ngram: Int[Array, "B n"],
               wanted: Bool[Array, "B"]) -> Int[Array, "B H E"]:
    """Puts an n-gram first in its bucket, and the oldest out."""
    held = self.bucket(pool, ngram[:, 0])
    same = jnp.all(held == ngram[:, None], axis=-1)
    same = same.at[:, -1].set(True)           # who is pushed out if none is
    place = jnp.argmax(same, axis=1)[:, None]
    older = jnp.concatenate([ngram[:, None], held[:, :-1]], axis=1)
    held = jnp.where((jnp.arange(self.guesses)[None] <= place)[..., None],
                     older, held)
    rows = jnp.where(wanted, jnp.arange(len(pool)), len(pool))
    return pool.at[rows, ngram[:, 0] % self.buckets].set(
        held.reshape(len(pool), -1), mode="drop")


@functools.cache
def window_and_guesses(columns: int, levels: int, guesses: int) -> Tree:
  """The window, level by level, its first a chain; then the guesses."""
  parents = [-1, *range(columns)]
  parents += range(1, 1 + (levels - 1) * columns)
  for _ in range(guesses):
    parents += [0, *range(len(parents), len(parents) + levels - 1)]
  return Tree(tuple(parents))
