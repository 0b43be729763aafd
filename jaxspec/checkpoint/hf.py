# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: config.json and safetensors, read and written.

The safetensors library checks each file's header against its length; what it
lets pass (a duplicate tensor, shards that disagree with their index) is
checked here. Tensors are read one at a time from a memory map.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxspec.checkpoint.base import Checkpoint
from jaxspec.checkpoint.tokenizer import Tokenizer
from jaxspec.errors import InputError
from jaxspec.models import families, weights
from jaxspec.models.transformer import Config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD_BYTES = 5_000_000_000
_LARGEST_JSON = 64 << 20
_LARGEST_HEADER = 100_000_000  # What the safetensors library accepts.
_READABLE = ("F32", "F16", "BF16", "F64")
# Tables that old files store and every reader computes.
_HARMLESS = ("rotary_emb.inv_freq", "self_attn.masked_bias", "attn.bias")
# Of multi-stream models: stored by all, used by those that gate by role.
_GATING = "self_attn.gate_in_norm.weight"
# Where the body may stand: plain, multimodal old and new, headless.
_ROOTS = ("model.", "language_model.model.", "model.language_model.", "")


def read_json(path: pathlib.Path) -> dict:
  """Returns the object in a JSON file, of bounded size."""
  try:
    if path.stat().st_size > _LARGEST_JSON:
      raise InputError(
          f"{path} is larger than {_LARGEST_JSON} bytes; it is not a config."
      )
    found = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise InputError(f"{path} cannot be read: {error.strerror}.") from error
  except (ValueError, RecursionError) as error:
    raise InputError(
        f"{path} is not valid JSON ({error}); fetch it again."
    ) from error
  if not isinstance(found, dict):
    raise InputError(f"{path} must hold a JSON object; fetch it again.")
  return found


