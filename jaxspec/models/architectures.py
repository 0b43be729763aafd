# SPDX-License-Identifier: Apache-2.0
"""Sizes of published models, so that they can be planned for by name.

Each is what matters of the `config.json` that the model was published with,
read as any other is (see `jaxspec.models.families`).
"""

from typing import Any

from jaxspec.errors import InputError, nearest
from jaxspec.models import families
from jaxspec.models.transformer import Config

# Their rms_norm_eps is 1e-5; that of the others 1e-6, the default.
_WIDE_EPS = ("llama", "mistral", "mixtral")
# Of each: model_type, then hidden_size, num_hidden_layers,
# num_attention_heads, num_key_value_heads, intermediate_size, vocab_size,
# max_position_embeddings, rope_theta, and what else it says.
_LLAMA_3_1 = dict(rope_scaling=dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192), max_position_embeddings=131072)
_QWEN_MOE = dict(head_dim=128, num_experts=128, num_experts_per_tok=8,
                 norm_topk_prob=True)
_PUBLISHED: dict[str, tuple[Any, ...]] = {
    "smollm2-135m": ("llama", 576, 30, 9, 3, 1536, 49152, 8192, 1e5,
                     dict(tie_word_embeddings=True)),
    "smollm2-1.7b": ("llama", 2048, 24, 32, 32, 8192, 49152, 8192, 130000.0,
                     dict(tie_word_embeddings=True)),
    "llama3-8b": ("llama", 4096, 32, 32, 8, 14336, 128256, 8192, 5e5, {}),
    "llama3-70b": ("llama", 8192, 80, 64, 8, 28672, 128256, 8192, 5e5, {}),
    "llama3.1-8b": ("llama", 4096, 32, 32, 8, 14336, 128256, 8192, 5e5,
                    _LLAMA_3_1),
    "llama3.1-70b": ("llama", 8192, 80, 64, 8, 28672, 128256, 8192, 5e5,
                     _LLAMA_3_1),
    "llama3.1-405b": ("llama", 16384, 126, 128, 8, 53248, 128256, 8192, 5e5,
                      _LLAMA_3_1),
    "mistral-7b": ("mistral", 4096, 32, 32, 8, 14336, 32768, 32768, 1e6,
                   dict(sliding_window=None)),
    "mixtral-8x7b": ("mixtral", 4096, 32, 32, 8, 14336, 32000, 32768, 1e6,
                     dict(num_local_experts=8, num_experts_per_tok=2)),
    "qwen3-0.6b": ("qwen3", 1024, 28, 16, 8, 3072, 151936, 40960, 1e6,
                   dict(head_dim=128, tie_word_embeddings=True)),
    "qwen3-8b": ("qwen3", 4096, 36, 32, 8, 12288, 151936, 40960, 1e6,
                 dict(head_dim=128)),
    "qwen3-32b": ("qwen3", 5120, 64, 64, 8, 25600, 151936, 40960, 1e6,
                  dict(head_dim=128)),
    "qwen3-30b-a3b": ("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, 40960, 1e6,
                      _QWEN_MOE | dict(moe_intermediate_size=768)),
    "qwen3-235b-a22b": ("qwen3_moe", 4096, 94, 64, 4, 12288, 151936, 40960,
                        1e6, _QWEN_MOE | dict(moe_intermediate_size=1536)),
    "gemma2-9b": ("gemma2", 3584, 42, 16, 8, 14336, 256000, 8192, 1e4, dict(
        head_dim=256, query_pre_attn_scalar=256, sliding_window=4096,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True)),
}


def names() -> list[str]:
  return list(_PUBLISHED)


def sizes(name: str) -> Config:
  """The sizes of a published model.

  Raises:
    InputError: it is not among them.
  """
  if name not in _PUBLISHED:
    raise InputError(f"no architecture {name!r} is known by name; there are "
                     f"{', '.join(_PUBLISHED)}.{nearest(name, _PUBLISHED)}")
  (kind, width, depth, heads, kv_heads, mlp, vocab, context, theta,
   more) = _PUBLISHED[name]
  return families.config(dict(
      model_type=kind, hidden_size=width, num_hidden_layers=depth,
      num_attention_heads=heads, num_key_value_heads=kv_heads,
      intermediate_size=mlp, vocab_size=vocab, max_position_embeddings=context,
      rope_theta=theta) | ({"rms_norm_eps": 1e-5} if kind in _WIDE_EPS else {})
      | more)
