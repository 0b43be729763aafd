# SPDX-License-Identifier: Apache-2.0
"""Plain decoding: the drafter that guesses nothing."""

from flax import struct

from jaxspec.base import Drafter, Proposal
from jaxspec.tree import root


@struct.dataclass
class Autoregressive(Drafter):
  """Proposes the root alone, so that each pass yields one token."""

  tree = root()

  def propose(self, model, seq, request, state):
    return Proposal(seq.tail(), self.tree), state
