# SPDX-License-Identifier: Apache-2.0
"""`python -m pallas_kernels COMMAND --flags`: what is known of the kernels."""

import copy
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from pallas_kernels.errors import InputError

_USER_ERROR = 2
_INTERRUPTED = 130


def compile_(settings: Any) -> int:
  """Compiles every kernel for TPUs that are not here, lowers it for a GPU.

  What the file of --json holds of the same sources and compiler is kept.
  Exits with 1 if one that should compile does not.
  """
  from pallas_kernels import case, compiling, records
  names = list(dict.fromkeys(settings.topologies))
  journal = records.Records(settings.json, records.command())
  with tempfile.TemporaryDirectory() as folder:
    dump = pathlib.Path(folder) / "dump" if settings.schedule else None
    compiling.prepare(dump)
    cases = case.collect(settings.op)
    for op in {one.op for one in cases}:
      journal.keep(op, [one.name for one in cases if one.op == op])
    for name in names:
      compiling.device(name)             # bad input is told of before the work
    print(compiling.table([]), flush=True)
    outcomes = []
    for outcome in compiling.compile_all(
        cases, names, dump, journal, gpu=settings.gpu):
      outcomes.append(outcome)
      print(compiling.row(outcome), flush=True)
  bad = [o for o in outcomes if not o.good]
  said = {status: sum(o.status == status for o in outcomes)
          for status in dict.fromkeys(o.status for o in outcomes)}
  print("\n" + ", ".join(f"{n} {status}" for status, n in said.items()))
  if settings.readme:
    _renew(settings.readme, compiling.summary(journal.rows), "compiled")
  return 1 if bad else 0


def tune(settings: Any) -> int:
  """Times blocks of every size on this device, and writes the best."""
  from pallas_kernels import blocks, case, tuning
  if not settings.output:
    raise InputError("say where the table goes, with --output=FILE; a file "
                     "that is there is added to")
  file = pathlib.Path(settings.output)
  target = tuning.local_target(settings.interpret)
  cases = case.collect(settings.op)
  if not file.parent.is_dir():
    raise InputError(f"--output={file}: there is no such folder")
  table = copy.deepcopy(blocks.load(file)) if file.exists() else {}
  options = {"seconds": 0.0, "repeats": 1} if settings.interpret else {}
  tuned = 0
  for trials in tuning.tune(cases, target, **options):
    first = trials[0]
    if first.seconds is None:
      print(f"{first.case.op}, {first.case.name}: {first.reason}", flush=True)
      continue
    best, tuned = tuning.winner(trials), tuned + 1
    print(f"{best.op} {best.key}: {best.blocks} takes "
          f"{1e6 * (best.seconds or 0):.1f} us, {first.blocks} of the "
          f"heuristic {1e6 * first.seconds:.1f}; {len(trials)} tried, "
          f"{sum(t.seconds is None for t in trials)} of them in vain",
          flush=True)
    tuning.enter(table, target, trials)
    blocks.save(file, table)             # what is done is not lost
  print(f"{tuned} entries for {target.kind!r} in {file}")
  return 0


def floors(settings: Any) -> int:
  """The least time of every case on every chip, and what the kernels move."""
  from pallas_kernels import case
  from pallas_kernels import floors as lib
  from pallas_kernels.matmul.cases import exits
  cases = case.collect(settings.op)
  print(lib.table(cases))
  rows = lib.records(cases)
  if any(one.op == "fused_mlp" for one in cases):
    left = list(exits())
    print("\n" + lib.exit_table(left))
    rows += lib.exit_records(left)
    if settings.readme:
      _renew(settings.readme, lib.exit_table(left), "exits")
  _write(settings.json, rows)
  return 0


def support(settings: Any) -> int:
  """Which implementation takes what, as the dispatcher says."""
  from pallas_kernels import case
  from pallas_kernels import support as lib
  answers = lib.ask_all(case.collect(settings.op))
  print(lib.table(answers))
  _write(settings.json, lib.records(answers))
  if settings.readme:
    _renew(settings.readme, lib.table(answers), "support")
  return 0


