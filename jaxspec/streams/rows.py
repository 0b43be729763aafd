# SPDX-License-Identifier: Apache-2.0
"""Rows of a table through the model: one row, a chain of rows, a chunk.

The nodes of a pass are the cells of some rows, row by row. Within a row each
sees itself alone, the mask of the identity; of earlier rows in flight, and of
the cache, what its stream may read. So a step, the verification of drafted
rows and the reading of a prompt are one function.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxspec.caches import Fresh
from jaxspec.streams.cache import StreamCache, StreamFresh, StreamPlace
from jaxspec.streams.layout import StreamLayout
from jaxspec.streams.model import StreamModel
from pallas_kernels import pack


@struct.dataclass
class Block:
  """Some rows of a table, W columns wide.

  Attributes:
    live: cells that hold a token.
    kept: cells whose keys later tokens may see.
    placed: cells that take a slot of the cache.
    streams: the stream of each column; that of a prefix is `layout.count`.
  """

  tokens: Int[Array, "B n W"]
  live: Bool[Array, "B n W"]
  kept: Bool[Array, "B n W"]
  placed: Bool[Array, "B n W"]
  positions: Int[Array, "B n W"]
  streams: tuple[int, ...] = struct.field(pytree_node=False)

  @property
  def size(self) -> int:
    """Cells of a row of the batch: the nodes of a pass (N)."""
    return self.tokens.shape[1] * self.tokens.shape[2]

  def flat(self, cells: Array) -> Array:
    """Cells in the order of the nodes, row by row."""
    return cells.reshape(len(cells), -1)

  @property
  def node_streams(self) -> Int[np.ndarray, "N"]:
    return np.tile(np.array(self.streams, np.int32), self.tokens.shape[1])


def table_block(layout: StreamLayout, tokens: Int[Array, "B n C"],
                live: Bool[Array, "B n C"], first: Int[Array, "B"],
                counts: Int[Array, "B C"], base: Int[Array, "B"]) -> Block:
  """Rows of a table as a block.

  What is said behind a hole is what would be said behind the stream's last
  word if it stood in the row of the hole; it must be among the `tokens`.

  Args:
    first: the number of the first of these rows.
    counts: the tokens each stream has had before them.
    base: the length of the prefix, where positions begin.
  """
  if layout.positions == "rows":
    row = first[:, None] + jnp.arange(tokens.shape[1])[None]
    place = jnp.broadcast_to(row[..., None], tokens.shape)
  else:
    # A hole asks the last word before it again, in that word's place.
    before = jnp.cumsum(live, axis=1, dtype=jnp.int32) - 1
    place = jnp.maximum(counts[:, None] + before, 0) + layout.leads[None, None]
  kept = live
  if not layout.keep_silence:
    kept = live & (tokens != layout.silence)
  # Sums over keys are rounded by where these lie: who must have no effect may
  # not move them, and so even its holes have a place.
  placed = jnp.ones_like(kept) if layout.apart else kept
  return Block(tokens, live, kept, placed, base[:, None, None] + place,
               tuple(range(layout.count)))


def prefix_block(layout: StreamLayout, tokens: Int[Array, "B T"],
                 live: Bool[Array, "B T"], start: Int[Array, ""]) -> Block:
  """A part of the text that all streams share, as rows of one column."""
  place = start + jnp.broadcast_to(jnp.arange(tokens.shape[1])[None],
                                   tokens.shape)
  live = live[..., None]
  return Block(tokens[..., None], live, live, live, place[..., None],
               (layout.count,))


@jax.named_scope("rows")
def extend(model: StreamModel, layout: StreamLayout, cache: StreamCache,
           block: Block) -> tuple[Float[Array, "B n W D"], Fresh]:
  """Takes all cells of some rows through the model at once.

  Returns:
    The residual stream above the last layer, and keys and values.
  """
  backbone, streams = model.backbone, block.node_streams
  x = backbone.embed(block.flat(block.tokens))
  tint = model.tint(layout)
  if tint is not None:
    x = x + tint.astype(x.dtype)[streams][None]
  at = StreamPlace(block.flat(block.positions), pack(seen(layout, block)),
                   readable=jnp.asarray(layout.words[streams]))
  fresh = backbone.init_fresh(cache, block.size)
  x, fresh = backbone.extend(x, cache, fresh, at,
                             layers=range(backbone.depth))
  return x.reshape(*block.tokens.shape, x.shape[-1]), fresh


def seen(layout: StreamLayout, block: Block) -> Bool[Array, "B N N"]:
  """Which cells of the block each of its cells sees."""
  streams = block.node_streams
  row = np.repeat(np.arange(block.tokens.shape[1]), len(block.streams))
  allowed = layout.visible[streams][:, streams] & (row[:, None] > row[None])
  place, kept = block.flat(block.positions), block.flat(block.kept)
  earlier = place[:, None] < place[..., None]
  return jnp.asarray((allowed[None] & earlier & kept[:, None])
                     | np.eye(block.size, dtype=bool)[None])


def commit(cache: StreamCache, block: Block, fresh: Fresh,
           taken: Int[Array, "B"]) -> StreamCache:
  """Keeps the keys of the first `taken` rows of each session's table."""
  index = jnp.arange(block.tokens.shape[1])[None, :, None]
  wanted = block.flat(block.placed & (index < taken[:, None, None]))
  path = jnp.argsort(~wanted, axis=1, stable=True).astype(jnp.int32)
  streams = jnp.broadcast_to(block.node_streams[None], wanted.shape)
  places = block.flat(jnp.where(block.kept, block.positions, -1))
  fresh = StreamFresh(fresh.k, fresh.v, places, streams)
  return cache.commit(fresh, path, jnp.sum(wanted, axis=1, dtype=jnp.int32))
