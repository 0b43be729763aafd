# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints, written afresh by every test that wants one."""

import json
import pathlib

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def llama_tensors(dtype=ml_dtypes.bfloat16, seed: int = 0) -> dict:
  """The tensors that belong to `LLAMA`."""
  rng = np.random.default_rng(seed)

  def weight(*shape):
    return rng.standard_normal(shape).astype(dtype)

  tensors = {
      "model.embed_tokens.weight": weight(300, 32),
      "model.norm.weight": weight(32),
      "lm_head.weight": weight(300, 32),
  }
  for i in range(2):
    layer = {
        "input_layernorm.weight": weight(32),
        "post_attention_layernorm.weight": weight(32),
        "self_attn.q_proj.weight": weight(32, 32),
        "self_attn.k_proj.weight": weight(16, 32),
        "self_attn.v_proj.weight": weight(16, 32),
        "self_attn.o_proj.weight": weight(32, 32),
        "mlp.gate_proj.weight": weight(48, 32),
        "mlp.up_proj.weight": weight(48, 32),
        "mlp.down_proj.weight": weight(32, 48),
    }
    tensors |= {f"model.layers.{i}.{k}": v for k, v in layer.items()}
  return tensors


def byte_level() -> tokenizers.Tokenizer:
  """A byte-level tokenizer of 256 bytes, some merges and special tokens."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate(alphabet)}
  merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t")]
  for left, right in merges:
    vocabulary[left + right] = len(vocabulary)
  inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  return inner


def write_folder(
    folder: pathlib.Path, hf: dict | None = None, tensors: dict | None = None
) -> pathlib.Path:
  """Writes a whole Hugging Face folder."""
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(hf or LLAMA))
  (folder / "generation_config.json").write_text('{"eos_token_id": [261, 262]}')
  safetensors.numpy.save_file(
      llama_tensors() if tensors is None else tensors,
      folder / "model.safetensors",
  )
  byte_level().save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
      json.dumps({
          "bos_token": "<|im_start|>",
          "eos_token": {"content": "<|im_end|>"},
          "chat_template": TEMPLATE,
      })
  )
  return folder


def gguf_metadata(writer: gguf.GGUFWriter) -> None:
  """What a llama of the size of `LLAMA` says about itself."""
  writer.add_block_count(2)
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(48)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_context_length(64)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(10000.0)
  writer.add_rope_dimension_count(8)


def gguf_tokens(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
  """The tokenizer of `byte_level`, as llama.cpp stores it."""
  vocabulary = byte_level().get_vocab()
  tokens = sorted(vocabulary, key=vocabulary.__getitem__)
  tokens += [f"[PAD{i}]" for i in range(300 - len(tokens))]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  kinds = [1] * 261 + [3, 3] + [5] * 37
  writer.add_token_types(kinds)
  writer.add_token_merges(["h e", "l l", "he ll", "hell o", "Ġ t"])
  writer.add_bos_token_id(261)
  writer.add_eos_token_id(262)
  writer.add_chat_template(TEMPLATE)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
  """Rows in the order llama.cpp keeps them."""
  pairs = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
  return pairs.swapaxes(1, 2).reshape(weight.shape)


_GGUF_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_tensors() -> dict[str, np.ndarray]:
  """The tensors of `llama_tensors` in float32, under llama.cpp's names."""
  found = {}
  for name, tensor in llama_tensors(np.float32).items():
    if name.startswith("model.layers."):
      _, _, i, rest = name.split(".", 3)
      if "q_proj" in rest:
        tensor = permuted(tensor, 4)
      if "k_proj" in rest:
        tensor = permuted(tensor, 2)
      found[f"blk.{i}.{_GGUF_NAMES[rest]}"] = tensor
  tensors = llama_tensors(np.float32)
  found["token_embd.weight"] = tensors["model.embed_tokens.weight"]
  found["output_norm.weight"] = tensors["model.norm.weight"]
  found["output.weight"] = tensors["lm_head.weight"]
  return found


def write_gguf(
    path: pathlib.Path,
    *,
    architecture: str = "llama",
    metadata=gguf_metadata,
    tokens=gguf_tokens,
    tensors: dict | None = None,
    kind: gguf.GGMLQuantizationType | None = None,
) -> pathlib.Path:
  """Writes a whole GGUF file.

  Args:
    path: where to.
    architecture: what it claims to be.
    metadata: adds sizes to the writer.
    tokens: adds the tokenizer to the writer.
    tensors: by llama.cpp's names.
    kind: how to quantize matrices; float32 when None.
  """
  writer = gguf.GGUFWriter(path, architecture)
  metadata(writer)
  tokens(writer)
  for name, tensor in (tensors or gguf_tensors()).items():
    if kind is not None and tensor.ndim > 1:
      packed = gguf.quants.quantize(tensor, kind)
      writer.add_tensor(name, packed, raw_dtype=kind)
    else:
      writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path
