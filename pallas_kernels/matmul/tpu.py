# SPDX-License-Identifier: Apache-2.0
"""Weights streamed through VMEM: two tiles in flight, each read once.

The stack stays in HBM (said aloud: XLA would move a small one, whole, into
VMEM where it had the choice). A kernel copies the tiles of one layer itself
instead of leaving it to a grid's pipeline, for two reasons: where no row is
live it copies none at all (a pipeline would fetch its first), and a layer is a
place in the stack, not a slice of it.

A matrix `[F D]` whose D does not fill the last of its lanes, as SmolLM2's 576
does not, is kept by XLA with F along the lanes. Kernels take it so: the
transposition in front of them costs nothing, whereas they would be handed a
copy if they did not ask for it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import choose
from pallas_kernels.matmul.activations import IN_KERNELS
from pallas_kernels.quantized import GroupedQArray, QArray
from pallas_kernels.target import CHIPS, Target

MOST_ROWS = 256
LANES = 128
# Inputs, or outputs, of one product within a tile: it bounds what the widened
# integers take.
CHUNK = 1024
# Bytes of a tile, all weights counted. Nothing overlaps the copy of the first,
# so that it should be a small part of the layer; and not so small that the
# start of a copy shows.
TILE = 4 << 20
PARTS = 8
# What is not cut into tiles of whole lanes is one tile, up to so many bytes.
TOY = 1 << 20


def streamed_matmul(x, stack, layer, live, *, target: Target):
  """See `pallas_kernels.matmul.op.streamed_matmul`."""
  rows, inputs = x.shape
  outputs = stack.shape[1]
  _check("streamed_matmul", x, [stack])
  cost = _cost(x, stack, outputs=outputs, live=live is not None)
  tile = _tile("streamed_matmul", target, rows, outputs, _layer_bytes(stack))
  scratch = []
  if isinstance(stack, GroupedQArray):
    resident = [x]
    streamed = [(stack.values, 0, tile // 2), (stack.scale, 1, tile)]
    if stack.zero is not None:
      sums = x.astype(jnp.float32).reshape(rows, -1, stack.group)
      resident.append(jnp.sum(sums, axis=-1))
      streamed.append((stack.zero, 1, tile))
    parts = LANES // stack.group
    scratch = [pltpu.VMEM((parts * _up(rows, 16), inputs), x.dtype)]
    start = functools.partial(_spread, group=stack.group)
    step = functools.partial(_grouped, group=stack.group)
  else:
    resident = [x]
    if isinstance(stack, QArray):
      resident.append(_row(stack.scale, layer))
      stack = stack.values
    turned = _turned(stack)
    streamed = [_outputs(stack, tile)]
    start, step = None, functools.partial(_plain, turned=turned)
  return _stream("streamed_matmul", start, step, layer=layer, live=live,
                 resident=resident, streamed=streamed,
                 out=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
                 scratch=scratch, cost=cost, target=target)


def quantized_matmul(x, weight, *, target: Target):
  """See `pallas_kernels.matmul.op.quantized_matmul`."""
  stack = jax.tree.map(lambda w: w[None], weight)
  return streamed_matmul(x, stack, jnp.int32(0), None, target=target)


def fused_mlp(x, norm, gate, up, down, layer, live, *, eps, activation,
              target: Target):
  """See `pallas_kernels.matmul.op.fused_mlp`."""
  weights = [gate, up, down]
  _check("fused_mlp", x, weights)
  if any(isinstance(w, GroupedQArray) for w in weights):
    raise NotImplementedError(
        "no fused block of four-bit weights; use three quantized_matmul")
  if len({isinstance(w, QArray) for w in weights}) > 1:
    raise NotImplementedError("weights are all arrays, or all QArrays; "
                              "use implementation='xla'")
  size = gate.shape[1]
  tile = _tile("fused_mlp", target, len(x), size,
               sum(map(_layer_bytes, weights)))
  cost = _cost(x, *weights, norm=norm, outputs=x.shape[1],
               live=live is not None)
  resident = [x, _row(norm, layer)]
  if isinstance(gate, QArray):
    resident += [_row(w.scale, layer) for w in weights]
    gate, up, down = (w.values for w in weights)
  return _stream(
      "fused_mlp", functools.partial(_norm, eps=eps),
      functools.partial(_mlp, activation=activation, turned=_turned(gate)),
      layer=layer, live=live, resident=resident,
      streamed=[_outputs(gate, tile), _outputs(up, tile), (down, 1, tile)],
      out=jax.ShapeDtypeStruct(x.shape, jnp.float32),
      scratch=[pltpu.VMEM(x.shape, x.dtype)], cost=cost, target=target,
      finish=_rescale if len(resident) > 2 else None)


def moved_bytes(x: Any, *stacks: Any, norm: Any = None, outputs: int,
                live: bool = False, exited: bool = False) -> int:
  """What a call moves between HBM and VMEM, counted by its copies.

  Args:
    x, stacks, norm: shapes, or arrays, as the op takes them.
    outputs: of a row.
    live: whether a mask of rows is given.
    exited: whether no row of it is live.
  """
  rows = x.shape[0]
  total = x.size * x.dtype.itemsize + 4 * rows * outputs + 8
  total += 4 * rows if live else 0
  if norm is not None:
    total += 4 * norm.shape[-1]
  for stack in stacks:
    if isinstance(stack, QArray):
      total += 4 * stack.scale.shape[-1]
    if isinstance(stack, GroupedQArray) and stack.zero is not None:
      total += 4 * rows * stack.scale.shape[1]
    total += 0 if exited else _layer_bytes(stack)
    if isinstance(stack, GroupedQArray) and _turned(stack.values):
      # Two outputs share a byte, so that it cannot be taken as it lies: XLA
      # copies the stack (where it is the same in every step, before the first).
      total += 2 * math.prod(stack.values.shape)
  return total


def _cost(x, *stacks, norm=None, outputs, live):
  """Of a call in which some row is live."""
  products = sum(math.prod(stack.shape[1:]) for stack in stacks)
  return pl.CostEstimate(
      flops=2 * len(x) * products, transcendentals=0,
      bytes_accessed=moved_bytes(x, *stacks, norm=norm, outputs=outputs,
                                 live=live))


def _stream(op, start, step, *, layer, live, resident, streamed, out, scratch,
            cost, target, finish=None):
  """One program that runs `step` on every tile while the next is copied.

  Args:
    start, finish: called once as `f(resident, out, scratch)`, on references.
    step: called as `step(i, resident, tiles, out, scratch)`.
    resident: arrays that are in VMEM as a whole.
    streamed: `(array, axis, size)`: of a layer `array[layer]`, tile i is the
      `size` entries from `i * size` on along `axis`.
  """
  shapes = [tuple(size if at == axis else n
                  for at, n in enumerate(array.shape[1:]))
            for array, axis, size in streamed]
  array, axis, size = streamed[0]
  tiles = array.shape[1 + axis] // size
  if live is not None:
    resident = [live.astype(jnp.int32)[:, None], *resident]
  head = jnp.stack([layer, jnp.int32(1) if live is None
                    else jnp.any(live).astype(jnp.int32)])

  def kernel(head, *refs):
    refs = list(refs)
    inside = [refs.pop(0) for _ in resident]
    stacks = [refs.pop(0) for _ in streamed]
    out = refs.pop(0)
    buffers = [refs.pop(0) for _ in streamed]
    arrived, *own = refs
    mask = inside.pop(0) if live is not None else None

    def copies(i, slot):
      for n, (stack, buffer, (_, axis, size)) in enumerate(
          zip(stacks, buffers, streamed, strict=True)):
        place = [slice(None)] * (len(stack.shape) - 1)
        place[axis] = pl.ds(pl.multiple_of(i * size, size), size)
        yield pltpu.make_async_copy(stack.at[(head[0], *place)],
                                    buffer.at[slot], arrived.at[n, slot])

    @pl.when(head[1] == 0)
    def _():
      out[...] = jnp.zeros_like(out)

    @pl.when(head[1] != 0)
    def _():
      for copy in copies(0, 0):
        copy.start()
      if start is not None:
        start(inside, out, own)

      def advance(i, _):
        slot = lax.rem(i, 2)

        @pl.when(i + 1 < tiles)
        def _():
          for copy in copies(i + 1, 1 - slot):
            copy.start()

        for copy in copies(i, slot):
          copy.wait()
        step(i, inside, [buffer.at[slot] for buffer in buffers], out, own)

      lax.fori_loop(0, tiles, advance, None)
      if finish is not None:
        finish(inside, out, own)
      if mask is not None:
        out[...] = jnp.where(mask[...] != 0, out[...], 0)

  buffers = [pltpu.VMEM((2, *shape), array.dtype)
             for shape, (array, _, _) in zip(shapes, streamed, strict=True)]
  whole = [math.prod(x.shape) * x.dtype.itemsize for x in (*resident, out)]
  own = [math.prod(x.shape) * x.dtype.itemsize for x in (*buffers, *scratch)]
  # What comes and goes by itself has two buffers too. The rest is for values
  # that do not fit in registers.
  needed = 2 * sum(whole) + sum(own) + (8 << 20)
  if needed > _fast_memory(target):
    raise NotImplementedError(
        f"{out.shape[0]} rows and tiles of {shapes} take {needed >> 20} MiB of "
        "VMEM; use implementation='xla'")
  return pl.pallas_call(
      kernel,
      out_shape=out,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(1,),
          in_specs=[pl.BlockSpec(x.shape, lambda i, head, n=x.ndim: (0,) * n)
                    for x in resident]
          + [pl.BlockSpec(memory_space=pltpu.HBM)] * len(streamed),
          out_specs=pl.BlockSpec(out.shape, lambda i, head: (0, 0)),
          scratch_shapes=[*buffers,
                          pltpu.SemaphoreType.DMA((len(streamed), 2)),
                          *scratch]),
      compiler_params=pltpu.CompilerParams(vmem_limit_bytes=needed),
      cost_estimate=cost,
      interpret=target.interpret,
      name=op,
  )(head, *resident, *(array for array, _, _ in streamed))


# Steps: what is done with a tile.


def _plain(i, inside, tiles, out, own, *, turned):
  """A tile of outputs, of plain or of eight-bit weights."""
  x, *scale = inside
  y = _product(x, tiles[0], turned)
  at = pl.ds(pl.multiple_of(i * y.shape[1], y.shape[1]), y.shape[1])
  out[:, at] = y if not scale else y * scale[0][:, at]


def _spread(inside, out, own, *, group):
  """Copies rows for each group within 128 inputs, zero but in the group.

  So a product takes 128 inputs, however small the groups are, and gives the
  sum of each group apart.
  """
  x, (spread,) = inside[0], own
  rows = x.shape[0]
  step = _up(rows, 16)
  part = lax.div(lax.broadcasted_iota(jnp.int32, x.shape, 1), group)
  for j in range(LANES // group):
    mine = lax.rem(part, LANES // group) == j
    spread[j * step:j * step + rows, :] = jnp.where(
        mine, x[...].astype(jnp.float32), 0).astype(spread.dtype)


def _grouped(i, inside, tiles, out, own, *, group):
  """A tile of outputs, of four-bit weights."""
  x, *sums = inside
  values, scale, *zero = tiles
  spread, = own
  rows, inputs = x.shape
  size, step, parts = scale.shape[1], _up(rows, 16), LANES // group

  def add(y, at, width, chunk):
    """The products with `width` inputs from `at` on, scaled."""
    # A byte's two values become neighbouring rows.
    w = pltpu.bitcast(values[:, pl.ds(at, width)], jnp.int4)
    s = _dot(spread[:, pl.ds(at, width)],
             w.astype(jnp.bfloat16).astype(spread.dtype))
    for j in range(-(-width // group)):
      y = y + (s[j * step:j * step + rows]
               * scale[pl.ds(chunk * parts + j, 1), :])
    return y

  y = jnp.zeros((rows, size), jnp.float32)
  # Fewer at a time where the groups' sums fill the registers.
  many = max(1, CHUNK // LANES // (1 if parts * step <= 64 else 4))
  many_inputs = many * LANES

  def block(c, y):
    for k in range(many):
      chunk = c * many + k
      y = add(y, pl.multiple_of(chunk * LANES, LANES), LANES, chunk)
    return y

  blocks = inputs // many_inputs
  if blocks:
    y = lax.fori_loop(0, blocks, block, y)
  for at in range(blocks * many_inputs, inputs, LANES):
    y = add(y, at, min(LANES, inputs - at), at // LANES)
  if zero:
    shift = zero[0][...].astype(jnp.float32) * scale[...]
    y = y - _dot(sums[0][...], shift, 0)
  out[:, pl.ds(pl.multiple_of(i * size, size), size)] = y


def _norm(inside, out, own, *, eps):
  """Norms the rows once; nothing is summed yet."""
  x, norm, *_ = inside
  y = x[...].astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  own[0][...] = (y * norm[...]).astype(x.dtype)
  out[...] = jnp.zeros_like(out)


def _mlp(i, inside, tiles, out, own, *, activation, turned):
  """A tile of hidden values, from the normed rows to the sums."""
  _, _, *scales = inside
  normed, = own
  gate_tile, up_tile, down_tile = tiles
  gate = _product(normed, gate_tile, turned)
  up = _product(normed, up_tile, turned)
  size = gate.shape[1]
  at = pl.ds(pl.multiple_of(i * size, size), size)
  if scales:
    gate, up = gate * scales[0][:, at], up * scales[1][:, at]
  hidden = (IN_KERNELS[activation](gate) * up).astype(normed.dtype)
  for start, stop in _chunks(out.shape[1]):
    out[:, start:stop] += _dot(
        hidden, down_tile[start:stop, :].astype(hidden.dtype))


def _rescale(inside, out, own):
  out[...] *= inside[4][...]


def _product(x, tile, turned):
  """`x @ tile.T`, or `x @ tile`, chunk by chunk of the inputs."""
  y = jnp.zeros((x.shape[0], tile.shape[1 if turned else 0]), jnp.float32)
  for start, stop in _chunks(x.shape[1]):
    w = tile[start:stop, :] if turned else tile[:, start:stop]
    y += _dot(x[:, start:stop], w.astype(x.dtype), 0 if turned else 1)
  return y


def _dot(x, w, inputs=1):
  """The product over axis 1 of `x` and axis `inputs` of `w`."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(x, w, (((1,), (inputs,)), ((), ())),
                         precision=precision,
                         preferred_element_type=jnp.float32)


