# SPDX-License-Identifier: Apache-2.0
"""Ways to guess what comes next. One file a drafter; its name is its file's.

Each file holds one class whose name is the file's in CamelCase; `parse` finds
it, so that a new drafter touches no list.
"""

import ast
import importlib
import pkgutil
from typing import Any

from jaxspec.errors import InputError, nearest


def names() -> list[str]:
  """The drafters there are."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def parse(text: str) -> Any:
  """Makes the drafter that `text` names.

  Args:
    text: `name` or `name:option=value,option=value`, for example
      `prompt_lookup:length=8,max_ngram=3`.

  Raises:
    InputError: there is no such drafter or option.
  """
  name, _, options = text.partition(":")
  if name not in names():
    raise InputError(f"drafter {name!r} is unknown; there are "
                     f"{', '.join(names())}." + nearest(name, names()))
  module = importlib.import_module(f"{__name__}.{name}")
  kind = getattr(module, "".join(map(str.capitalize, name.split("_"))))
  known = kind.__dataclass_fields__
  values = {}
  for option in filter(None, options.split(",")):
    key, separator, value = option.partition("=")
    if key not in known or not separator:
      raise InputError(
          f"drafter {name} has no option {option!r}; it has "
          f"{', '.join(known) or 'none'}." + nearest(key, known))
    try:
      values[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      values[key] = value
  return kind(**values)
