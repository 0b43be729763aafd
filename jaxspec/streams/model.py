# SPDX-License-Identifier: Apache-2.0
"""A language model, and what it has learnt about streams.

All that a multi-stream model has beyond its backbone is one vector a stream,
added to the embedding of each of its tokens. A model without knows streams by
their words alone.
"""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer
from jaxspec.streams.layout import StreamLayout

# The names under which checkpoints hold the table of stream embeddings: ours,
# and that of the published Qwen3 models. All else is named as in any Qwen3, but
# for a norm in each layer that these do not use (`jaxspec.checkpoint.hf`).
NAMES = ("stream_embedding", "model.channel_embedding.weight")
FILE = "streams.safetensors"


@struct.dataclass
class StreamModel:
  """A backbone of any family, and a vector for each stream.

  Attributes:
    embedding: by `Stream.id`; None adds nothing.
  """

  backbone: Transformer
  embedding: Float[Array, "ids D"] | None = None

  def tint(self, layout: StreamLayout) -> Float[Array, "X D"] | None:
    """What is added to the tokens of each stream, and of the prefix."""
    if self.embedding is None:
      return None
    rows = self.embedding[layout.ids]
    prefix = jnp.zeros_like(rows[:1])
    if layout.prefix_id is not None:
      prefix = self.embedding[layout.prefix_id][None]
    return jnp.concatenate([rows, prefix])

  def check(self, layout: StreamLayout) -> None:
    """Refuses a layout whose streams it has no vectors for.

    Raises:
      InputError: an id is beyond the table, or a silence token beyond the
        vocabulary.
    """
    if layout.silence is not None and layout.silence >= self.backbone.vocab:
      raise InputError(f"the silence token {layout.silence} is beyond the "
                       f"model's {self.backbone.vocab} tokens; name another")
    if self.embedding is None:
      return
    known, most = len(self.embedding), max(*layout.ids, layout.prefix_id or 0)
    if most >= known:
      raise InputError(f"the layout has a stream with id {most}, and the model "
                       f"has embeddings for {known}; use a layout it was "
                       "trained for")


def save(folder: str | pathlib.Path,
         embedding: Float[Array | np.ndarray, "ids D"]) -> None:
  """Puts a table of stream embeddings beside a model's weights."""
  import safetensors.numpy
  file = pathlib.Path(folder).expanduser() / FILE
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(
        {NAMES[0]: np.asarray(embedding, np.float32)}, file)
  except OSError as e:
    raise InputError(f"cannot write {file}: {e.strerror or e}; name another "
                     "folder") from e


def load(folder: str | pathlib.Path, model: Transformer
         ) -> Float[Array, "ids D"] | None:
  """Reads the table of a folder, under any of `NAMES` in any of its files.

  Returns:
    None where it has none.

  Raises:
    InputError: the folder cannot be read, or its table is for another width.
  """
  import safetensors
  folder = pathlib.Path(folder).expanduser()
  for file in sorted(folder.glob("*.safetensors")):
    try:
      with safetensors.safe_open(file, "flax") as tensors:
        found = sorted(set(NAMES) & set(tensors.keys()))
        if not found:
          continue
        table: Any = tensors.get_tensor(found[0])
    except (OSError, safetensors.SafetensorError) as e:
      raise InputError(f"cannot read {file}: {e}; write it again") from e
    if table.ndim != 2 or table.shape[1] != model.config.width:
      raise InputError(
          f"{file}: {found[0]} has shape {tuple(table.shape)}, and the model "
          f"is {model.config.width} wide; use the one made for this model")
    return table.astype(model.embedding[...].dtype)
  return None
