# SPDX-License-Identifier: Apache-2.0
"""Reads what the families share of a Hugging Face `config.json`.

Every value is checked where it is read: a config that asks for what the
transformer does not compute is refused, because a model that runs with one
setting ignored is wrong without a sign of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxspec.errors import InputError
from jaxspec.models.layers import Rope
from jaxspec.models.transformer import Config

_LARGEST = 1 << 31
# Far above any model; what is built once a layer must stay small.
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 65_536
_LAYER_TYPES = ("full_attention", "sliding_attention")
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
_ALIASES = {"swish": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def integer(
    hf: dict,
    key: str,
    default: int | None = None,
    low: int = 1,
    high: int = _LARGEST,
) -> int:
  """Returns a whole number in [low, high)."""
  value = hf.get(key)
  value = default if value is None else value
  if value is None:
    raise InputError(f"the config has no {key!r}; add it to config.json.")
  if isinstance(value, bool) or not isinstance(value, int):
    raise InputError(f"{key!r} must be a whole number, found {value!r}.")
  if not low <= value < high:
    raise InputError(f"{key!r} must be in [{low}, {high}), found {value!r}.")
  return value


def real(hf: dict, key: str, default: float | None = None) -> float:
  """Returns a finite number above zero."""
  value = hf.get(key)
  value = default if value is None else value
  if value is None:
    raise InputError(f"the config has no {key!r}; add it to config.json.")
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise InputError(f"{key!r} must be a number, found {value!r}.")
  # Compared, not converted: a JSON integer may be too large for a float.
  if not 0 < value < 1e30:
    raise InputError(
        f"{key!r} must be above 0 and below 1e30, found {value!r}."
    )
  return float(value)


def optional(hf: dict, key: str, default: float | None = None) -> float | None:
  """Returns a finite number above zero, or None where the config says null."""
  if hf.get(key, default) is None:
    return None
  return real(hf, key, default)


def refuse(hf: dict, key: str, allowed: Any, why: str) -> None:
  """Raises unless `key` is absent, null or one of the `allowed` values."""
  value = hf.get(key)
  if value is not None and value not in allowed:
    raise InputError(
        f"{key}={value!r} is not supported, since {why}; use a checkpoint"
        f" with {key} = {' or '.join(repr(a) for a in allowed)}."
    )


def section(hf: dict, key: str) -> dict:
  """Returns the object called `key`."""
  if not isinstance(hf.get(key), dict):
    raise InputError(f"{key!r} must be an object, found {hf.get(key)!r}.")
  return hf[key]


def experts(hf: dict, key: str, default: int) -> int:
  """Returns how many experts a layer has."""
  return integer(hf, key, default, high=_MOST_EXPERTS)


def experts_per_token(hf: dict, experts: int, default: int) -> int:
  """Returns how many experts a token is sent to."""
  count = integer(hf, "num_experts_per_tok", default)
  if count > experts:
    raise InputError(
        f"num_experts_per_tok={count} is more than the model's {experts}"
        " experts; config.json must be corrected."
    )
  return count


def upper_window(hf: dict) -> dict:
  """Returns Qwen's window: off by default, and over the upper layers alone."""
  if not hf.get("use_sliding_window"):
    return {"window": None}
  first = integer(hf, "max_window_layers", 28, low=0)
  return {
      "window": integer(hf, "sliding_window", 4096),
      "sliding": lambda i: i >= first,
  }


def rope(parameters: Any, theta: float, context: int) -> Rope:
  """Returns the rotary embedding that one `rope_parameters` describes."""
  if not isinstance(parameters, dict):
    raise InputError(
        f"rope parameters must be an object, found {parameters!r}."
    )
  kind = parameters.get("rope_type", parameters.get("type")) or "default"
  theta = real(parameters, "rope_theta", theta)
  refuse(
      parameters, "partial_rotary_factor", (1, 1.0), "all of a head is rotated"
  )
  if kind == "default":
    return Rope(theta)
  if kind == "linear":
    return Rope(theta, "linear", factor=real(parameters, "factor"))
  if kind == "llama3":
    return Rope(
        theta,
        "llama3",
        factor=real(parameters, "factor"),
        low_frequency=real(parameters, "low_freq_factor"),
        high_frequency=real(parameters, "high_freq_factor"),
        original_context=integer(
            parameters, "original_max_position_embeddings", context
        ),
    )
  raise InputError(
      f"rope type {kind!r} is not supported; use a checkpoint with rope type"
      " 'default', 'linear' or 'llama3'."
  )


