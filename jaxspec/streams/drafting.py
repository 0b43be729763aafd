# SPDX-License-Identifier: Apache-2.0
"""Guesses of whole rows, which one pass can verify as a chain."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxspec import heads, naming
from jaxspec.drafters.prompt_lookup import PromptLookup
from jaxspec.errors import InputError
from jaxspec.heads import MedusaHeads
from jaxspec.streams.layout import StreamLayout
from jaxspec.streams.model import StreamModel
from jaxspec.streams.state import StreamState


@runtime_checkable
class RowDrafter(Protocol):
  """Guesses the next K rows of every session. A pytree: leaves are weights."""

  def propose(self, model: StreamModel, layout: StreamLayout,
              batch: StreamState
              ) -> tuple[Int[Array, "B K C"], Bool[Array, "B"]]:
    """What the model may say in each stream, row by row.

    What is read, and which streams are silent or closed, is not its concern:
    that follows from what it guesses, or is known.

    Returns:
      Guesses, and whether they are worth a wider pass.
    """
    ...


@struct.dataclass
class LookupRows:
  """In each stream, what followed the same words the last time.

  A row stands only if every stream's guess does, so that one of which nothing
  is known spoils it for all.

  Attributes:
    length: rows that are guessed.
    max_ngram: the longest ending of a stream that is looked for.
    min_ngram: the shortest that is believed.
    all: whether every stream must know what follows; else one is enough, and
      the others repeat their last token, which is right where they are silent.
  """

  length: int = struct.field(pytree_node=False, default=3)
  max_ngram: int = struct.field(pytree_node=False, default=3)
  min_ngram: int = struct.field(pytree_node=False, default=1)
  all: bool = struct.field(pytree_node=False, default=True)

  def __post_init__(self):
    for name, low, high in (("length", 1, 32), ("min_ngram", 1, 64),
                            ("max_ngram", self.min_ngram, 64)):
      naming.whole("lookup", name, getattr(self, name), low, high)

  def propose(self, model, layout, batch):
    lines = batch.lines
    sessions, streams = lines.counts.shape
    look = PromptLookup(  # pyright: ignore[reportAbstractUsage]
        self.length, self.max_ngram, self.min_ngram)
    tokens, run = jax.vmap(look.look_up)(
        lines.texts.reshape(sessions * streams, -1),
        jnp.maximum(lines.counts, 1).reshape(-1))
    tokens = tokens.reshape(sessions, streams, self.length)
    run = run.reshape(sessions, streams)
    last, _ = lines.pending
    known = run >= self.min_ngram
    tokens = jnp.where(known[..., None], tokens, last[..., None])
    writes = lines.open & layout.writes[None] & ~lines.queue.waits
    worth = jnp.any(writes & known, axis=1)
    if self.all:
      worth &= jnp.all(known | ~writes, axis=1)
    return jnp.moveaxis(tokens, 1, 2), worth


@struct.dataclass
class HeadRows:
  """In each stream, what heads on the model's last layer say comes next.

  The heads are those of ordinary decoding (arXiv:2401.10774): a stream is to
  them a text like any other. Each looks at the last row that was fed.
  """

  heads: MedusaHeads

  def propose(self, model, layout, batch):
    written = jnp.array(layout.written)
    x = batch.last[:, written]
    said = self.heads.choose(model.backbone, x.reshape(-1, x.shape[-1]), 1)
    said = said.reshape(*x.shape[:2], -1)                         # [B W K]
    tokens, _ = batch.lines.pending
    guesses = jnp.zeros((*tokens.shape, said.shape[2]), jnp.int32).at[
        :, written].set(said)
    return jnp.moveaxis(guesses, 1, 2), batch.passes > 0


def parse(text: str, model: StreamModel) -> RowDrafter | None:
  """Reads `lookup:length=3,all=False` or `medusa:heads=FOLDER`.

  Heads without a folder are those that are shipped for the model. No text is no
  drafter.

  Raises:
    InputError: there is no such drafter or option, or the heads are another
      model's.
  """
  if not text:
    return None
  name, options = naming.choose("row drafter", text, ["lookup", "medusa"])
  if name == "lookup":
    known = [f.name for f in dataclasses.fields(LookupRows)]
    values = naming.options(f"row drafter {name}", options, known)
    if not isinstance(values.get("all", True), bool):
      raise InputError("row drafter lookup: all must be True or False, got "
                       f"{values['all']!r}")
    return LookupRows(**values)
  folder = naming.options(f"row drafter {name}", options, ["heads"])
  folder = heads.find(str(folder.get("heads", "")), model.backbone, "medusa")
  return HeadRows(heads.load(folder, model.backbone, "medusa").heads)
