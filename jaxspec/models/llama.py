# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, and what is built like them (SmolLM2, TinyLlama, Yi)."""

from jaxspec.models import huggingface
from jaxspec.models.transformer import Config
from jaxspec.models.weights import Names

NAMES = Names()


def config(hf: dict) -> Config:
  huggingface.refuse(
      hf, "attention_bias", (False,), "it adds a bias to the output projection"
  )
  return huggingface.read(hf, "llama")
