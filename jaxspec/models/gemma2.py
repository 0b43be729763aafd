# SPDX-License-Identifier: Apache-2.0
"""Gemma 2: norms around both blocks, soft caps, every other layer slides."""

import math

from jaxspec.models import huggingface
from jaxspec.models.transformer import Config
from jaxspec.models.weights import Names

NAMES = Names(
    post_attn_norm="post_attention_layernorm.weight",
    mlp_norm="pre_feedforward_layernorm.weight",
    post_mlp_norm="post_feedforward_layernorm.weight",
    norm_offset=1.0,
)


def config(hf: dict) -> Config:
  huggingface.refuse(
      hf, "attention_bias", (False,), "it adds a bias to the output projection"
  )
  huggingface.refuse(
      hf, "use_bidirectional_attention", (False,), "decoding is causal"
  )
  scalar = huggingface.real(hf, "query_pre_attn_scalar", 256.0)
  return huggingface.read(
      {"head_dim": 256} | hf,
      "gemma2",
      activation="hidden_activation",
      default_activation="gelu_pytorch_tanh",
      window=huggingface.integer(hf, "sliding_window", 4096),
      sliding=lambda i: i % 2 == 0,
      tied=True,
      post_norms=True,
      attention_cap=huggingface.optional(hf, "attn_logit_softcapping", 50.0),
      logits_cap=huggingface.optional(hf, "final_logit_softcapping", 30.0),
      query_scale=scalar**-0.5,
      embed_scale=math.sqrt(huggingface.integer(hf, "hidden_size")),
  )
