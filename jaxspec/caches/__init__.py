# SPDX-License-Identifier: Apache-2.0
"""Committed keys and values, under one contract.

A cache is read-only inside a step. Nodes in flight live in `Fresh`; the
accepted path of each row is written by `commit`, all layers at once, and
rejected nodes are forgotten because they were never written anywhere.

A file that holds a class called like it (`paged.py`, `PagedCache`) is a cache;
`parse` finds it, so that a new one touches no list.
"""

import importlib
import inspect
import pkgutil
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxspec import naming
from jaxspec.caches.fresh import Cache as Cache
from jaxspec.caches.fresh import Fresh as Fresh
from jaxspec.caches.fresh import Place as Place
from jaxspec.errors import InputError


def kinds() -> dict[str, Any]:
  """The classes of the caches there are, by the names of their files."""
  found = {}
  for name in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    module = importlib.import_module(f"{__name__}.{name}")
    kind = getattr(module, f"{naming.camel_case(name)}Cache", None)
    if kind is not None:
      found[name] = kind
  return found


def stored_in(mesh: Any, weights: Any, wanted: str | None = None
              ) -> np.dtype:
  """The dtype of keys and values on a mesh.

  Args:
    weights: the model's own, which is taken but on a CPU, where XLA would
      convert a whole bfloat16 cache to write a row.
    wanted: goes before.
  """
  if wanted is None and mesh.devices.flat[0].platform == "cpu":
    wanted = "float32"
  return jnp.dtype(wanted or weights)


def parse(text: str) -> tuple[Any, dict[str, int]]:
  """Finds the cache that `text` names.

  Args:
    text: `name` or `name:option=value,option=value`, each a whole number,
      for example `paged:page=64,pages=100`.

  Returns:
    The class, and options for its `empty`.

  Raises:
    InputError: there is no such cache, option or number.
  """
  known = kinds()
  name, options = naming.choose("cache", text, known)
  parameters = inspect.signature(known[name].empty).parameters.values()
  settings = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
  values = naming.options(f"cache {name}", options, settings)
  for key, value in values.items():
    if not isinstance(value, int) or isinstance(value, bool):
      raise InputError(f"{name}: {key} must be a whole number, got {value!r}")
  return known[name], values
