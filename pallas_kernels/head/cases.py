# SPDX-License-Identifier: Apache-2.0
"""Shapes at which `proposal_head` is judged."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.head import tpu
from pallas_kernels.head.op import proposal_head
from pallas_kernels.target import Target

# The model and what is trimmed of it: width and rows of the unembedding.
_MODELS = {
    "smollm2-135m": (576, 49152),
    "smollm2-135m, trimmed to 8192": (576, 8192),
    "llama3-8b": (4096, 128256),
    "llama3-70b, one of 8": (8192, 16032),
}
# Of which the bytes of blocks are told; others differ in results alone.
_TARGET = Target("tpu", "TPU v5 lite")


def cases() -> Iterator[Case]:
  """Of an exit, of four heads on eight rows, and all that can be asked."""
  for name, (width, vocab) in _MODELS.items():
    trimmed = "trimmed" in name
    for rows, count, drawn, masked in ((1, 1, False, False),
                                       (8, 4, True, False),
                                       (32, 10, False, False),
                                       (64, 8, True, True)):
      yield _case(name, rows, width, vocab, count, trimmed, drawn, masked)


def _case(name, rows, width, vocab, count, trimmed, drawn, masked) -> Case:
  said = f"{name}, {'draw' if drawn else 'say'} {count} for {rows}"
  spec = jax.ShapeDtypeStruct
  arguments = {
      "x": spec((rows, width), jnp.bfloat16),
      "norm": spec((width,), jnp.float32),
      "unembedding": spec((vocab, width), jnp.bfloat16)}
  if trimmed:
    arguments["tokens"] = spec((vocab,), jnp.int32)
  if masked:
    arguments["allowed"] = spec((rows, -(-vocab // 32)), jnp.uint32)
    said += ", constrained"
  if drawn:
    arguments["noise"] = spec((rows, 2), jnp.uint32)
    arguments["temperature"] = spec((rows,), jnp.float32)
  least = sum(s.size * s.dtype.itemsize for s in arguments.values())
  if trimmed and not drawn:
    least -= vocab * 4           # a few of the names are read
  least += rows * (2 * count + 4) * 4

  def sample(seed):
    draw = np.random.default_rng(seed)
    made = {
        "x": draw.standard_normal((rows, width)),
        "norm": np.ones(width),
        "unembedding": draw.standard_normal((vocab, width)) / width ** 0.5,
        "tokens": np.arange(vocab) * 4,
        "allowed": draw.integers(0, 2**32, (rows, -(-vocab // 32)), np.uint32),
        "noise": draw.integers(0, 2**32, (rows, 2), np.uint32),
        "temperature": draw.choice([0.0, 0.7, 1.0], rows)}
    return tuple(jnp.asarray(made[key], s.dtype)
                 for key, s in arguments.items())

  return Case(
      op="proposal_head", name=said,
      call=functools.partial(_call, tuple(arguments), count),
      arguments=tuple(arguments.values()), least_bytes=least,
      operations=2 * rows * vocab * width,
      moved_bytes=tpu.moved_bytes(
          rows, width, vocab, 2, count, target=_TARGET, masked=masked,
          drawn=drawn, named=drawn and trimmed), sample=sample)


def _call(names, count, *arguments, implementation=None):
  return proposal_head(**dict(zip(names, arguments)), eps=1e-5, count=count,
                       implementation=implementation)
