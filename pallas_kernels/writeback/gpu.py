# SPDX-License-Identifier: Apache-2.0
"""`commit_kv` for GPUs: XLA's slice updates, so far."""

from pallas_kernels.target import Target


def commit_kv(buffers, fresh, path, slots, *, scales, paged, target: Target):
  """See `pallas_kernels.writeback.op.commit_kv`."""
  raise NotImplementedError(
      "there is no kernel for GPUs yet; 'xla' updates a slice for each node, "
      "in place, use it")
