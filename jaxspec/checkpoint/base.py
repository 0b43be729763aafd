# SPDX-License-Identifier: Apache-2.0
"""What every checkpoint gives: sizes, weights one by one, a tokenizer."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxspec.checkpoint.tokenizer import Tokenizer
from jaxspec.errors import InputError
from jaxspec.models import weights
from jaxspec.models.transformer import Config, Source


@dataclasses.dataclass(frozen=True)
class Unread:
  """A weight on disk, of which as much is read as is asked for.

  Attributes:
    shape: of all of it.
    read: gives a part.
  """

  shape: tuple[int, ...]
  read: Callable[[weights.Part], np.ndarray]

  def __getitem__(self, part: weights.Part) -> np.ndarray:
    return self.read(part)

  def __array__(self, dtype: Any = None, copy: bool | None = None
                ) -> np.ndarray:
    return np.array(self.read((slice(None),) * len(self.shape)), dtype)


# Places a weight on the mesh, by the logical names of its dimensions.
Put = Callable[[Unread, tuple[str | None, ...]], jax.Array]


class Checkpoint:
  """A model on disk, open for reading.

  Attributes:
    source_name: where it was read from, for messages.
    config: the sizes of its transformer.
    generation: its `generation_config`, with whole numbers checked.
  """

  def __init__(self, source_name: str, config: Config, generation: dict):
    self.source_name = source_name
    self.config = config
    self.generation = generation

  def weight(
      self, path: str, part: weights.Part | None = None
  ) -> np.ndarray:
    """Reads one weight, in the file's own dtype, and keeps no copy of it.

    Args:
      path: the transformer's name for it.
      part: what to read of it; None for all.
    """
    raise NotImplementedError

  def close(self) -> None:
    """Lets go of the files."""

  @functools.cached_property
  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer that came with the weights, or None where none did."""
    tokenizer = self._tokenizer()
    if tokenizer is not None and tokenizer.vocab_size > self.config.vocab:
      raise InputError(
          f"{self.source_name}: the tokenizer has ids up to"
          f" {tokenizer.vocab_size - 1} but the model's vocabulary is"
          f" {self.config.vocab}; use the tokenizer made for this model."
      )
    return tokenizer

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """The tokens that end a text, by generation config and by tokenizer."""
    ids = list(_ids(self.generation.get("eos_token_id")))
    if self.tokenizer is not None:
      ids += self.tokenizer.eos_ids
    return tuple(i for i in dict.fromkeys(ids) if i < self.config.vocab)

  def source(
      self,
      put: Put,
      dtype: Any = None,
      *,
      like: Mapping[str, jax.ShapeDtypeStruct] | None = None,
      check_finite: bool = False,
  ) -> Source:
    """Returns what a `Transformer` is constructed from.

    Args:
      put: places a weight on the mesh, reading what it needs of it.
      dtype: of weights for which the transformer asks no dtype; None keeps the
        file's.
      like: shapes and shardings by path, when they are known in advance; a
        checkpoint that can restores straight onto them (see `orbax`).
      check_finite: whether to refuse weights that hold NaN or infinity.
    """
    del like
    own = dtype

    def source(path, shape, axes, dtype=None):
      self._check(path, tuple(shape))
      wanted = dtype if dtype is not None else own

      def read(part):
        array = self.weight(path, part)
        if check_finite and not np.isfinite(array).all():
          raise InputError(
              f"{self.source_name}: weight {path!r} holds NaN or infinity;"
              " fetch the checkpoint again."
          )
        if wanted is not None and array.dtype != np.dtype(wanted):
          array = array.astype(wanted)
        return array

      return put(Unread(tuple(shape), read), axes)

    return source

  def _check(self, path: str, shape: tuple[int, ...]) -> None:
    if path not in self.shapes:
      raise InputError(
          f"{self.source_name}: a {self.config.family} checkpoint has no weight"
          f" {path!r}; build the transformer from this checkpoint's config."
      )
    if self.shapes[path] != shape:
      raise InputError(
          f"{self.source_name}: weight {path!r} has shape {self.shapes[path]},"
          f" the transformer asks for {shape}; build it from this checkpoint's"
          " config."
      )

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by path, in the order they are asked for."""
    return weights.shapes(self.config)

  def _tokenizer(self) -> Tokenizer | None:
    return None

  def __enter__(self) -> "Checkpoint":
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()


def _ids(value: object) -> tuple[int, ...]:
  """Returns token ids from what a generation config may hold: one or many."""
  many = value if isinstance(value, list | tuple) else [value]
  return tuple(i for i in many if type(i) is int and i >= 0)
