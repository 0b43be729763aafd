# SPDX-License-Identifier: Apache-2.0
"""What a folder of heads says of itself, and may say wrongly."""

import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxspec.errors import InputError

_CHOICES, _RANKS = 1024, 1024


class Settings:
  """A config that may say anything; what is wrong is named."""

  def __init__(self, path: pathlib.Path, values: dict):
    self.path, self.get = path, values.get

  def fail(self, key: str, wanted: str) -> InputError:
    found = repr(self.get(key))
    if len(found) > 60:
      found = found[:60] + "..."
    return InputError(f"{self.path}: {key} must be {wanted}, got {found}")

  def integer(self, key: str, low: int, high: int, **default: Any) -> Any:
    value = self.get(key)
    if default and value is None:
      return default["default"]
    if type(value) is not int or not low <= value <= high:
      raise self.fail(key, f"an integer in [{low}, {high}]")
    return value

  def flag(self, key: str) -> bool:
    value = self.get(key)
    if type(value) is not bool:
      raise self.fail(key, "true or false")
    return value

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
