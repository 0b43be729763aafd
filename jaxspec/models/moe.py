# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts without capacity: a token never depends on its peers.

Each token is copied to its experts, the copies are sorted by expert, and each
expert multiplies its own: the work grows with `per_token`, not with the number
of experts (but on a GPU for a few tokens, where reading the weights is all the
time). On a mesh each shard does so for the experts (and the slice of
their width) it holds, for the rows of its data shard, and one sum over the
shards follows; neither tokens nor weights travel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxspec import kernels, sharding
from jaxspec.models.layers import ACTIVATIONS, linear


def mixture(x: Float[Array, "B T D"], router: Float[Array, "E D"],
            gate_up: Float[Array, "E 2 F D"], down: Float[Array, "E D F"], *,
            per_token: int, normalize: bool,
            activation: str) -> Float[Array, "B T D"]:
  """Sends each token to its `per_token` best experts, none dropped.

  Args:
    normalize: whether the chosen weights are rescaled to sum to one.

  Returns:
    The weighted sum of the experts' outputs, in float32.
  """
  def mix(x, router, gate_up, down, first=0):
    chosen, experts = _route(x, router, per_token, normalize)
    return _mix(x, chosen, experts - first, gate_up, down, activation)

  mesh = sharding.current()
  if mesh is None:
    return mix(x, router, gate_up, down)

  by_row = sharding.spec(("rows", None, None), x.shape, mesh)
  wide = sharding.spec(("experts", None, "mlp", None), gate_up.shape, mesh)
  deep = sharding.spec(("experts", None, "mlp"), down.shape, mesh)
  owner, slice_axis = wide[0], wide[2]

  def shard(x, router, gate_up, down):
    # Every shard routes its rows; XLA would gather them to find the top k.
    first = lax.axis_index(owner) * len(gate_up) if owner else 0
    y = mix(x, router, gate_up, down, first)
    split = tuple(axis for axes in (owner, slice_axis) if axes
                  for axis in ((axes,) if isinstance(axes, str) else axes))
    return lax.psum(y, split) if split else y

  # Nothing inside says which values differ between shards: no check_vma.
  return jax.shard_map(
      shard, in_specs=(by_row, PartitionSpec(), wide, deep), out_specs=by_row,
      check_vma=False)(x, router, gate_up, down)


def _route(x, router, per_token, normalize):
  weights = jax.nn.softmax(linear(x, router), axis=-1)          # [B T E]
  chosen, experts = lax.top_k(weights, per_token)
  if normalize:
    chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
  return chosen, experts


