# SPDX-License-Identifier: Apache-2.0
"""Products of decode and verification steps of models people run."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.matmul import tpu
from pallas_kernels.matmul.op import (
  fused_mlp,
  quantized_matmul,
  streamed_matmul,
)
from pallas_kernels.quantized import GroupedQArray, QArray

# Width and MLP of a device.
MODELS = {
    "smollm2-135m": (576, 1536),
    "llama3-8b": (4096, 14336),
    "llama3-70b of tp 8": (8192, 3584),
}
# Layers of a stack: enough that one is a place in it.
DEPTH = 4
# Layers of each model, of which rows that leave early need the first third.
DEPTHS = {"smollm2-135m": 30, "llama3-8b": 32, "llama3-70b of tp 8": 80}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def cases() -> Iterator[Case]:
  """Every op at every model, in the kinds of weights it takes."""
  for model, (width, mlp) in MODELS.items():
    for part, rows, kind, outputs, inputs in (
        ("gate", 8, "bf16", mlp, width),
        ("down", 1, "int4 of 128", width, mlp)):
      stack = _weight(kind, DEPTH, outputs, inputs)
      yield _case(
          "streamed_matmul", f"{model} {part}, {rows} rows, {kind}",
          streamed_matmul,
          (_shape(rows, inputs), stack, _shape(dtype=jnp.int32),
           _shape(rows, dtype=jnp.bool_)), [stack], outputs)
    for part, rows, kind, outputs, inputs in (
        ("gate", 8, "int8", mlp, width),
        ("down", 1, "int4 of 64", width, mlp),
        ("down", 64, "int4 of 32 with zeros", width, mlp)):
      weight = _weight(kind, outputs, inputs)
      yield _case(
          "quantized_matmul", f"{model} {part}, {rows} rows, {kind}",
          quantized_matmul, (_shape(rows, inputs), weight), [_stacked(weight)],
          outputs)
    for rows, kind in ((1, "bf16"), (64, "bf16"), (8, "int8")):
      up, down = (_weight(kind, DEPTH, *shape)
                  for shape in ((mlp, width), (width, mlp)))
      norm = _shape(DEPTH, width, dtype=jnp.float32)
      yield _case(
          "fused_mlp", f"{model}, {rows} rows, {kind}",
          functools.partial(fused_mlp, eps=1e-5, activation="silu"),
          (_shape(rows, width), norm, up, up, down, _shape(dtype=jnp.int32),
           _shape(rows, dtype=jnp.bool_)), [up, up, down], width)


@dataclasses.dataclass(frozen=True)
class Exit:
  """A step's MLP blocks (`early_exit_stream`), of whose rows some leave early.

  Attributes:
    lower: of `depth` layers, those that all rows need.
    share: of the rows, those that leave behind them.
    moved_bytes: what the TPU kernel moves in all layers, by its own count, if
      just that share leaves; None where that is no number of rows.
    mean_bytes: the same on average, if each row leaves with that chance.
  """

  model: str
  rows: int
  lower: int
  depth: int
  share: float
  moved_bytes: int | None
  mean_bytes: float


def exits() -> Iterator[Exit]:
  """What leaving early saves where 8 rows are decoded, and where one is."""
  for model, (width, mlp) in MODELS.items():
    depth, norm = DEPTHS[model], _shape(1, width, dtype=jnp.float32)
    lower = depth // 3
    up, down = _shape(1, mlp, width), _shape(1, width, mlp)
    for rows in (8, 1):
      read, left = (tpu.moved_bytes(
          _shape(rows, width), up, up, down, norm=norm, outputs=width,
          live=True, exited=exited) for exited in (False, True))
      for share in SHARES:
        moved = lower * read + (depth - lower) * (left if share == 1 else read)
        mean = lower * read + (depth - lower) * (
            read + share ** rows * (left - read))
        yield Exit(model, rows, lower, depth, share,
                   None if share * rows % 1 else moved, mean)


def _case(op, name, call, arguments, stacks, outputs):
  x = arguments[0]
  norm = arguments[1] if op == "fused_mlp" else None
  live = op != "quantized_matmul"
  rows = x.shape[0]
  least = _bytes(x) + 4 * rows * outputs + sum(
      _bytes(leaf) // leaf.shape[0] for leaf in jax.tree.leaves(stacks))
  operations = 2 * rows * sum(math.prod(s.shape[1:]) for s in stacks)
  if norm is not None:
    least += 4 * norm.shape[-1]
  return Case(
      op=op, name=name, call=call, arguments=arguments, least_bytes=least,
      operations=operations,
      moved_bytes=tpu.moved_bytes(x, *stacks, norm=norm, outputs=outputs,
                                  live=live),
      sample=functools.partial(_sample, arguments))


def _shape(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def _bytes(x):
  return x.size * x.dtype.itemsize


def _weight(kind, *shape):
  if kind == "bf16":
    return _shape(*shape)
  if kind == "int8":
    return QArray(_shape(*shape, dtype=jnp.int8),
                  _shape(*shape[:-1], dtype=jnp.float32))
  *outer, outputs, inputs = shape
  groups = (*outer, inputs // int(kind.split()[2]), outputs)
  return GroupedQArray(
      _shape(*outer, outputs // 2, inputs, dtype=jnp.int8),
      _shape(*groups, dtype=jnp.float32),
      _shape(*groups, dtype=jnp.int8) if kind.endswith("zeros") else None)


def _stacked(weight):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), weight)


def _sample(arguments, seed):
  """Arrays of these shapes; every other row has exited."""
  rng = np.random.default_rng(seed)

  def draw(x):
    if x.dtype == jnp.bool_:
      return jnp.arange(x.size) % 2 == 0
    if x.dtype == jnp.int32:
      return jnp.int32(rng.integers(DEPTH))
    if x.dtype == jnp.int8:
      return jnp.asarray(rng.integers(-127, 128, x.shape, np.int8))
    size = math.sqrt(x.shape[-1])
    return jnp.asarray(rng.standard_normal(x.shape, np.float32) / size, x.dtype)

  return jax.tree.map(draw, arguments)
