# SPDX-License-Identifier: Apache-2.0
"""Gemma 3, text: norms everywhere, five of six layers slide.

The multimodal wrapper's config is read through its `text_config`; its vision
tower stays on disk. Published wrappers leave most of the text's settings to
defaults, so all of them are here.
"""

import math

from jaxspec.models import huggingface
from jaxspec.models.gemma2 import NAMES as NAMES
from jaxspec.models.transformer import Config

_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}


def config(hf: dict) -> Config:
  if "text_config" in hf:
    outer = {k: hf[k] for k in ("tie_word_embeddings",) if k in hf}
    hf = outer | huggingface.section(hf, "text_config")
  hf = _DEFAULTS | {k: v for k, v in hf.items() if v is not None}
  huggingface.refuse(
      hf, "attention_bias", (False,), "it adds a bias to the output projection"
  )
  huggingface.refuse(
      hf, "use_bidirectional_attention", (False,), "decoding is causal"
  )
  period = huggingface.integer(hf, "sliding_window_pattern", 6)
  scalar = huggingface.real(hf, "query_pre_attn_scalar", 256.0)
  return huggingface.read(
      hf,
      "gemma3",
      theta=1_000_000.0,
      local_theta=huggingface.real(hf, "rope_local_base_freq", 10_000.0),
      activation="hidden_activation",
      default_activation="gelu_pytorch_tanh",
      window=huggingface.integer(hf, "sliding_window", 4096),
      sliding=lambda i: (i + 1) % period != 0,
      tied=True,
      qk_norm=True,
      post_norms=True,
      attention_cap=huggingface.optional(hf, "attn_logit_softcapping"),
      logits_cap=huggingface.optional(hf, "final_logit_softcapping"),
      query_scale=scalar**-0.5,
      embed_scale=math.sqrt(huggingface.integer(hf, "hidden_size")),
  )
