# SPDX-License-Identifier: Apache-2.0
"""Qwen 3, dense: query and key are normalised head by head."""

from jaxspec.models import huggingface
from jaxspec.models.transformer import Config
from jaxspec.models.weights import Names

NAMES = Names()


def config(hf: dict) -> Config:
  huggingface.refuse(
      hf, "attention_bias", (False,), "it adds a bias to the output projection"
  )
  return huggingface.read(
      {"head_dim": 128} | hf,
      "qwen3",
      qk_norm=True,
      **huggingface.upper_window(hf),
  )
