# SPDX-License-Identifier: Apache-2.0
"""A whole drafter: what followed this token the last time will follow it."""

import jax.numpy as jnp
from flax import struct

from jaxspec.base import Drafter, Proposal
from jaxspec.tree import chain


@struct.dataclass
class Bigram(Drafter):
  height, size = 1, 2              # one token, behind the last committed one

  def init(self, model, rows, capacity):
    return jnp.full((rows, model.vocab), -1, jnp.int32)

  def insert(self, model, state, rows, prefix, request):
    return state.at[rows].set(-1, mode="drop")

  def propose(self, model, seq, request, state):
    guess = jnp.take_along_axis(state, seq.tail(), axis=1)
    tokens = jnp.concatenate([seq.tail(), jnp.maximum(guess, 0)], axis=1)
    return Proposal(tokens, chain(1), live=1 + (guess[:, 0] >= 0)), state

  def observe(self, model, seq, state, proposal, scores, verdict):
    # Behind the last accepted node the model said something of its own.
    kept, row = verdict.kept, jnp.arange(len(state))
    before = proposal.tokens[row, (kept > 1).astype(int)]
    row = jnp.where(kept > 0, row, len(state))      # finished rows are left out
    return state.at[row, before].set(verdict.next_token, mode="drop")
