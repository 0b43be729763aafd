# SPDX-License-Identifier: Apache-2.0
"""Shapes at which `tree_attention` is compiled, counted and timed."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import tpu
from pallas_kernels.attention.op import tree_attention
from pallas_kernels.attention.words import pack
from pallas_kernels.case import Case

# Query heads, key/value heads, head size; of 70B the part of one of eight.
# And the page: heads of 64 are not padded where a page fills a row of lanes.
MODELS = {"smollm2-135m": (9, 3, 64, 128), "llama3-8b": (32, 8, 128, 64),
          "llama3-70b/8": (8, 1, 128, 64)}
ROWS, HELD, SLOTS = 8, 4096, 5120


def cases() -> Iterator[Case]:
  """Decoding, verification and a chunk of a prompt, 8 rows of 4096 tokens."""
  for model in MODELS:
    for what, tokens in (("decode", 1), ("verify 8", 8), ("verify 64", 64)):
      yield _case(model, what, tokens)
    yield _case(model, "prefill 256", 256, rows=1)
    yield _case(model, "decode, pages", 1, paged=True)
    yield _case(model, "verify 8, pages", 8, paged=True)
    yield _case(model, "verify 8, window 1024", 8, window=1024)
    yield _case(model, "decode, int8", 1, stored=jnp.int8)
    yield _case(model, "verify 8, int8", 8, stored=jnp.int8)
    yield _case(model, "verify 8, float8", 8, stored=jnp.float8_e4m3fn)
  # As of Gemma 2; and a row of four streams, side by side.
  yield _case("llama3-8b", "verify 8, soft cap 50", 8, cap=50.0)
  for model in MODELS:
    yield _case(model, "a row of 4 streams", 4, streams=4)
  yield _case("llama3-8b", "verify 8, int8 pages", 8, paged=True,
              stored=jnp.int8, page=128)
  yield _case("llama3-8b", "decode of 1 row of 128k", 1, rows=1, held=130000,
              slots=131072)


def _case(model, what, tokens, *, rows=ROWS, held=HELD, slots=SLOTS,
          paged=False, window=None, stored=jnp.bfloat16, page=None, cap=None,
          streams=0):
  heads, groups, size, usual = MODELS[model]
  page = page or usual
  dtype, words = jnp.bfloat16, -(-tokens // 32)
  scaled = jnp.dtype(stored).itemsize == 1
  pages = slots // page
  where = ((rows * pages + 1, groups, page) if paged else
           (rows, groups, slots))
  shape = jax.ShapeDtypeStruct
  buffer, scales = shape((*where, size), stored), shape(where, jnp.float32)
  fresh = shape((rows, tokens, groups, size), dtype)
  ints = functools.partial(shape, dtype=jnp.int32)
  arguments = (
      shape((rows, tokens, heads, size), dtype), buffer, buffer, fresh, fresh,
      ints((rows, slots)), ints((rows, tokens)), ints((rows, tokens)),
      shape((tokens, words), jnp.uint32),
      scales if scaled else None, scales if scaled else None,
      ints((rows, pages)) if paged else None,
      ints((rows, slots)) if streams else None,
      shape((tokens,), jnp.uint32) if streams else None)

  def call(query, key, value, fresh_key, fresh_value, slot_positions,
           positions, fresh_positions, seen, key_scale, value_scale, table,
           slot_streams, readable, *, implementation=None):
    return tree_attention(
        query, key, value, fresh_key, fresh_value,
        slot_positions=slot_positions, positions=positions,
        fresh_positions=fresh_positions, seen=seen, scale=size ** -0.5,
        key_scale=key_scale, value_scale=value_scale, table=table,
        window=window, logits_soft_cap=cap, slot_streams=slot_streams,
        readable=readable, implementation=implementation)

  def sample(seed):
    rng = np.random.default_rng(seed)

    def draw(like):
      if like.dtype == jnp.int8:
        return jnp.asarray(rng.integers(-127, 128, like.shape, np.int8))
      return jnp.asarray(rng.standard_normal(like.shape, np.float32),
                         like.dtype)
    query, key, value, fresh_key, fresh_value = map(draw, arguments[:5])
    slot = np.arange(slots)
    # Tokens of streams that stand side by side have one position.
    depth = slot // max(streams, 1)
    slot_positions = np.tile(np.where(slot < held, depth, -1), (rows, 1))
    positions = np.tile(
        held // max(streams, 1) + np.arange(tokens) * (not streams), (rows, 1))
    mask = np.eye(tokens) > 0 if streams else np.tri(tokens, dtype=bool)
    scale = [draw(scales) * 0.002 + 0.02 if scaled else None for _ in "kv"]
    table = (jnp.asarray(1 + rng.permutation(rows * pages).reshape(rows, -1),
                         jnp.int32) if paged else None)
    of_streams = [None, None]
    if streams:                        # each token reads its own and the first
      of_streams = [jnp.asarray(np.tile(slot % streams, (rows, 1)), jnp.int32),
                    1 | jnp.uint32(1) << jnp.arange(tokens, dtype=jnp.uint32)]
    return (query, key, value, fresh_key, fresh_value,
            jnp.asarray(slot_positions, jnp.int32),
            jnp.asarray(positions, jnp.int32),
            jnp.asarray(positions, jnp.int32), pack(mask), *scale, table,
            *of_streams)

  # Of a windowed layer, what the first token sees lies that far back.
  visible = held if window is None else window - 1
  slot_bytes = 2 * groups * (size * jnp.dtype(stored).itemsize + 4 * scaled)
  least = rows * (visible * (slot_bytes + 4) + 2 * tokens * heads * size * 2
                  + 2 * tokens * groups * size * 2) + tokens * words * 4
  return Case(
      "tree_attention", f"{model}, {what} of {held}", call, arguments, least,
      4 * rows * tokens * heads * size * (visible + tokens),
      tpu.moved_bytes(
          (rows, tokens, heads, size), buffer.shape, tokens, (held,) * rows,
          key_dtype=stored, dtype=dtype, slots=slots, paged=paged,
          scales=scaled, words=words, window=window,
          streamed=bool(streams)),
      sample)
