# SPDX-License-Identifier: Apache-2.0
"""Rules that pick one path of a scored tree. One file a rule.

Each file holds a function called like the file, or a frozen dataclass whose
name is the file's in CamelCase and whose fields are the options; `parse` finds
it, so that a new verifier touches no list.
"""

import dataclasses
import importlib
import pkgutil
from typing import Any

from jaxspec import naming


def names() -> list[str]:
  """The verifiers there are."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def parse(text: str) -> Any:
  """Makes the verifier that `text` names.

  Args:
    text: `name` or `name:option=value,option=value`, for example
      `typical:epsilon=0.09,delta=0.3`; see `jaxspec.naming`.

  Raises:
    InputError: there is no such verifier or option, or a value is wrong.
  """
  name, options = naming.choose("verifier", text, names())
  module = importlib.import_module(f"{__name__}.{name}")
  kind = getattr(module, naming.camel_case(name), None)
  fields = [] if kind is None else [f.name for f in dataclasses.fields(kind)]
  values = naming.options(f"verifier {name}", options, fields)
  return getattr(module, name) if kind is None else kind(**values)
