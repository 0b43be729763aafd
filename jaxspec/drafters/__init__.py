# SPDX-License-Identifier: Apache-2.0
"""Ways to guess what comes next. One file a drafter; its name is its file's.

Each file holds one class whose name is the file's in CamelCase; `parse` finds
it, so that a new drafter touches no list.
"""

import importlib
import pkgutil
from typing import Any

from jaxspec import naming


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
  name, options = naming.choose("drafter", text, names())
  module = importlib.import_module(f"{__name__}.{name}")
  kind = getattr(module, "".join(map(str.capitalize, name.split("_"))))
  return kind(**naming.options(f"drafter {name}", options,
                               kind.__dataclass_fields__))
