# SPDX-License-Identifier: Apache-2.0
"""`tree_attention` for TPUs: blocks of the prefix, fetched while others count.

A step of the grid is a row of the batch with as many of its key/value heads as
fit: their tokens are the rows of one matrix. It attends to the fresh nodes,
then walks the prefix in blocks, by an online softmax. Blocks are copied by
hand into two buffers, a unit (a page, or a run of slots) at a time, the next
one while this one is computed, over the borders of steps too. So what is
fetched is what rows hold: no gather, no block behind a row's last slot.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import choose
from pallas_kernels.target import Target

# Finite, so that a token which has seen nothing yet has no NaN.
_LEAST = -0.7 * float(jnp.finfo(jnp.float32).max)
_LANES = 128
# Rows of the matrix of queries of one step, over all its heads.
_ROWS = 2048
# A block of keys in bytes, and a block of scores in numbers.
_BLOCK_BYTES, _SCORES = 512 << 10, 512 << 10
# Scores, beyond which they pass through memory, this many slots at a time:
# they do not all fit into registers, and spilled is moved more than once.
_STAGED, _PIECE = 64 << 10, 256
# Bytes of one copy: fewer take longer to ask for than to bring.
_COPY_BYTES = 64 << 10
# Of what tells a slot: its stream, of 32.
_STREAM_BITS = 5
# Slots of a block that is copied at once, whatever its alignment.
_UNALIGNED = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
  """How one call is cut up.

  Attributes:
    cores: TensorCores that share the call.
    heads: key/value heads of a step.
    tokens: tokens of a step.
    unit: slots of one copy.
    units: copies of one block.
    blocks: blocks of the longest row.
    slots_minor: whether keys lie with slots in lanes. XLA keeps heads smaller
      than a lane row so, because nothing is padded.
  """

  cores: int
  heads: int
  tokens: int
  unit: int
  units: int
  blocks: int
  slots_minor: bool

  @property
  def block(self) -> int:
    return self.unit * self.units

  def staged(self, height: int) -> bool:
    """Whether scores of so many rows pass through memory."""
    return height * self.block > _STAGED and self.block % _PIECE == 0


def tree_attention(query, key, value, fresh_key, fresh_value, *,
                   slot_positions, positions, fresh_positions, seen, scale,
                   table, window, logits_soft_cap, target,
                   key_scale=None, value_scale=None, slot_streams=None,
                   readable=None):
  """See `pallas_kernels.attention.op.tree_attention`."""
  plan = _plan(query.shape, key.shape, key.dtype, slot_positions.shape[1],
               table is not None, key_scale is not None, target)
  _check(query, key, value, fresh_key, fresh_value)
  return _attend(
      query, key, value, fresh_key, fresh_value, slot_positions, positions,
      fresh_positions, seen, table, key_scale, value_scale, slot_streams,
      readable, scale=scale, window=window, logits_soft_cap=logits_soft_cap,
      plan=plan, interpret=target.interpret)


def moved_bytes(query_shape, key_shape, nodes: int, lengths, *, key_dtype,
                dtype, slots: int, paged: bool = False, scales: bool = False,
                words: int = 1, window: int | None = None,
                streamed: bool = False, target: Target = Target("tpu")) -> int:
  """Bytes that the kernel's blocks move between memory and chip.

  Args:
    lengths: positions that each row holds, in the slots from its first on.
    slots: of the longest row there may be.
    streamed: whether slots are of several streams.
  """
  plan = _plan(query_shape, key_shape, jnp.dtype(key_dtype), slots, paged,
               scales, target)
  return _moved(plan, query_shape, key_shape[1], nodes, lengths,
                key_dtype=key_dtype, dtype=dtype, scales=scales, words=words,
                window=window, streamed=streamed)


def _units(plan, length, window):
  """Units of a row that are walked.

  The first block begins with a block, the last one ends with a unit.
  """
  first = 0 if window is None else max(0, length - window + 1) // plan.block
  return -(-length // plan.unit) - plan.units * first


def _moved(plan, query_shape, groups, nodes, lengths, *, key_dtype, dtype,
           scales, words, window, streamed):
  rows, tokens, heads, size = query_shape
  units = [_units(plan, n, window) for n in lengths]
  blocks = [-(-n // plan.units) for n in units]
  parts = groups // plan.heads
  each = jnp.dtype(key_dtype).itemsize
  width = 1 if plan.slots_minor else -(-size // _LANES) * _LANES / size
  again = -(-tokens // plan.tokens)                 # times a prefix is read
  moved = sum(units) * plan.unit * groups * size * each * 2 * width * again
  if scales:
    moved += sum(units) * plan.unit * groups * 4 * 2 * parts * again
  moved += sum(blocks) * plan.block * 4 * parts * again
  element = jnp.dtype(dtype).itemsize
  moved += 2 * rows * tokens * heads * size * element
  moved += 2 * rows * _padded(nodes) * groups * size * element
  more = (window is not None) + 2 * streamed
  shared = rows * parts if more else 1
  moved += shared * tokens * (heads // groups) * (words + more) * 4
  return int(moved)


def _plan(query_shape, key_shape, dtype, slots, paged, scales, target):
  """Sizes of blocks; raises NotImplementedError where there are none."""
  rows, tokens, heads, size = query_shape
  groups, unit = key_shape[1], key_shape[2]
  if slots == 0:
    raise NotImplementedError("no slots to walk over; use 'xla'")
  if size % 8 or size > 512:
    raise NotImplementedError(f"head size {size}: it must be a multiple of 8, "
                              "at most 512; use 'xla'")
  share = heads // groups
  # Where two TensorCores are one device, each takes half of the heads.
  cores = target.cores if groups % target.cores == 0 else 1
  most = groups // cores
  together = max(n for n in range(1, most + 1)
                 if most % n == 0 and (n == 1 or n * tokens * share <= _ROWS))
  if together * tokens * share > _ROWS:
    tokens = max(16, _ROWS // share // 16 * 16)
  slots_minor = size < _LANES and size * -(-unit // _LANES) < unit
  padded = size if slots_minor else -(-size // _LANES) * _LANES
  # Where a copy may begin, in slots.
  tile = _LANES if slots_minor or scales else 32 // dtype.itemsize
  slot_bytes = together * padded * dtype.itemsize
  if not paged:
    wanted = min(max(_LANES, _COPY_BYTES // slot_bytes // _LANES * _LANES),
                 512)
    fits = [n for n in range(tile, wanted + 1, tile) if slots % n == 0]
    if slots <= wanted or (not fits and slots <= _UNALIGNED):
      unit = slots
    elif fits:
      unit = max(fits)
    else:
      raise NotImplementedError(
          f"{slots} slots of {dtype}: more than {_UNALIGNED} must be a "
          f"multiple of {tile}; use 'xla', or caches of such a capacity")
  block = min(_BLOCK_BYTES // slot_bytes, _SCORES // max(tokens * share, 16),
              1024)
  most = max(1, slots // unit)
  units = 1
  if unit % tile == 0:
    units = min(most, choose(
        "tree_attention", target, (tokens, heads, groups, size, unit, dtype),
        lambda: max(1, min(block // unit, most))))
  return Plan(cores, together, tokens, unit, units,
              -(-slots // (unit * units)), slots_minor)


def _check(query, key, value, fresh_key, fresh_value):
  dtype = query.dtype if key.dtype.itemsize == 1 else key.dtype
  if key.dtype != value.dtype:
    raise NotImplementedError(f"keys of {key.dtype} with values of "
                              f"{value.dtype}; use 'xla'")
  if fresh_key.dtype != dtype or fresh_value.dtype != dtype:
    raise NotImplementedError(
        f"fresh keys of {fresh_key.dtype} where products are in {dtype}: cast "
        "them, or use 'xla'")
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(f"products in {dtype}: a TPU has float32 and "
                              "bfloat16; use 'xla'")


def _padded(nodes):
  return -(-nodes // 16) * 16


@functools.partial(jax.jit, static_argnames=(
    "scale", "window", "logits_soft_cap", "plan", "interpret"))
def _attend(query, key, value, fresh_key, fresh_value, slot_positions,
            positions, fresh_positions, seen, table, key_scale, value_scale,
            slot_streams, readable, *, scale, window, logits_soft_cap, plan,
            interpret):
  rows, tokens, heads, size = query.shape
  groups, nodes = key.shape[1], fresh_key.shape[1]
  share = heads // groups
  slots = slot_positions.shape[1]
  dtype = query.dtype if key.dtype.itemsize == 1 else key.dtype

  # Tokens before heads that share keys: a block of tokens is a run of rows.
  q = query.astype(dtype).reshape(rows, tokens, groups, share, size)
  q = jnp.moveaxis(q, 2, 1).reshape(rows, groups, tokens * share, size)
  spare = _padded(nodes) - nodes
  fresh = [jnp.moveaxis(jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0))), 2, 1)
           for x in (fresh_key, fresh_value)]
  if plan.slots_minor:
    key, value = (jnp.swapaxes(x, 2, 3) for x in (key, value))

  held = slot_positions >= 0
  sights = lax.bitcast_convert_type(seen, jnp.int32)
  if sights.ndim == 2:
    sights = sights[None]
  wanted, more = held, []                  # besides, of each token
  if window is not None:
    oldest = positions - window
    wanted = held & (slot_positions > jnp.min(oldest, axis=1, keepdims=True))
    more.append(oldest)
  if slot_streams is not None:
    more += [positions, jnp.broadcast_to(
        lax.bitcast_convert_type(readable, jnp.int32), positions.shape)]
    # A slot tells where it stands and, in its lowest bits, in which stream.
    slot_positions = jnp.where(
        held, (slot_positions << _STREAM_BITS) | slot_streams, -1)
  if more:
    sights = jnp.concatenate([
        jnp.broadcast_to(sights, (rows, *sights.shape[1:])),
        jnp.stack(more, axis=-1).astype(jnp.int32)], axis=-1)
  sights = jnp.repeat(sights, share, axis=1)                   # [_ T*R W]

  # What of each row is walked: its first block, and the units up to its last
  # slot. And up to which block all slots are held, so that none is masked.
  slot = lax.broadcasted_iota(jnp.int32, held.shape, 1)
  units = -(-jnp.max(jnp.where(wanted, slot + 1, 0), axis=1) // plan.unit)
  begin = jnp.min(jnp.where(wanted, slot, slots), axis=1) // plan.block
  whole = jnp.min(jnp.where(held, slots, slot), axis=1) // plan.block
  begin = jnp.minimum(begin, -(-units // plan.units))
  spans = jnp.stack([begin, units, whole]).astype(jnp.int32)
  padded = plan.blocks * plan.block - slots
  held_at = jnp.pad(slot_positions.astype(jnp.int32), ((0, 0), (0, padded)),
                    constant_values=-1)
  held_at = held_at.reshape(rows, plan.blocks, 1, plan.block)

  parts = groups // plan.heads // plan.cores
  spread = -(-tokens // plan.tokens)
  height = plan.tokens * share
  steps = parts * rows * spread

  def at(core, step):
    """Of a step: heads, row and block of tokens."""
    return (core * parts + step // (rows * spread), step // spread % rows,
            step % spread)

  def by_tokens(core, step, *_):
    part, row, turn = at(core, step)
    return row, part, turn, 0

  def by_row(core, step, *_):
    part, row, _ = at(core, step)
    return row, part, 0, 0

  def sights_at(core, step, *_):
    _, row, turn = at(core, step)
    return (row if sights.shape[0] > 1 else 0), turn, 0

  fresh_spec = pl.BlockSpec((1, plan.heads, _padded(nodes), size), by_row)
  inputs = [q, *fresh, sights]
  in_specs = [pl.BlockSpec((1, plan.heads, height, size), by_tokens),
              fresh_spec, fresh_spec,
              pl.BlockSpec((1, height, sights.shape[2]), sights_at)]
  if window is not None:
    inputs.append(jnp.pad(fresh_positions.astype(jnp.int32),
                          ((0, 0), (0, spare)))[:, None])
    in_specs.append(pl.BlockSpec(
        (1, 1, _padded(nodes)),
        lambda core, step, *_: (at(core, step)[1], 0, 0)))
  stored = [key, value, held_at]
  slab = ((size, plan.block) if plan.slots_minor else (plan.block, size))
  buffers = [pltpu.VMEM((2, plan.heads, *slab), key.dtype),
             pltpu.VMEM((2, plan.heads, *slab), value.dtype),
             pltpu.VMEM((2, 1, plan.block), jnp.int32)]
  if key_scale is not None:
    stored += [key_scale, value_scale]
    buffers += [pltpu.VMEM((2, groups, plan.block), jnp.float32)] * 2
  if not interpret:
    # Said, because the compiler would bring a cache that fits into VMEM, all of
    # it, whatever of it is held.
    stored = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in stored]
  inputs += stored
  in_specs += [pl.BlockSpec(memory_space=pl.ANY)] * len(stored)
  kernel = functools.partial(
      _kernel, at=at, steps=steps, rows=rows, plan=plan, scale=scale,
      window=window, cap=logits_soft_cap, dtype=dtype, nodes=_padded(nodes),
      stored=len(stored), paged=table is not None,
      streamed=slot_streams is not None)
  scalars = [spans.reshape(-1)] + ([] if table is None else [table.astype(
      jnp.int32)])
  # How much rows hold is known when it runs: at most, all there is room for.
  attended = _units(plan, slots, window) * plan.unit + nodes
  cost = pl.CostEstimate(
      flops=4 * rows * tokens * heads * size * attended,
      transcendentals=rows * tokens * heads * attended,
      bytes_accessed=_moved(
          plan, query.shape, groups, nodes, (slots,) * rows,
          key_dtype=key.dtype, dtype=dtype, scales=key_scale is not None,
          words=seen.shape[-1], window=window,
          streamed=slot_streams is not None))
  out = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(scalars), grid=(plan.cores, steps),
          in_specs=in_specs,
          out_specs=pl.BlockSpec((1, plan.heads, height, size), by_tokens),
          scratch_shapes=[
              *buffers, pltpu.SemaphoreType.DMA((2,)),
              pltpu.SMEM((1,), jnp.int32),
              pltpu.VMEM((plan.heads, height, _LANES), jnp.float32),
              pltpu.VMEM((plan.heads, height, _LANES), jnp.float32),
              pltpu.VMEM((plan.heads, height, size), jnp.float32),
              *[pltpu.VMEM((height, plan.block), jnp.float32)]
              * plan.staged(height)]),
      out_shape=jax.ShapeDtypeStruct(q.shape, query.dtype),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=48 << 20),
      cost_estimate=cost, interpret=interpret, name="tree_attention",
  )(*scalars, *inputs)
  out = out.reshape(rows, groups, tokens, share, size)
  return jnp.moveaxis(out, 1, 2).reshape(query.shape)


def _kernel(spans, *refs, at, steps, rows, plan, scale, window, cap, dtype,
            nodes, stored, paged, streamed):
  """One step; see `_attend` for what the references are."""
  refs = list(refs)
  table = refs.pop(0) if paged else None
  queries, fresh_keys, fresh_values, sights = refs[:4]
  fresh_positions = refs[4] if window is not None else None
  refs = refs[4 + (window is not None):]
  stores, out, buffers = refs[:stored], refs[stored], refs[stored + 1:
                                                            2 * stored + 1]
  sems, turn, top, total, sums, *scores = refs[2 * stored + 1:]
  keys, values, helds, *scales = buffers
  core, step = pl.program_id(0), pl.program_id(1)
  part, row, _ = at(core, step)

  def span(row):
    begin, units = spans[row], spans[rows + row]
    return begin, units, pl.cdiv(units, plan.units)

  begin, units, end = span(row)
  after = jnp.minimum(step + 1, steps - 1)
  after_part, after_row, _ = at(core, after)
  after_begin, after_units, after_end = span(after_row)

  def copies(part, row, index, slot, unit):
    """Copies of one unit of a block."""
    one = index * plan.units + unit
    # Aligned by the plan; where a block is one unit, it begins at zero.
    def run(at):
      return pl.ds(0 if plan.units == 1 else pl.multiple_of(
          at, plan.unit), plan.unit)
    to = run(unit * plan.unit)
    page = table[row, one] if paged else row
    there = slice(None) if paged or plan.blocks * plan.units == 1 else pl.ds(
        pl.multiple_of(one * plan.unit, plan.unit), plan.unit)
    heads = pl.ds(part * plan.heads, plan.heads)
    for source, buffer in zip(stores[:2], (keys, values)):
      if plan.slots_minor:
        yield source.at[page, heads, :, there], buffer.at[slot, :, :, to]
      else:
        yield source.at[page, heads, there, :], buffer.at[slot, :, to, :]
    # Heads lie within a tile: all or none can be copied.
    for source, buffer in zip(stores[3:], scales):
      yield source.at[page, :, there], buffer.at[slot, :, to]

  def each(do, part, row, index, slot, units):
    """Starts, or awaits, all copies of a block."""
    do(pltpu.make_async_copy(stores[2].at[row, index], helds.at[slot],
                             sems.at[slot]))
    def unit(i, _):
      for source, to in copies(part, row, index, slot, i):
        do(pltpu.make_async_copy(source, to, sems.at[slot]))
      return ()
    lax.fori_loop(0, jnp.minimum(units - index * plan.units, plan.units), unit,
                  ())

  def start(*block):
    each(lambda copy: copy.start(), *block)

  @pl.when(step == 0)
  def _():
    turn[0] = 0
    @pl.when(begin < end)
    def _():
      start(part, row, begin, 0, units)

  def follow(slot):
    """Starts the next step's first block."""
    @pl.when((step + 1 < steps) & (after_begin < after_end))
    def _():
      start(after_part, after_row, after_begin, slot, after_units)

  def dot(a, b, dims):
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return lax.dot_general(a, b, (dims, ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)

  def beside(number):
    """What stands behind the words of `seen`, from the last on."""
    at = sights.shape[2] - number
    return sights[0, :, at:at + 1]

  def oldest():
    return beside(3 if streamed else 1)

  def scored(s, factor):
    s = s * factor
    return s if cap is None else cap * jnp.tanh(s / cap)

  def spread(x, width):
    """Of numbers that stand in all lanes, as many lanes as are wanted.

    What is kept of each token stands in all lanes of a row, because to bring
    one number into all takes more than to keep it there.
    """
    whole, rest = divmod(width, _LANES)
    parts = [x] * whole + ([x[:, :rest]] if rest else [])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

  def over_lanes(what, x, more=None):
    """Brings what stands in several rows of lanes into one."""
    if x.shape[1] % _LANES:
      assert more is None
      return x
    parts = [x[:, n:n + _LANES] for n in range(0, x.shape[1], _LANES)]
    return functools.reduce(what, parts if more is None else [more, *parts])

  def add(head, pieces, minor=False):
    """Attends, by an online softmax, to some slots, a piece at a time.

    Args:
      pieces: of each a function that gives its scores, and one that gives its
        values and their scales.
    """
    old, best = top[head], None
    kept = []
    for n, (score, _) in enumerate(pieces):
      s = score()
      best = over_lanes(jnp.maximum, s, best)
      if len(pieces) == 1:
        kept.append(s)
      else:
        scores[0][:, pl.ds(n * _PIECE, _PIECE)] = s
    new = jnp.maximum(old, jnp.max(best, axis=1, keepdims=True))
    shrink = jnp.exp(old - new)
    top[head] = new
    mass, more = None, sums[head] * spread(shrink, sums.shape[2])
    for n, (_, values) in enumerate(pieces):
      s = (kept[0] if len(pieces) == 1
           else scores[0][:, pl.ds(n * _PIECE, _PIECE)])
      s = jnp.exp(s - spread(new, s.shape[1]))
      mass = over_lanes(jnp.add, s, mass)
      value, value_scale = values()
      if value_scale is not None:
        s = s * value_scale
      more += dot(s.astype(dtype), value, ((1,), (1 if minor else 0,)))
    total[head] = total[head] * shrink + jnp.sum(mass, axis=1, keepdims=True)
    sums[head] = more

  top[...] = jnp.full(top.shape, _LEAST, jnp.float32)
  total[...] = jnp.zeros(total.shape, jnp.float32)
  sums[...] = jnp.zeros(sums.shape, jnp.float32)
  for start_node in range(0, nodes, _LANES):
    count = min(_LANES, nodes - start_node)
    shape = (queries.shape[2], count)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    word = start_node // 32
    bits = sights[0, :, word:word + 1]
    for n in range(1, -(-count // 32)):
      bits = jnp.where(lane >= 32 * n, sights[0, :, word + n:word + n + 1],
                       bits)
    visible = lax.shift_right_logical(
        jnp.broadcast_to(bits, shape), lane & 31) & 1 == 1
    some = pl.ds(start_node, count)
    if window is not None:
      visible &= fresh_positions[0, :, some] > oldest()
    for head in range(plan.heads):
      s = dot(queries[0, head], fresh_keys[0, head, some], ((1,), (1,)))
      s = jnp.where(visible, scored(s, scale), _LEAST)
      value = fresh_values[0, head, some]
      add(head, [(lambda s=s: s, lambda value=value: (value, None))])

  def attend(slot, whole):
    at = helds[slot]                                           # [1 block]
    place = at >> _STREAM_BITS if streamed else at
    visible = None if whole else at >= 0
    rules = []
    if window is not None:
      rules.append(place > oldest())
    if streamed:
      shape = (queries.shape[2], plan.block)
      of = jnp.broadcast_to(at & (1 << _STREAM_BITS) - 1, shape)
      words = jnp.broadcast_to(beside(1), shape)
      rules += [place < beside(2),
                lax.shift_right_logical(words, of) & 1 == 1]
    for seen in rules:
      visible = seen if visible is None else visible & seen
    if not whole:
      if plan.slots_minor:
        held = at >= 0
      else:
        held = jnp.transpose(jnp.broadcast_to(at, (_LANES, plan.block)))
        held = held[:, :1] >= 0                                # [block 1]
    width = _PIECE if scores else plan.block

    def taken(x, axis, first):
      """A piece of what has all slots, or one for all of them."""
      return x if x is None or x.shape[axis] == 1 or width == plan.block else (
          lax.slice_in_dim(x, first, first + width, axis=axis))

    def stored_at(buffer, head, first):
      some = pl.ds(first, width)
      x = (buffer[slot, head, :, some] if plan.slots_minor
           else buffer[slot, head, some])
      return x if x.dtype == dtype else x.astype(dtype)

    def scale_at(n, head, first):
      return scales[n][slot, pl.ds(part * plan.heads + head, 1),
                       pl.ds(first, width)]

    def score(head, first):
      s = dot(queries[0, head], stored_at(keys, head, first),
              ((1,), (0 if plan.slots_minor else 1,)))
      s = scored(s, scale * scale_at(0, head, first) if scales else scale)
      return s if visible is None else jnp.where(taken(visible, 1, first), s,
                                                 _LEAST)

    def values_at(head, first):
      value = stored_at(values, head, first)
      value_scale = scale_at(1, head, first) if scales else None
      if not whole:
        # A zero probability does not hide a NaN that lay there before.
        there = taken(held, 1 if plan.slots_minor else 0, first)
        value = jnp.where(there, value.astype(jnp.float32), 0).astype(dtype)
        if scales:
          value_scale = jnp.where(taken(at, 1, first) >= 0, value_scale, 0)
      return value, value_scale

    for head in range(plan.heads):
      add(head, [(functools.partial(score, head, first),
                  functools.partial(values_at, head, first))
                 for first in range(0, plan.block, width)], plan.slots_minor)

  def block(index, slot):
    @pl.when(index + 1 < end)
    def _():
      start(part, row, index + 1, 1 - slot, units)
    @pl.when(index + 1 == end)
    def _():
      follow(1 - slot)
    each(lambda copy: copy.wait(), part, row, index, slot, units)
    whole = index < spans[2 * rows + row]
    pl.when(whole)(lambda: attend(slot, True))
    pl.when(~whole)(lambda: attend(slot, False))
    return 1 - slot

  @pl.when(begin >= end)
  def _():
    follow(turn[0])

  turn[0] = lax.fori_loop(begin, end, block, turn[0])
  for head in range(plan.heads):
    out[0, head] = (sums[head] / spread(total[head], sums.shape[2])).astype(
        out.dtype)
