# SPDX-License-Identifier: Apache-2.0
"""Qwen 2 and 2.5: Llama with biases on query, key and value."""

from jaxspec.models import huggingface
from jaxspec.models.transformer import Config
from jaxspec.models.weights import Names

NAMES = Names()


def config(hf: dict) -> Config:
  return huggingface.read(
      hf, "qwen2", qkv_bias=True, **huggingface.upper_window(hf)
  )
