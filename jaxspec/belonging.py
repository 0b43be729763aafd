# SPDX-License-Identifier: Apache-2.0
"""Folders that belong to one model: heads and adapters.

A `config.json`, which says what is there and bears the model's fingerprint,
and a `model.safetensors`. A folder of another model is refused.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxspec import hosts
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FLOATS = ("F32", "F16", "BF16")
_FORMAT = 1


def fingerprint(model: Transformer) -> str:
  """What tells one model from another: its sizes and a sample of its weights.

  Values are sampled from the embedding, the final norm, and three layers, and
  rounded to bfloat16, so that a model read as float32 and one read as bfloat16
  are the same. One that was quantized is another model, and so is one with an
  adapter merged into it, in whichever layers that is (see `adapters.merged`).
  """
  if model.identity:
    return model.identity
  c = model.config
  sizes = (c.vocab, c.width, c.depth, c.heads, c.kv_heads, c.head_size, c.mlp,
           c.experts)
  found = hashlib.sha256(repr(sizes).encode())
  weights = [model.embedding, model.final_norm]
  for layer in sorted({0, c.depth // 2, c.depth - 1}):
    weights += [model.layers[layer].qkv, model.layers[layer].down]
  rng = np.random.default_rng(0)
  for weight in weights:
    value = weight[...]
    some = tuple(rng.integers(0, size, 64) for size in value.shape)
    value = hosts.fetch(value[some].astype(jnp.bfloat16).astype(jnp.float32))
    found.update(value.astype("<f4").tobytes())
  return found.hexdigest()[:32]


class Settings:
  """A config that may say anything; what is wrong is named."""

  def __init__(self, path: pathlib.Path, values: dict):
    self.path, self.get = path, values.get

  def fail(self, key: str, wanted: str) -> InputError:
    found = repr(self.get(key))
    if len(found) > 60:
      found = found[:60] + "..."
    return InputError(f"{self.path}: {key} must be {wanted}, got {found}")

  def integer(self, key: str, low: int, high: int, **default: Any) -> Any:
    value = self.get(key)
    if default and value is None:
      return default["default"]
    if type(value) is not int or not low <= value <= high:
      raise self.fail(key, f"an integer in [{low}, {high}]")
    return value

  def number(self, key: str, low: float, high: float) -> float:
    value = self.get(key)
    # What is not a number is in no interval.
    if (isinstance(value, bool) or not isinstance(value, int | float)
        or not low <= value <= high):
      raise self.fail(key, f"a number in [{low:g}, {high:g}]")
    return float(value)

  def flag(self, key: str) -> bool:
    value = self.get(key)
    if type(value) is not bool:
      raise self.fail(key, "true or false")
    return value


def write(folder: str | pathlib.Path, model: Transformer, kind: str,
          settings: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
  """Writes a folder of some kind, with the fingerprint of its model."""
  import safetensors.numpy  # Loaded when a file is written.
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  config = dict(format=_FORMAT, kind=kind, model=fingerprint(model), **settings)
  safetensors.numpy.save_file(
      {name: np.ascontiguousarray(value) for name, value in weights.items()},
      folder / WEIGHTS)
  # Last: a folder without it is none.
  _put(folder / CONFIG, config)


def add(folder: str | pathlib.Path, settings: Mapping[str, Any], *,
        writer: str) -> None:
  """Adds to what the config of a folder says.

  Raises:
    InputError: there is no config, or it cannot be written.
  """
  from jaxspec.checkpoint import hf  # pulls in file formats
  path = _config_of(folder, writer)
  try:
    _put(path, hf.read_json(path) | dict(settings))
  except OSError as error:
    raise InputError(f"cannot write {path}: {error.strerror}") from error


def _config_of(folder: str | pathlib.Path, writer: str) -> pathlib.Path:
  path = pathlib.Path(folder) / CONFIG
  if not path.is_file():
    raise InputError(f"{folder} has no {CONFIG}; pass a folder that {writer} "
                     "wrote")
  return path


def _put(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Writes a config whole, or not at all."""
  new = path.with_name(path.name + ".new")
  new.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
  new.replace(path)


def kind_of(folder: str | pathlib.Path) -> Any:
  """The kind a folder says it is of, whatever that is."""
  from jaxspec.checkpoint import hf  # pulls in file formats
  return hf.read_json(pathlib.Path(folder) / CONFIG).get("kind")


@contextlib.contextmanager
def reading(folder: str | pathlib.Path, model: Transformer, kind: str, *,
            noun: str, writer: str,
            settings: Callable[[pathlib.Path, dict], Any] = Settings
            ) -> Iterator[tuple[Any, "File"]]:
  """Opens a folder of this kind and for this model.

  Every tensor in it must have been read in the end.

  Args:
    noun, writer: what is in it, and what writes it, for errors.
    settings: made of the config's path and what it says.

  Raises:
    InputError: it is of another kind or for another model, or a file is not as
      its config says.
  """
  folder = pathlib.Path(folder)
  config = settings_of(folder, kind, writer=writer, settings=settings)
  made_for, here = config.get("model"), fingerprint(model)
  if made_for != here:
    raise InputError(f"{folder} was made for the model {made_for!r} and this "
                     f"is {here!r}; pass {noun} of this model")
  with _open(folder / WEIGHTS) as file:
    yield config, file
    file.refuse_unread(noun)


def settings_of(folder: str | pathlib.Path, kind: str, *, writer: str,
                settings: Callable[[pathlib.Path, dict], Any] = Settings
                ) -> Any:
  """What the config of a folder of this kind says.

  Raises:
    InputError: it is of another kind.
  """
  from jaxspec.checkpoint import hf  # pulls in file formats
  path = _config_of(folder, writer)
  config = settings(path, hf.read_json(path))
  if config.get("kind") != kind:
    raise InputError(f"{path} is of kind {config.get('kind')!r}; pass a folder "
                     f"of kind {kind!r}")
  config.integer("format", _FORMAT, _FORMAT)
  return config


class File:
  """An open safetensors file, read tensor by tensor and in full."""

  def __init__(self, path: pathlib.Path, file: Any):
    self.path, self._file = path, file
    self._unread = set(file.keys())

  def read(self, name: str, shape: tuple[int, ...],
           kinds: Sequence[str] = FLOATS) -> np.ndarray:
    if name not in self._unread:
      raise InputError(f"{self.path} has no tensor {name!r}; fetch it again")
    part = self._file.get_slice(name)
    found, kind = tuple(part.get_shape()), part.get_dtype()
    if found != shape or kind not in kinds:
      raise InputError(
          f"{self.path}: tensor {name!r} is {kind}{list(found)} where the "
          f"config asks for {'/'.join(kinds)}{list(shape)}; use the config "
          "that belongs to it")
    self._unread.discard(name)
    return self._file.get_tensor(name)

  def refuse_unread(self, noun: str) -> None:
    for name in sorted(self._unread):
      raise InputError(f"{self.path}: tensor {name!r} has no place in these "
                       f"{noun}; use the config that belongs to it")


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[File]:
  import safetensors  # Loaded when a file is opened.

  from jaxspec.checkpoint import hf
  try:
    hf.refuse_duplicates(path)
    with safetensors.safe_open(path, framework="numpy") as file:
      yield File(path, file)
  except (safetensors.SafetensorError, OSError) as error:
    raise InputError(f"{path} is not a whole safetensors file ({error}); "
                     "fetch it again") from error
