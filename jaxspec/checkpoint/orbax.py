# SPDX-License-Identifier: Apache-2.0
"""Orbax folders: our own layout, restored straight onto any mesh.

A folder holds all that serving needs:

    jaxspec.json     sizes, generation config, and the mark of a whole folder
    weights/         Orbax's arrays, keyed by the transformer's own paths
    tokenizer.json   and its settings and chat template

`jaxspec.json` is written last, so that a save which was cut short is seen as
one. Restoring with `like` (shapes and shardings by path) lets each host read
its own shards alone; without it, weights pass one by one through `put`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxspec.checkpoint.base import Checkpoint, Put
from jaxspec.checkpoint.hf import read_json
from jaxspec.checkpoint.tokenizer import Tokenizer
from jaxspec.errors import InputError
from jaxspec.models import weights
from jaxspec.models.layers import Rope
from jaxspec.models.transformer import Config, Source

MARK = "jaxspec.json"
_WEIGHTS = "weights"
_VERSION = 1


def save(
    folder: str | pathlib.Path,
    config: Config,
    weight: Callable[[str], Any],
    *,
    tokenizer: Tokenizer | None = None,
    generation: dict | None = None,
) -> None:
  """Writes a transformer and what belongs to it.

  On several hosts, all call this: each writes its own shards.

  Args:
    folder: where to; must not hold a checkpoint yet.
    config: its sizes.
    weight: gives one weight by path: a `jax.Array` on a mesh, or a host array.
    tokenizer: written beside, with its chat template.
    generation: its generation config.
  """
  folder = pathlib.Path(folder).absolute()
  if (folder / MARK).exists() or (folder / _WEIGHTS).exists():
    raise InputError(
        f"{folder} already holds a checkpoint; pass a new folder, or remove it."
    )
  folder.mkdir(parents=True, exist_ok=True)
  tree = {path: weight(path) for path in weights.shapes(config)}
  _v1().save(folder / _WEIGHTS, tree)
  if jax.process_index() != 0:
    return
  if tokenizer is not None:
    tokenizer.save(folder)
  content = {
      "version": _VERSION,
      "config": dataclasses.asdict(config),
      "generation": generation or {},
  }
  partial = folder / (MARK + ".partial")
  partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
  partial.replace(folder / MARK)


class Orbax(Checkpoint):
  """A folder written by `save`."""

  def __init__(self, folder: str | pathlib.Path, source_name: str = ""):
    self.folder = pathlib.Path(folder).absolute()
    path = self.folder / MARK
    if not path.is_file():
      raise InputError(
          f"{self.folder} has no {MARK}, so its save was cut short; save it"
          " again."
      )
    content = read_json(path)
    if content.get("version") != _VERSION:
      raise InputError(
          f"{path} has version {content.get('version')!r}, this program reads"
          f" {_VERSION}; convert the model again."
      )
    config, generation = content.get("config"), content.get("generation")
    if not isinstance(config, dict) or not isinstance(generation, dict):
      raise InputError(f"{path} lacks its config; convert the model again.")
    sizes = _config(config, path)
    super().__init__(source_name or str(folder), sizes, generation)
    self._kinds = _kinds(self.folder / _WEIGHTS)
    for name, shape in self.shapes.items():
      if name not in self._kinds:
        raise InputError(
            f"{self.folder} has no weight {name!r}; convert the model again."
        )
      if self._kinds[name][0] != shape:
        raise InputError(
            f"{self.folder}: weight {name!r} has shape {self._kinds[name][0]}"
            f" where {MARK} asks for {shape}; convert the model again."
        )

  def weight(
      self, path: str, part: weights.Part | None = None
  ) -> np.ndarray:
    if path not in self._kinds:
      raise KeyError(path)
    # Host memory, wherever the arrays lay when they were saved.
    like = {path: np.empty(*self._kinds[path])}
    found = np.asarray(_load(self.folder / _WEIGHTS, like, self._kinds)[path])
    return found if part is None else found[part]

  def source(
      self,
      put: Put,
      dtype: Any = None,
      *,
      like: Mapping[str, jax.ShapeDtypeStruct] | None = None,
      check_finite: bool = False,
  ) -> Source:
    if like is None:
      return super().source(put, dtype, check_finite=check_finite)
    restored = self.restore(like)

    def source(path, shape, axes, dtype=None):
      del axes, dtype  # Both are in `like`.
      if path not in restored or restored[path].shape != tuple(shape):
        found = restored[path].shape if path in restored else None
        raise InputError(
            f"{self.source_name}: weight {path!r} has shape {found}, the"
            f" transformer asks for {tuple(shape)}; build it from this"
            " checkpoint's config."
        )
      return restored.pop(path)

    return source

  def restore(
      self, like: Mapping[str, jax.ShapeDtypeStruct]
  ) -> dict[str, jax.Array]:
    """Restores weights, all at once, onto the shardings they are to have."""
    for path, wanted in like.items():
      if path not in self.shapes or self.shapes[path] != tuple(wanted.shape):
        raise InputError(
            f"{self.source_name}: weight {path!r} has shape"
            f" {self.shapes.get(path)}, {tuple(wanted.shape)} is asked for;"
            " build the transformer from this checkpoint's config."
        )
    return _load(self.folder / _WEIGHTS, dict(like), self._kinds)

  def _tokenizer(self) -> Tokenizer | None:
    return Tokenizer.from_folder(self.folder)


def _v1() -> Any:
  """Returns Orbax's present interface, loaded when a folder is opened."""
  try:
    from orbax.checkpoint import v1
  except ImportError as error:
    raise InputError(
        "this orbax-checkpoint has no v1 interface; pip install"
        " 'orbax-checkpoint>=0.12.8'."
    ) from error
  return v1


def _load(
    path: pathlib.Path, like: dict[str, Any], kinds: Mapping[str, tuple]
) -> dict[str, Any]:
  v1 = _v1()
  # Every key must be named; those not asked for stay on disk.
  tree = dict.fromkeys(kinds, v1.PLACEHOLDER) | like
  try:
    restored = v1.load(path, tree)
  except (OSError, ValueError, KeyError) as error:
    raise InputError(
        f"{path} cannot be restored ({_first_line(error)}); convert the model"
        " again."
    ) from error
  return {name: restored[name] for name in like}


def _kinds(path: pathlib.Path) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Returns the shape and dtype of every array, without reading any."""
  try:
    tree = _v1().metadata(path).metadata
    return {k: (tuple(a.shape), np.dtype(a.dtype)) for k, a in tree.items()}
  except InputError:
    raise
  except Exception as error:  # Orbax has no one class of errors.
    raise InputError(
        f"{path} is no whole Orbax checkpoint ({_first_line(error)}); convert"
        " the model again."
    ) from error


def _config(content: dict, path: pathlib.Path) -> Config:
  try:
    ropes = tuple(_rope(**rope) for rope in content["ropes"])
    windows = tuple(content["windows"])
    return Config(**content | {"ropes": ropes, "windows": windows})
  except (KeyError, TypeError) as error:
    raise InputError(
        f"{path} does not hold the sizes of a model ({error}); convert the"
        " model again."
    ) from error


def _rope(factors: list[float] | None = None, **rest: Any) -> Rope:
  # JSON has no tuples.
  return Rope(factors=None if factors is None else tuple(factors), **rest)


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__
