# SPDX-License-Identifier: Apache-2.0
"""Tables for the law tests: given rows in, a batch of sessions, tables out."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from jaxspec.base import Request
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.options import Options, as_request
from jaxspec.streams import cache as cache_
from jaxspec.streams import loop, rows, state
from jaxspec.streams.cache import StreamCache
from jaxspec.streams.layout import StreamLayout
from jaxspec.streams.model import StreamModel

ROOM, QUEUE, STOPS = 40, 16, 4
GREEDY = Options(max_new_tokens=20)
SAMPLED = Options(
    max_new_tokens=20, temperature=0.7, top_p=0.9, top_k=40, seed=7,
    repetition_penalty=1.1, frequency_penalty=0.1)


def tinted(backbone: Any, ids: int = 12, scale: float = 0.5) -> StreamModel:
  """A backbone with random stream embeddings."""
  rng = np.random.default_rng(5)
  shape = (ids, backbone.config.width)
  return StreamModel(backbone, jnp.asarray(
      scale * rng.standard_normal(shape), jnp.float32))


def random_table(layout: StreamLayout, height: int, *, seed: int = 0,
                 holes: float = 0.3, vocab: int = 64
                 ) -> tuple[np.ndarray, np.ndarray]:
  """Cells, and which of them hold a token; the last row is full."""
  rng = np.random.default_rng([seed, height])
  shape = (height, layout.count)
  tokens = rng.integers(2, vocab, shape).astype(np.int32)
  empty = rng.random(shape) < holes
  empty[-1] = False
  if layout.silence is None:
    return tokens, ~empty
  tokens[tokens == layout.silence] = layout.silence + 1
  return np.where(empty, layout.silence, tokens), np.ones(shape, bool)


def pad(x: np.ndarray, height: int) -> np.ndarray:
  widths = [(0, height - len(x))] + [(0, 0)] * (x.ndim - 1)
  return np.pad(x, widths)


def requests(layout: StreamLayout, tables: Sequence[np.ndarray],
             options: Options | Sequence[Options]) -> Request:
  """One request a stream of each session."""
  if isinstance(options, Options):
    options = [options] * len(tables)
  each = [o for o in options for _ in range(layout.count)]
  lengths = [int(n) for live in tables for n in live.sum(axis=0)]
  return as_request(each, lengths, (), vocab=64, stops=STOPS, biases=4)


def empty(model: StreamModel, layout: StreamLayout, sessions: int, *,
          kind: Any = ContiguousCache, room: int = ROOM, prefix: int = 16,
          **options: Any) -> state.StreamState:
  @jax.jit
  def make(model):
    cache = cache_.empty(
        model.backbone, layout, kind, sessions, prefix + room * layout.count,
        jnp.float32, **options)
    return loop.init(model, layout, cache, room=room, queue=QUEUE,
                     stops=STOPS, biases=4)
  return make(model)


def begin(model: StreamModel, layout: StreamLayout,
          tables: Sequence[tuple[np.ndarray, np.ndarray]],
          options: Options | Sequence[Options] = GREEDY, *,
          prefix: Sequence[int] = (), batch: Any = None,
          at: Sequence[int] | None = None, chunk: int = 16,
          room: int = ROOM, **cache: Any) -> state.StreamState:
  """Sessions that go on behind given tables."""
  count = np.array([len(t) for t, _ in tables], np.int32)
  some = max(chunk // layout.count, 1)
  height = -(-int(count.max()) // some) * some
  padded = np.zeros((len(tables), chunk if prefix else 0), np.int32)
  padded[:, :len(prefix)] = prefix
  reading = loop.prefill(
      model, layout, padded,
      np.full(len(tables), len(prefix), np.int32),
      np.stack([pad(t, height) for t, _ in tables]),
      np.stack([pad(v, height) for _, v in tables]), count, chunk=chunk,
      dtype=jnp.dtype(jnp.float32))
  if batch is None:
    batch = empty(model, layout, len(tables), room=room, **cache)
  open_ = np.array([[at in layout.written for at in range(layout.count)]
                    for _ in tables])
  rows_ = np.arange(len(tables)) if at is None else np.array(at)
  return loop.insert(
      layout, batch, rows_.astype(np.int32), reading,
      requests(layout, [v for _, v in tables], options), open_,
      np.full(len(tables), batch.cache.capacity, np.int32))


def go(batch: state.StreamState) -> state.StreamState:
  """Lets all sessions go."""
  no = np.zeros(len(batch.base), bool)
  return loop.hold(batch, no, no)


def push(layout: StreamLayout, batch: state.StreamState, session: int,
         stream: int, tokens: Sequence[int]) -> state.StreamState:
  """Up to eight words for a stream, as something new."""
  padded = np.zeros(8, np.int32)
  padded[:len(tokens)] = tokens
  return loop.push(layout, batch, np.int32(session), np.int32(stream), padded,
                   np.int32(len(tokens)), np.bool_(True))


def finish(model: StreamModel, layout: StreamLayout, batch: state.StreamState,
           drafter: Any = None, rows_: int = 2**20) -> state.StreamState:
  """Writes rows until every session waits, or has so many more."""
  return loop.decode(model, layout, drafter, go(batch), np.int32(2**30),
                     np.int32(rows_))


@struct.dataclass
class Told:
  """Knows what the next two rows will be, but for some tokens."""

  tables: Int[Array, "B R C"]

  @classmethod
  def of(cls, known: Sequence[Any], room: int = ROOM) -> "Told":
    """One for these tables, of sessions side by side."""
    return cls(jnp.asarray(np.stack([pad(np.array(cells), room)
                                     for cells in known]), jnp.int32))

  def propose(self, model, layout, batch):
    row = batch.lines.row[:, None] + 1 + jnp.arange(2)[None]
    known = jnp.take_along_axis(self.tables, jnp.minimum(
        row, self.tables.shape[1] - 1)[..., None], axis=1)
    return known + (row % 5 == 0)[..., None], jnp.ones(len(known), bool)


def table(batch: state.StreamState, session: int = 0) -> np.ndarray:
  """The cells of a session's rows, -1 where there is none."""
  lines = batch.lines
  filled, row, counts, texts = jax.device_get(
      (lines.filled, lines.row, lines.counts, lines.texts))
  filled = filled[session, :row[session] + 1]
  cells = np.full(filled.shape, -1)
  for stream in range(filled.shape[1]):
    cells[filled[:, stream], stream] = texts[
        session, stream, :counts[session, stream]]
  return cells


