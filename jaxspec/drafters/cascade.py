# SPDX-License-Identifier: Apache-2.0
"""A small model drafts for a larger one, and that one for the model.

Staged drafting (arXiv:2308.04623) by recursion: each level is a `DraftModel`
whose drafter is the level below.
"""

from typing import Any

from flax import struct

from jaxspec import naming
from jaxspec.drafters import Target
from jaxspec.drafters.draft_model import DraftModel
from jaxspec.errors import InputError


@struct.dataclass
class Cascade(DraftModel):
  """Draft models that draft for each other."""

  @classmethod
  def build(cls, target: Target, models: Any = "self:int8",
            drafter: Any = "prompt_lookup", length: Any = 6) -> Any:
    """Makes the levels of options as they were written.

    Args:
      models: cheapest first, separated by semicolons; each as `draft_model`
        takes it. `self` is the model that this one drafts for.
      drafter: what drafts for the cheapest.
      length: most tokens each level drafts.

    Raises:
      InputError: names the option that does not fit.
    """
    levels = naming.split(str(models), ";")
    if not all(levels):
      raise InputError(f"cascade: models={models!r} must name one or more, "
                       "for example [self:layers=0-9;self:int8]")
    inner = str(drafter)
    for level in levels[:-1]:
      inner = f"draft_model:model=[{level}],length={length},drafter=[{inner}]"
    return super().build(target, levels[-1], length, inner)
