# SPDX-License-Identifier: Apache-2.0
"""`accept_nodes`: the verifier's pass over the vocabulary, for N nodes.

Sample and match: a drafted node stands if it is the sample behind its parent.
What decides that, and what log-probabilities and the ratio test need besides,
are a few numbers for each node; the logits are read once.
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.acceptance import gpu, tpu, xla
from pallas_kernels.dispatch import dispatch
from pallas_kernels.target import Implementation

_IMPLEMENTATIONS = {"tpu": tpu.accept_nodes, "gpu": gpu.accept_nodes,
                    "xla": xla.accept_nodes}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judged:
  """What is said of each node.

  Attributes:
    token: the sample behind it; the likeliest token in a greedy row. Of equal
      scores the first wins.
    score: of that token, its perturbed logit: of parts of a vocabulary the
      one with the largest score, the first of them, has the sample.
    logit: of that token, as given.
    total: log-sum-exp of the logits as given: `logit - total` is the token's
      log-probability before any warp.
    chance: of the drafted token, its probability under the model's law.
    excess: how much that law p has over the draft's q, the sum of
      max(p - q, 0): with 1 less that probability a draft from q stands.
  """

  token: Int[Array, "B N"]
  score: Float[Array, "B N"]
  logit: Float[Array, "B N"]
  total: Float[Array, "B N"]
  chance: Float[Array, "B N"] | None = None
  excess: Float[Array, "B N"] | None = None


def accept_nodes(
    logits: Float[Array, "B N V"],
    *,
    temperature: Float[Array, "B"],
    noise: UInt32[Array, "B N 2"],
    first: Int[Array, ""] | None = None,
    draft: Float[Array, "B N V"] | None = None,
    drafted: Int[Array, "B N"] | None = None,
    implementation: Implementation = None,
) -> Judged:
  """Samples behind every node, and judges one draft there.

  Args:
    logits: behind every node, after whatever warps but temperature.
    temperature: of each row; 0 is greedy, and draws no noise.
    noise: `jax.random.key_data` of a key for each node. Token v is perturbed
      by `jax.random.gumbel(key, ...)[v]`; see `pallas_kernels.noise`.
    first: the number of the first of these tokens, where they are a part of
      the vocabulary; 0 if None. Sums are then of this part.
    draft: the law from which `drafted` was drawn behind each node, for the
      ratio test (arXiv:2211.17192); the model's law is the softmax of
      `logits / temperature`, in a greedy row all on the likeliest token.
    drafted: one token behind each node.

  Raises:
    ValueError: one of `draft` and `drafted` without the other, or with
      `first`: the ratio test needs the whole vocabulary.
    NotImplementedError: the implementation asked for does not take these.
  """
  if (draft is None) != (drafted is None):
    raise ValueError("accept_nodes: draft and drafted come together")
  if draft is not None and first is not None:
    raise ValueError("accept_nodes: the ratio test needs the whole vocabulary, "
                     "so draft and first exclude one another")
  parts = dispatch("accept_nodes", _IMPLEMENTATIONS, implementation, logits,
                   temperature=temperature, noise=noise, first=first,
                   draft=draft, drafted=drafted)
  return Judged(*parts)
