# SPDX-License-Identifier: Apache-2.0
"""Results of many prompts, on disk the moment they are finished.

Prompts finish in any order, and the output has theirs. So finished records are
appended to `FILE.partial`, and when all are there `FILE` is written in order
and put in place whole. A run that dies leaves what it finished in the partial
file, from which `--resume` goes on.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from jaxspec.errors import InputError


class Journal:
  """Records of a run, by the index of their prompt.

  Attributes:
    finished: the records known so far, those of earlier runs included.
  """

  finished: dict[int, dict[str, Any]]

  def __init__(
    self, output: str, *, count: int, identity: Any, resume: bool = False
  ):
    """Opens the partial file.

    Args:
      output: the file to write in the end.
      count: how many prompts there are.
      identity: everything that decides what the records say, as JSON; a
        partial file of anything else is not continued.
      resume: continue a partial file instead of refusing to overwrite it.
    """
    # The target of a link is replaced, not the link.
    self.output = os.path.realpath(os.path.expanduser(output))
    self.partial = self.output + ".partial"
    self.finished = {}
    self._count = count
    _check_place(self.output)
    text = json.dumps(identity, sort_keys=True, default=str)
    header = {
      "jaxspec": "partial results",
      "prompts": count,
      "identity": hashlib.sha256(text.encode()).hexdigest(),
    }
    try:
      if os.path.exists(self.partial):
        if not resume:
          raise InputError(
            f"{self.partial} holds results of a run that did not finish; pass "
            "--resume to go on from them, or remove the file to start over"
          )
        self._read(header)
        self._file = open(self.partial, "a", encoding="utf-8")
      else:
        self._file = open(self.partial, "x", encoding="utf-8")
        self._append(header)
    except OSError as e:
      raise _unwritable(self.partial, e) from e

  def add(self, index: int, record: Mapping[str, Any]) -> None:
    """Keeps one finished record; it is on disk when this returns."""
    self.finished[index] = dict(record)
    try:
      self._append({"index": index, "record": record})
    except OSError as e:
      raise _unwritable(self.partial, e) from e

  def finish(self) -> None:
    """Writes the output, in the order of the prompts."""
    self._file.close()
    new = self.output + ".new"
    try:
      with open(new, "w", encoding="utf-8") as file:
        for index in range(self._count):
          file.write(_dumps(self.finished[index]))
        file.flush()
        os.fsync(file.fileno())
      os.replace(new, self.output)
      os.unlink(self.partial)
    except OSError as e:
      raise _unwritable(self.output, e) from e

  def close(self) -> None:
    """Lets go of the partial file, and removes it where nothing is in it."""
    self._file.close()
    if not self.finished:
      with contextlib.suppress(OSError):
        os.unlink(self.partial)

  def _append(self, line: Mapping[str, Any]) -> None:
    self._file.write(_dumps(line))
    self._file.flush()
    os.fsync(self._file.fileno())

  def _read(self, header: Mapping[str, Any]) -> None:
    """Loads the partial file, whose last line may have been cut short."""
    with open(self.partial, "rb+") as file:
      whole = file.read()
      end = whole.rfind(b"\n") + 1
      file.truncate(end)
    try:
      first, *lines = [json.loads(line) for line in whole[:end].splitlines()]
      records = {line["index"]: line["record"] for line in lines}
    except (ValueError, KeyError, TypeError) as e:
      raise InputError(
        f"{self.partial} cannot be read as partial results; remove it to start "
        "over"
      ) from e
    if first != header:
      raise InputError(
        f"{self.partial} was made from other prompts or settings; give the "
        "same ones to resume it, or remove the file to start over"
      )
    self.finished = records


def complete(output: str, count: int) -> Sequence[Mapping[str, Any]] | None:
  """Returns the records of a finished output, or None where it is not one."""
  try:
    with open(os.path.expanduser(output), encoding="utf-8") as file:
      records = [json.loads(line) for line in file]
  except (OSError, ValueError):
    return None
  return records if len(records) == count else None


def _check_place(output: str) -> None:
  folder = os.path.dirname(output)
  if not os.path.isdir(folder):
    raise InputError(
      f"--output={output}: there is no folder {folder}; make it first"
    )
  # Putting a file in place of a device would break the device.
  if os.path.exists(output) and not stat.S_ISREG(os.stat(output).st_mode):
    raise InputError(f"--output={output} is not a regular file; name a file")


def _unwritable(file: str, error: OSError) -> InputError:
  return InputError(
    f"cannot write {file}: {error.strerror}; what was finished before is kept"
  )


def _dumps(record: Mapping[str, Any]) -> str:
  return json.dumps(record, ensure_ascii=False) + "\n"