def _mix(x, chosen, experts, gate_up, down, activation):
  """The weighted sum over those chosen experts that are in [0, E)."""
  count, per_token = len(gate_up), experts.shape[-1]
  here = (experts >= 0) & (experts < count)
  expert = jnp.where(here, experts, count).reshape(-1)          # [A]
  order = jnp.argsort(expert, stable=True)
  sizes = jnp.sum(expert[None] == jnp.arange(count)[:, None], axis=1,
                  dtype=jnp.int32)
  tokens = x.reshape(-1, x.shape[-1])[order // per_token]
  by_block = functools.partial(_by_block, activation=activation)
  by_large_block = functools.partial(by_block, largest=512)
  tpu = _by_kernel if kernels.allowed() else by_large_block
  few = len(tokens) <= _FEW
  y = lax.platform_dependent(
      tokens, sizes, gate_up, down, cpu=by_block,
      tpu=functools.partial(tpu, activation=activation),
      default=functools.partial(_by_all, activation=activation)
      if few else by_large_block)
  y = y[jnp.argsort(order)].reshape(*experts.shape, -1)         # [B T k D]
  y = jnp.where(here[..., None], y * chosen[..., None], 0)
  return jnp.sum(y, axis=-2)


def _by_kernel(tokens: Float[Array, "A D"], sizes: Int[Array, "E"],
               gate_up: Float[Array, "E 2 F D"], down: Float[Array, "E D F"],
               *, activation: str, interpret: bool = False
               ) -> Float[Array, "A D"]:
  """Runs of `sizes[e]` tokens through expert e; what follows is undefined.

  A TPU's `lax.ragged_dot` would lay the weights out anew in each call, for it
  takes them with the other axis last: a copy as large as the experts.
  """
  groups, _, width, _ = gate_up.shape
  count = len(tokens)
  # One tile of tokens where they are few, so that an expert is read once.
  tile = 256 if count >= 256 * groups else min(-(-count // 16) * 16, 128)
  tokens = jnp.pad(tokens, ((0, -count % tile), (0, 0)))

  def dot(x, weight):
    tiles = tile, _tile(weight.shape[2]), _tile(weight.shape[1])
    # A TPU keeps the axis last of which it need not pad the lanes.
    aside = weight.shape[2] % 128 != 0 and weight.shape[1] % 128 == 0
    if aside:
      weight = jnp.swapaxes(weight, 1, 2)
    return gmm(x, weight, sizes, jnp.float32, tiles, None, None, not aside,
               interpret)

  exact = "highest" if tokens.dtype == jnp.float32 else None
  with jax.default_matmul_precision(exact):
    hidden = dot(tokens, gate_up.reshape(groups, 2 * width, -1))
    hidden = _gate(hidden.reshape(-1, 2, width), activation)
    return dot(hidden.astype(tokens.dtype), down)[:count]


def _tile(size: int) -> int:
  """A megabyte or two of weights is read at a time."""
  return next((n for n in range(1024, 511, -128) if size % n == 0),
              min(size, 1024))


# So many tokens (each times the experts it has) are multiplied by the time that
# a GPU has read a weight.
_FEW = 256


def _by_all(tokens: Float[Array, "A D"], sizes: Int[Array, "E"],
            gate_up: Float[Array, "E 2 F D"], down: Float[Array, "E D F"], *,
            activation: str) -> Float[Array, "A D"]:
  """The same: each token through all experts, of which it keeps one.

  Reads each weight once. XLA for a GPU would copy one expert out of the stack
  before it multiplies by it, and all of them for `lax.ragged_dot`.
  """
  own = jnp.minimum(jnp.searchsorted(
      jnp.cumsum(sizes), jnp.arange(len(tokens)), side="right"), len(sizes) - 1)
  hidden = _gate(linear(tokens, gate_up), activation)           # [A E F]
  y = lax.dot_general(
      hidden.astype(tokens.dtype), down, (((2,), (2,)), ((1,), (0,))),
      precision=lax.Precision.HIGHEST if tokens.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32)                       # [E A D]
  return y[own, jnp.arange(len(tokens))]


def _by_block(tokens: Float[Array, "A D"], sizes: Int[Array, "E"],
              gate_up: Float[Array, "E 2 F D"], down: Float[Array, "E D F"],
              *, activation: str, largest: int = 64) -> Float[Array, "A D"]:
  """The same, a few tokens of one expert at a time, `largest` at most.

  But for a TPU XLA multiplies a ragged dot out over all experts, which on a CPU
  is slower than the dense product (`experiments/expert_products.py`).
  """
  count, groups = len(tokens), len(sizes)
  # About twice a group's average: seldom two blocks, little padding. (One row
  # of bfloat16 has no kernel at all.)
  average = 2 * count // groups
  block = min(max(4, 1 << (average - 1).bit_length() if average else 4),
              largest)
  most = min(count, groups + count // block)

  blocks = (sizes + block - 1) // block                         # [E]
  last, end = jnp.cumsum(blocks), jnp.cumsum(sizes)
  first, start = last - blocks, end - sizes
  nth = jnp.arange(most)
  expert = jnp.minimum(jnp.searchsorted(last, nth, side="right"), groups - 1)
  row = start[expert] + (nth - first[expert]) * block
  rows = jnp.clip(row[:, None] + jnp.arange(block)[None], 0, count - 1)

  def run(_, step):
    expert, rows, live = step
    def multiply():
      up, dn = (lax.dynamic_index_in_dim(w, expert, keepdims=False)
                for w in (gate_up, down))
      hidden = _gate(linear(tokens[rows][None], up)[0], activation)
      return linear(hidden.astype(tokens.dtype)[None], dn)[0]
    def skip():
      return jnp.zeros((block, tokens.shape[1]), jnp.float32)
    return None, lax.cond(live, multiply, skip)

  _, y = lax.scan(run, None, (expert, rows, nth < last[-1]))
  # Back from blocks to rows.
  row = jnp.arange(count)
  owner = jnp.minimum(jnp.searchsorted(end, row, side="right"), groups - 1)
  at = first[owner] * block + row - start[owner]
  return y.reshape(most * block, -1)[jnp.clip(at, 0, most * block - 1)]


def _gate(hidden, activation):
  return ACTIVATIONS[activation](hidden[..., 0, :]) * hidden[..., 1, :]
