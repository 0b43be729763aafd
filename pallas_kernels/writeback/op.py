# SPDX-License-Identifier: Apache-2.0
"""`commit_kv`: the accepted nodes of every row enter the cache, in place.

Keys and values of all layers in one call. Nothing is written but what was
accepted, and nothing else of a cache is read or copied.
"""

from jaxtyping import Array, Float, Int, Int8

from pallas_kernels.dispatch import dispatch
from pallas_kernels.target import Implementation
from pallas_kernels.writeback import gpu, tpu, xla

_IMPLEMENTATIONS = {"tpu": tpu.commit_kv, "gpu": gpu.commit_kv,
                    "xla": xla.commit_kv}

Buffer = Float[Array, "X G S K"] | Int8[Array, "X G S K"]
Scale = Float[Array, "X G S"]


def commit_kv(
    buffers: tuple[Buffer, ...],
    fresh: tuple[Float[Array, "B N G K"], ...],
    path: Int[Array, "B P"],
    slots: Int[Array, "B P"],
    *,
    scales: tuple[Scale, ...] | None = None,
    paged: bool = False,
    implementation: Implementation = None,
) -> tuple[tuple[Buffer, ...], tuple[Scale, ...] | None]:
  """`buffers[i][b, :, slots[b, p]] = fresh[i][b, path[b, p]]`, for all i.

  Donate the buffers: they come back in the same memory. Fresh nodes that are
  not written may hold anything.

  Args:
    buffers: keys and values of any number of layers, in any order, all of one
      shape and dtype. X is B, and S the slots of a row.
    fresh: the nodes in flight, one array for each buffer.
    path: of each row, the node of the p-th write.
    slots: the slot it goes to, at least 0; S or more for none. Slots of a row
      that are written differ.
    scales: of int8 buffers, what their values are to be multiplied by, one
      for each token and head; a node is rounded on its way, the largest of
      its absolute values to 127.
    paged: buffers are pools of X pages of S slots: slot s is slot `s % S` of
      page `s // S`, and X * S or more is none. No page is written by two rows.

  Returns:
    The buffers, and the scales.

  Raises:
    ValueError: buffers that are not alike, or of int8 without scales.
    NotImplementedError: the implementation asked for does not take these.
  """
  if len(buffers) != len(fresh) or not buffers:
    raise ValueError(f"commit_kv: {len(buffers)} buffers for {len(fresh)} "
                     "fresh arrays; give one of each, and at least one")
  for name, all_of in (("buffers", buffers), ("fresh", fresh),
                       ("scales", scales or ())):
    if len({(x.shape, str(x.dtype)) for x in all_of}) > 1:
      raise ValueError(f"commit_kv: {name} must be alike; call it once for "
                       "each shape and dtype")
  if (buffers[0].dtype.kind == "i") != (scales is not None):
    raise ValueError("commit_kv: scales belong to int8 buffers, and int8 "
                     f"buffers to scales, got {buffers[0].dtype}")
  if scales is not None and len(scales) != len(buffers):
    raise ValueError(f"commit_kv: {len(scales)} scales for {len(buffers)} "
                     "buffers")
  return dispatch("commit_kv", _IMPLEMENTATIONS, implementation, buffers,
                  fresh, path, slots, scales=scales, paged=paged)
