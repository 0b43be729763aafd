# SPDX-License-Identifier: Apache-2.0
"""Finds the family of a checkpoint by the name of its file in this folder."""

import importlib
import pathlib
import types

from jaxspec.errors import InputError, nearest
from jaxspec.models.transformer import Config

# Two names for one family: the text part of a multimodal model.
_SAME = {"gemma3_text": "gemma3"}


def supported() -> list[str]:
  """Returns the families: the files here that have a `config` function."""
  here = pathlib.Path(__file__)
  return [
      path.stem
      for path in sorted(here.parent.glob("[a-z]*.py"))
      if path.stem != here.stem
      and "\ndef config(hf" in path.read_text(encoding="utf-8")
  ]


def family(model_type: object) -> types.ModuleType:
  """Returns the module with the `config` and `NAMES` of a `model_type`."""
  known = supported()
  text = model_type if isinstance(model_type, str) else ""
  name = _SAME.get(text, text)
  if name not in known:
    hint = nearest(text, known)
    raise InputError(
        f"model_type {model_type!r} is not supported; the supported ones are"
        f" {', '.join(known)}.{hint}"
    )
  return importlib.import_module(f"jaxspec.models.{name}")


def config(hf: dict) -> Config:
  """Returns the `Config` that a Hugging Face config.json describes."""
  return family(hf.get("model_type")).config(hf)