def _chunks(size):
  return [(at, min(at + CHUNK, size)) for at in range(0, size, CHUNK)]


def _turned(stack):
  """Whether XLA keeps a layer `[F D]` with F along the lanes."""
  return stack.shape[-1] % LANES != 0 and stack.shape[-2] % LANES == 0


def _outputs(stack, tile):
  """A stack of layers to be streamed by outputs, as `_stream` takes it."""
  if _turned(stack):
    return jnp.swapaxes(stack, 1, 2), 1, tile
  return stack, 0, tile


def _row(stack, layer):
  """One of a stack of vectors, `[1 n]`. It is small enough to copy."""
  return lax.dynamic_slice_in_dim(stack, layer, 1).astype(jnp.float32)


# Sizes, and what is refused.


def _check(op, x, weights):
  if x.shape[0] > MOST_ROWS:
    raise NotImplementedError(
        f"{op} is for up to {MOST_ROWS} rows, got {x.shape[0]}; "
        "use implementation='xla'")
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f"{op} takes bfloat16 or float32, got {x.dtype}; "
                              "use implementation='xla'")
  for weight in weights:
    if isinstance(weight, GroupedQArray):
      if LANES % weight.group or weight.group < 32:
        raise NotImplementedError(
            f"groups are 32, 64 or 128 inputs, got {weight.group}; "
            "use implementation='xla'")
    elif not isinstance(weight, QArray) and weight.dtype != x.dtype:
      raise NotImplementedError(
          f"rows and weights have one dtype, got {x.dtype} and {weight.dtype}; "
          "use implementation='xla'")


