# SPDX-License-Identifier: Apache-2.0
"""Kinds of heads, found by their files and made from text."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from jaxspec import naming
from jaxspec.errors import InputError


def kinds() -> dict[str, Any]:
  """The class of each kind."""
  package, found = importlib.import_module("jaxspec.heads"), {}
  for file in pkgutil.iter_modules(package.__path__):
    module = importlib.import_module(f"{package.__name__}.{file.name}")
    found |= {c.kind: c for c in vars(module).values()
              if isinstance(c, type) and getattr(c, "kind", "") == file.name}
  return found


def parse(text: str, model: Any, frequent: Callable[[int], Sequence[int]]
          ) -> Any:
  """Makes the untrained heads that `text` names.

  Args:
    text: `kind:option=value,option=value`, the options those of the kind's
      `init`, where `tokens` is how many tokens they can say.
    frequent: gives the ids of that many tokens.

  Raises:
    InputError: there is no such kind or option, or a value out of bounds.
  """
  kind, options = naming.choose("kind of heads", text, sorted(kinds()))
  made = kinds()[kind]
  bounds = made.bounds(model) | {"tokens": (1, model.vocab)}
  flags = [name for name, p in inspect.signature(made.init).parameters.items()
           if isinstance(p.default, bool)]
  values = naming.options(f"heads {kind}", options, [*bounds, *flags])
  for name, value in values.items():
    if name in bounds:
      naming.whole(kind, name, value, *bounds[name])
    elif not isinstance(value, bool):
      raise InputError(f"{kind}: {name} must be True or False, got {value!r}")
  for name, p in inspect.signature(made.init).parameters.items():
    if name in bounds and p.default is p.empty and name not in values:
      low, high = bounds[name]
      raise InputError(f"{kind} needs {name}=N in [{low}, {high}]")
  if "tokens" in values:
    values["tokens"] = frequent(values["tokens"])
  return made.init(model, **values)
