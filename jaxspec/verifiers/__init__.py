# SPDX-License-Identifier: Apache-2.0
"""Rules that pick one path of a scored tree. One file a rule."""

import importlib
import pkgutil
from typing import Any

from jaxspec import naming


def parse(text: str) -> Any:
  """Finds the verifier that is called like its file.

  Raises:
    InputError: there is none, or it was given options, which none has.
  """
  names = sorted(module.name for module in pkgutil.iter_modules(__path__))
  name, options = naming.choose("verifier", text, names)
  naming.options(f"verifier {name}", options, ())
  return getattr(importlib.import_module(f"{__name__}.{name}"), name)
