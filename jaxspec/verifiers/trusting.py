# SPDX-License-Identifier: Apache-2.0
"""Trusting: whatever a drafter is sure enough of stands. Lossy.

Every live draft on the path of first children becomes the text, and behind it
stands a token of the model's own. The pass has computed the keys and values of
all layers for all of them, so that the model goes on from what it has read in
full, and no error of the drafter's layers is carried along (the deep pass of
FREE, arXiv:2310.05424; CALM, arXiv:2207.07061, copies the upper layers' state
instead). Nothing is compared with the model, so nothing that was shown is ever
taken back, and the law of the text is not the model's.

How sure is sure enough, the drafter decides: `early_exit:stop=0.9` drafts no
further where its head's confidence is less. A drafter that never doubts, such
as prompt lookup, is believed without end; it is not meant for this.
"""

import dataclasses
from typing import ClassVar

from jaxspec.base import Proposal, Verdict
from jaxspec.sampling import Laws
from jaxspec.verifiers.exact import deepest, ending


@dataclasses.dataclass(frozen=True)
class Trusting:
  """Takes all live first children.

  Attributes:
    final: nothing that was drafted and shown is taken back.
  """

  final: ClassVar[bool] = True
  honest: ClassVar[bool] = False
  lossy: ClassVar[bool] = True
  label: ClassVar[str] = "trusting(lossy)"

  def __call__(self, proposal: Proposal, laws: Laws) -> Verdict:
    node = deepest(proposal, proposal.leads)
    return ending(proposal, node, laws.draw(node))
