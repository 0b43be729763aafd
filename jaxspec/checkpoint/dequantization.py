# SPDX-License-Identifier: Apache-2.0
"""ggml's quantized blocks to float32.

The gguf package knows every type; the common ones of 32 weights a block have a
shorter way here, with results equal to the bit, that works in pieces which
stay in a core's cache and on all cores.
"""

import concurrent.futures
import os
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxspec.errors import InputError

_BLOCK = 32
_PIECE = 4096  # Blocks at a time: half a megabyte of float32.

# What follows is ggml's list of types.
_F32, _F16, _F64, _BF16 = 0, 1, 28, 30
_PLAIN = {
    _F32: np.dtype("<f4"),
    _F16: np.dtype("<f2"),
    _F64: np.dtype("<f8"),
    _BF16: np.dtype(ml_dtypes.bfloat16),
}


def dequantize(
    raw: np.ndarray, kind: int, shape: tuple[int, ...], name: str
) -> np.ndarray:
  """Returns the weights in `raw` bytes; float16 and bfloat16 stay as they are.

  Args:
    raw: uint8, as long as the type and the shape ask for.
    kind: number in ggml's list of types.
    shape: of the result.
    name: of the tensor, for messages.
  """
  if kind in _PLAIN:
    return raw.view(_PLAIN[kind]).reshape(shape)
  if kind in _FAST:
    return _in_pieces(raw, *_FAST[kind]).reshape(shape)
  from gguf import constants, quants  # Loaded when such a type is met.

  known = constants.GGMLQuantizationType(kind)
  _, size = constants.GGML_QUANT_SIZES[known]
  # Longer rows than the tensor's own cost the package fewer calls.
  blocks = len(raw) // size
  together = next(n for n in (64, 32, 16, 8, 4, 2, 1) if blocks % n == 0)
  try:
    with np.errstate(all="ignore"):
      found = quants.dequantize(raw.reshape(-1, together * size), known)
  except NotImplementedError as error:
    raise InputError(
        f"tensor {name!r} has type {known.name}, which cannot be"
        " dequantized; quantize the model to another type, such as Q8_0."
    ) from error
  return found.reshape(shape)


def _in_pieces(
    raw: np.ndarray, size: int, unpack: Callable[[np.ndarray, np.ndarray], None]
) -> np.ndarray:
  blocks = raw.reshape(-1, size)
  out = np.empty((len(blocks), _BLOCK), np.float32)

  def one(start: int) -> None:
    with np.errstate(all="ignore"):  # Scales of a damaged file may overflow.
      unpack(blocks[start : start + _PIECE], out[start : start + _PIECE])

  starts = range(0, len(blocks), _PIECE)
  threads = min(len(starts), os.cpu_count() or 1, 8)
  if threads < 2:
    for start in starts:
      one(start)
  else:
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      list(pool.map(one, starts))
  return out


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
  """Returns the float16 at byte `at` of each block, as a float32 column."""
  bits = np.ascontiguousarray(blocks[:, at : at + 2])
  return bits.view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray, out: np.ndarray) -> None:
  out[:, :16] = packed & 15
  out[:, 16:] = packed >> 4


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
  bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
  return bits << 4


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
  _nibbles(blocks[:, 2:], out)
  out -= 8
  out *= _half(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
  _nibbles(blocks[:, 4:], out)
  out *= _half(blocks, 0)
  out += _half(blocks, 2)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
  _nibbles(blocks[:, 6:], out)
  out += _fifth_bits(blocks, 2)
  out -= 16
  out *= _half(blocks, 0)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
  _nibbles(blocks[:, 8:], out)
  out += _fifth_bits(blocks, 4)
  out *= _half(blocks, 0)
  out += _half(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
  out[:] = blocks[:, 2:].view(np.int8)
  out *= _half(blocks, 0)


# By number: bytes a block, and how to unpack it.
_FAST = {
    2: (18, _q4_0),
    3: (20, _q4_1),
    6: (22, _q5_0),
    7: (24, _q5_1),
    8: (34, _q8_0),
}
