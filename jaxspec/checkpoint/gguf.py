# SPDX-License-Identifier: Apache-2.0
"""GGUF files, read only: metadata to sizes, quantized blocks to weights.

Metadata is put into the words of a Hugging Face config.json and read by the
family's own file, so that a setting has one meaning and one check.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from jaxspec.checkpoint import gguf_header, gguf_tokenizer
from jaxspec.checkpoint.base import Checkpoint
from jaxspec.checkpoint.dequantization import dequantize
from jaxspec.checkpoint.tokenizer import Tokenizer
from jaxspec.errors import InputError, nearest
from jaxspec.models import families, weights
from jaxspec.models.transformer import Config

_FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
# llama.cpp's names. Gemma's norms already hold what Hugging Face adds later.
_NAMES = weights.Names(
    root="",
    embedding="token_embd.weight",
    final_norm="output_norm.weight",
    lm_head="output.weight",
    layer="blk.{i}.",
    attn_norm="attn_norm.weight",
    q="attn_q",
    k="attn_k",
    v="attn_v",
    out="attn_output.weight",
    q_norm="attn_q_norm.weight",
    k_norm="attn_k_norm.weight",
    post_attn_norm="post_attention_norm.weight",
    mlp_norm="ffn_norm.weight",
    post_mlp_norm="post_ffw_norm.weight",
    gate="ffn_gate.weight",
    up="ffn_up.weight",
    down="ffn_down.weight",
    router="ffn_gate_inp.weight",
    expert_gate="ffn_gate.{e}.weight",
    expert_up="ffn_up.{e}.weight",
    expert_down="ffn_down.{e}.weight",
    fused_gate_up="",
    fused_down="",
    stacked_gate="ffn_gate_exps.weight",
    stacked_up="ffn_up_exps.weight",
    stacked_down="ffn_down_exps.weight",
)
_FACTORS = "rope_freqs.weight"
# Read by nobody: the rotary table of early files.
_HARMLESS = (".attn_rot_embd", "rope.freqs")
# The only sizes of Gemma whose scores are scaled by width over heads.
_WIDE_GEMMA = {"gemma2": 46, "gemma3": 62}


class Gguf(Checkpoint):
  """One GGUF file."""

  def __init__(self, path: str | pathlib.Path, source_name: str = ""):
    self.path = pathlib.Path(path)
    self._header = gguf_header.read(self.path)
    try:
      config, generation = self._config()
    except InputError as error:
      raise InputError(f"{self.path}: {error}") from error
    super().__init__(source_name or str(path), config, generation)

  def weight(
      self, path: str, part: weights.Part | None = None
  ) -> np.ndarray:
    return weights.assemble(
        path, self.config, _NAMES, self._read, self._has, part
    )

  def _tokenizer(self) -> Tokenizer | None:
    return gguf_tokenizer.build(self._header.values, str(self.path))

  def _has(self, name: str) -> bool:
    return name in self._header.tensors

  def _read(
      self, name: str, shape: tuple[int, ...], part: weights.Part
  ) -> np.ndarray:
    tensor = self._header.tensors[name]
    first, rest = range(shape[0])[part[0]], part[1:]
    if not rest:  # Blocks of numbers may begin and end within it.
      first, rest = range(shape[0]), part
    # Rows of a matrix are whole blocks; columns are cut from whole rows.
    each = tensor.size // shape[0]
    start = tensor.start + first.start * each
    raw = self._header.data[start : start + len(first) * each]
    found = dequantize(
        raw, tensor.kind, (len(first), *shape[1:]), f"{self.path}: {name}"
    )
    if self.config.family in ("llama", "mixtral") and name.endswith(
        ("attn_q.weight", "attn_k.weight")
    ):
      found = _unpermute(found, len(first) // self.config.head_size)
    return found[(..., *rest)]

  def _shape_of(self, name: str) -> tuple[int, ...] | None:
    tensor = self._header.tensors.get(name)
    return tensor.shape if tensor else None

  def _config(self) -> tuple[Config, dict]:
    values = self._header.values
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
      hint = nearest(str(architecture), _FAMILIES)
      raise InputError(
          f"architecture {architecture!r} is not supported; the supported ones"
          f" are {', '.join(_FAMILIES)}.{hint}"
      )
    if _whole(values, "split.count") not in (None, 0, 1):
      raise InputError(
          "the file is one of several; join them with llama-gguf-split"
          " --merge."
      )
    embedding = self._shape_of(_NAMES.embedding)
    if embedding is None or len(embedding) != 2:
      raise InputError(
          f"tensor {_NAMES.embedding!r} is missing or no matrix; fetch it"
          " again."
      )
    hf = _words(values, architecture, embedding[0])
    hf["tie_word_embeddings"] = not self._has(_NAMES.lm_head)
    config = families.config(hf)
    tokens = values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != config.vocab:
      raise InputError(
          f"the tokenizer has {len(tokens)} tokens but tensor"
          f" {_NAMES.embedding!r} has {config.vocab} rows; fetch it again."
      )
    used = weights.check(config, _NAMES, self._shape_of)
    config = self._with_factors(config)
    for name in self._header.tensors.keys() - used - {_FACTORS}:
      if not name.endswith(_HARMLESS):
        raise InputError(
            f"tensor {name!r} has no place in a {architecture} model, so its"
            " effect would be lost; use another conversion of the model."
        )
    keys = ("bos", "eos", "padding")
    generation = {
        f"{key if key != 'padding' else 'pad'}_token_id": values[
            f"tokenizer.ggml.{key}_token_id"
        ]
        for key in keys
        if f"tokenizer.ggml.{key}_token_id" in values
    }
    return config, generation

  def _with_factors(self, config: Config) -> Config:
    """Takes up Llama 3.1's scaling, stored as a tensor of divisors."""
    shape = self._shape_of(_FACTORS)
    if shape is None:
      return config
    if shape != (config.head_size // 2,):
      raise InputError(
          f"tensor {_FACTORS!r} has shape {shape} where a head of"
          f" {config.head_size} asks for ({config.head_size // 2},);"
          " fetch it again."
      )
    tensor = self._header.tensors[_FACTORS]
    raw = self._header.data[tensor.start : tensor.start + tensor.size]
    factors = dequantize(raw, tensor.kind, shape, _FACTORS).astype(np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
      raise InputError(
          f"tensor {_FACTORS!r} holds a factor that is not above 0; fetch it"
          " again."
      )
    ropes = tuple(
        dataclasses.replace(rope, factors=tuple(factors.tolist()))
        for rope in config.ropes
    )
    return dataclasses.replace(config, ropes=ropes)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
  """Undoes llama.cpp's order of rows, which pairs neighbours for its rope."""
  rows = len(weight) // heads // 2
  pairs = weight.reshape(heads, rows, 2, *weight.shape[1:])
  return pairs.swapaxes(1, 2).reshape(weight.shape)


def _whole(values: dict[str, Any], key: str) -> Any:
  """Returns a number; a list of equal ones, a value a layer, counts as one."""
  value = values.get(key)
  if isinstance(value, np.ndarray) and len(value):
    if (value != value[0]).any():
      raise InputError(
          f"{key} differs between layers, which is not supported; use another"
          " model."
      )
    value = value[0].item()
  if isinstance(value, float):
    # The file has four bytes of what was written as 1e-05.
    value = float(str(np.float32(value)))
  if value is not None and (
      isinstance(value, bool) or not isinstance(value, int | float)
  ):
    raise InputError(f"{key} must be a number, found {value!r}.")
  return value


def _words(values: dict[str, Any], architecture: str, vocab: int) -> dict:
  """Returns the metadata in the words of a Hugging Face config.json."""

  def get(key: str) -> Any:
    return _whole(values, f"{architecture}.{key}")

  for key in ("embedding_length", "block_count", "attention.head_count"):
    if not isinstance(get(key), int) or get(key) < 1:
      raise InputError(
          f"{architecture}.{key} must be a whole number above 0, found"
          f" {get(key)!r}; fetch it again."
      )
  width, heads = get("embedding_length"), get("attention.head_count")
  head_size = get("attention.key_length") or width // heads
  for key in ("attention.value_length", "rope.dimension_count"):
    if get(key) not in (None, head_size):
      raise InputError(
          f"{architecture}.{key}={get(key)} differs from the head size"
          f" {head_size}, which is not supported; use another model."
      )
  hf = {
      "model_type": _FAMILIES[architecture],
      "vocab_size": vocab,
      "hidden_size": width,
      "num_hidden_layers": get("block_count"),
      "num_attention_heads": heads,
      "num_key_value_heads": get("attention.head_count_kv"),
      "head_dim": head_size,
      "intermediate_size": get("feed_forward_length"),
      "max_position_embeddings": get("context_length"),
      "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
      "rope_theta": get("rope.freq_base"),
  }
  kind = values.get(f"{architecture}.rope.scaling.type", "none")
  if not isinstance(kind, str) or kind not in ("none", ""):
    hf["rope_scaling"] = {
        "rope_type": kind,
        "factor": get("rope.scaling.factor") or 1.0,
    }
  elif get("rope.scale_linear"):
    hf["rope_scaling"] = {"type": "linear", "factor": get("rope.scale_linear")}
  if get("expert_count"):
    if get("expert_shared_count"):
      raise InputError(
          f"{architecture}.expert_shared_count={get('expert_shared_count')} is"
          " not supported; use a model without shared experts."
      )
    if architecture == "llama":
      hf["model_type"] = "mixtral"
    hf["num_local_experts"] = get("expert_count")
    hf["num_experts_per_tok"] = get("expert_used_count")
    hf["moe_intermediate_size"] = get("expert_feed_forward_length")
    # llama.cpp normalises for both families, so no file says so.
    hf["norm_topk_prob"] = True
  if architecture in _WIDE_GEMMA:
    hf["sliding_window"] = get("attention.sliding_window")
    wide = hf["num_hidden_layers"] == _WIDE_GEMMA[architecture]
    hf["query_pre_attn_scalar"] = width // heads if wide else head_size
    hf["attn_logit_softcapping"] = get("attn_logit_softcapping")
    hf["final_logit_softcapping"] = get("final_logit_softcapping")
    hf["rope_local_base_freq"] = get("rope.freq_base_swa")
    if architecture == "gemma2":  # What llama.cpp assumes of early files.
      hf["attn_logit_softcapping"] = hf["attn_logit_softcapping"] or 50.0
      hf["final_logit_softcapping"] = hf["final_logit_softcapping"] or 30.0
  return {key: value for key, value in hf.items() if value is not None}
