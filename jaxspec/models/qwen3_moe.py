# SPDX-License-Identifier: Apache-2.0
"""Qwen 3 with a mixture of experts in every layer."""

from jaxspec.models import huggingface
from jaxspec.models.transformer import Config
from jaxspec.models.weights import Names

NAMES = Names()


def config(hf: dict) -> Config:
  huggingface.refuse(
      hf, "attention_bias", (False,), "it adds a bias to the output projection"
  )
  why = "every layer has experts here"
  huggingface.refuse(hf, "decoder_sparse_step", (1,), why)
  huggingface.refuse(hf, "mlp_only_layers", ([],), why)
  # Old files say num_experts, transformers 5 writes num_local_experts.
  key = "num_experts" if "num_experts" in hf else "num_local_experts"
  experts = huggingface.experts(hf, key, 128)
  return huggingface.read(
      hf,
      "qwen3_moe",
      mlp="moe_intermediate_size",
      qk_norm=True,
      experts=experts,
      experts_per_token=huggingface.experts_per_token(hf, experts, 8),
      normalize_experts=bool(hf.get("norm_topk_prob", False)),
      **huggingface.upper_window(hf),
  )
