# SPDX-License-Identifier: Apache-2.0
"""`accept_nodes` for GPUs: XLA's reductions, so far."""

from pallas_kernels.target import Target


def accept_nodes(logits, *, temperature, noise, first, draft, drafted,
                 target: Target):
  """See `pallas_kernels.acceptance.op.accept_nodes`."""
  raise NotImplementedError(
      "there is no kernel for GPUs yet; 'xla' makes the same noise and the "
      "same tokens, in a pass for each sum, use it")
