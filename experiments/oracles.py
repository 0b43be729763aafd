# SPDX-License-Identifier: Apache-2.0
"""The same weights in other people's engines.

A comparison is only fair, and parity only means something, when every engine
holds the very same weights. `as_transformers` fills a transformers model from
one of our checkpoints, tensor by tensor and without a hub; `gguf_file` lets
llama.cpp write the shipped GGUF file again in another precision.
"""

import os
import pathlib
from typing import Any

import numpy as np

from jaxspec.checkpoint import Checkpoint
from jaxspec.errors import InputError
from jaxspec.models import weights
from jaxspec.models.transformer import Config

# What llama.cpp calls them (enum llama_ftype).
FILE_TYPES = {"f32": 0, "f16": 1, "q4_1": 3, "q8_0": 7, "bf16": 32}


def llama_config(config: Config) -> Any:
  """The transformers config of a model of the Llama family."""
  import transformers

  plain = (config.family == "llama" and len(set(config.ropes)) == 1
           and config.ropes[0].kind == "default"
           and config.ropes[0].factors is None and not config.qkv_bias)
  if not plain:
    raise InputError(f"the oracle knows plain Llama models only, got a "
                     f"{config.family} model; compare it by its own files")
  return transformers.LlamaConfig(
      vocab_size=config.vocab, hidden_size=config.width,
      intermediate_size=config.mlp, num_hidden_layers=config.depth,
      num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
      head_dim=config.head_size, max_position_embeddings=config.context,
      rms_norm_eps=config.norm_eps, hidden_act=config.activation,
      tie_word_embeddings=config.tied,
      rope_parameters={"rope_type": "default",
                       "rope_theta": config.ropes[0].theta},
      bos_token_id=None, eos_token_id=None, pad_token_id=0)


def as_transformers(checkpoint: Checkpoint, dtype: str = "float32") -> Any:
  """A transformers model with a checkpoint's weights.

  One tensor at a time is held twice, so that the peak memory of a process is
  that of the model.

  Args:
    checkpoint: of the Llama family.
    dtype: the name of a torch dtype.
  """
  import torch
  import transformers

  config = checkpoint.config
  wanted = getattr(torch, dtype)
  model = transformers.LlamaForCausalLM._from_config(
      llama_config(config), dtype=wanted)
  targets = model.state_dict()
  missing = set(targets) - ({"lm_head.weight"} if config.tied else set())
  for path in checkpoint.shapes:
    weight = np.asarray(checkpoint.weight(path), np.float32)
    for name, tensor in weights.split(path, weight, config, weights.Names()):
      targets[name].copy_(torch.from_numpy(np.array(tensor)))
      missing.discard(name)
  if missing:
    raise InputError(f"no weight was found for {sorted(missing)[0]!r}")
  model.generation_config.eos_token_id = None      # never ends by itself
  model.generation_config.pad_token_id = 0
  return model.eval()


def cache_folder() -> pathlib.Path:
  """Where converted files are kept: a private folder of the user's cache."""
  root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  folder = pathlib.Path(root).expanduser() / "jaxspec" / "oracles"
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  return folder


def gguf_file(source: str | os.PathLike, kind: str,
              folder: str | os.PathLike | None = None) -> pathlib.Path:
  """The GGUF file `source` in another precision, converted once.

  Args:
    kind: a key of `FILE_TYPES`.
    folder: where converted files are kept; `cache_folder()` by default.
  """
  source = pathlib.Path(source)
  if kind not in FILE_TYPES:
    raise InputError(f"kind must be one of {', '.join(FILE_TYPES)}, "
                     f"got {kind!r}")
  size = source.stat().st_size
  target = (pathlib.Path(folder) if folder else cache_folder()) / (
      f"{source.stem}.{size}.{kind}.gguf")
  if target.is_file():
    return target

  import llama_cpp
  quiet_llama()
  parameters = llama_cpp.llama_model_quantize_default_params()
  parameters.ftype = FILE_TYPES[kind]
  parameters.allow_requantize = True
  partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
  failed = llama_cpp.llama_model_quantize(
      str(source).encode(), str(partial).encode(), parameters)
  if failed:
    partial.unlink(missing_ok=True)
    raise InputError(f"llama.cpp could not write {source} as {kind} "
                     f"(code {failed})")
  partial.replace(target)
  return target


def quiet_llama() -> None:
  """Stops llama.cpp from logging."""
  import llama_cpp

  global _silence                      # llama.cpp keeps only the pointer
  _silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
  llama_cpp.llama_log_set(_silence, None)


_silence: Any = None
