# SPDX-License-Identifier: Apache-2.0
"""Folders of heads, each for one model."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxspec import belonging
from jaxspec.belonging import fingerprint
from jaxspec.errors import InputError
from jaxspec.heads.base import beside, dtype_of
from jaxspec.heads.kinds import kinds
from jaxspec.heads.settings import Calibration, Settings
from jaxspec.models.transformer import Source, Transformer, abstract_source


@dataclasses.dataclass(frozen=True)
class Stored:
  """What a folder holds.

  Attributes:
    choices: the tree it comes with, best node first; empty for none.
    accuracy: what `medusa.measure` found; None where nothing was measured.
    calibration: what may be shown before it is settled; None where that was
      not looked into.
  """

  heads: Any
  choices: tuple[tuple[int, ...], ...] = ()
  accuracy: Float[np.ndarray, "heads ranks"] | None = None
  calibration: Calibration | None = None


def save(folder: str | pathlib.Path, heads: Any, model: Transformer, *,
         choices: Sequence[Sequence[int]] = (),
         accuracy: Float[np.ndarray, "heads ranks"] | None = None) -> None:
  """Writes heads as a folder, with the fingerprint of their model."""
  weights, count = heads.tensors(), None
  if heads.tokens is not None:
    weights = {**weights, "tokens": heads.tokens[...]}
    count = len(heads.tokens[...])
  belonging.write(folder, model, heads.kind, dict(
      vocabulary=count, **heads.settings(), choices=[list(c) for c in choices],
      accuracy=None if accuracy is None else np.asarray(accuracy).tolist()),
      weights)


def note(folder: str | pathlib.Path, calibration: Calibration) -> None:
  """Keeps beside heads what may be shown of them.

  Raises:
    InputError: the folder holds no heads, or cannot be written.
  """
  belonging.add(folder, {"calibration": dataclasses.asdict(calibration)},
                writer="jaxspec.heads.save")


def load(folder: str | pathlib.Path, model: Transformer, kind: str) -> Stored:
  """Reads heads for `model`, onto its mesh and in its dtype.

  Of a model of shapes alone (see `transformer.abstract_source`), heads are
  shapes too, whichever model they were made for.

  Args:
    kind: of the heads, e.g. "medusa": a file of `jaxspec/heads`.

  Raises:
    InputError: they are of another kind or for another model, or a file is
      not as its config says.
  """
  if isinstance(model.embedding.get_raw_value(), jax.ShapeDtypeStruct):
    config = belonging.settings_of(folder, kind, writer="jaxspec.heads.save",
                                   settings=Settings)
    return _stored(kind, config, model, _shapes(model), None)
  with belonging.reading(
      folder, model, kind, noun="heads", writer="jaxspec.heads.save",
      settings=Settings) as (config, file):
    count = config.integer("vocabulary", 1, model.vocab, default=None)
    tokens = None
    if count is not None:
      tokens = file.read("tokens", (count,), ("I32",))
      if tokens[0] < 0 or tokens[-1] >= model.vocab or np.any(
          np.diff(tokens) <= 0):
        raise InputError(f"{file.path}: tokens must be ascending ids below "
                         f"{model.vocab}; fetch it again")
    put = beside(model)

    def source(name, shape, axes, wanted=None):
      array = file.read(name, shape)
      return put(array.astype(wanted or dtype_of(model)), axes)

    return _stored(kind, config, model, source, tokens)


def _stored(kind: str, config: Settings, model: Transformer, source: Source,
            tokens: Any) -> Stored:
  heads = kinds()[kind].read(model, source, config, tokens)
  columns = getattr(heads, "count", 1)
  return Stored(heads, config.choices(columns), config.accuracy(columns),
                config.calibration())


def _shapes(model: Transformer) -> Source:
  like = model.embedding.get_raw_value()
  return abstract_source(like.dtype, like.sharding and like.sharding.mesh)


__all__ = ["Stored", "fingerprint", "load", "note", "save"]
