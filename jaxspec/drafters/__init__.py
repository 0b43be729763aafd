# SPDX-License-Identifier: Apache-2.0
"""Ways to guess what comes next. One file a drafter; its name is its file's.

Each file holds one class whose name is the file's in CamelCase; `parse` finds
it, so that a new drafter touches no list. A class that needs more than its
fields, such as weights from a file, has a class method `build(target, ...)`,
whose keyword arguments are its options.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from jaxspec import naming
from jaxspec.errors import InputError


@dataclasses.dataclass(frozen=True)
class Target:
  """What a drafter is made for.

  Attributes:
    model: the transformer it drafts for, its weights on the mesh.
    tokenizer: None for a checkpoint without one.
    load: reads another checkpoint, given as `Generator.load` takes it, onto
      the same mesh in the same dtype; gives the model and its tokenizer.
    honest: whether the verifier wants to know what drafts were drawn from.
    cache_dtype: of the target's keys and values.
  """

  model: Any
  tokenizer: Any = None
  load: Callable[[str], tuple[Any, Any]] | None = None
  honest: bool = False
  cache_dtype: str = "float32"


def names() -> list[str]:
  """The drafters there are."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def parse(text: str, target: Target | None = None) -> Any:
  """Makes the drafter that `text` names.

  Args:
    text: `name` or `name:option=value,option=value`, for example
      `prompt_lookup:length=8,max_ngram=3`; see `jaxspec.naming`.
    target: what it will draft for; only some drafters can do without.

  Raises:
    InputError: there is no such drafter or option.
  """
  name, options = naming.choose("drafter", text, names())
  module = importlib.import_module(f"{__name__}.{name}")
  kind = getattr(module, naming.camel_case(name))
  owner = f"drafter {name}"
  if not hasattr(kind, "build"):
    return kind(**naming.options(owner, options, kind.__dataclass_fields__))
  _, *known = inspect.signature(kind.build).parameters
  if target is None:
    raise InputError(f"{owner} must be told what it drafts for; name it where "
                     "the Generator is made")
  return kind.build(target, **naming.options(owner, options, known))
