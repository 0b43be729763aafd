# SPDX-License-Identifier: Apache-2.0
"""Parts by the names of their files, with options: `paged:page=64,pages=9`."""

import ast
from collections.abc import Collection
from typing import Any

from jaxspec.errors import InputError, nearest


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

  Raises:
    InputError: `owner` has no such option.
  """
  values = {}
  for option in filter(None, text.split(",")):
    key, separator, value = option.partition("=")
    if key not in known or not separator:
      raise InputError(f"{owner} has no option {option!r}; it has "
                       f"{', '.join(known) or 'none'}.{nearest(key, known)}")
    try:
      values[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      values[key] = value
  return values
