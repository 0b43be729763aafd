# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows, where reading the weight is all the time there is.

Weights have their outputs first. Three kinds are taken: plain arrays, `QArray`
(eight bits, a scale for each output) and `GroupedQArray` (four bits, a scale
for each group of inputs). Activations are never rounded to integers here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.matmul import gpu, tpu, xla
from pallas_kernels.quantized import GroupedQArray, QArray
from pallas_kernels.target import Implementation

_STREAMED = {"tpu": tpu.streamed_matmul, "gpu": gpu.streamed_matmul,
             "xla": xla.streamed_matmul}
_QUANTIZED = {"tpu": tpu.quantized_matmul, "gpu": gpu.quantized_matmul,
              "xla": xla.quantized_matmul}
_FUSED = {"tpu": tpu.fused_mlp, "gpu": gpu.fused_mlp, "xla": xla.fused_mlp}


def streamed_matmul(
    x: Float[Array, "B D"],
    stack: Float[Array, "L F D"] | QArray | GroupedQArray,
    layer: Int[Array, ""] | int,
    live: Bool[Array, "B"] | None = None,
    *,
    implementation: Implementation = None,
) -> Float[Array, "B F"]:
  """`x` times one layer of a stack of weights: `x @ stack[layer].T`.

  The kernels copy no layer out of the stack, and where no row is live they
  read none of it.

  Args:
    stack: the weights of all layers.
    layer: which one; traced or not.
    live: the rows that have not exited, None for all. The others give zeros,
      whatever they hold.

  Returns:
    The products in float32, summed in float32.

  Raises:
    NotImplementedError: the implementation asked for does not take these
      shapes or dtypes.
  """
  return dispatch("streamed_matmul", _STREAMED, implementation, x, stack,
                  jnp.asarray(layer, jnp.int32), live)


def quantized_matmul(
    x: Float[Array, "B D"],
    weight: QArray | GroupedQArray,
    *,
    implementation: Implementation = None,
) -> Float[Array, "B F"]:
  """`x` times a weight of eight or four bits, for 1 to 64 rows or so.

  The kernels widen the integers on the chip: a wide weight never is in
  memory. (`pallas_kernels.quantized.matmul` rounds `x` to integers too.)

  Args:
    weight: `[F D]`; groups of 32, 64 or 128 inputs in a kernel.

  Returns:
    The products in float32, summed in float32.

  Raises:
    NotImplementedError: as of `streamed_matmul`.
  """
  return dispatch("quantized_matmul", _QUANTIZED, implementation, x, weight)


def fused_mlp(
    x: Float[Array, "B D"],
    norm: Float[Array, "*L D"],
    gate: Float[Array, "*L F D"] | QArray,
    up: Float[Array, "*L F D"] | QArray,
    down: Float[Array, "*L D F"] | QArray,
    layer: Int[Array, ""] | int = 0,
    live: Bool[Array, "B"] | None = None,
    *,
    eps: float,
    activation: str,
    implementation: Implementation = None,
) -> Float[Array, "B D"]:
  """A gated MLP behind its norm: `down(act(gate(n)) * up(n))`, n = norm(x).

  The residual is not added: some models norm what comes out first. In the
  kernels every weight is read once. On a TPU the hidden values stay on the
  chip; on a GPU they pass through memory, between two kernels.

  Args:
    x: the residual stream of a few rows.
    norm: multipliers of the root-mean-square norm.
    gate, up, down: weights, of one layer or of a stack of them.
    layer: which of the stack.
    live: the rows that have not exited, None for all. The others give zeros;
      where there are no others, no weight is read.
    eps: added to the mean square.
    activation: "silu", "gelu" or "gelu_tanh".

  Returns:
    The block's outcome in float32. Norm, activation and sums are in float32;
    normed rows and hidden values are rounded to the dtype of `x`.

  Raises:
    NotImplementedError: as of `streamed_matmul`.
  """
  if gate.ndim == 2:
    norm, gate, up, down = (one_layer(w) for w in (norm, gate, up, down))
  return dispatch("fused_mlp", _FUSED, implementation, x, norm, gate, up, down,
                  jnp.asarray(layer, jnp.int32), live, eps=eps,
                  activation=activation)


def one_layer(weight: Any) -> Any:
  """A weight as a stack of one."""
  return jax.tree.map(lambda x: x[None], weight)
