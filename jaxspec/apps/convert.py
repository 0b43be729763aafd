# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint in another form: Orbax or Hugging Face safetensors.

  python -m jaxspec convert --model=model.gguf --output=folder

Weights pass one by one: as safetensors, a model larger than the memory can be
written. The folder appears when it is complete, not before.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Iterator
from typing import Any

from absl import flags

from jaxspec.apps import launch
from jaxspec.errors import InputError, nearest

_FORMATS = ("safetensors", "orbax")
_DTYPES = ("float32", "bfloat16", "float16")


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of this command."""
  launch.define_model_flags(values)
  flags.DEFINE_string("output", None, "the folder to make", flag_values=values)
  flags.DEFINE_string(
    "format", "safetensors", " or ".join(_FORMATS), flag_values=values
  )


def main(settings: types.SimpleNamespace) -> None:
  """Converts the checkpoint that the settings name."""
  if not settings.output:
    raise InputError("--output=FOLDER is missing; name the folder to make")
  _check("format", settings.format, _FORMATS)
  dtype = settings.dtype and _dtype(settings.dtype)
  output = pathlib.Path(settings.output).expanduser().absolute()
  from jaxspec import checkpoint
  from jaxspec.checkpoint import hf, orbax

  write = {"safetensors": hf.write, "orbax": orbax.save}[settings.format]
  with (
    checkpoint.open_checkpoint(settings.model) as source,
    _folder(output) as folder,
    launch.progress("writing") as on_progress,
  ):
    paths = {path: at for at, path in enumerate(source.shapes, 1)}

    def weight(path: str) -> Any:
      if on_progress is not None:
        on_progress(path, paths[path], len(paths))
      array = source.weight(path)
      return array.astype(dtype, copy=False) if dtype else array

    write(
      folder,
      source.config,
      weight,
      tokenizer=source.tokenizer,
      generation=source.generation,
    )
  launch.say(f"wrote {settings.output}")


@contextlib.contextmanager
def _folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder that takes the place of `output` if all went well."""
  if output.exists():
    is_empty = output.is_dir() and not any(output.iterdir())
    if not is_empty:
      raise InputError(
        f"--output={output} is there already; name a new folder, or remove it"
      )
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent)
  except OSError as e:
    raise InputError(f"cannot make {output}: {e.strerror}") from e
  folder = pathlib.Path(made)
  try:
    yield folder
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)  # mkdtemp's folder is for its owner alone.
    folder.replace(output)
  except OSError as e:
    raise InputError(
      f"cannot write {output}: {e.strerror or e}; free some space, or name "
      "another folder"
    ) from e
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _dtype(name: str) -> Any:
  import ml_dtypes
  import numpy as np

  _check("dtype", name, _DTYPES)
  return np.dtype(getattr(ml_dtypes, name, name))


def _check(flag: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise InputError(
      f"--{flag}={value} must be {' or '.join(known)}." + nearest(value, known)
    )
