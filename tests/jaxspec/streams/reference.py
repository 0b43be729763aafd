# SPDX-License-Identifier: Apache-2.0
"""Both published layouts from their definitions: NumPy in float64, one table
at a time, every mask written out cell by cell, nothing kept between rows."""

from collections.abc import Sequence

import numpy as np


def normed(x, weight, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def turned(x, positions, theta):
  """Rotary embedding, halves rotated; x is [N heads K]."""
  half = x.shape[-1] // 2
  angle = positions[:, None] * theta ** -(np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def logits(backbone, x, positions, mask):
  """A Qwen3 or Llama of this repository's weights, over tokens `x` [N D]."""
  c = backbone.config

  def w(value):
    return np.asarray(value[...], np.float64)
  for layer, block in enumerate(backbone.layers):
    h = normed(x, w(block.attn_norm), c.norm_eps)
    qkv = np.einsum("nd,grkd->ngrk", h, w(block.qkv))
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    if c.qk_norm:
      q = normed(q, w(block.q_norm), c.norm_eps)
      k = normed(k, w(block.k_norm), c.norm_eps)
    theta = c.ropes[layer].theta
    q = turned(q.reshape(len(x), c.heads, -1), positions, theta)
    k = turned(k, positions, theta)
    seen = mask
    if c.windows[layer] is not None:
      far = positions[:, None] - positions[None] >= c.windows[layer]
      seen = mask & ~far
    out = np.zeros((len(x), c.heads, c.head_size))
    for head in range(c.heads):
      group = head // (c.heads // c.kv_heads)
      scores = q[:, head] @ k[:, group].T / np.sqrt(c.head_size)
      scores = np.where(seen, scores, -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      out[:, head] = weights @ v[:, group]
    x = x + out.reshape(len(x), -1) @ w(block.out).T
    h = normed(x, w(block.mlp_norm), c.norm_eps)
    gate = h @ w(block.gate).T
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w(block.up).T)) @ w(
        block.down).T
  x = normed(x, w(backbone.final_norm), c.norm_eps)
  return x @ w(backbone.embedding if c.tied else backbone.lm_head).T


def table_logits(model, tokens: np.ndarray, live: np.ndarray, *, rule: str,
                 ids: Sequence[int], prefix: Sequence[int] = (),
                 prefix_id: int | None = None, silence: int | None = None,
                 skip_silence: bool = False) -> np.ndarray:
  """What is said behind every live cell of a table [n C]; NaN elsewhere.

  Args:
    rule: "counters" (sections 5 and 6 of arXiv:2605.12460) or "rows" (7).
    ids: of the streams in the table of embeddings.
  """
  table = np.asarray(model.backbone.embedding[...], np.float64)
  tint = np.asarray(model.embedding, np.float64)
  cells = [(-1, -1, token, at) for at, token in enumerate(prefix)]
  counts = [0] * tokens.shape[1]
  for row, stream in np.ndindex(tokens.shape):
    if live[row, stream]:
      own = row if rule == "rows" else counts[stream]
      cells.append((row, stream, tokens[row, stream], len(prefix) + own))
      counts[stream] += 1
  count = len(cells)
  mask = np.zeros((count, count), bool)
  for q, (row_q, stream_q, _, at_q) in enumerate(cells):
    for k, (row_k, stream_k, token_k, at_k) in enumerate(cells):
      if q == k:
        mask[q, k] = True
      elif skip_silence and stream_k >= 0 and token_k == silence:
        continue
      elif stream_k < 0:                       # the prefix is causal
        mask[q, k] = stream_q >= 0 or at_k < at_q
      elif stream_q < 0:
        continue
      elif rule == "rows":
        mask[q, k] = row_k < row_q
      elif stream_k == stream_q:
        mask[q, k] = at_k < at_q
      else:                         # it must have come, and be strictly earlier
        mask[q, k] = row_k < row_q and at_k < at_q
  x = np.array([table[token] for _, _, token, _ in cells])
  for n, (_, stream, _, _) in enumerate(cells):
    id_ = ids[stream] if stream >= 0 else prefix_id
    if id_ is not None:
      x[n] += tint[id_]
  said = logits(model.backbone, x, np.array([at for *_, at in cells], float),
                mask)
  out = np.full((*tokens.shape, said.shape[-1]), np.nan)
  for (row, stream, _, _), logit in zip(cells, said):
    if stream >= 0:
      out[row, stream] = logit
  return out
