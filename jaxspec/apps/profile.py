# SPDX-License-Identifier: Apache-2.0
"""Says where the time of a profiled run went, by stage of a step.

  python -m jaxspec decode --prompt='Count to ten.' --profile_dir=/tmp/trace
  python -m jaxspec profile --profile_dir=/tmp/trace

For each program: the share of its time that proposing, scoring, verifying,
committing and observing took, and the operations that took most. Without a
device, `plan --profile` counts the same in the compiled program.
"""

import json
import types
from typing import TYPE_CHECKING

from absl import flags

from jaxspec.apps import launch
from jaxspec.errors import InputError

if TYPE_CHECKING:
  from jaxspec.traces import Taken
else:  # Imported when needed, as in all commands.
  Taken = object


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string(
    "profile_dir", None, "a folder that decode --profile_dir wrote to; the "
    "newest trace in it is read", flag_values=values,
  )
  flags.DEFINE_integer(
    "top", 10, "operations listed of each program", flag_values=values
  )
  flags.DEFINE_float(
    "least", 0.02, "programs that took a smaller share of the time are left "
    "out", flag_values=values,
  )
  flags.DEFINE_string("json", None, "a file for all figures",
                      flag_values=values)


def main(settings: types.SimpleNamespace) -> None:
  """Prints the shares of the trace that the settings name."""
  from jaxspec import profiling, traces

  if not settings.profile_dir:
    raise InputError("--profile_dir is missing; name a folder that decode "
                     "--profile_dir wrote to")
  if settings.top < 0:
    raise InputError(f"--top must be at least 0, got {settings.top}")
  taken = traces.read(traces.files(settings.profile_dir),
                      profiling.SCOPES)
  if not taken:
    raise InputError(f"the trace in {settings.profile_dir} holds no operation "
                     "of a compiled program; trace a run that decodes")
  programs: dict[str, list[Taken]] = {}
  for one in taken:
    programs.setdefault(one.program, []).append(one)
  whole = sum(one.seconds for one in taken)
  for name, ops in sorted(programs.items(), key=lambda item: -sum(
      one.seconds for one in item[1])):
    took = sum(one.seconds for one in ops)
    if took >= settings.least * whole:
      print("\n".join(lines(name, ops, took / whole if whole else 0.0,
                            settings.top)))
  if settings.json:
    launch.write(settings.json, json.dumps({
      name: dict(
        seconds=sum(one.seconds for one in ops),
        scopes={scope or "other": seconds
                for scope, seconds in traces.by_scope(ops).items()},
        operations=[dict(operation=one.operation, scope=one.scope,
                         name=one.name, seconds=one.seconds, times=one.times)
                    for one in ops[:settings.top]])
      for name, ops in programs.items()}, indent=2) + "\n")


def lines(name: str, ops: list[Taken], share: float, top: int) -> list[str]:
  """What a person reads of one program."""
  from jaxspec import traces

  took = sum(one.seconds for one in ops)
  found = [f"{name}: {1e3 * took:.1f} ms, {share:.1%} of all"]
  for scope, seconds in traces.by_scope(ops).items():
    found.append(f"  {scope or 'no scope':<10}{1e3 * seconds:>10.1f} ms"
                 f"{seconds / took if took else 0:>8.1%}")
  if top:
    found += ["", f"  {'ms':>10}{'share':>8}{'times':>8}  operation"]
  for one in ops[:top]:
    found.append(
      f"  {1e3 * one.seconds:>10.1f}{one.seconds / took if took else 0:>8.1%}"
      f"{one.times:>8}  {one.scope or 'no scope'}: {one.operation}"
      + (f", {one.name.rpartition('/')[2]}" if one.name else ""))
  return [*found, ""]
