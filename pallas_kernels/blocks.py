# SPDX-License-Identifier: Apache-2.0
"""Sizes of blocks: from a table that was measured, else from a heuristic.

The table (`blocks.json`) is a dictionary of dictionaries: device kind, op, key,
and there an integer or a list of them:

  {"TPU v5 lite": {"streamed_matmul": {"8,4096,14336,bfloat16": [512, 2048]}}}

`python -m pallas_kernels tune` fills it on a device. A table of one's own comes
before that of the package where PALLAS_KERNELS_BLOCKS names its file.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels.errors import InputError
from pallas_kernels.target import Target

# What one entry holds, and a table.
Blocks = int | tuple[int, ...]
Table = dict[str, dict[str, dict[str, Blocks]]]

SHIPPED = pathlib.Path(__file__).with_name("blocks.json")
VARIABLE = "PALLAS_KERNELS_BLOCKS"

# ((op, key), blocks) that come before every table while they are tried.
# jax's caches of traces tell trials apart.
trial = jax.make_user_context(default_value=())

# Where `choose` notes what it was asked, while `watch` is at it.
_watching: list[dict[tuple[str, str], Blocks]] = []


def choose(op: str, target: Target, key: str | Sequence[Any],
           heuristic: Callable[[], Any]) -> Any:
  """The blocks of one call.

  Args:
    op: the public function's name.
    key: what the best blocks depend on: shapes and types.
    heuristic: called without arguments where no table knows better; gives an
      integer, or a tuple of them.

  Raises:
    InputError: a table is malformed, or its entry has another form than the
      heuristic's.
  """
  name = key if isinstance(key, str) else ",".join(map(str, key))
  guess = heuristic()
  for seen in _watching:
    seen[op, name] = guess
  tried = dict(trial.value)
  if (op, name) in tried:
    return tried[op, name]
  for path in _paths():
    found = load(path).get(target.kind, {}).get(op, {}).get(name)
    if found is None:
      continue
    if _count(found) != _count(guess):
      raise InputError(
          f"{path}: {target.kind!r}, {op!r}, {name!r} is {found!r}, but the "
          f"kernel wants {_form(_count(guess))}; tune it again")
    return found
  return guess


class watch:
  """Notes every choice that is made inside: `{(op, key): heuristic's}`."""

  def __enter__(self) -> dict[tuple[str, str], Blocks]:
    self._seen: dict[tuple[str, str], Blocks] = {}
    _watching.append(self._seen)
    return self._seen

  def __exit__(self, *unused: object) -> None:
    # By identity: two that are at it may have seen the same.
    at = [seen is self._seen for seen in _watching].index(True)
    del _watching[at]


def load(path: str | os.PathLike[str]) -> Table:
  """Reads a table, once for each state of its file.

  Raises:
    InputError: there is no such file, or it is not a table.
  """
  try:
    info = os.stat(path)
  except OSError as e:
    raise InputError(f"there is no table of blocks {str(path)!r} "
                     f"({e.strerror})") from e
  return _load(os.fspath(path), info.st_mtime_ns, info.st_size)


def save(path: str | os.PathLike[str], table: Table) -> None:
  """Writes a table, sorted, so that two of them can be compared."""
  file = pathlib.Path(path)
  partial = file.with_name(file.name + ".partial")
  partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n",
                     encoding="utf-8")
  partial.replace(file)


def _paths() -> list[str | os.PathLike[str]]:
  own = os.environ.get(VARIABLE)
  return [own, SHIPPED] if own else [SHIPPED]


@functools.lru_cache(maxsize=16)
def _load(path: str, *state: int) -> Table:
  del state
  try:
    content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except ValueError as e:                # not JSON, or not UTF-8
    raise InputError(f"{path} is no JSON: {e}") from e
  return _checked(content, path, ("device kind", "op", "key"))


def _checked(content: Any, where: str, levels: Sequence[str]) -> Any:
  if not levels:
    whole = content if isinstance(content, list) else [content]
    if not whole or not all(type(x) is int and x > 0 for x in whole):
      raise InputError(f"{where} is {content!r}, but blocks are a positive "
                       "integer or a list of them")
    return tuple(content) if isinstance(content, list) else content
  if not isinstance(content, dict):
    raise InputError(f"{where} is {content!r}, but must be an object with one "
                     f"entry for each {levels[0]}")
  return {name: _checked(entry, f"{where}: {name!r}", levels[1:])
          for name, entry in content.items()}


def _count(blocks: Any) -> int | None:
  return len(blocks) if isinstance(blocks, (tuple, list)) else None


def _form(count: int | None) -> str:
  return "an integer" if count is None else f"a list of {count} integers"
