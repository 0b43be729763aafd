# SPDX-License-Identifier: Apache-2.0
"""A small op with everything an op has, for tests of what all ops share.

`bump(x, w, state)` gives `x @ w` and `state + 1`, which takes over the memory
of `state`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks
from pallas_kernels.case import Case
from pallas_kernels.dispatch import dispatch


def _xla(x, w, state):
  y = jnp.dot(x, w, preferred_element_type=jnp.float32)
  return y.astype(x.dtype), state + 1


def _tpu(x, w, state, *, target):
  if x.dtype == jnp.float16:
    raise NotImplementedError("no TPU has float16; use bfloat16, or xla")
  rows, columns = x.shape[0], w.shape[1]
  block = blocks.choose("bump", target, (rows, columns), lambda: 128)
  if columns % block:
    raise ValueError(f"{columns} columns are no multiple of {block}")
  return pl.pallas_call(
      _kernel, grid=(columns // block,),
      in_specs=[pl.BlockSpec(x.shape, lambda i: (0, 0)),
                pl.BlockSpec((w.shape[0], block), lambda i: (0, i)),
                pl.BlockSpec((rows, block), lambda i: (0, i))],
      out_specs=[pl.BlockSpec((rows, block), lambda i: (0, i))] * 2,
      out_shape=[jax.ShapeDtypeStruct((rows, columns), x.dtype),
                 jax.ShapeDtypeStruct(state.shape, state.dtype)],
      input_output_aliases={2: 1}, interpret=target.interpret,
      compiler_params=None if target.interpret else pltpu.CompilerParams(),
      name="bump")(x, w, state)


def _kernel(x, w, state, y, out):
  y[...] = jnp.dot(x[...], w[...],
                   preferred_element_type=jnp.float32).astype(y.dtype)
  out[...] = state[...] + 1


def _gpu(x, w, state, *, target):
  raise NotImplementedError("rows below 64; use xla")


def bump(x, w, state, *, implementation=None, **changes):
  implementations = {"tpu": _tpu, "gpu": _gpu, "xla": _xla} | changes
  return dispatch("bump", implementations, implementation, x, w, state)


def case(name="small, bump 8", rows=8, columns=512, donated=(2,), dtype=None,
         **changes) -> Case:
  dtype = dtype or jnp.bfloat16
  shapes = (rows, 256), (256, columns), (rows, columns)
  arguments = tuple(jax.ShapeDtypeStruct(s, d)
                    for s, d in zip(shapes, (dtype, dtype, jnp.float32)))
  least = 2 * (rows * 256 + 256 * columns + rows * columns) + (
      8 * rows * columns)

  def sample(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(k, x.shape).astype(x.dtype)
                 for k, x in zip(keys, arguments))

  return Case(op="bump", name=name, call=functools.partial(bump, **changes),
              arguments=arguments, least_bytes=least,
              operations=2 * rows * 256 * columns, moved_bytes=least,
              sample=sample, donated=donated)
