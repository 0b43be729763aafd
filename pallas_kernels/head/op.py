# SPDX-License-Identifier: Apache-2.0
"""`proposal_head`: the likeliest tokens and how sure a head is, in one pass.

What a drafter wants of `[B V]` logits is a few numbers a row. The kernels walk
the vocabulary in tiles, read each row of the unembedding once, and never write
a logit to memory.

The products of a head's own block (a lens, a gated MLP) come before: each of
their weights is read once by any way of computing them, and what passes
between is one vector a row, so that a kernel could save nothing there. The
final norm is inside.
"""

from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.dispatch import dispatch
from pallas_kernels.head import gpu, tpu, xla
from pallas_kernels.head.law import Forecast
from pallas_kernels.target import Implementation

_IMPLEMENTATIONS = {"tpu": tpu.proposal_head, "gpu": gpu.proposal_head,
                    "xla": xla.proposal_head}


def proposal_head(
    x: Float[Array, "B D"],
    norm: Float[Array, "D"],
    unembedding: Float[Array, "V D"],
    *,
    eps: float,
    count: int = 1,
    logits_soft_cap: float | None = None,
    tokens: Int[Array, "V"] | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
    noise: UInt32[Array, "B 2"] | None = None,
    temperature: Float[Array, "B"] | None = None,
    implementation: Implementation = None,
) -> Forecast:
  """The law `softmax(rms_norm(x) @ unembedding.T)`, in a few numbers.

  Args:
    x: the residual stream, behind the head's block.
    norm: the weight of the final norm.
    unembedding: outputs first, as an embedding is, so that it can be one.
    eps: of the norm.
    count: K, how many tokens.
    logits_soft_cap: logits become `cap * tanh(logit / cap)` (Gemma 2).
    tokens: the ids that rows of `unembedding` stand for, if it is trimmed to
      the likeliest of a vocabulary; None where they are their own.
    allowed: a bit for each row of `unembedding` (see `pack`): the others have
      no probability. For a trimmed one, `pack(flags[:, tokens])`.
    noise: the words of a key for each row; then `tokens` are drawn, without
      replacement and in order: the best of `logit / temperature + gumbel`,
      with the noise of `jax.random.gumbel` under that key at the token's id.
      The other results are those of the law itself.
    temperature: of the draw; a row of 0 gets its likeliest tokens.

  Returns:
    See `Forecast`. Norm, sums and softmax are in float32; the product is one
    in the dtype of `x` and `unembedding`, summed in float32.

  Raises:
    ValueError: one of `noise` and `temperature` without the other, or `count`
      is not from 1 to V.
    NotImplementedError: the implementation asked for does not take these.
  """
  if (noise is None) != (temperature is None):
    raise ValueError("proposal_head: noise and temperature come together")
  if not 1 <= count <= unembedding.shape[0]:
    raise ValueError(f"proposal_head: count must be from 1 to "
                     f"{unembedding.shape[0]}, got {count}")
  return dispatch(
      "proposal_head", _IMPLEMENTATIONS, implementation, x, norm, unembedding,
      eps=eps, count=count, logits_soft_cap=logits_soft_cap, tokens=tokens,
      allowed=allowed, noise=noise, temperature=temperature)
