# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: what followed the same words last time.

The n-gram drafter of Saxena's prompt-lookup-decoding and of transformers
(`prompt_lookup_num_tokens`), on the device: no weights, no host.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxspec import naming
from jaxspec.base import Drafter, Proposal
from jaxspec.errors import InputError
from jaxspec.tree import chain, grow


@struct.dataclass
class PromptLookup(Drafter):
  """Drafts the continuation of the latest longest match of the text's end.

  Attributes:
    length: how many tokens are drafted; with the root, 7 make 8 nodes.
    max_ngram: the longest ending that is looked for.
    min_ngram: the shortest that is believed. Below it nothing is drafted.
    branches: how many matches are continued, if their continuations differ;
      they are drafted as one tree.
    nodes: of that tree at most, root included; 0 for as many as there can be.
  """

  length: int = struct.field(pytree_node=False, default=7)
  max_ngram: int = struct.field(pytree_node=False, default=3)
  min_ngram: int = struct.field(pytree_node=False, default=1)
  branches: int = struct.field(pytree_node=False, default=1)
  nodes: int = struct.field(pytree_node=False, default=0)

  def __post_init__(self):
    for name, low, high in (("length", 1, 64), ("min_ngram", 1, 64),
                            ("max_ngram", self.min_ngram, 64),
                            ("branches", 1, 16)):
      naming.whole("prompt_lookup", name, getattr(self, name), low, high)
    if self.nodes != 0:
      naming.whole("prompt_lookup", "nodes", self.nodes, 2, self.most)
      if self.branches == 1:
        raise InputError("prompt_lookup: nodes is for more branches than one; "
                         "a single one is as long as length says")

  @property
  def most(self) -> int:
    """Nodes if no two branches share any."""
    return 1 + self.branches * self.length

  @property
  def height(self):
    return self.length

  @property
  def size(self):
    return self.nodes or self.most

  @property
  def priors(self):
    # By the length of the match.
    return tuple(1 - 0.65 * 0.5 ** more for more in range(self.max_ngram))

  def propose(self, model, seq, request, state):
    look_up = self.look_up if self.branches == 1 else self.look_up_all
    tokens, run = jax.vmap(look_up)(seq.tokens, seq.length)
    kinds = jnp.maximum(run - 1, 0)
    found = run >= self.min_ngram
    if self.branches > 1:
      return self.join(seq.tail(), tokens, kinds, found), state
    tokens = jnp.concatenate([seq.tail(), tokens], axis=1)
    live = jnp.where(found, self.length + 1, 1)
    kinds = jnp.broadcast_to(kinds[:, None], tokens.shape)
    return Proposal(tokens, chain(self.length), live=live, kinds=kinds), state

  def join(self, root: Int[Array, "B 1"], tokens: Int[Array, "B W K"],
           kinds: Int[Array, "B W"], found: Bool[Array, "B W"]) -> Proposal:
    """One tree of all continuations, the likeliest nodes first."""
    rows = len(root)
    # Where two disagree the better match is right the more often.
    branch = jnp.arange(1, self.branches + 1)[None]
    chances = jnp.where(found, jnp.array(self.priors)[kinds] / branch, 0.0)
    parents = np.arange(-1, self.most - 1)
    parents[1::self.length] = 0

    def spread(values):
      values = jnp.repeat(values, self.length, axis=1)
      return jnp.pad(values, ((0, 0), (1, 0)))
    tree, tokens, path, place = grow(
        jnp.concatenate([root, tokens.reshape(rows, -1)], axis=1),
        jnp.broadcast_to(parents[None], (rows, self.most)), spread(chances),
        nodes=self.size, height=self.length)
    # A node is of the kind of its best match.
    kinds = jnp.zeros_like(tokens).at[jnp.arange(rows)[:, None], place].max(
        spread(kinds), mode="drop")
    return Proposal(
        tokens, tree, live=jnp.sum(path > 0, axis=1, dtype=jnp.int32),
        kinds=kinds)

  def look_up(self, tokens: Int[Array, "C"], length: Int[Array, ""]
              ) -> tuple[Int[Array, "K"], Int[Array, ""]]:
    """Finds the continuation in one row.

    Returns:
      The drafted tokens, and the length of the match. A match so recent that
      its continuation runs into the end of the text is a loop, and is
      continued as one.
    """
    run = self.runs(tokens, length)
    slots = jnp.arange(len(tokens))
    best = jnp.argmax(run * len(tokens) + slots)       # longest, then latest
    period = jnp.maximum(length - 1 - best, 1)
    return tokens[best + 1 + jnp.arange(self.length) % period], run[best]

  def look_up_all(self, tokens: Int[Array, "C"], length: Int[Array, ""]
                  ) -> tuple[Int[Array, "W K"], Int[Array, "W"]]:
    """The same of the best matches whose continuations differ."""
    run = self.runs(tokens, length)
    slots = jnp.arange(len(tokens))
    period = jnp.maximum(length - 1 - slots, 1)[:, None]
    ahead = tokens[jnp.minimum(
        slots[:, None] + 1 + jnp.arange(self.length)[None] % period,
        len(tokens) - 1)]                                          # [C K]
    found = []
    for _ in range(self.branches):
      best = jnp.argmax(run * len(tokens) + slots)
      found.append((ahead[best], run[best]))
      run = jnp.where(jnp.all(ahead == ahead[best][None], axis=1), 0, run)
    drafts, runs = zip(*found)
    return jnp.stack(drafts), jnp.stack(runs)

  def runs(self, tokens: Int[Array, "C"], length: Int[Array, ""]
           ) -> Int[Array, "C"]:
    """How long a match of the text's end ends in each slot."""
    slots = jnp.arange(len(tokens))
    last = length - 1
    run = jnp.zeros(tokens.shape, jnp.int32)
    unbroken = slots < last
    for back in range(self.max_ngram):
      shifted = jnp.roll(tokens, back)
      unbroken &= (shifted == tokens[last - back]) & (slots >= back)
      unbroken &= back < length
      run += unbroken
    return run
