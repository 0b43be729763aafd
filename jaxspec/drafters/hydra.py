# SPDX-License-Identifier: Apache-2.0
"""Hydra: as Medusa, by heads that see the nodes above (arXiv:2402.05109).

The text ends with a token the model has committed but not read, the root. All
heads read the stream at the position before it. The first sees the root too,
and says what follows it; the next sees one node more, and so on. So the
children of two nodes differ, and a tree is filled depth by depth.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jaxspec.drafters import medusa
from jaxspec.heads import HydraHeads


@struct.dataclass
class Hydra(medusa.Medusa):
  """Drafts the likeliest tokens of each head behind each path.

  Its state is the top of the stream at the last accepted node.
  """

  kind: ClassVar[str] = "hydra"

  heads: HydraHeads

  costly = True

  def init(self, model, rows, capacity) -> Float[Array, "B D"]:
    x = jax.eval_shape(model.embed, jnp.zeros((rows, 1), jnp.int32))
    return jnp.zeros((rows, x.shape[-1]), x.dtype)

  def insert(self, model, state, rows, prefix, request):
    return state.at[rows].set(prefix.last, mode="drop")

  def propose(self, model, seq, request, state):
    tree, rank = self.tree, self._rank
    parents = np.array(tree.parents)
    tokens = jnp.zeros((len(state), tree.size), jnp.int32)
    tokens = tokens.at[:, :1].set(seq.tail())
    z, heard = self.heads.look(model, state)
    heard, nodes = heard[:, None], np.zeros(1, np.int32)
    for depth in range(tree.height):
      heard = self.heads.hear(model, depth, heard, tokens[:, nodes])
      below = np.flatnonzero(tree.depths == depth + 1)
      best = self.heads.choose(model, depth, z, heard,
                               int(rank[below].max()) + 1)
      beam = np.searchsorted(nodes, parents[below])
      tokens = tokens.at[:, below].set(best[:, beam, rank[below]])
      # Of these, the nodes with children.
      inner = np.isin(below, parents)
      heard, nodes = heard[:, beam[inner]], below[inner]
    return self._filled(tokens), state

  def observe(self, model, seq, state, proposal, scores, verdict):
    return jnp.where((verdict.kept > 0)[:, None],
                     medusa.last(scores, verdict), state)