def layer_types(hf: dict, depth: int, otherwise: Sequence[str]) -> list[str]:
  """Returns, for each layer, "full_attention" or "sliding_attention"."""
  kinds = hf.get("layer_types")
  if kinds is None:
    return list(otherwise)
  if not isinstance(kinds, list) or len(kinds) != depth:
    size = len(kinds) if isinstance(kinds, list) else repr(kinds)
    raise InputError(
        f"'layer_types' must list {depth} layers, as num_hidden_layers says,"
        f" found {size}."
    )
  for kind in kinds:
    if kind not in _LAYER_TYPES:
      raise InputError(
          f"layer type {kind!r} is not supported; the supported ones are"
          f" {', '.join(_LAYER_TYPES)}."
      )
  return kinds


def read(
    hf: dict,
    family: str,
    *,
    theta: float = 10_000.0,
    local_theta: float | None = None,
    activation: str = "hidden_act",
    default_activation: str = "silu",
    tied: bool = False,
    window: int | None = None,
    sliding: Callable[[int], bool] = lambda i: True,
    mlp: str = "intermediate_size",
    **rest: Any,
) -> Config:
  """Returns a `Config` from what all families name alike.

  Args:
    hf: the parsed config.json.
    family: what to call the model.
    theta: rope base where the config names none.
    local_theta: rope base of sliding layers, when it is another one.
    activation: the config's name for the activation.
    default_activation: what it is where the config names none.
    tied: whether the head is the embedding where the config does not say.
    window: positions that a sliding layer sees, or None for no such layers.
    sliding: whether a layer slides, where the config has no `layer_types`.
    mlp: the config's name for the width of the MLP (of an expert).
    **rest: further fields of `Config`, as they are.
  """
  refuse(hf, "mlp_bias", (False,), "MLPs have no bias here")
  if hf.get("quantization_config"):
    method = hf["quantization_config"]
    method = method.get("quant_method") if isinstance(method, dict) else method
    raise InputError(
        f"weights packed by {method!r} are not read; use the checkpoint in"
        " float16, bfloat16 or float32, or a GGUF file of it."
    )
  width = integer(hf, "hidden_size")
  depth = integer(hf, "num_hidden_layers", high=_MOST_LAYERS)
  heads = integer(hf, "num_attention_heads")
  kv_heads = integer(hf, "num_key_value_heads", heads)
  if heads % kv_heads:
    raise InputError(
        f"num_attention_heads={heads} is not a multiple of"
        f" num_key_value_heads={kv_heads}; config.json must be corrected."
    )
  if hf.get("head_dim") is None and width % heads:
    raise InputError(
        f"hidden_size={width} is not a multiple of"
        f" num_attention_heads={heads}, and no head_dim is given."
    )
  head_size = integer(hf, "head_dim", width // heads)
  if head_size % 2:
    raise InputError(f"head_dim must be even to be rotated, found {head_size}.")
  context = integer(hf, "max_position_embeddings", 2048)
  kind = hf.get(activation) or default_activation
  if isinstance(kind, str):
    kind = _ALIASES.get(kind, kind)
  if kind not in _ACTIVATIONS:
    raise InputError(
        f"{activation}={kind!r} is not supported; the supported activations"
        f" are {', '.join(_ACTIVATIONS)}."
    )
  default = ["full_attention"] * depth
  if window is not None:
    default = [_LAYER_TYPES[int(sliding(i))] for i in range(depth)]
  kinds = layer_types(hf, depth, default)
  if window is None and "sliding_attention" in kinds:
    if hf.get("sliding_window") is None:
      raise InputError(
          "'layer_types' has sliding layers but 'sliding_window' is null;"
          " config.json must name a window."
      )
    if not family.startswith("qwen"):  # Qwen has a switch, and it is off.
      raise InputError(f"a {family} model with sliding layers is not known.")
    kinds = default
  parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  base = real(hf, "rope_theta", theta)
  nested = isinstance(parameters, dict) and parameters.keys() & set(
      _LAYER_TYPES
  )
  far = (parameters.get("full_attention") or {}) if nested else parameters
  ropes = {"full_attention": rope(far, base, context)}
  if nested or local_theta is not None:
    near = (parameters.get("sliding_attention") or {}) if nested else {}
    ropes["sliding_attention"] = rope(near, local_theta or base, context)
  return Config(
      family=family,
      vocab=integer(hf, "vocab_size"),
      width=width,
      depth=depth,
      heads=heads,
      kv_heads=kv_heads,
      head_size=head_size,
      mlp=integer(hf, mlp),
      ropes=tuple(ropes.get(k, ropes["full_attention"]) for k in kinds),
      windows=tuple(window if k == _LAYER_TYPES[1] else None for k in kinds),
      context=context,
      norm_eps=real(hf, "rms_norm_eps", 1e-6),
      activation=kind,
      tied=bool(hf.get("tie_word_embeddings", tied)),
      **rest,
  )


def write(config: Config, dtype: str) -> dict:
  """Returns the config.json of a transformer: the inverse of reading one."""
  kinds = [_LAYER_TYPES[int(w is not None)] for w in config.windows]
  ropes = dict(zip(kinds, config.ropes, strict=True))
  gemma = config.family.startswith("gemma")
  name = {
      "llama": "Llama",
      "mistral": "Mistral",
      "mixtral": "Mixtral",
      "qwen2": "Qwen2",
      "qwen3": "Qwen3",
      "qwen3_moe": "Qwen3Moe",
      "gemma2": "Gemma2",
      "gemma3": "Gemma3",
  }[config.family]
  hf = {
      "architectures": [f"{name}ForCausalLM"],
      "model_type": "gemma3_text" if name == "Gemma3" else config.family,
      "dtype": dtype,
      "torch_dtype": dtype,
      "vocab_size": config.vocab,
      "hidden_size": config.width,
      "num_hidden_layers": config.depth,
      "num_attention_heads": config.heads,
      "num_key_value_heads": config.kv_heads,
      "head_dim": config.head_size,
      "intermediate_size": config.mlp,
      "max_position_embeddings": config.context,
      "rms_norm_eps": config.norm_eps,
      "hidden_activation" if gemma else "hidden_act": config.activation,
      "tie_word_embeddings": config.tied,
      "attention_bias": config.qkv_bias,
  }
  local = ropes.get("sliding_attention")
  far = ropes.get("full_attention", local)
  assert far is not None
  hf["rope_theta"] = far.theta
  if name == "Gemma3":
    hf["rope_local_base_freq"] = (local or far).theta
  if (scaling := _rope_scaling(far, config.head_size)) is not None:
    hf["rope_scaling"] = scaling
  windows = {w for w in config.windows if w is not None}
  hf["sliding_window"] = windows.pop() if windows else None
  if windows:
    raise InputError("layers with windows of two sizes cannot be written.")
  if name.startswith("Qwen") or gemma:
    hf["layer_types"] = kinds
    hf["use_sliding_window"] = hf["sliding_window"] is not None
  elif len(ropes) > 1:
    raise InputError(
        f"a {config.family} model with both windowed and other layers cannot"
        " be written as config.json."
    )
  if gemma:
    scale = config.query_scale or config.head_size**-0.5
    hf["query_pre_attn_scalar"] = round(scale**-2, 6)
    if hf["query_pre_attn_scalar"] == int(hf["query_pre_attn_scalar"]):
      hf["query_pre_attn_scalar"] = int(hf["query_pre_attn_scalar"])
    hf["attn_logit_softcapping"] = config.attention_cap
    hf["final_logit_softcapping"] = config.logits_cap
  if config.experts:
    hf["num_experts_per_tok"] = config.experts_per_token
    hf["num_local_experts"] = config.experts
  if name == "Qwen3Moe":
    hf["num_experts"] = config.experts
    hf["moe_intermediate_size"] = config.mlp
    hf["norm_topk_prob"] = config.normalize_experts
    hf["decoder_sparse_step"] = 1
    hf["mlp_only_layers"] = []
  return hf


def _rope_scaling(rope: Rope, head_size: int) -> dict | None:
  """Returns the `rope_scaling` of one rotary embedding."""
  if rope.factors is not None:
    rope = _named_factors(rope, head_size)
  if rope.kind == "default":
    return None
  scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
  if rope.kind == "llama3":
    scaling |= {
        "low_freq_factor": rope.low_frequency,
        "high_freq_factor": rope.high_frequency,
        "original_max_position_embeddings": rope.original_context,
    }
  return scaling


def _named_factors(rope: Rope, head_size: int) -> Rope:
  """Finds which Llama 3 scaling gives these per-frequency factors."""
  stored = rope.frequencies(head_size)
  # The largest divisor is the scaling's own; the rest Llama 3 never varied.
  for factor in sorted(set(rope.factors or ())):
    named = Rope(rope.theta, "llama3", factor=float(factor))
    if np.allclose(named.frequencies(head_size), stored, rtol=1e-4, atol=0):
      return named
  raise InputError(
      "rope factors that are not Llama 3's cannot be written as config.json."
  )
