# SPDX-License-Identifier: Apache-2.0
"""Teaching a model to say the next token of every stream it writes.

Tables lie in blocks, cell by cell: several to a block, told apart by its mask,
and without the cells that no other sees and from which nothing is learnt. A
backbone learns by an adapter or as a whole (`jaxspec.tuning`), and with it the
vector of each stream.

The functions below are to `training.fit` what those of the same name in
`jaxspec.distillation` are.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxspec import distillation
from jaxspec.caches import Place
from jaxspec.distillation import Lesson, Marks, Pace, begin
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer
from jaxspec.reading import climb
from jaxspec.streams import conversion
from jaxspec.streams import layout as layouts
from jaxspec.streams.conversion import Table
from jaxspec.streams.layout import StreamLayout
from jaxspec.streams.model import NAMES, StreamModel
from jaxspec.tuning import MODEL, LowRank, Tuned, Whole

# The pupil beside `MODEL`: the vectors of streams.
STREAMS = "streams"


@dataclasses.dataclass(frozen=True)
class Recipe(Pace):
  """How streams are taught.

  Attributes:
    layout: of the tables.
    blocks: side by side in a batch.
    width: cells of a block.
    positions: cells of a batch to learn from at each step, at most: much of a
      step may be their logits. Where there are more, some are drawn.
    silence: of the silences of a stream, which are most of what it says, the
      share to learn from. They are drawn once for all rounds, so that the
      others need not be computed.
  """

  layout: StreamLayout = dataclasses.field(default_factory=layouts.single)
  blocks: int = 2
  width: int = 512
  positions: int = 512
  silence: float = 0.3


@struct.dataclass
class Cells:
  """Blocks of cells, of one or more tables each.

  Attributes:
    kept: whether later cells may see it.
    table: which table of the block it is of; -1 for none, and then it is
      padding, which is seen by none.
    wanted: what should come next in its stream.
    learnt: whether the model should say so.
  """

  tokens: Int[Array, "B N"]
  streams: Int[Array, "B N"]
  rows: Int[Array, "B N"]
  positions: Int[Array, "B N"]
  kept: Bool[Array, "B N"]
  table: Int[Array, "B N"]
  wanted: Int[Array, "B N"]
  learnt: Bool[Array, "B N"]


@struct.dataclass
class Tints:
  """Vectors of streams, none of which says anything at first."""

  embedding: Float[Array, "ids D"]

  @classmethod
  def init(cls, model: Transformer, layout: StreamLayout) -> "Tints":
    count = 1 + max(*layout.ids.tolist(), layout.prefix_id or 0)
    return cls(jnp.zeros((count, model.config.width)))

  def tensors(self) -> dict[str, Array]:
    return {NAMES[0]: self.embedding}


# Where the cells of tables lie.


def flatten(table: Table, recipe: Recipe, rng: Any = None
            ) -> dict[str, np.ndarray]:
  """The cells of a table that count, row by row, as the fields of `Cells`.

  What is not kept, and not learnt from, changes nothing, and neither do rows
  behind the last from which something is learnt. A table that is wider than a
  block ends with the last row that fits.

  Args:
    rng: draws the silences that are learnt from; None takes all.
  """
  layout = recipe.layout
  wanted, learnt = conversion.targets(layout, table)
  kept, row = table.live, np.arange(len(table.live))[:, None]
  position = row = np.broadcast_to(row, kept.shape)
  if layout.silence is not None:
    if rng is not None:
      learnt &= (wanted != layout.silence) | (
          rng.random(learnt.shape) < recipe.silence)
    if not layout.keep_silence:
      kept = kept & (table.tokens != layout.silence)
  if layout.positions == "counters":
    position = (np.cumsum(table.live, axis=0) - table.live
                + layout.leads[None])
  counts = kept | learnt
  counts &= row <= max(np.flatnonzero(learnt.any(axis=1)), default=-1)
  counts &= (np.cumsum(counts.sum(axis=1)) <= recipe.width)[:, None]
  streams = np.broadcast_to(np.arange(layout.count)[None], kept.shape)
  return {name: value[counts] for name, value in dict(
      tokens=table.tokens, streams=streams, rows=row, positions=position,
      kept=kept, wanted=wanted, learnt=learnt).items()}


def lay_out(blocks: Sequence[Sequence[Mapping[str, np.ndarray]]], width: int
            ) -> Cells:
  """Some flattened tables in each block, padded to `width`."""
  shape = (len(blocks), width)
  fields = {f.name: np.zeros(shape, bool if f.name in ("kept", "learnt")
                             else np.int32) for f in dataclasses.fields(Cells)}
  fields["table"] -= 1
  for row, tables in enumerate(blocks):
    start = 0
    for number, cells in enumerate(tables):
      here = slice(start, start + len(cells["tokens"]))
      for name, value in cells.items():
        fields[name][row, here] = value
      fields["table"][row, here] = number
      start = here.stop
  return Cells(**jax.tree.map(jnp.asarray, fields))


class Order:
  """Which blocks are read at each step; in a round each is read once.

  Attributes:
    blocks: by the numbers of their tables.
    filled: the share of cells that is no padding.
  """

  def __init__(self, tables: Sequence[Table], recipe: Recipe, *,
               whole: bool = False):
    """Packs tables.

    Args:
      whole: whether all silences are to be foretold.
    """
    self._recipe = recipe
    rng = None if whole else np.random.default_rng(recipe.seed)
    self._cells = [flatten(table, recipe, rng) for table in tables]
    sizes = [len(cells["tokens"]) for cells in self._cells]
    self.blocks = [block for block in conversion.pack(sizes, recipe.width)
                   if any(sizes[at] for at in block)]
    if not self.blocks:
      raise InputError("there is no table to learn from")
    self.filled = sum(sizes) / (len(self.blocks) * recipe.width)

  def batch(self, step: int) -> Cells:
    some = self._recipe.blocks
    turn, place = divmod(step, -(-len(self.blocks) // some))
    order = np.random.default_rng([self._recipe.seed, turn]).permutation(
        len(self.blocks))
    # The last batch of a round is filled up from its beginning.
    which = np.resize(np.roll(order, -place * some), some)
    return self._lay_out([self.blocks[at] for at in which])

  def once(self) -> Iterator[Cells]:
    """Every block once; what fills the last batch is empty."""
    some = self._recipe.blocks
    for at in range(0, len(self.blocks), some):
      here = self.blocks[at:at + some]
      yield self._lay_out([*here, *[[]] * (some - len(here))])

  def _lay_out(self, blocks: Sequence[Sequence[int]]) -> Cells:
    return lay_out([[self._cells[at] for at in block] for block in blocks],
                   self._recipe.width)


# What is seen and what is to be said.


def seen(layout: StreamLayout, cells: Cells) -> Bool[Array, "B N N"]:
  """Which cells each cell sees: its own, and earlier ones of its table."""
  def pair(x):
    return x[:, :, None], x[:, None, :]
  reader, source = pair(cells.streams)
  allowed = jnp.asarray(layout.visible)[reader, source]
  for x in (cells.rows, cells.positions):
    now, then = pair(x)
    allowed &= then < now
  own, other = pair(cells.table)
  allowed &= (own == other) & cells.kept[:, None]
  return allowed | jnp.eye(cells.tokens.shape[1], dtype=bool)[None]


def read(model: StreamModel, layout: StreamLayout, cells: Cells, *,
         learns: bool = False) -> Float[Array, "B N D"]:
  """The residual stream above the last layer, at every cell.

  What `rows.extend` gives row by row (`tests/jaxspec/streams`).
  """
  backbone = model.backbone
  x = backbone.embed(cells.tokens)
  tint = model.tint(layout)
  if tint is not None:
    x = x + tint.astype(x.dtype)[cells.streams]
  at = Place.of(cells.positions, seen(layout, cells))
  return climb(backbone, x, at, learns=learns)[backbone.depth]


def lacks(model: Transformer, x: Float[Array, "M D"], wanted: Int[Array, "M"]
          ) -> tuple[Float[Array, "M"], Bool[Array, "M"]]:
  """What it lacks, in nats, to say what is wanted; and whether it would."""
  logits = model.unembed(x[None])[0]
  said = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
  return (jax.nn.logsumexp(logits, axis=-1) - said,
          jnp.argmax(logits, axis=-1) == wanted)


def _drawn(cells: Cells, recipe: Recipe, key: Array
           ) -> tuple[Int[Array, "M"], Bool[Array, "M"]]:
  """Cells to learn from; and which of them count."""
  learnt = cells.learnt.reshape(-1)
  score = jnp.where(learnt, jax.random.uniform(key, learnt.shape), -1.0)
  top, flat = jax.lax.top_k(score, min(recipe.positions, len(learnt)))
  return flat, top >= 0


@functools.partial(jax.jit, static_argnames=("recipe",),
                   donate_argnames=("lesson",))
def advance(model: Transformer, pupils: Mapping[str, Any], lesson: Lesson,
            cells: Cells, recipe: Recipe) -> tuple[Lesson, dict[str, Marks]]:
  """One step of all pupils.

  Returns:
    What was learnt, and marks by stream; those of a stream that had nothing to
    say are not a number.
  """
  body, layout = pupils[MODEL], recipe.layout
  flat, counts = _drawn(cells, recipe,
                        distillation.draw_key(recipe, lesson.step))
  streams = cells.streams.reshape(-1)[flat]

  def loss(weights):
    pupil = StreamModel(body.onto(weights[MODEL]), weights[STREAMS][NAMES[0]])
    x = read(pupil, layout, cells, learns=True)
    each, right = lacks(pupil.backbone, x.reshape(-1, x.shape[-1])[flat],
                        cells.wanted.reshape(-1)[flat])
    mean = jnp.sum(each * counts) / jnp.maximum(jnp.sum(counts), 1)
    return mean, (each, right)

  slope, (each, right) = jax.grad(loss, has_aux=True)(lesson.weights)
  weights, moments = {}, {}
  for name in pupils:
    weights[name], moments[name] = distillation.learn(
        lesson.weights[name], lesson.moments[name], slope[name], recipe)
  marks = {}
  for at in layout.written:
    own = counts & (streams == at)
    asked = jnp.sum(own).astype(jnp.float32)
    marks[layout.names[at]] = Marks(
        jnp.where(asked > 0, jnp.sum(each * own) / jnp.maximum(asked, 1),
                  jnp.nan),
        jnp.sum(right & own).astype(jnp.float32).reshape(1, 1),
        asked.reshape(1, 1))
  return Lesson(weights, moments, lesson.step + 1), marks


@dataclasses.dataclass(frozen=True)
class Taught:
  """A model that knows its streams, and the adapter by which it does, if any.
  """

  model: StreamModel
  adapter: Any = None


def taught(model: Transformer, pupils: Mapping[str, Any], lesson: Lesson
           ) -> Taught:
  """The model as it is now, in the dtype it began with."""
  tuned: Tuned = pupils[MODEL].taught(lesson.weights[MODEL])
  table = lesson.weights[STREAMS][NAMES[0]]
  return Taught(StreamModel(tuned.model, table.astype(
      model.embedding[...].dtype)), tuned.adapter)


# What became of the model.


@functools.partial(jax.jit, static_argnames=("layout",))
def _examine(model: StreamModel, layout: StreamLayout, cells: Cells
             ) -> Float[Array, "C 2 3"]:
  x = read(model, layout, cells)

  # Block by block: logits of all cells would fill the memory.
  def block(args):
    x, wanted, learnt, streams = args
    each, right = lacks(model.backbone, x, wanted)
    silent = wanted == (-1 if layout.silence is None else layout.silence)
    kind = streams * 2 + silent
    values = jnp.stack([each, right, jnp.ones_like(each)], axis=1)
    values = jnp.where(learnt[:, None], values, 0.0)
    return jax.ops.segment_sum(values, kind, 2 * layout.count)

  found = jax.lax.map(block, (x, cells.wanted, cells.learnt, cells.streams))
  return jnp.sum(found, axis=0).reshape(layout.count, 2, 3)


def examine(model: StreamModel, tables: Sequence[Table], recipe: Recipe
            ) -> dict[str, dict[str, float | None]]:
  """How well a model foretells tables, stream by stream.

  Returns:
    For each stream that is written the mean `loss`, in nats, of `words` and
    of `silence` (`silence_loss`), how often the likeliest token is right
    (`right`, `silence_right`), and of how many; None where there
    are none.
  """
  layout = recipe.layout
  sums = np.zeros((layout.count, 2, 3))
  for cells in Order(tables, recipe, whole=True).once():
    sums += np.asarray(_examine(model, layout, cells), np.float64)
  found = {}
  for at in layout.written:
    words, silence = sums[at]
    found[layout.names[at]] = {
        "loss": _ratio(words[0], words[2]),
        "right": _ratio(words[1], words[2]), "words": int(words[2]),
        "silence_loss": _ratio(silence[0], silence[2]),
        "silence_right": _ratio(silence[1], silence[2]),
        "silence": int(silence[2])}
  return found


def _ratio(total: float, count: float) -> float | None:
  return float(total / count) if count else None


__all__ = ["MODEL", "STREAMS", "Cells", "LowRank", "Order", "Recipe", "Taught",
           "Tints", "Whole", "advance", "begin", "examine", "flatten",
           "lay_out", "read", "seen", "taught"]
