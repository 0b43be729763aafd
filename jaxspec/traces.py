# SPDX-License-Identifier: Apache-2.0
"""Where the time of a profiled run went, by named scope.

A trace holds when each operation ran, and the compiled programs themselves,
in which each operation says what it was made from:
`jit(decode)/while/body/score/dot_general`. Here the two are joined. The files
are protocol buffers (tsl's `XSpace`, xla's `HloProto`), of which the few fields
that matter are read, so that nothing need be installed.

Times are an operation's own: what runs inside of it, as the body in a loop, is
taken off.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from jaxspec.errors import InputError

Data = bytes | memoryview


@dataclasses.dataclass
class Taken:
  """One operation of one program, all devices together.

  Attributes:
    program: e.g. "jit_decode".
    operation: as the compiled program names it.
    scope: the named scope it is in, "" for none.
    name: what it was made from, as jax names it; "" where that is unknown.
    seconds: in all.
    times: how often it ran.
  """

  program: str
  operation: str
  scope: str
  name: str
  seconds: float = 0.0
  times: int = 0


def files(folder: str | pathlib.Path) -> list[pathlib.Path]:
  """The files of the newest trace in a folder, one for each host.

  Raises:
    InputError: there is none.
  """
  folder = pathlib.Path(folder).expanduser()
  found: dict[pathlib.Path, list[pathlib.Path]] = {}
  for file in folder.rglob("*.xplane.pb"):
    found.setdefault(file.parent, []).append(file)
  if not found:
    raise InputError(f"{folder} holds no trace (*.xplane.pb); make one with "
                     "decode --profile_dir=FOLDER")
  newest = max(found, key=lambda run: max(
      file.stat().st_mtime for file in found[run]))
  return sorted(found[newest])


def read(paths: Iterable[pathlib.Path], scopes: Collection[str]
         ) -> list[Taken]:
  """What operations took, in traces of one run on some hosts.

  Raises:
    InputError: a file is no trace.
  """
  found: dict[tuple[str, str], Taken] = {}
  for path in paths:
    try:
      _add(path.read_bytes(), tuple(scopes), found)
    except (ValueError, IndexError, KeyError) as e:
      raise InputError(f"{path} is no trace, or was cut off") from e
  return sorted(found.values(), key=lambda taken: -taken.seconds)


def by_scope(taken: Iterable[Taken]) -> dict[str, float]:
  """Seconds of each scope, the longest first."""
  seconds: dict[str, float] = {}
  for one in taken:
    seconds[one.scope] = seconds.get(one.scope, 0.0) + one.seconds
  return dict(sorted(seconds.items(), key=lambda item: -item[1]))


# Planes of a trace, their lines, and the events on them.


@dataclasses.dataclass
class _Kind:
  """What all events of a kind have in common."""

  name: str = ""
  shown: str = ""
  stats: dict[str, Any] = dataclasses.field(default_factory=dict)


def _add(data: Data, scopes: tuple[str, ...],
         found: dict[tuple[str, str], Taken]) -> None:
  planes = [_group(plane) for number, plane in _fields(data) if number == 1]
  programs: dict[int, tuple[str, dict[str, tuple[str, str]]]] = {}
  kinds = [_kinds(plane) for plane in planes]
  for of_plane in kinds:
    for number, kind in of_plane.items():
      proto = kind.stats.get("Hlo Proto") or kind.stats.get("hlo_proto")
      if proto is not None:
        programs[kind.stats.get("program_id", number)] = (
            kind.name.partition("(")[0], _origins(proto, scopes))
  named = {name: number for number, (name, _) in programs.items()}
  for plane, of_plane in zip(planes, kinds):
    title = _text(plane.get(2, [b""])[0])
    stats = _stat_names(plane)
    for line in plane.get(3, ()):
      _add_line(line, title, of_plane, stats, programs, named, scopes, found)


def _add_line(line: Data, plane: str, kinds: dict[int, _Kind],
              names: dict[int, str], programs: Any, named: dict[str, int],
              scopes: tuple[str, ...], found: dict[tuple[str, str], Taken]
              ) -> None:
  parts = _group(line)
  # A TPU says on lines of their own when steps and programs ran.
  operations = _text(parts.get(2, [b""])[0]) == "XLA Ops"
  everything = plane.startswith("/device:") and operations
  events = []
  for event in parts.get(4, ()):
    fields = _group(event)
    kind = kinds.get(_first(fields, 1), _Kind())
    stats = kind.stats | _stats(fields.get(4, ()), names)
    if not everything and "hlo_op" not in stats:
      continue
    events.append((_first(fields, 2), _first(fields, 3), kind, stats))
  for start, duration, kind, stats, own in _alone(events):
    del start, duration
    operation = str(stats.get("hlo_op") or kind.shown or kind.name)
    module = str(stats.get("hlo_module", "")).partition("(")[0]
    number = stats.get("program_id")
    if number not in programs or module not in ("", programs[number][0]):
      number = named.get(module)
    program, origins = programs.get(number, (module or "unknown", {}))
    scope, name = origins.get(operation, ("", ""))
    path = str(stats.get("tf_op", "")).partition(":")[0] or name
    scope = _scope(path, scopes) or scope
    one = found.setdefault((program, operation), Taken(
        program, operation, scope, path))
    one.seconds += own * 1e-12
    one.times += 1


def _alone(events: list[tuple[int, int, _Kind, dict[str, Any]]]
           ) -> Iterator[tuple[int, int, _Kind, dict[str, Any], int]]:
  """Each event of a line with the picoseconds that no other is within it."""
  own = [event[1] for event in events]
  order = sorted(range(len(events)),
                 key=lambda i: (events[i][0], -events[i][1]))
  above: list[int] = []
  for i in order:
    start, duration = events[i][:2]
    while above and start >= events[above[-1]][0] + events[above[-1]][1]:
      above.pop()
    if above:
      own[above[-1]] -= duration
    above.append(i)
  for event, left in zip(events, own):
    yield (*event, max(left, 0))


def _kinds(plane: dict[int, list[Any]]) -> dict[int, _Kind]:
  names = _stat_names(plane)
  found = {}
  for entry in plane.get(4, ()):
    fields = _group(entry)
    kind = _group(fields.get(2, [b""])[0])
    found[_first(fields, 1)] = _Kind(
        _text(kind.get(2, [b""])[0]), _text(kind.get(4, [b""])[0]),
        _stats(kind.get(5, ()), names))
  return found


def _stat_names(plane: dict[int, list[Any]]) -> dict[int, str]:
  found = {}
  for entry in plane.get(5, ()):
    fields = _group(entry)
    found[_first(fields, 1)] = _text(
        _group(fields.get(2, [b""])[0]).get(2, [b""])[0])
  return found


_WANTED = ("hlo_op", "hlo_module", "program_id", "tf_op", "hlo_proto",
           "Hlo Proto")


def _stats(stats: Iterable[Data], names: dict[int, str]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for stat in stats:
    fields = _group(stat)
    name = names.get(_first(fields, 1), "")
    if name not in _WANTED:
      continue
    for number, (value, *_) in fields.items():
      if number in (3, 4):                # a number
        found[name] = value
      elif number == 5:
        found[name] = _text(value)
      elif number == 6:
        found[name] = value
      elif number == 7:                   # a text that is kept once
        found[name] = names.get(value, "")
  return found


# Programs.


def _origins(proto: Data, scopes: tuple[str, ...]
             ) -> dict[str, tuple[str, str]]:
  """The scope of each operation, and what it was made from."""
  module = _group(_group(proto).get(1, [b""])[0])
  bodies: dict[int, list[dict[int, list[Any]]]] = {}
  for computation in module.get(3, ()):
    fields = _group(computation)
    bodies[_first(fields, 5)] = [_group(op) for op in fields.get(2, ())]

  def path(op: dict[int, list[Any]]) -> str:
    return _text(_group(op.get(7, [b""])[0]).get(2, [b""])[0])

  found: dict[str, tuple[str, str]] = {}
  for body in bodies.values():
    users: dict[int, str] = {}
    for op in reversed(body):
      name = path(op)
      scope = _scope(name, scopes)
      if not scope and _text(op.get(2, [b""])[0]) == "fusion":
        inside = (_scope(path(inner), scopes) for number in _numbers(op, 38)
                  for inner in bodies.get(number, ()))
        scope = next(filter(None, inside), "")
      # One without, such as a copy, is of who uses it first.
      scope = scope or users.get(_first(op, 35), "")
      if scope:
        users.update((operand, scope) for operand in _numbers(op, 36))
      found[_text(op.get(1, [b""])[0])] = scope, name
  return found


def _scope(path: str, scopes: Collection[str]) -> str:
  return next((part for part in path.split("/") if part in scopes), "")


# The encoding.


def _group(data: Data) -> dict[int, list[Any]]:
  found: dict[int, list[Any]] = {}
  for number, value in _fields(data):
    found.setdefault(number, []).append(value)
  return found


def _fields(data: Data) -> Iterator[tuple[int, Any]]:
  """Numbers and values of a message: integers, or bytes."""
  view, at = memoryview(data), 0
  while at < len(view):
    key, at = _integer(view, at)
    kind = key & 7
    if kind == 0:
      value, at = _integer(view, at)
    else:
      if kind == 2:
        size, at = _integer(view, at)
      elif kind in (1, 5):
        size = 8 if kind == 1 else 4
      else:
        raise ValueError(f"no field is of kind {kind}")
      value, at = view[at:at + size], at + size
      if at > len(view):
        raise ValueError("it ends within a field")
    yield key >> 3, value


def _integer(data: memoryview, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at


def _numbers(fields: dict[int, list[Any]], number: int) -> list[int]:
  """Integers, packed or not."""
  found: list[int] = []
  for value in fields.get(number, ()):
    if isinstance(value, int):
      found.append(value)
      continue
    at = 0
    while at < len(value):
      one, at = _integer(value, at)
      found.append(one)
  return found


def _first(fields: dict[int, list[Any]], number: int) -> int:
  return fields.get(number, [0])[0]


def _text(data: Any) -> str:
  return bytes(data).decode("utf-8", "replace")


__all__ = ["Taken", "by_scope", "files", "read"]
