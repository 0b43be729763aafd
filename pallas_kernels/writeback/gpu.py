# SPDX-License-Identifier: Apache-2.0
"""`commit_kv` for GPUs."""

from pallas_kernels.target import Target


def commit_kv(buffers, fresh, path, slots, *, scales, paged, target: Target):
  raise NotImplementedError("todo; use 'xla'")
