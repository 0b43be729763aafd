# SPDX-License-Identifier: Apache-2.0
"""What answers begin with: a guess that costs nothing, and a control.

A table of how often answers began with which token, by the last token of the
prompt and over all. A first token that is frequent enough can be shown before
the prompt is read at all; and a head that reads it must be better than that.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from jaxspec.errors import InputError

_FORMAT = "jaxspec first tokens 1"
# A context is believed if so many answers were seen behind it.
_ENOUGH = 10


@dataclasses.dataclass(frozen=True)
class FirstTokens:
  """The likeliest first token behind each last token of a prompt.

  Attributes:
    vocab: of the tokens.
    overall: the likeliest first token, and the share of answers that begin
      with it; None where no answer was seen.
    behind: the same behind the last tokens that were seen often enough.
    threshold: the least share with which a guess is made.
  """

  vocab: int
  overall: tuple[int, float] | None
  behind: Mapping[int, tuple[int, float]]
  threshold: float = 0.5

  def guess(self, prompt: Sequence[int]) -> list[int]:
    """The first token of the answer; nothing where none is likely enough."""
    found = self.behind.get(prompt[-1], self.overall)
    return [found[0]] if found and found[1] >= self.threshold else []

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the table, without the threshold, as JSON."""
    text = json.dumps({
        "format": _FORMAT, "vocab": self.vocab, "overall": self.overall,
        "behind": {str(k): v for k, v in self.behind.items()}}, indent=2)
    try:
      pathlib.Path(path).expanduser().write_text(text + "\n",
                                                 encoding="utf-8")
    except OSError as e:
      raise InputError(f"cannot write {path}: {e.strerror}") from e


def learn(pairs: Iterable[tuple[int, int]], vocab: int) -> FirstTokens:
  """Counts.

  Args:
    pairs: the last token of each prompt, and the first of its answer.
  """
  every: collections.Counter[int] = collections.Counter()
  behind: dict[int, collections.Counter[int]] = collections.defaultdict(
      collections.Counter)
  for last, first in pairs:
    every[first] += 1
    behind[last][first] += 1

  def best(counts):
    token, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return token, count / counts.total()
  return FirstTokens(
      vocab, best(every) if every else None,
      {last: best(counts) for last, counts in sorted(behind.items())
       if counts.total() >= _ENOUGH})


def load(path: str | pathlib.Path, threshold: float = 0.5) -> FirstTokens:
  """Reads what `FirstTokens.save` wrote.

  Raises:
    InputError: there is no such table, or the threshold is no share.
  """
  if not 0 <= threshold <= 1:
    raise InputError("the share of answers from which on a first token is "
                     f"shown must be in [0, 1], got {threshold!r}")
  try:
    found = json.loads(pathlib.Path(path).expanduser().read_text("utf-8"))
    if found["format"] != _FORMAT:
      raise ValueError
    vocab = int(found["vocab"])

    def entry(value):
      token, share = int(value[0]), float(value[1])
      if not (0 <= token < vocab and 0 <= share <= 1):
        raise ValueError
      return token, share
    return FirstTokens(
        vocab, entry(found["overall"]) if found["overall"] else None,
        {int(last): entry(value) for last, value in found["behind"].items()},
        float(threshold))
  except OSError as e:
    raise InputError(f"cannot read first tokens from {path}: {e.strerror}"
                     ) from e
  except (ValueError, TypeError, KeyError, IndexError, AttributeError,
          RecursionError) as e:
    raise InputError(f"{path} holds no table of first tokens; make one with "
                     "python -m jaxspec calibrate --first_tokens=FILE") from e