def logits(model: StreamModel, layout: StreamLayout, tokens: np.ndarray,
           live: np.ndarray, *, prefix: Sequence[int] = (),
           steps: Sequence[int] | None = None) -> np.ndarray:
  """What the model says behind every cell of one table.

  Args:
    steps: how many rows each pass takes; None takes all at once.
  """
  steps = [len(tokens)] if steps is None else steps
  return _logits(model, layout, tokens[None], live[None],
                 np.asarray(prefix, np.int32)[None], steps)[0]


def _logits(model, layout, tokens, live, prefix, steps):
  base = np.full(1, prefix.shape[1], np.int32)
  cache = StreamCache.over(model.backbone.init_cache(
      ContiguousCache, 1, prefix.shape[1] + tokens.size, jnp.float32))
  if prefix.shape[1]:
    cache = _prefix(model, layout, cache, prefix)
  counts, first, said = np.zeros((1, layout.count), np.int32), 0, []
  for some in steps:
    cells = live[:, first:first + some]
    logits, cache = _pass(
        model, layout, cache, tokens[:, first:first + some], cells,
        np.full(1, first, np.int32), counts, base)
    said.append(logits[0])
    counts, first = counts + cells.sum(axis=1, dtype=np.int32), first + some
  return np.concatenate(said)[None]


@functools.partial(jax.jit, static_argnames="layout")
def _prefix(model, layout, cache, prefix):
  block = rows.prefix_block(layout, prefix, prefix >= 0,
                            jnp.zeros((), jnp.int32))
  _, fresh = rows.extend(model, layout, cache, block)
  return rows.commit(cache, block, fresh,
                     jnp.full(1, prefix.shape[1], jnp.int32))


@functools.partial(jax.jit, static_argnames="layout")
def _pass(model, layout, cache, tokens, live, first, counts, base):
  block = rows.table_block(layout, tokens, live, first, counts, base)
  x, fresh = rows.extend(model, layout, cache, block)
  cache = rows.commit(cache, block, fresh,
                      jnp.full(1, tokens.shape[1], jnp.int32))
  said = model.backbone.unembed(x.reshape(1, -1, x.shape[-1]))
  return said.reshape(*tokens.shape, -1), cache


def published_tensors(backbone: Any) -> dict[str, np.ndarray]:
  """The tensors of a Llama or Qwen3, named as their checkpoints name them."""
  width = backbone.config.width
  tensors = {"model.embed_tokens.weight": backbone.embedding,
             "model.norm.weight": backbone.final_norm}
  for at, block in enumerate(backbone.layers):
    qkv = block.qkv[...]
    names = {
        "input_layernorm": block.attn_norm, "self_attn.o_proj": block.out,
        "post_attention_layernorm": block.mlp_norm,
        "mlp.gate_proj": block.gate, "mlp.up_proj": block.up,
        "mlp.down_proj": block.down,
        "self_attn.q_proj": qkv[:, :-2].reshape(-1, width),
        "self_attn.k_proj": qkv[:, -2].reshape(-1, width),
        "self_attn.v_proj": qkv[:, -1].reshape(-1, width)}
    if backbone.config.qk_norm:
      names |= {"self_attn.q_norm": block.q_norm,
                "self_attn.k_norm": block.k_norm}
    tensors |= {f"model.layers.{at}.{name}.weight": value
                for name, value in names.items()}
  return {name: np.array(value[...], np.float32)
          for name, value in tensors.items()}


def published_config(backbone: Any, family: str) -> dict[str, Any]:
  """The config.json of such a checkpoint."""
  c = backbone.config
  return {
      "model_type": family, "vocab_size": c.vocab, "hidden_size": c.width,
      "intermediate_size": c.mlp, "num_hidden_layers": c.depth,
      "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
      "head_dim": c.head_size, "max_position_embeddings": c.context,
      "rms_norm_eps": c.norm_eps, "rope_theta": c.ropes[0].theta,
      "tie_word_embeddings": c.tied}
