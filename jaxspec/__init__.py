# SPDX-License-Identifier: Apache-2.0
"""Decodes large language models with speculation as a compiled program.

  from jaxspec import Generator, Options

  generator = Generator.load("smollm2-135m", drafter="prompt_lookup")
  completion, = generator.generate(["Once upon a time"], Options(seed=1))

What stands here is what most programs need; the parts, for those that build
upon them, are in the modules. Nothing is loaded before it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxspec.answers import Completion as Completion
  from jaxspec.answers import TextEvent as TextEvent
  from jaxspec.drift import DriftMonitor as DriftMonitor
  from jaxspec.errors import InputError as InputError
  from jaxspec.generator import Generator as Generator
  from jaxspec.metrics import Stats as Stats
  from jaxspec.options import Options as Options

_HOMES = {
  "Completion": "answers",
  "DriftMonitor": "drift",
  "Generator": "generator",
  "InputError": "errors",
  "Options": "options",
  "Stats": "metrics",
  "TextEvent": "answers",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module 'jaxspec' has no attribute {name!r}")
  return getattr(importlib.import_module(f"jaxspec.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
