# SPDX-License-Identifier: Apache-2.0
"""Weights streamed through shared memory to the tensor cores (Hopper).

A block of threads has some outputs, 128 unless a table knows better, and walks
the inputs, several chunks ahead.
The weight is the long side of a product; the short one is 64 rows however many
there are, because both factors must be swizzled alike.
An MLP is two kernels: sums over all hidden values cannot stay in one block, and
what goes between, a few rows, stays in the L2 cache.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import choose
from pallas_kernels.matmul.activations import IN_KERNELS
from pallas_kernels.quantized import GroupedQArray, QArray
from pallas_kernels.target import Target, shared_memory

_TILE, _CHUNK = 128, 64          # outputs, and inputs
_WIDE = 64                       # rows
_BYTES = 160 << 10               # of shared memory, for chunks on their way
_BESIDES = 4 << 10               # of it, for what Pallas needs itself


def streamed_matmul(x, stack, layer, live, *, target: Target):
  """See `pallas_kernels.matmul.op.streamed_matmul`."""
  scale = None
  if isinstance(stack, QArray):
    # The rows of a product are its outputs: scaling them is left to XLA.
    scale = lax.dynamic_slice_in_dim(stack.scale, layer, 1)
    stack = stack.values
  _check(x, stack, dtypes=(jnp.bfloat16, jnp.int8))
  y = _stream("streamed_matmul", lambda y: y, x, [stack], _head(layer, live),
              jnp.float32, target)
  return _of_live(y if scale is None else y * scale, live)


def quantized_matmul(x, weight, *, target: Target):
  """See `pallas_kernels.matmul.op.quantized_matmul`."""
  stack = jax.tree.map(lambda w: w[None], weight)
  return streamed_matmul(x, stack, jnp.int32(0), None, target=target)


def fused_mlp(x, norm, gate, up, down, layer, live, *, eps, activation,
              target: Target):
  """See `pallas_kernels.matmul.op.fused_mlp`."""
  _check(x, gate, up)
  _check(jax.ShapeDtypeStruct((x.shape[0], down.shape[-1]), x.dtype), down)
  head = _head(layer, live)
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  norm = lax.dynamic_slice_in_dim(norm, layer, 1)
  hidden = _stream(
      "fused_mlp", lambda gate, up: IN_KERNELS[activation](gate) * up,
      (y * norm).astype(x.dtype), [gate, up], head, x.dtype, target)
  y = _stream("fused_mlp", lambda y: y, hidden, [down], head, jnp.float32,
              target)
  return _of_live(y, live)


def _plan(op, x, stacks, dtype, target):
  """Outputs of a block of threads, and chunks on their way."""
  inputs, (_, outputs, _) = x.shape[1], stacks[0].shape
  each, count = stacks[0].dtype.itemsize, len(stacks)

  def guess():
    ahead = _BYTES // ((count * _TILE + _WIDE) * _CHUNK * 2)
    return _TILE, min(ahead, inputs // _CHUNK, 8)

  tile, ahead = choose(op, target, (count, outputs, inputs, stacks[0].dtype),
                       guess)
  needed = _BESIDES + ahead * _CHUNK * (count * tile * each + _WIDE * 2) + (
      tile * _WIDE * jnp.dtype(dtype).itemsize)
  if stacks[0].dtype != x.dtype:
    needed += tile * _CHUNK * 2
  if outputs % tile or tile % _WIDE or ahead > inputs // _CHUNK or (
      needed > shared_memory(target)):
    raise NotImplementedError(
        f"{op}: a table has {tile} of {outputs} outputs and {ahead} of "
        f"{inputs // _CHUNK} chunks on their way, in {needed >> 10} KiB; tune "
        "again, or use implementation='xla'")
  return tile, ahead


def _stream(op, finish, x, stacks, head, dtype, target):
  """`finish` of the products with a layer of each stack, `[rows outputs]`."""
  rows, inputs = x.shape
  _, outputs, _ = stacks[0].shape
  tile_size, ahead = _plan(op, x, stacks, dtype, target)
  x = jnp.pad(x, ((0, _WIDE - rows), (0, 0))).T

  scratch = [plgpu.SMEM((tile_size, _WIDE), dtype)]
  if stacks[0].dtype != x.dtype:
    # Integers are widened here.
    shape = (tile_size, _CHUNK)
    scratch.append(plgpu.SMEM(shape, x.dtype,
                              transforms=_transforms(shape, x.dtype)))

  def kernel(head_ref, x_ref, *refs):
    stack_refs, (out_ref, out_smem, *wide) = (refs[:len(stacks)],
                                              refs[len(stacks):])
    start = lax.axis_index("tile") * tile_size

    @pl.when(head_ref[1] != 0)
    def _():
      layer = head_ref[0]

      def scope(*accs):
        def body(_, x_ref, *tile_refs):
          for acc, tile in zip(accs, tile_refs, strict=True):
            if wide:
              wide[0][...] = tile[...].astype(x_ref.dtype)
              plgpu.commit_smem()
              tile = wide[0]
            plgpu.wgmma(acc, tile, x_ref)
          plgpu.wgmma_wait(0)

        plgpu.emit_pipeline(
            body, grid=(inputs // _CHUNK,), max_concurrent_steps=ahead,
            in_specs=[_block((_CHUNK, _WIDE), lambda k: (k, 0), x.dtype)]
            + [_block((tile_size, _CHUNK), lambda k: (0, k), stack.dtype)
               for stack in stacks])(
                x_ref, *(ref.at[layer, pl.ds(start, tile_size)]
                         for ref in stack_refs))
        return tuple(acc[...] for acc in accs)

      sums = pl.run_scoped(
          scope, *[plgpu.ACC((tile_size, _WIDE), jnp.float32)] * len(stacks))
      out_smem[...] = finish(*sums).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(out_smem, out_ref.at[pl.ds(start, tile_size)])
      plgpu.wait_smem_to_gmem(0)

  y = plgpu.kernel(
      kernel, grid=(outputs // tile_size,), grid_names=("tile",),
      out_type=jax.ShapeDtypeStruct((outputs, _WIDE), dtype),
      scratch_types=scratch,
      compiler_params=plgpu.CompilerParams(
          lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      interpret=target.interpret)(head, x, *stacks)
  return y[:, :rows].T


def _block(shape, place, dtype):
  return plgpu.BlockSpec(shape, place, transforms=_transforms(shape, dtype))


def _transforms(shape, dtype):
  swizzle = plgpu.find_swizzle(shape[1] * dtype.itemsize * 8)
  return (plgpu.TilingTransform((8, swizzle // dtype.itemsize)),
          plgpu.SwizzleTransform(swizzle))


def _head(layer, live):
  """The layer, and whether there is anything to do."""
  some = jnp.int32(1) if live is None else jnp.any(live).astype(jnp.int32)
  return jnp.stack([layer, some])


def _of_live(y, live):
  # Where no row is live the kernel left what it found.
  return y if live is None else jnp.where(live[:, None], y, 0)


def _check(x, *stacks, dtypes=(jnp.bfloat16,)):
  rows, inputs = x.shape
  if rows > _WIDE:
    raise NotImplementedError(
        f"up to {_WIDE} rows, got {rows}; use implementation='xla'")
  for stack in stacks:
    if isinstance(stack, QArray | GroupedQArray):
      raise NotImplementedError(
          "of quantized weights only QArrays are widened on the way to a GPU's "
          "tensor cores, and not in fused_mlp; use implementation='xla'")
    if x.dtype != jnp.bfloat16 or stack.dtype not in dtypes:
      raise NotImplementedError(
          f"rows are bfloat16, weights too, got {x.dtype} and {stack.dtype}: "
          "tensor cores would round float32; use implementation='xla'")
    if stack.shape[-2] % _TILE or inputs % _CHUNK:
      raise NotImplementedError(
          f"outputs by the {_TILE} and inputs by the {_CHUNK}, got "
          f"{stack.shape[-2]} and {inputs}; use implementation='xla'")
