# SPDX-License-Identifier: Apache-2.0
"""Parts by the names of their files, with options: `paged:page=64,pages=9`.

A value in square brackets may itself be such a text, or several, separated by
semicolons: `union:drafters=[prompt_lookup:length=4;recycling],nodes=16`.
"""

import ast
from collections.abc import Collection
from typing import Any

from jaxspec.errors import InputError, nearest


def camel_case(name: str) -> str:
  """The class a file is named after: `PromptLookup` of `prompt_lookup`."""
  return "".join(map(str.capitalize, name.split("_")))


def choose(kind: str, text: str, names: Collection[str]) -> tuple[str, str]:
  """Splits the text of a flag at its colon.

  Args:
    kind: what it names, for the error.
    names: what there is.

  Returns:
    The name, and the text of its options.

  Raises:
    InputError: there is nothing of that name.
  """
  name, _, options = text.partition(":")
  if name not in names:
    raise InputError(f"{kind} {name!r} is unknown; there are "
                     f"{', '.join(names)}.{nearest(name, names)}")
  return name, options


def options(owner: str, text: str, known: Collection[str]) -> dict[str, Any]:
  """Reads `option=value,option=value`; a value is a literal or plain text.

  A value in brackets is the text within.

  Raises:
    InputError: `owner` has no such option, or a bracket is not closed.
  """
  values = {}
  for option in filter(None, split(text, ",")):
    key, separator, value = option.partition("=")
    if key not in known or not separator:
      raise InputError(f"{owner} has no option {option!r}; it has "
                       f"{', '.join(known) or 'none'}.{nearest(key, known)}")
    if value.startswith("[") and value.endswith("]"):
      values[key] = value[1:-1]
      continue
    try:
      values[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      values[key] = value
  return values


def number(owner: str, name: str, value: Any, low: float, high: float
           ) -> float:
  """Checks an option that must be a number in [low, high].

  Raises:
    InputError: it is not.
  """
  if (isinstance(value, bool) or not isinstance(value, int | float)
      or not low <= value <= high):
    raise InputError(f"{owner}: {name} must be a number in [{low:g}, "
                     f"{high:g}], got {value!r}")
  return float(value)


def layers(owner: str, name: str, text: str, depth: int) -> list[int]:
  """Reads an option that names layers, as `0-3+26+29`.

  Raises:
    InputError: it names none, or one that is not there.
  """
  try:
    found = []
    for part in text.split("+"):
      first, _, last = part.partition("-")
      found += range(int(first), min(int(last or first), depth) + 1)
  except ValueError:
    found = []
  if not found or not all(0 <= layer < depth for layer in found):
    raise InputError(f"{owner}: {name}={text} must name some of "
                     f"0-{depth - 1}, for example 0-1+{depth - 1}")
  return found


def split(text: str, separator: str) -> list[str]:
  """Splits where no bracket is open.

  Raises:
    InputError: brackets do not match.
  """
  parts, depth = [""], 0
  for letter in text:
    depth += (letter == "[") - (letter == "]")
    if depth < 0:
      break
    if letter == separator and not depth:
      parts.append("")
    else:
      parts[-1] += letter
  if depth:
    raise InputError(f"{text!r} has brackets that do not match")
  return parts


def whole(owner: str, name: str, value: Any, low: int, high: int) -> None:
  """Sees to it that an option is an integer within bounds.

  Raises:
    InputError: it is not.
  """
  if type(value) is not int or not low <= value <= high:
    raise InputError(f"{owner}: {name} must be an integer in [{low}, {high}], "
                     f"got {value!r}")