_COMMANDS: dict[str, Callable[[Any], int]] = {
    "compile": compile_, "tune": tune, "floors": floors, "support": support}


def define_flags(command: str, values: flags.FlagValues) -> None:
  """Defines the flags of one command."""
  flags.DEFINE_list("op", [], "ops, by the public function's name; all, if "
                    "none is named", flag_values=values)
  if command == "tune":
    flags.DEFINE_string("output", None, "the table that is made or added to",
                        flag_values=values)
    flags.DEFINE_boolean(
        "interpret", False, "try the command without a device: kernels are "
        "interpreted, and times mean nothing", flag_values=values)
    return
  flags.DEFINE_string("json", None, "a file for all that is found",
                      flag_values=values)
  if command in ("support", "compile", "floors"):
    flags.DEFINE_string("readme", None, "a file in which the table is renewed, "
                        "between its marks", flag_values=values)
  if command == "compile":
    flags.DEFINE_list("topologies", ["v5e", "v5p", "v6e", "tpu7x"],
                      "generations of TPUs", flag_values=values)
    flags.DEFINE_boolean("gpu", True, "lower for an H100 too",
                         flag_values=values)
    flags.DEFINE_boolean("schedule", True, "read what the compiler dumps of "
                         "bundles and spills", flag_values=values)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit status."""
  name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
  try:
    if name in ("-h", "--help", "--helpfull", "help"):
      print(_usage())
      return 0
    if name not in _COMMANDS:
      raise InputError(f"the first argument must be one of "
                       f"{', '.join(_COMMANDS)}, got {name!r}")
    settings = _parse(name, rest)
    return 0 if settings is None else _COMMANDS[name](settings)
  except InputError as e:
    print("pallas_kernels:", " ".join(str(e).split()), file=sys.stderr)
    return _USER_ERROR
  except KeyboardInterrupt:
    print("pallas_kernels: interrupted", file=sys.stderr)
    return _INTERRUPTED


def _parse(name: str, argv: Sequence[str]) -> types.SimpleNamespace | None:
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  define_flags(name, values)
  keys = list(values)
  if {"-h", "--help", "--helpfull"} & set(argv):
    print(f"usage: python -m pallas_kernels {name} --flags\n\n"
          + _summary(name) + "\n\nFlags:")
    for key in keys:
      default = values[key].default_as_str
      print(f"  --{key}\n      {values[key].help}"
            + (f" [{default.strip(chr(39))}]" if default else ""))
    return None
  try:
    _, *rest = values(["pallas_kernels", *argv])
  except flags.Error as e:
    raise InputError(str(e)) from e
  if rest:
    raise InputError(f"expected flags alone, got {rest[0]!r}; write "
                     "--name=value")
  return types.SimpleNamespace(**{key: values[key].value for key in keys})


def _usage() -> str:
  width = max(map(len, _COMMANDS))
  return "\n".join([
      "usage: python -m pallas_kernels COMMAND --flags", "",
      *(f"  {name:{width}}  {_summary(name)}" for name in _COMMANDS), "",
      "python -m pallas_kernels COMMAND --help lists the flags of a command."])


def _summary(name: str) -> str:
  return (_COMMANDS[name].__doc__ or "").partition("\n")[0]


def _write(path: str | None, rows: list[Any]) -> None:
  from pallas_kernels import records
  if path is not None:
    file = records.Records(None, records.command())
    file.rows = rows
    file.write(path)


def _renew(path: str, shown: str, name: str) -> None:
  """Puts a table between the marks of its name in a README."""
  from pallas_kernels import support
  file = pathlib.Path(path)
  try:
    text = file.read_text(encoding="utf-8")
  except OSError as e:
    raise InputError(f"--readme={file} cannot be read ({e.strerror})") from e
  file.write_text(support.insert(text, shown, name), encoding="utf-8")


if __name__ == "__main__":
  sys.exit(main())
