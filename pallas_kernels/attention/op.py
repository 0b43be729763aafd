# SPDX-License-Identifier: Apache-2.0
"""`tree_attention`: committed prefix by length, tree in flight by a tiny mask.

Decode is T = 1, verification T = N, prefill a chunk: one op. No mask spans the
prefix: a slot is seen if it holds a position, and if that position lies within
the token's window.
"""

from jaxtyping import Array, Float, Int, Int8, UInt32

from pallas_kernels.attention import gpu, tpu, xla
from pallas_kernels.dispatch import dispatch
from pallas_kernels.target import Implementation

_IMPLEMENTATIONS = {"tpu": tpu.tree_attention, "gpu": gpu.tree_attention,
                    "xla": xla.tree_attention}

# Committed keys or values: a buffer a row, or a pool of pages.
Committed = (Float[Array, "B G S K"] | Float[Array, "X G page K"]
             | Int8[Array, "B G S K"] | Int8[Array, "X G page K"])
Scales = Float[Array, "B G S"] | Float[Array, "X G page"]
# Those that tell streams apart; the others say that they do not.
_STREAMED = ("tpu", "xla")
# Those that merge what several devices found.
_MERGED = ("xla",)


def tree_attention(
    query: Float[Array, "B T H K"],
    key: Committed,
    value: Committed,
    fresh_key: Float[Array, "B N G K"],
    fresh_value: Float[Array, "B N G K"],
    *,
    slot_positions: Int[Array, "B S"],
    positions: Int[Array, "B T"],
    fresh_positions: Int[Array, "B N"],
    seen: UInt32[Array, "T W"] | UInt32[Array, "B T W"],
    scale: float,
    key_scale: Scales | None = None,
    value_scale: Scales | None = None,
    table: Int[Array, "B M"] | None = None,
    window: int | None = None,
    logits_soft_cap: float | None = None,
    slot_streams: Int[Array, "B S"] | None = None,
    readable: UInt32[Array, "T"] | None = None,
    across: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T H K"]:
  """Grouped-query attention of T tokens to S committed slots and N fresh ones.

  Args:
    query: heads `g * (H // G) ...` share key/value head g.
    key: committed keys. Heads come before slots, so that the two dimensions a
      tile spans are neighbours and no backend transposes a cache.
    slot_positions: the position each slot holds, -1 where it holds none.
    positions: the position of each token.
    fresh_positions: the position of each fresh key.
    seen: the fresh keys each token sees, one bit each: W words (see `pack`).
    scale: what scores are multiplied by.
    key_scale: what stands in `key`, times this, are the keys: float32, one for
      each slot and head. For keys of eight bits, int8 or float8.
    value_scale: the same for `value`.
    table: the pages of each row, in order, where `key` and `value` are pools
      of pages; slot s lies in page `table[b, s // page]`, and what stands in
      slots without a position may be anything.
    window: how many positions a token sees, itself included; None for all.
    logits_soft_cap: scores become `cap * tanh(score / cap)` (Gemma 2).
    slot_streams: the stream each slot is of, below 32, where a prefix holds
      several side by side; None for one.
    readable: with `slot_streams`, the streams each token may read, one bit
      each. Of those it sees the slots whose position comes before its own.
    across: the mesh axis, within a `shard_map`, over which slots are split:
      `key`, `value`, `slot_positions` and `slot_streams` are this device's,
      all others are the same on all, and so is what is returned.

  Returns:
    The attended values, in the dtype of `query`. Scores and softmax are in
    float32; eight bits are widened to the dtype of `query`, others are
    multiplied as they are.

  Raises:
    ValueError: one of `key_scale` and `value_scale` without the other.
  """
  if (key_scale is None) != (value_scale is None):
    raise ValueError("tree_attention: key_scale and value_scale go together, "
                     "got one of them")
  implementations, more = dict(_IMPLEMENTATIONS), {}
  if slot_streams is not None:
    more |= dict(slot_streams=slot_streams, readable=readable)
    implementations = {name: call if name in _STREAMED else _one_stream
                       for name, call in _IMPLEMENTATIONS.items()}
  if across is not None:
    more["across"] = across
    implementations = {name: call if name in _MERGED else _whole
                       for name, call in implementations.items()}
  return dispatch(
      "tree_attention", implementations, implementation,
      query, key, value, fresh_key, fresh_value,
      slot_positions=slot_positions, positions=positions,
      fresh_positions=fresh_positions, seen=seen, scale=scale,
      key_scale=key_scale, value_scale=value_scale, table=table,
      window=window, logits_soft_cap=logits_soft_cap,
      **more)


def _one_stream(*unused: object, **also_unused: object):
  raise NotImplementedError("it takes a prefix of one stream; use 'xla'")


def _whole(*unused: object, **also_unused: object):
  raise NotImplementedError("it takes all slots of a row, and these are split "
                            "over devices; use 'xla'")
