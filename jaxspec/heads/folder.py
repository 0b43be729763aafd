# SPDX-License-Identifier: Apache-2.0
"""Folders of heads, and which model they are for."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxspec.errors import InputError
from jaxspec.heads.base import beside, dtype_of
from jaxspec.heads.kinds import kinds
from jaxspec.heads.settings import Calibration, Settings
from jaxspec.models.transformer import Transformer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FORMAT = 1
_FLOATS = ("F32", "F16", "BF16")


def fingerprint(model: Transformer) -> str:
  """What tells one model from another: its sizes and a sample of its weights.

  Values are sampled from the embedding, the final norm, and three layers, and
  rounded to bfloat16, so that a model read as float32 and one read as bfloat16
  are the same. One that was quantized is another model.
  """
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
    value = np.asarray(value[some].astype(jnp.bfloat16).astype(jnp.float32))
    found.update(value.astype("<f4").tobytes())
  return found.hexdigest()[:32]


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
  import safetensors.numpy  # Loaded when a file is written.
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  weights, count = heads.tensors(), None
  if heads.tokens is not None:
    weights = {**weights, "tokens": heads.tokens[...]}
    count = len(heads.tokens[...])
  config = dict(
      format=_FORMAT, kind=heads.kind, model=fingerprint(model),
      vocabulary=count, **heads.settings(), choices=[list(c) for c in choices],
      accuracy=None if accuracy is None else np.asarray(accuracy).tolist())
  safetensors.numpy.save_file(
      {name: np.ascontiguousarray(value) for name, value in weights.items()},
      folder / WEIGHTS)
  # Last: a folder without it is not one of heads.
  _write(folder / CONFIG, config)


def note(folder: str | pathlib.Path, calibration: Calibration) -> None:
  """Keeps beside heads what may be shown of them.

  Raises:
    InputError: the folder holds no heads, or cannot be written.
  """
  from jaxspec.checkpoint import hf  # pulls in file formats
  path = _config_of(folder)
  try:
    _write(path, hf.read_json(path) | {
        "calibration": dataclasses.asdict(calibration)})
  except OSError as error:
    raise InputError(f"cannot write {path}: {error.strerror}") from error


def _config_of(folder: str | pathlib.Path) -> pathlib.Path:
  path = pathlib.Path(folder) / CONFIG
  if not path.is_file():
    raise InputError(f"{folder} has no {CONFIG}; pass a folder that "
                     "jaxspec.heads.save wrote")
  return path


def _write(path: pathlib.Path, config: dict[str, Any]) -> None:
  new = path.with_name(path.name + ".new")
  new.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
  new.replace(path)


def load(folder: str | pathlib.Path, model: Transformer, kind: str) -> Stored:
  """Reads heads for `model`, onto its mesh and in its dtype.

  Args:
    kind: of the heads, e.g. "medusa": a file of `jaxspec/heads`.

  Raises:
    InputError: they are of another kind or for another model, or a file is
      not as its config says.
  """
  from jaxspec.checkpoint import hf  # pulls in file formats
  folder, path = pathlib.Path(folder), _config_of(folder)
  config = Settings(path, hf.read_json(path))
  if config.get("kind") != kind:
    raise InputError(f"{path} is of kind {config.get('kind')!r}; pass a folder "
                     f"of kind {kind!r}")
  config.integer("format", _FORMAT, _FORMAT)
  made_for, here = config.get("model"), fingerprint(model)
  if made_for != here:
    raise InputError(f"{folder} was made for the model {made_for!r} and this "
                     f"is {here!r}; pass heads of this model")
  count = config.integer("vocabulary", 1, model.vocab, default=None)
  with _open(folder / WEIGHTS) as file:
    tokens = None
    if count is not None:
      tokens = file.read("tokens", (count,), ("I32",))
      if tokens[0] < 0 or tokens[-1] >= model.vocab or np.any(
          np.diff(tokens) <= 0):
        raise InputError(f"{file.path}: tokens must be ascending ids below "
                         f"{model.vocab}; fetch it again")
    put = beside(model)

    def source(name, shape, axes, wanted=None):
      array = file.read(name, shape, _FLOATS)
      return put(array.astype(wanted or dtype_of(model)), axes)

    heads = kinds()[kind].read(model, source, config, tokens)
    file.refuse_unread()
  columns = getattr(heads, "count", 1)
  return Stored(heads, config.choices(columns), config.accuracy(columns),
                config.calibration())


class _File:
  """An open safetensors file, read tensor by tensor and in full."""

  def __init__(self, path: pathlib.Path, file: Any):
    self.path, self._file = path, file
    self._unread = set(file.keys())

  def read(self, name: str, shape: tuple[int, ...], kinds: Sequence[str]
           ) -> np.ndarray:
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

  def refuse_unread(self) -> None:
    for name in sorted(self._unread):
      raise InputError(f"{self.path}: tensor {name!r} has no place in these "
                       "heads; use the config that belongs to it")


@contextlib.contextmanager
def _open(path: pathlib.Path):
  import safetensors  # Loaded when a file is opened.

  from jaxspec.checkpoint import hf
  try:
    hf.refuse_duplicates(path)
    with safetensors.safe_open(path, framework="numpy") as file:
      yield _File(path, file)
  except (safetensors.SafetensorError, OSError) as error:
    raise InputError(f"{path} is not a whole safetensors file ({error}); "
                     "fetch it again") from error
