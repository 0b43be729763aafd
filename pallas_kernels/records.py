# SPDX-License-Identifier: Apache-2.0
"""Result files: what was found, by which command, of which sources.

To compile everything takes an hour of a processor. So what is found is written
down at once, with a digest of the sources that it depends on, and is not looked
for again while they, and the compiler, are the same.
"""

import ast
import functools
import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Collection
from importlib import metadata
from typing import Any

from pallas_kernels.errors import InputError

_HERE = pathlib.Path(__file__).parent
# What makes a row: those of one key replace one another.
_KEY = ("op", "case", "target", "jax")


def versions() -> dict[str, str | None]:
  """Of Python, and of what compiles."""
  found: dict[str, str | None] = {"python": platform.python_version()}
  for name in ("jax", "jaxlib", "libtpu"):
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = None
  return found


@functools.cache
def sources(modules: tuple[str, ...], other: str = "",
            packages: tuple[str, ...] = (_HERE.name,)) -> str:
  """A digest of modules' files, and of all they import of some packages.

  Args:
    other: name of files that do not matter, being for another platform.
    packages: those that are looked at, beside this one.
  """
  seen: set[pathlib.Path] = set()
  waiting = [_HERE.parent.joinpath(*module.split(".")).with_suffix(".py")
             for module in modules]
  while waiting:
    file = waiting.pop()
    if file in seen or not file.is_file() or file.stem == other:
      continue
    seen.add(file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ImportFrom) and (node.module or "").partition(
          ".")[0] in packages:
        at = _HERE.parent.joinpath(*(node.module or "").split("."))
        waiting += [at.with_suffix(".py"),
                    *(at / f"{name.name}.py" for name in node.names)]
  digest = hashlib.sha256()
  for file in [*sorted(seen), _HERE / "blocks.json"]:
    digest.update(file.read_bytes())
  return digest.hexdigest()[:16]


class Records:
  """A file of rows, each of which is written when it is found."""

  def __init__(self, path: str | None, command: str):
    """Reads what is there.

    Args:
      path: the file; None for none.

    Raises:
      InputError: the file is there, and has no rows.
    """
    self._file = None if path is None else pathlib.Path(path)
    self._command = command
    self._versions = versions()
    self.rows: list[dict[str, Any]] = []
    if self._file is not None and self._file.exists():
      self.rows = load(self._file)

  def find(self, source: str, **key: str) -> dict[str, Any] | None:
    """The row that was found with the same sources and compiler."""
    key["jax"] = self._versions["jax"] or ""
    for row in self.rows:
      if (_key(row) == _key(key) and row["source"] == source
          and row["versions"] == self._versions):
        return row
    return None

  def add(self, row: dict[str, Any], source: str = "") -> None:
    """Puts a row in place of what its key had, and writes the file."""
    row = row | {"jax": self._versions["jax"], "source": source,
                 "commit": commit(), "versions": self._versions}
    at = [_key(old) for old in self.rows]
    if _key(row) in at:
      self.rows[at.index(_key(row))] = row
    else:
      self.rows.append(row)
    if self._file is not None:
      self.write(self._file)

  def keep(self, op: str, cases: Collection[str]) -> None:
    """Forgets what is of an op's cases that are no more."""
    self.rows = [row for row in self.rows
                 if row["op"] != op or row["case"] in cases]

  def write(self, path: str | pathlib.Path) -> None:
    """Writes all there is to a file.

    Raises:
      InputError: it cannot be written.
    """
    file = pathlib.Path(path)
    content = {
        "command": self._command, "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "versions": self._versions, "rows": self.rows}
    partial = file.with_name(file.name + ".partial")
    try:
      partial.write_text(json.dumps(content, indent=1) + "\n",
                         encoding="utf-8")
      partial.replace(file)
    except OSError as e:
      raise InputError(f"--json={file} cannot be written ({e.strerror})"
                       ) from e


def command(module: str = _HERE.name) -> str:
  """How this process was called."""
  return " ".join(["python", "-m", module, *sys.argv[1:]])


def load(file: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a file.

  Raises:
    InputError: it has none.
  """
  try:
    return json.loads(file.read_text(encoding="utf-8"))["rows"]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise InputError(f"{file} is no file of this command "
                     f"({type(e).__name__}: {e}); name another, or remove it"
                     ) from e


@functools.cache
def commit() -> str | None:
  """The commit of this checkout, with "+" where files differ from it."""
  def git(*args: str) -> str:
    return subprocess.run(["git", "-C", str(_HERE), *args], check=True,
                          capture_output=True, text=True).stdout.strip()
  try:
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return git("rev-parse", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return None


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
  return tuple(row[name] for name in _KEY)


def _processor() -> str:
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  except OSError:
    pass
  return platform.processor() or "unknown"
