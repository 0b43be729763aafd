# SPDX-License-Identifier: Apache-2.0
"""What a folder of heads says of itself, and may say wrongly."""

import numpy as np
from jaxtyping import Float

from jaxspec import belonging

_CHOICES, _RANKS = 1024, 1024


class Settings(belonging.Settings):
  """A config that may say anything; what is wrong is named."""

  def choices(self, heads: int) -> tuple[tuple[int, ...], ...]:
    value = self.get("choices") or []
    if not isinstance(value, list) or len(value) > _CHOICES or any(
        not isinstance(choice, list) or not 1 <= len(choice) <= heads
        or any(type(rank) is not int or not 0 <= rank < _RANKS
               for rank in choice) for choice in value):
      raise self.fail("choices", f"at most {_CHOICES} lists of up to "
                      f"{heads} ranks")
    return tuple(map(tuple, value))

  def accuracy(self, heads: int) -> Float[np.ndarray, "heads ranks"] | None:
    value = self.get("accuracy")
    if value is None:
      return None
    try:
      found = np.array(value, np.float64)
    except (ValueError, TypeError):
      found = np.zeros((0, 0))
    if (found.ndim != 2 or len(found) != heads
        or not 1 <= found.shape[1] <= _RANKS
        or not np.all((found >= 0) & (found <= 1))):
      raise self.fail("accuracy", f"{heads} lists of shares, equally long")
    return found
