# SPDX-License-Identifier: Apache-2.0
"""Each family: its config as published, and the logits of its reference."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.checkpoint import hf, open_checkpoint
from jaxspec.errors import InputError
from jaxspec.models import families, weights
from jaxspec.models.layers import Rope
from jaxspec.models.transformer import Config

pytestmark = pytest.mark.usefixtures("quick_compiles")

# What the files of well-known models say, where it decides anything.
LLAMA_31 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
}


def test_all_families_are_found():
  assert families.supported() == [
      "gemma2",
      "gemma3",
      "llama",
      "mistral",
      "mixtral",
      "qwen2",
      "qwen3",
      "qwen3_moe",
  ]


@pytest.mark.parametrize("name", ["layers", "transformer", "os", "", None, 3])
def test_other_files_are_no_families(name):
  with pytest.raises(InputError, match="supported ones are gemma2, gemma3"):
    families.family(name)


def test_llama_31():
  config = families.config(LLAMA_31)
  rope = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
  assert config.ropes == (rope,) * 32
  assert config.head_size == 128 and config.queries_per_kv == 4
  assert config.windows == (None,) * 32 and not config.tied


def test_both_spellings_of_rope_are_one():
  old = families.config(LLAMA_31)
  new = dict(LLAMA_31)
  scaling = new.pop("rope_scaling")
  new["rope_parameters"] = scaling | {"rope_theta": new.pop("rope_theta")}
  assert families.config(new) == old


def test_mistral_windows():
  hf_config = SMALL | {"model_type": "mistral"}
  assert families.config(hf_config).windows == (4096,) * 4
  assert families.config(hf_config | {"sliding_window": None}).windows == (
      None,
  ) * 4


def test_qwen2_window_is_off_unless_asked_for():
  hf_config = SMALL | {
      "model_type": "qwen2",
      "sliding_window": 8,
      "max_window_layers": 3,
      "use_sliding_window": False,
  }
  config = families.config(hf_config)
  assert config.windows == (None,) * 4 and config.qkv_bias
  config = families.config(hf_config | {"use_sliding_window": True})
  assert config.windows == (None, None, None, 8)


def test_gemma3_sparse_wrapper():
  """Published wrappers leave most of the text's settings to defaults."""
  text = {
      "hidden_size": 2560,
      "intermediate_size": 10240,
      "model_type": "gemma3_text",
      "num_hidden_layers": 34,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      "sliding_window": 1024,
  }
  config = families.config({"model_type": "gemma3", "text_config": text})
  assert config.vocab == 262208 and config.heads == 8 and config.kv_heads == 4
  assert config.windows[:6] == (1024,) * 5 + (None,)
  assert config.ropes[0] == Rope(10_000.0)
  assert config.ropes[5] == Rope(1_000_000.0, "linear", 8.0)
  assert config.tied and config.qk_norm and config.post_norms
  assert config.activation == "gelu_pytorch_tanh"
  assert config.embed_scale == pytest.approx(2560**0.5)
  assert config.query_scale == pytest.approx(1 / 16)


def test_gemma3_nested_rope_parameters():
  hf_config = SMALL | {
      "model_type": "gemma3_text",
      "num_hidden_layers": 6,
      "rope_parameters": {
          "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
          "full_attention": {
              "rope_type": "linear",
              "factor": 2.0,
              "rope_theta": 7.0,
          },
      },
  }
  config = families.config(hf_config)
  assert config.ropes == (Rope(5.0),) * 5 + (Rope(7.0, "linear", 2.0),)


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "step=2"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        (
            {
                "model_type": "mixtral",
                "num_local_experts": 2,
                "num_experts_per_tok": 3,
            },
            "num_experts_per_tok=3.*2 experts",
        ),
        (
            {"model_type": "gemma3", "use_bidirectional_attention": True},
            "bidirectional",
        ),
        ({"model_type": "gemma3", "text_config": 3}, "'text_config'"),
        (
            {"model_type": "llama", "layer_types": ["full_attention"]},
            "list 4 layers",
        ),
        (
            {"model_type": "llama", "layer_types": ["chunked_attention"] * 4},
            "'chunked_attention'",
        ),
    ],
)
def test_config_that_is_refused(hf_config, message):
  with pytest.raises(InputError, match=message):
    families.config(SMALL | hf_config)


def _config(name: str, **changes) -> Config:
  hf_config = SMALL | {
      "model_type": name,
      "num_hidden_layers": 2,
      "num_experts_per_tok": 2,
  }
  return families.config(hf_config | changes)


