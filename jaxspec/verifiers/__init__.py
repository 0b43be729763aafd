# SPDX-License-Identifier: Apache-2.0
"""Rules that pick one path of a scored tree. One file a rule."""

import importlib
import pkgutil
from typing import Any

from jaxspec.errors import InputError, nearest


def parse(name: str) -> Any:
  """Finds the verifier that is called like its file.

  Raises:
    InputError: there is none.
  """
  names = sorted(module.name for module in pkgutil.iter_modules(__path__))
  if name not in names:
    raise InputError(f"verifier {name!r} is unknown; there are "
                     f"{', '.join(names)}.{nearest(name, names)}")
  return getattr(importlib.import_module(f"{__name__}.{name}"), name)
