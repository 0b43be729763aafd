# SPDX-License-Identifier: Apache-2.0
"""Medusa: heads on the model's own features, their choices on a static tree.

The text ends with a token the model has committed but not read, the root. The
head k that looked at the position before it predicts what comes k + 1 tokens
behind the root, so that nodes of depth d are choices of head d - 1.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from jaxspec import heads as heads_lib
from jaxspec import loop
from jaxspec.base import Drafter, Proposal, Scores, Verdict
from jaxspec.errors import InputError, nearest
from jaxspec.heads import HydraHeads, MedusaHeads
from jaxspec.tree import Choices, Tree, best_choices, closed, in_order

# Trees published with Medusa's heads (github.com/FasterDecoding/Medusa), best
# node first: the ranks taken on the way to each, a digit a depth. The first is
# for heads on a frozen model, the other for heads trained with theirs.
TREES = {
    "mc_sim_7b_63": (
        "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 "
        "30 09 8 9 100 020 12 003 40 21 004 005 0000 011 006 030 50 13 007 008 "
        "009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"),
    "vicuna_7b_stage2": (
        "0 00 1 01 000 10 2 02 001 03 3 010 20 4 002 04 11 100 0000 5 003 05 "
        "020 30 011 06 6 07 004 40 12 08 7 030 0001 005 21 006 101 0010 200 50 "
        "09 012 8 040 021 13 007 0002 008 110 0100 60 9 013 0003 102 050 31 "
        "0020 70 14"),
}
_NODES = 64           # as many as published trees have, root included


@struct.dataclass
class Medusa(Drafter):
  """Drafts the likeliest tokens of each head.

  Its state is what the heads said behind the last accepted node.

  Attributes:
    choices: the ranks taken on the way to each node, best node first.
    priors: how often the choice of each rank is right.
  """

  kind: ClassVar[str] = "medusa"

  heads: MedusaHeads
  choices: Choices = struct.field(pytree_node=False)
  priors: tuple[float, ...] = struct.field(pytree_node=False, default=())

  @classmethod
  def build(cls, target: Any, heads: Any = "", tree: Any = "",
            nodes: Any = 0) -> Any:
    """For the target, from a folder.

    Args:
      heads: the folder, or the name of heads that are shipped for the model;
        nothing for the first of these.
      tree: one of `TREES`; `best` for the one that suits the accuracy stored
        with the heads; nothing for the tree stored with them, or else `best`
        if their accuracy is known, or else the first of `TREES` as deep as
        there are heads.
      nodes: how many at most, root included; 0 for all, or 64 of `best`.
    """
    if type(nodes) is not int or nodes and not 2 <= nodes <= 1025:
      raise InputError(f"{cls.kind}: nodes must be 0 or an integer in "
                       f"[2, 1025], got {nodes!r}")
    folder = heads_lib.find(str(heads), target.model, cls.kind)
    stored = heads_lib.load(folder, target.model, cls.kind)
    choices = _choose(cls.kind, str(tree), stored, stored.heads.count, nodes)
    ranks = max(max(choice) for choice in choices) + 1
    words = (target.model.vocab if stored.heads.tokens is None
             else len(stored.heads.tokens))
    if ranks > words:
      raise InputError(f"{cls.kind}: the tree has {ranks} choices beside each "
                       f"other and the heads know {words} tokens; name "
                       "another tree")
    return cls(stored.heads, choices, _priors(stored.accuracy, ranks))

  @property
  def tree(self) -> Tree:
    return in_order(self.choices)

  @property
  def _ranks(self) -> int:
    return max(max(choice) for choice in self.choices) + 1

  @property
  def _rank(self) -> Int[np.ndarray, "N"]:
    """Of each node among its siblings."""
    return np.array([0, *(choice[-1] for choice in self.choices)], np.int32)

  def init(self, model, rows, capacity) -> Int[Any, "B heads ranks"]:
    return jnp.zeros((rows, self.heads.count, self._ranks), jnp.int32)

  def insert(self, model, state, rows, prefix, request):
    said = self.heads.choose(model, prefix.last, self._ranks)
    return state.at[rows].set(said, mode="drop")

  def propose(self, model, seq, request, state):
    head = self.tree.depths[1:] - 1
    drafted = state[:, head, self._rank[1:]]
    return self._filled(jnp.concatenate([seq.tail(), drafted], axis=1)), state

  def observe(self, model, seq, state, proposal, scores, verdict):
    said = self.heads.choose(model, last(scores, verdict), self._ranks)
    return jnp.where((verdict.kept > 0)[:, None, None], said, state)

  def _filled(self, tokens: Int[Array, "B N"]) -> Proposal:
    kinds = jnp.broadcast_to(jnp.asarray(self._rank)[None], tokens.shape)
    return Proposal(tokens, self.tree, kinds=kinds)


def last(scores: Scores, verdict: Verdict) -> Float[Array, "B D"]:
  """The top of the stream at the last accepted node."""
  deepest = jnp.maximum(verdict.kept - 1, 0)[:, None]
  node = jnp.take_along_axis(verdict.path, deepest, axis=1)
  return jnp.take_along_axis(scores.features[-1], node[..., None],
                             axis=1)[:, 0]


def published(name: str) -> Choices:
  """The choices of one of `TREES`."""
  return tuple(tuple(map(int, word)) for word in TREES[name].split())


def measure(model: Any, heads: MedusaHeads | HydraHeads,
            tokens: Int[Any, "R T"], length: Int[Any, "R"], *,
            ranks: int = 10, chunk: int = 512, rows: int = 8
            ) -> Float[np.ndarray, "heads ranks"]:
  """How often the choice of each rank of each head is right.

  Heads that see tokens before it are given those of the text: so it is how
  often a node is right whose parent is.

  Args:
    tokens: texts of the kind that will be decoded, padded.
    length: tokens of each.
    rows: texts read at a time.

  Returns:
    Shares of all positions that have a token to compare with; what
    `tree.best_choices` builds a tree from.
  """
  tokens, length = np.asarray(tokens, np.int32), np.asarray(length, np.int32)
  spare = -tokens.shape[1] % chunk if tokens.shape[1] > chunk else 0
  tokens = np.pad(tokens, ((0, 0), (0, spare)))
  # Some texts at a time, filled up with empty ones.
  some = min(rows, len(tokens))
  spare = -len(tokens) % some
  tokens = np.pad(tokens, ((0, spare), (0, 0)))
  length = np.pad(length, (0, spare), constant_values=1)
  found = []
  for start in range(0, len(tokens), some):
    part = slice(start, start + some)
    prefix = loop.prefill(model, (model.depth,), tokens[part], length[part],
                          chunk=chunk, dtype=model.embedding[...].dtype)
    found.append(_ranks(model, heads, prefix.features[0], tokens[part],
                        length[part], ranks=ranks))
  right, asked = (np.sum([np.asarray(x) for x in xs], axis=0)
                  for xs in zip(*found))
  return right / np.maximum(asked, 1)[:, None]


@jax.jit(static_argnames="ranks")
def _ranks(model, heads, x, tokens, length, *, ranks):
  """Of each head: positions right at each rank, and positions in all."""
  width = tokens.shape[1]
  ahead = np.arange(width)[:, None] + 1 + np.arange(heads.count + 1)[None]
  behind = tokens[:, np.minimum(ahead, width - 1)]         # [R T heads+1]
  following, wanted = behind[..., :-1], behind[..., 1:]
  known = jnp.asarray(ahead[None, :, 1:]) < length[:, None, None]
  column, sayable = wanted, known
  if heads.tokens is not None:
    column = jnp.searchsorted(heads.tokens, wanted)
    column = jnp.minimum(column, len(heads.tokens) - 1)
    sayable = known & (heads.tokens[column] == wanted)

  # Some positions at a time: their logits would be large.
  def some(part):
    x, following, column = part
    found = []
    for logits, at in zip(heads.say(model, x, following), column.T):
      true = jnp.take_along_axis(logits, at[:, None], axis=1)
      earlier = jnp.arange(logits.shape[1])[None] < at[:, None]
      found.append(jnp.sum((logits > true) | ((logits == true) & earlier),
                           axis=1))
    return jnp.stack(found, axis=1)

  step = math.gcd(width, 128)
  rank = lax.map(some, tuple(a.reshape(-1, step, a.shape[2])
                             for a in (x, following, column)))
  hits = sayable[..., None] & (rank.reshape(column.shape)[..., None]
                               == jnp.arange(ranks)[None, None, None])
  return jnp.sum(hits, axis=(0, 1)), jnp.sum(known, axis=(0, 1))


def _choose(owner: str, name: str, stored: heads_lib.Stored, heads: int,
            nodes: int) -> Choices:
  """The choices that the options of `Medusa.build` name."""
  if name not in ("", "best", *TREES):
    raise InputError(f"{owner}: tree {name!r} is unknown; there are best, "
                     f"{', '.join(TREES)}.{nearest(name, ['best', *TREES])}")
  if name == "best" and stored.accuracy is None:
    raise InputError(f"{owner}: tree=best needs heads whose accuracy was "
                     "measured; name another tree")
  if name in TREES:
    choices = published(name)
    deepest = max(map(len, choices))
    if deepest > heads:
      raise InputError(f"{owner}: tree {name} is {deepest} deep and there are "
                       f"{heads} heads; name another tree")
  elif not name and stored.choices:
    choices = closed(stored.choices)
  elif stored.accuracy is not None:
    choices = best_choices(stored.accuracy, (nodes or _NODES) - 1)
    # Heads that were never right still need a tree.
    choices = choices or ((0,),)
  else:
    choices = tuple(c for c in published(next(iter(TREES)))
                    if len(c) <= heads)
  return choices[:nodes - 1] if nodes else choices


def _priors(accuracy: Float[np.ndarray, "heads ranks"] | None, ranks: int
            ) -> tuple[float, ...]:
  """How often the choice of each rank is right, over all heads."""
  if accuracy is None:
    return tuple(0.5 ** (rank + 1) for rank in range(ranks))
  mean = accuracy.mean(axis=0)[:ranks]
  return (*mean.tolist(), *[0.0] * (ranks - len(mean)))