class HuggingFace(Checkpoint):
  """A folder in Hugging Face's layout."""

  def __init__(self, folder: str | pathlib.Path, source_name: str = ""):
    self.folder = pathlib.Path(folder)
    path = self.folder / "config.json"
    if not path.is_file():
      raise InputError(
          f"{self.folder} has no config.json; pass a folder with config.json"
          " and safetensors files."
      )
    self.hf = read_json(path)
    try:
      family = families.family(self.hf.get("model_type"))
      config = family.config(self.hf)
    except InputError as error:
      raise InputError(f"{path}: {error}") from error
    generation = self.folder / "generation_config.json"
    super().__init__(
        source_name or str(folder),
        config,
        read_json(generation) if generation.is_file() else _endings(self.hf),
    )
    self._files = contextlib.ExitStack()
    try:
      self._owner = self._open_shards()
    except BaseException:
      self._files.close()
      raise
    self._names = _placed(family.NAMES, self._owner)
    # A file without a head is tied, whatever the config leaves unsaid.
    if not config.tied and not self._has(self._names.lm_head):
      self.config = dataclasses.replace(config, tied=True)
      if self.hf.get("tie_word_embeddings") is False:
        raise InputError(
            f"{self.folder} has no tensor {self._names.lm_head!r}, though"
            " config.json says tie_word_embeddings=false; fetch it again."
        )
    try:
      used = weights.check(self.config, self._names, self._shape_of)
    except InputError as error:
      raise InputError(f"{self.folder}: {error}") from error
    self._refuse_unknown(used)

  def weight(
      self, path: str, part: weights.Part | None = None
  ) -> np.ndarray:
    return weights.assemble(
        path, self.config, self._names, self._read, self._has, part
    )

  def close(self) -> None:
    self._files.close()
    self._owner = {}

  def _tokenizer(self) -> Tokenizer | None:
    return Tokenizer.from_folder(self.folder)

  def _has(self, name: str) -> bool:
    return name in self._owner

  def _read(
      self, name: str, shape: tuple[int, ...], part: weights.Part
  ) -> np.ndarray:
    del shape  # Checked when the files were opened.
    path, file = self._owner[name]
    stored = file.get_slice(name)
    kind = stored.get_dtype()
    if kind not in _READABLE:
      raise InputError(
          f"{path}: tensor {name!r} has dtype {kind}; convert the checkpoint to"
          " F32, F16 or BF16."
      )
    return stored[part]

  def _shape_of(self, name: str) -> tuple[int, ...] | None:
    if name not in self._owner:
      return None
    return tuple(self._owner[name][1].get_slice(name).get_shape())

  def _refuse_unknown(self, used: set[str]) -> None:
    """Raises where a layer has a tensor that would be left out."""
    layers = self._names.root + self._names.layer.partition("{")[0]
    for name in self._owner:
      if name.startswith(layers) and name not in used:
        if name.endswith(_HARMLESS):
          continue
        if name.endswith(_GATING):
          if not self.hf.get("role_gating_enabled"):
            continue
          raise InputError(
              f"{self.folder / 'config.json'} says role_gating_enabled=true, "
              "and gates by role are not known here; use a model without."
          )
        raise InputError(
            f"{self._owner[name][0]}: tensor {name!r} has no place in a"
            f" {self.config.family} model; check model_type in config.json."
        )

  def _open_shards(self) -> dict[str, tuple[pathlib.Path, Any]]:
    """Opens every file; returns, for each tensor, the file that holds it."""
    index = self.folder / INDEX
    if not index.is_file():
      single = self.folder / SINGLE
      if not single.is_file():
        raise InputError(_no_weights(self.folder))
      return {name: (single, f) for name, f in self._open(single)}
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(name, str) for name in where.values()
    ):
      raise InputError(f"{index} has no valid 'weight_map'; fetch it again.")
    owner: dict[str, tuple[pathlib.Path, Any]] = {}
    for shard in sorted(set(where.values())):
      path = self.folder / shard
      if pathlib.Path(shard).name != shard or not path.is_file():
        raise InputError(
            f"{index} names shard {shard!r}, which is missing from"
            f" {self.folder}; fetch it."
        )
      for name, file in self._open(path):
        if name in owner:
          raise InputError(
              f"tensor {name!r} is in both {owner[name][0].name} and {shard};"
              f" fetch {self.folder} again."
          )
        owner[name] = (path, file)
    for name, shard in where.items():
      if name not in owner or owner[name][0].name != shard:
        raise InputError(
            f"{index} places tensor {name!r} in {shard}, which does not hold"
            " it; fetch that shard again."
        )
    return owner

  def _open(self, path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    import safetensors  # Loaded when a file is opened.

    try:
      refuse_duplicates(path)
      file = self._files.enter_context(
          safetensors.safe_open(path, framework="numpy")
      )
      found = [(name, file) for name in file.keys()]  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
      raise InputError(
          f"{path} is not a whole safetensors file ({error}); fetch it again."
      ) from error
    yield from found


def refuse_duplicates(path: pathlib.Path) -> None:
  """Raises where a header names a tensor twice: parsers keep either."""

  def unique(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
      names = [name for name, _ in pairs]
      twice = next(n for n in names if names.count(n) > 1)
      raise InputError(
          f"{path} holds {twice!r} twice in its header; fetch it again."
      )
    return found

  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    if size > min(_LARGEST_HEADER, path.stat().st_size):
      raise InputError(
          f"{path} claims a header of {size} bytes in a file of"
          f" {path.stat().st_size}; fetch it again."
      )
    try:
      json.loads(file.read(size), object_pairs_hook=unique)
    except InputError:
      raise
    except (ValueError, RecursionError) as error:
      raise InputError(
          f"{path} has an unreadable header ({error}); fetch it again."
      ) from error


def _placed(names: weights.Names, owner: dict) -> weights.Names:
  """Returns the names as they stand in this file: with its root."""
  roots = [root for root in _ROOTS if root + names.embedding in owner]
  root = roots[0] if roots else names.root
  head = names.lm_head
  if root == "language_model.model." and "language_model." + head in owner:
    head = "language_model." + head
  return dataclasses.replace(names, root=root, lm_head=head)


def _endings(hf: dict) -> dict:
  return {
      key: hf[key]
      for key in ("bos_token_id", "eos_token_id", "pad_token_id")
      if hf.get(key) is not None
  }


def _no_weights(folder: pathlib.Path) -> str:
  for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
    for found in sorted(folder.glob(pattern)):
      return (
          f"{found}: pickle checkpoints are not loaded; convert to safetensors."
      )
  return (
      f"{folder} has neither {SINGLE} nor {INDEX}; fetch the weights in"
      " safetensors form."
  )


def write(
    folder: str | pathlib.Path,
    config: Config,
    weight: Callable[[str], Any],
    *,
    dtype: Any = None,
    tokenizer: Tokenizer | None = None,
    generation: dict | None = None,
    hf: dict | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes a transformer as a Hugging Face folder.

  Args:
    folder: where to; made if need be, files of the same name are replaced.
    config: its sizes.
    weight: gives one weight by path, as `Checkpoint.weight` does.
    dtype: of the written tensors; None keeps each as it comes.
    tokenizer: written beside, with its chat template.
    generation: written as generation_config.json.
    hf: the config.json to write; derived from `config` when None.
    shard_bytes: the largest size of one file, unless one tensor is larger.
  """
  import safetensors.numpy  # Loaded when a file is written.

  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  names = families.family(config.family).NAMES
  where: dict[str, str] = {}
  total = shards = held = 0
  pending: dict[str, np.ndarray] = {}
  kinds: dict[str, None] = {}

  def flush() -> None:
    nonlocal pending, held, shards
    shards += 1
    shard = folder / f"part-{shards:05d}.safetensors"
    safetensors.numpy.save_file(pending, shard, metadata={"format": "pt"})
    where.update(dict.fromkeys(pending, shard.name))
    pending, held = {}, 0

  for path in weights.shapes(config):
    array = np.asarray(weight(path))
    for name, tensor in weights.split(path, array, config, names):
      tensor = np.ascontiguousarray(tensor, dtype)
      kinds.setdefault(str(tensor.dtype), None)
      if pending and held + tensor.nbytes > shard_bytes:
        flush()
      pending[name] = tensor
      held += tensor.nbytes
      total += tensor.nbytes
  flush()
  _name_shards(folder, where, shards, total)
  if hf is None:
    from jaxspec.models import huggingface

    # The embedding's, which is written first; norms may be float32.
    hf = huggingface.write(config, next(iter(kinds)))
  _write_json(folder / "config.json", hf)
  if generation:
    _write_json(folder / "generation_config.json", generation)
  if tokenizer is not None:
    tokenizer.save(folder)


def _name_shards(
    folder: pathlib.Path, where: dict[str, str], shards: int, total: int
) -> None:
  """Gives shards their final names, known only when all are written."""
  final = {
      f"part-{i:05d}.safetensors": f"model-{i:05d}-of-{shards:05d}.safetensors"
      for i in range(1, shards + 1)
  }
  if shards == 1:
    final = {"part-00001.safetensors": SINGLE}
  else:
    index = {name: final[shard] for name, shard in where.items()}
    _write_json(
        folder / INDEX,
        {"metadata": {"total_size": total}, "weight_map": index},
    )
  for old, new in final.items():
    (folder / old).replace(folder / new)


def _write_json(path: pathlib.Path, value: dict) -> None:
  path.write_text(
      json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
  )
