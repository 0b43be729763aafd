# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral with a mixture of experts in every layer."""

from jaxspec.models import huggingface
from jaxspec.models.transformer import Config
from jaxspec.models.weights import Names

_MOE = "block_sparse_moe."
NAMES = Names(
    router=_MOE + "gate.weight",
    expert_gate=_MOE + "experts.{e}.w1.weight",
    expert_up=_MOE + "experts.{e}.w3.weight",
    expert_down=_MOE + "experts.{e}.w2.weight",
    fused_gate_up=_MOE + "experts.gate_up_proj",
    fused_down=_MOE + "experts.down_proj",
)


def config(hf: dict) -> Config:
  window = None
  if hf.get("sliding_window") is not None:
    window = huggingface.integer(hf, "sliding_window")
  experts = huggingface.experts(hf, "num_local_experts", 8)
  return huggingface.read(
      hf,
      "mixtral",
      theta=1_000_000.0,
      window=window,
      experts=experts,
      experts_per_token=huggingface.experts_per_token(hf, experts, 2),
      normalize_experts=True,
  )
