# SPDX-License-Identifier: Apache-2.0
"""Mistral 7B and Nemo: Llama, with a sliding window in early versions."""

from jaxspec.models import huggingface
from jaxspec.models.transformer import Config
from jaxspec.models.weights import Names

NAMES = Names()


def config(hf: dict) -> Config:
  window = None
  if hf.get("sliding_window", 4096) is not None:
    window = huggingface.integer(hf, "sliding_window", 4096)
  return huggingface.read(hf, "mistral", window=window)
