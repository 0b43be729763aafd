# SPDX-License-Identifier: Apache-2.0
"""What a folder of heads says of itself, and may say wrongly."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxspec import belonging
from jaxspec.confidence import COEFFICIENTS, MEASURES

_CHOICES, _RANKS = 1024, 1024
# A threshold that no confidence reaches.
NEVER = 2.0


@dataclasses.dataclass(frozen=True)
class Calibration:
  """From which confidence on a head's tokens may be shown.

  Attributes:
    measure: of confidence, see `jaxspec.confidence`.
    first: the threshold for the first token of an answer; above 1 for never.
    later: the threshold for later ones.
    risk: at most this share of what is shown is taken back,
    confidence: with this probability over the texts it was found on.
    coefficients: of the measure `learned`.
  """

  measure: str
  first: float
  later: float
  risk: float
  confidence: float
  coefficients: tuple[float, ...] | None = None


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

  def calibration(self) -> Calibration | None:
    value = self.get("calibration")
    if value is None:
      return None
    fields = {field.name for field in dataclasses.fields(Calibration)}
    shares = dict(first=NEVER, later=NEVER, risk=1.0, confidence=1.0)
    if (not isinstance(value, dict) or set(value) != fields
        or value["measure"] not in MEASURES
        or not all(_number(value[name], 0, high)
                   for name, high in shares.items())):
      raise self.fail(
          "calibration", f"an object with measure, one of {', '.join(MEASURES)}"
          f"; first and later, numbers in [0, {NEVER:g}]; risk and confidence, "
          "numbers in [0, 1]; and coefficients")
    found = value["coefficients"]
    if value["measure"] != "learned":
      right = found is None
    else:
      right = (isinstance(found, list) and len(found) == COEFFICIENTS
               and all(_number(x, -1e6, 1e6) for x in found))
    if not right:
      raise self.fail("calibration", f"an object whose coefficients are "
                      f"{COEFFICIENTS} numbers where the measure is learned, "
                      "else null")
    numbers = {name: float(value[name]) for name in shares}
    return Calibration(
        value["measure"], **numbers,
        coefficients=None if found is None else tuple(map(float, found)))

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


def _number(value: Any, low: float, high: float) -> bool:
  return (isinstance(value, int | float) and not isinstance(value, bool)
          and math.isfinite(value) and low <= value <= high)
