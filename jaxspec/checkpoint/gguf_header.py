# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file, parsed within bounds.

Every length is compared with the bytes that are left before anything is
allocated, in Python's unbounded integers, so that no header can ask for more
than its file holds. Token lists are read in one plain loop: 100,000 strings in
some hundredths of a second.
"""

import dataclasses
import math
import mmap
import pathlib
import struct
from typing import Any

import numpy as np

from jaxspec.errors import InputError

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MOST_KEYS = 65_536
_MOST_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where one tensor lies.

  Attributes:
    shape: outermost dimension first, as NumPy has it.
    kind: its number in ggml's list of types.
    start: its first byte in the file.
    size: its bytes.
  """

  name: str
  shape: tuple[int, ...]
  kind: int
  start: int
  size: int


@dataclasses.dataclass(frozen=True)
class Header:
  """All that a GGUF file says about its tensors.

  Attributes:
    values: metadata by key; arrays are NumPy arrays, or lists of strings.
    tensors: by name.
    data: the whole file, mapped.
  """

  values: dict[str, Any]
  tensors: dict[str, Tensor]
  data: np.ndarray


class _Reader:
  """A position in a file's bytes that cannot leave them."""

  def __init__(self, path: pathlib.Path, buffer: Any):
    self.path, self.buffer = path, buffer
    self.at, self.size = 0, len(buffer)

  def fail(self, what: str) -> InputError:
    return InputError(
        f"{self.path} is not a whole GGUF file: {what} at byte {self.at};"
        " fetch it again."
    )

  def take(self, count: int) -> bytes:
    if count > self.size - self.at:
      raise self.fail(
          f"{count} bytes are announced and {self.size - self.at} are left"
      )
    found = self.buffer[self.at : self.at + count]
    self.at += count
    return found

  def unpack(self, form: str) -> int:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def string(self) -> str:
    length = self.unpack("<Q")
    try:
      return self.take(length).decode()
    except UnicodeDecodeError as error:
      raise self.fail("text that is not UTF-8 ends") from error

  def strings(self, count: int) -> list[str]:
    """Reads many strings: `string`, without a call for each."""
    if count * 8 > self.size - self.at:
      raise self.fail(f"{count} strings are announced, too many")
    buffer, at, size = self.buffer, self.at, self.size
    unpack = struct.Struct("<Q").unpack_from
    found = []
    try:
      for _ in range(count):
        end = at + 8 + unpack(buffer, at)[0]
        if end > size:
          self.at = at
          raise self.fail(f"a string ends at byte {end} of {size}")
        found.append(buffer[at + 8 : end].decode())
        at = end
    except (UnicodeDecodeError, struct.error) as error:
      self.at = at
      raise self.fail("a string is cut short or not UTF-8") from error
    self.at = at
    return found

  def value(self) -> Any:
    kind = self.unpack("<I")
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      item, count = self.unpack("<I"), self.unpack("<Q")
      if item == _STRING:
        return self.strings(count)
      if item not in _SCALARS:
        raise self.fail(f"an array of unknown type {item} begins")
      dtype = np.dtype(_SCALARS[item])
      return np.frombuffer(self.take(count * dtype.itemsize), dtype)
    if kind not in _SCALARS:
      raise self.fail(f"a value of unknown type {kind} begins")
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()


def read(path: pathlib.Path) -> Header:
  """Parses a header and maps the file.

  Raises:
    InputError: the file is no GGUF, is cut short, or contradicts itself.
  """
  try:
    with path.open("rb") as file:
      buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError) as error:
    raise InputError(f"{path} cannot be read ({error}).") from error
  reader = _Reader(path, buffer)
  if reader.take(4) != b"GGUF":
    raise InputError(f"{path} is not a GGUF file; check what was fetched.")
  version = reader.unpack("<I")
  if version not in (2, 3):
    raise InputError(
        f"{path} is GGUF version {version}; convert it to version 3, little"
        " endian."
    )
  tensor_count, key_count = reader.unpack("<Q"), reader.unpack("<Q")
  if key_count > _MOST_KEYS:
    raise reader.fail(f"{key_count} metadata keys are announced, too many")
  # A tensor's entry takes 32 bytes at least.
  if tensor_count * 32 > reader.size:
    raise reader.fail(f"{tensor_count} tensors are announced, too many")
  values: dict[str, Any] = {}
  for _ in range(key_count):
    key = reader.string()
    if key in values:
      raise reader.fail(f"key {key!r} comes a second time")
    values[key] = reader.value()
  entries = [_entry(reader) for _ in range(tensor_count)]
  alignment = values.get("general.alignment", 32)
  if (
      not isinstance(alignment, int)
      or not 0 < alignment <= 1 << 20
      or alignment & (alignment - 1)
  ):
    raise reader.fail(f"general.alignment is {alignment!r}, no power of two,")
  start = -(-reader.at // alignment) * alignment
  tensors = _place(reader, entries, start, alignment)
  return Header(values, tensors, np.frombuffer(buffer, np.uint8))


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
  name = reader.string()
  count = reader.unpack("<I")
  if not 1 <= count <= _MOST_DIMENSIONS:
    raise reader.fail(f"tensor {name!r} has {count} dimensions")
  shape = struct.unpack(f"<{count}Q", reader.take(8 * count))
  if not all(shape):
    raise reader.fail(f"tensor {name!r} is empty")
  return name, tuple(reversed(shape)), reader.unpack("<I"), reader.unpack("<Q")


def _place(
    reader: _Reader, entries: list, start: int, alignment: int
) -> dict[str, Tensor]:
  """Checks that tensors lie in the file, aligned and apart."""
  from gguf.constants import GGML_QUANT_SIZES

  sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
  tensors: dict[str, Tensor] = {}
  for name, shape, kind, offset in entries:
    if name in tensors:
      raise reader.fail(f"tensor {name!r} comes a second time")
    if kind not in sizes:
      raise InputError(
          f"{reader.path}: tensor {name!r} has unknown type {kind}; quantize"
          " the model to a type this gguf package knows, or update gguf."
      )
    block, size = sizes[kind]
    if shape[-1] % block:
      raise reader.fail(
          f"tensor {name!r} has rows of {shape[-1]}, no multiple of {block},"
      )
    total = math.prod(shape) // block * size
    if offset % alignment or start + offset + total > reader.size:
      raise reader.fail(
          f"tensor {name!r} needs {total} bytes from byte {start + offset} of"
          f" {reader.size}, the header ending"
      )
    tensors[name] = Tensor(name, shape, kind, start + offset, total)
  end = start
  for tensor in sorted(tensors.values(), key=lambda t: t.start):
    if tensor.start < end:
      raise reader.fail(f"tensor {tensor.name!r} overlaps another, listed")
    end = tensor.start + tensor.size
  return tensors