@pytest.mark.parametrize("name", families.supported())
def test_split_is_the_inverse_of_assemble(name):
  config = _config(name, num_local_experts=4, moe_intermediate_size=24)
  names = families.family(name).NAMES
  rng = np.random.default_rng(0)
  stored = {}
  made = {}
  for path, shape in weights.shapes(config).items():
    made[path] = rng.standard_normal(shape).astype(np.float32)
    stored |= dict(weights.split(path, made[path], config, names))
  used = weights.check(
      config, names, lambda n: stored[n].shape if n in stored else None
  )
  assert used == stored.keys()
  for path, weight in made.items():
    found = weights.assemble(
        path, config, names, lambda n, _, part: stored[n][part],
        stored.__contains__
    )
    np.testing.assert_allclose(found, weight, rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", families.supported())
def test_written_config_reads_back(name):
  from jaxspec.models import huggingface

  config = _config(name, num_local_experts=4, moe_intermediate_size=24)
  found = families.config(huggingface.write(config, "bfloat16"))
  assert found == config


def test_fused_experts_are_read():
  """transformers may keep all experts of a layer in two tensors."""
  config = _config("qwen3_moe", num_local_experts=4, moe_intermediate_size=24)
  names = families.family("qwen3_moe").NAMES
  rng = np.random.default_rng(0)
  stored = {
      names.full("fused_gate_up", 0): rng.random((4, 48, 32)),
      names.full("fused_down", 0): rng.random((4, 32, 24)),
  }
  found = weights.assemble(
      "layers.0.gate_up",
      config,
      names,
      lambda n, _, part: stored[n][part],
      stored.__contains__,
  )
  whole = stored[names.full("fused_gate_up", 0)]
  np.testing.assert_array_equal(found[:, 0], whole[:, :24])
  np.testing.assert_array_equal(found[:, 1], whole[:, 24:])


def test_stored_rope_factors_are_named_when_written():
  from jaxspec.models import huggingface

  config = families.config(LLAMA_31)
  plain, named = Rope(500000.0), config.ropes[0]
  factors = plain.frequencies(128) / named.frequencies(128)
  stored = dataclasses.replace(plain, factors=tuple(map(float, factors)))
  other = dataclasses.replace(config, ropes=(stored,) * 32)
  assert huggingface.write(other, "bfloat16")["rope_scaling"] == (
      LLAMA_31["rope_scaling"]
  )
  odd = dataclasses.replace(plain, factors=tuple(map(float, range(1, 65))))
  with pytest.raises(InputError, match="not Llama 3's"):
    huggingface.write(dataclasses.replace(config, ropes=(odd,) * 32), "float32")


_CASES = {
    "llama": (
        "LlamaConfig",
        {
            "rope_parameters": LLAMA_31["rope_scaling"]
            | {"original_max_position_embeddings": 32, "rope_theta": 5e3}
        },
    ),
    "llama, tied": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 1e4,
            },
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2": (
        "Qwen2Config",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe, normalized": (
        "Qwen3MoeConfig",
        {
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 5, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 7,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
}


@pytest.mark.parametrize("case", _CASES)
def test_logits_equal_transformers(case, tmp_path):
  """Both ways: their checkpoint in our model, our checkpoint in theirs."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from jaxspec.caches import Place
  from jaxspec.caches.contiguous import ContiguousCache
  from jaxspec.models.transformer import Transformer

  kind, changes = _CASES[case]
  theirs = transformers.AutoModelForCausalLM.from_config(
      getattr(transformers, kind)(**(SMALL | changes)),
      attn_implementation="eager",
  ).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for name, parameter in theirs.named_parameters():
      parameter.normal_(0, 0.3 if parameter.ndim > 1 else 0.2)
      if "norm" in name and "gemma" not in case:
        parameter.add_(1)
  theirs.save_pretrained(tmp_path / "theirs")
  tokens = np.arange(1, 25)[None] * 7 % 96

  def reference(model) -> np.ndarray:
    with torch.no_grad():
      return model(torch.tensor(tokens)).logits.numpy()

  wanted = reference(theirs)
  checkpoint = open_checkpoint(str(tmp_path / "theirs"))
  model = Transformer(
      checkpoint.config,
      checkpoint.source(lambda array, axes: jnp.asarray(array), np.float32),
  )
  cache = model.init_cache(ContiguousCache, 1, 32, jnp.float32)
  at = Place.of(jnp.arange(24)[None], jnp.tril(jnp.ones((24, 24), bool)))
  x, _ = model.extend(
      model.embed(jnp.asarray(tokens)),
      cache,
      model.init_fresh(cache, 24),
      at,
      layers=range(model.depth),
  )
  np.testing.assert_allclose(model.unembed(x), wanted, rtol=0, atol=1e-4)
  # Small shards, so that the index is written and read too.
  hf.write(
      tmp_path / "ours",
      checkpoint.config,
      checkpoint.weight,
      shard_bytes=20_000,
  )
  again = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "ours", attn_implementation="eager"
  ).eval()
  np.testing.assert_allclose(reference(again), wanted, rtol=0, atol=1e-6)