def _tile(op, target, rows, outputs, layer_bytes):
  """Outputs a tile: the most of 128, 256 ... that divide them and are small."""
  found = choose(op, target, (rows, outputs, layer_bytes),
                 lambda: _guess(op, outputs, layer_bytes))
  if outputs % found or found % LANES and found < outputs:
    raise NotImplementedError(
        f"{op}: a table has tiles of {found} for {outputs} outputs, which "
        f"they do not divide by the {LANES}; tune again")
  return found


def _guess(op, outputs, layer_bytes):
  if outputs % LANES:
    if layer_bytes <= TOY:
      return outputs
    raise NotImplementedError(
        f"{op} takes outputs by the {LANES}, got {outputs}; "
        "use implementation='xla'")
  most = min(TILE, max(layer_bytes // PARTS, TILE // 8))
  sizes = [size for size in range(LANES, outputs + 1, LANES)
           if outputs % size == 0 and size * layer_bytes // outputs <= most]
  return sizes[-1] if sizes else LANES


def _fast_memory(target):
  """Bytes of VMEM that one program may hold."""
  chip = CHIPS.get(target.kind)
  return (chip.fast_memory if chip else 64 << 20) * 3 // 4


def _layer_bytes(stack):
  """Bytes of one layer that are streamed: all but the scales of a QArray."""
  if isinstance(stack, QArray):
    stack = stack.values
  return sum(math.prod(x.shape[1:]) * x.dtype.itemsize
             for x in jax.tree.leaves(stack))


def _up(n, multiple):
  return -(-n // multiple) * multiple
