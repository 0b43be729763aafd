# SPDX-License-Identifier: Apache-2.0
"""A stack of MLP blocks that rows leave early, and what it reads.

The program is the same whoever leaves when: all layers are in it, and those
that no row needs any more cost neither arithmetic nor transfer. (A row that
leaves saves arithmetic alone: its neighbours need the weights.)
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.matmul.op import fused_mlp
from pallas_kernels.target import Implementation


def early_exit_stream(
    x: Float[Array, "B D"],
    norm: Float[Array, "L D"],
    gate: Any,
    up: Any,
    down: Any,
    *,
    layers: range,
    leaves: Callable[[Any, Any], Any],
    eps: float,
    activation: str,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B D"], Int[Array, ""]]:
  """Takes each row through the MLP blocks of `layers` until it leaves.

  Args:
    norm, gate, up, down: weights, as `fused_mlp` takes them.
    leaves: `leaves(x, layer)` says after each layer which rows go no further,
      as `Bool[B]`.

  Returns:
    The residual stream, each row's behind its last layer, and the number of
    layers whose weights were read.
  """
  def step(layer, state):
    x, live, read = state
    y = fused_mlp(x, norm, gate, up, down, layer, live, eps=eps,
                  activation=activation, implementation=implementation)
    read = read + jnp.any(live).astype(jnp.int32)
    x = x + y.astype(x.dtype)
    return x, live & ~leaves(x, layer), read

  live = jnp.ones(len(x), bool)
  x, _, read = lax.fori_loop(layers.start, layers.stop, step,
                             (x, live, jnp.int32(0)))
  return x, read


def expected_bytes(share: float, *, rows: int, lower: int, depth: int,
                   layer_bytes: int) -> float:
  """Bytes of weights a step reads, on average.

  Args:
    share: of rows that leave after `lower` of `depth` layers, each row
      regardless of the others; the rest stay to the end.
    layer_bytes: of the weights of one layer.
  """
  stays = 1 - share ** rows
  return layer_bytes * (lower + (depth - lower) * stays)
