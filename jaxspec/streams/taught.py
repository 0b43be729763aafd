# SPDX-License-Identifier: Apache-2.0
"""Folders of what a model has learnt about streams, and of its adapter.

A layout and a table of stream embeddings, with the fingerprint of the model
they are for; and, in a folder `adapter`, the change of the model that was
learnt with them. A folder of another model is refused.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxspec import adapters, belonging
from jaxspec.adapters import Adapter
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer
from jaxspec.streams import layout as layouts
from jaxspec.streams.layout import StreamLayout
from jaxspec.streams.model import NAMES, StreamModel

_KIND, _ADAPTER = "streams", "adapter"
_WRITER = "train_streams"


def save(folder: str | pathlib.Path, model: Transformer, layout: StreamLayout,
         embedding: Float[Array, "ids D"], adapter: Adapter | None = None
         ) -> None:
  """Writes a folder.

  Args:
    model: the one that `adapter` changes; without, the one that was taught.
  """
  folder = pathlib.Path(folder)
  if adapter is not None:
    adapters.save(folder / _ADAPTER, adapter, model)
  belonging.write(
      folder, model, _KIND, dict(
          layout=layouts.fields_of(layout), ids=len(embedding),
          adapter=_ADAPTER if adapter is not None else None),
      {NAMES[0]: np.asarray(embedding, np.float32)})


def layout_of(folder: str | pathlib.Path) -> StreamLayout:
  """The layout of a folder, before there is a model.

  Raises:
    InputError: it is another kind of folder.
  """
  config = belonging.settings_of(pathlib.Path(folder).expanduser(), _KIND,
                                 writer=_WRITER)
  return layouts.from_fields(config.get("layout"), str(config.path))


def load(folder: str | pathlib.Path, model: Transformer
         ) -> tuple[StreamModel, StreamLayout]:
  """Reads a folder for `model`, and merges its adapter.

  Raises:
    InputError: it is another kind of folder or for another model, or a file is
      not as its config says.
  """
  folder = pathlib.Path(folder).expanduser()
  with belonging.reading(folder, model, _KIND, noun="streams",
                         writer=_WRITER) as (config, file):
    count = config.integer("ids", 1, 1 << 16)
    table = file.read(NAMES[0], (count, model.config.width))
    if not np.isfinite(table).all():
      raise InputError(f"{file.path}: tensor {NAMES[0]!r} holds NaN or "
                       "infinity; train it again")
    layout = layouts.from_fields(config.get("layout"), str(config.path))
    backbone = model
    if config.get("adapter") is not None:
      if config.get("adapter") != _ADAPTER:
        raise config.fail("adapter", f"{_ADAPTER!r} or null")
      backbone = adapters.merged(
          model, adapters.load(folder / _ADAPTER, model))
  made = StreamModel(backbone, jnp.asarray(table).astype(
      model.embedding[...].dtype))
  made.check(layout)
  return made, layout
