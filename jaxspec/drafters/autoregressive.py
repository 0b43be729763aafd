# SPDX-License-Identifier: Apache-2.0
"""Plain decoding: the drafter that guesses nothing."""

from flax import struct

from jaxspec.base import Proposal
from jaxspec.tree import root


@struct.dataclass
class Autoregressive:
  """Proposes the root alone, so that each pass yields one token."""

  taps = ()
  height = 0

  def init(self, model, rows, capacity):
    return ()

  def insert(self, model, state, rows, prefix):
    return state

  def propose(self, model, seq, request, state):
    return Proposal(seq.tail(), root()), state

  def observe(self, model, seq, state, proposal, scores, verdict):
    return state
