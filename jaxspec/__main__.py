# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxspec COMMAND --flags`.

A command is a file of `jaxspec/apps/` that defines `main`; there is no list to
edit. Files are read, not imported, to find them, so `--help` loads nothing.
"""

import ast
import importlib
import pathlib
import sys
from collections.abc import Sequence

from jaxspec.apps import launch
from jaxspec.errors import InputError, nearest


def commands() -> dict[str, str]:
  """Returns the first docstring line of every command, by its name."""
  found = {}
  for file in sorted(pathlib.Path(launch.__file__).parent.glob("*.py")):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    if "main" in functions:
      summary = (ast.get_docstring(tree) or "").partition("\n")[0]
      found[file.stem] = summary
  return found


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit status."""
  argv = sys.argv[1:] if argv is None else argv
  name, *rest = argv or [""]
  return launch.guard(lambda: _dispatch(name, rest))


def _dispatch(name: str, rest: Sequence[str]) -> int:
  known = commands()
  if name in ("-h", "--help", "--helpfull", "help"):
    print(_usage(known))
    return 0
  if not name or name.startswith("-"):
    raise InputError(
      f"the first argument must be a command ({', '.join(known)}), got "
      f"{name!r}; see python -m jaxspec --help"
    )
  if name not in known:
    raise InputError(
      f"unknown command {name!r}; the commands are {', '.join(known)}."
      + nearest(name, known)
    )
  return launch.run(importlib.import_module(f"jaxspec.apps.{name}"), rest)


def _usage(known: dict[str, str]) -> str:
  width = max(map(len, known))
  lines = [f"  {name:{width}}  {summary}" for name, summary in known.items()]
  return "\n".join(
    [
      "usage: python -m jaxspec COMMAND --flags",
      "",
      *lines,
      "",
      "python -m jaxspec COMMAND --help lists the flags of a command.",
    ]
  )


if __name__ == "__main__":
  sys.exit(main())
