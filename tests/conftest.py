# SPDX-License-Identifier: Apache-2.0
"""Eight CPU devices, no silent broadcasting, and a tiny model for all."""

import gc
import importlib.util
import json
import os
from importlib import metadata

# A TPU compiler without a TPU (see tests/jaxspec/test_memory.py): these keep
# it from looking for one, and let test processes load it side by side.
os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled",
    TPU_MIN_LOG_LEVEL="3", TPU_STDERR_LOG_LEVEL="3")

# Nearly all the time of the tests is XLA's compiler for CPUs, which takes less
# than half of it with its older emitter of fusions and one module a program.
# (A flag that is unknown ends the process: since 0.11 there is one emitter.)
os.environ["XLA_FLAGS"] = " ".join((
    os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false"
    if metadata.version("jaxlib").startswith("0.10.") else "",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_prefer_vector_width=128"))

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from jaxspec import libtpu

libtpu.set_flags()
gc.set_threshold(100_000, 50, 50)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxspec.models.layers import Rope  # noqa: E402
from jaxspec.models.transformer import Config, Transformer, random_source  # noqa: E402


def tiny_config(**changes) -> Config:
  """Four layers of a Llama, small enough to compile in a second."""
  sizes = dict(
      family="llama", vocab=64, width=32, depth=4, heads=4, kv_heads=2,
      head_size=8, mlp=48, context=1024, tied=True)
  sizes.update(changes)
  depth = sizes["depth"]
  sizes.setdefault("ropes", (Rope(1e4),) * depth)
  sizes.setdefault("windows", (None,) * depth)
  return Config(**sizes)


@pytest.fixture(scope="session")
def tiny() -> Transformer:
  """A model whose greedy text repeats itself now and then."""
  return Transformer(tiny_config(), random_source(0, scale=1.5))


@pytest.fixture(scope="session")
def small() -> Transformer:
  """Two layers, one of which sees eight positions."""
  return Transformer(tiny_config(depth=2, windows=(8, None)),
                     random_source(0, scale=1.5))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Each compiled program holds memory maps, of which a process has 65530."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compiles():
  """Compiles without XLA's costly passes: half the time, the same meaning."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def tpu_compiler():
  """The compiler for TPUs, which need not be there."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("pip install jax[tpu] for the TPU compiler")
  # Programs compiled for a device that is not there cannot be read back.
  cache = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  jax.config.update("jax_enable_compilation_cache", cache)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
  """Returns a Hugging Face folder: a four-layer Llama of random weights.

  Its tokenizer has a token a byte, so that every text goes in and comes out.
  """
  folder = tmp_path_factory.mktemp("tiny")
  bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: at for at, token in enumerate([*bytes_, "<s>", "</s>"])}
  inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.add_special_tokens(["<s>", "</s>"])
  inner.save(str(folder / "tokenizer.json"))
  width, depth, heads, kv_heads, size, mlp = 32, 4, 4, 2, 8, 64
  settings = {
    "config.json": {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "vocab_size": len(vocab),
      "hidden_size": width,
      "num_hidden_layers": depth,
      "num_attention_heads": heads,
      "num_key_value_heads": kv_heads,
      "head_dim": size,
      "intermediate_size": mlp,
      "rms_norm_eps": 1e-5,
      "rope_theta": 10000.0,
      "max_position_embeddings": 512,
      "tie_word_embeddings": True,
      "hidden_act": "silu",
      "eos_token_id": vocab["</s>"],
    },
    "tokenizer_config.json": {
      "eos_token": "</s>",
      "chat_template": (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
      ),
    },
    "generation_config.json": {"repetition_penalty": 1.05},
  }
  for name, value in settings.items():
    (folder / name).write_text(json.dumps(value))
  shapes = {
    "model.embed_tokens.weight": (len(vocab), width),
    "model.norm.weight": (width,),
  }
  for layer in range(depth):
    at = f"model.layers.{layer}"
    shapes |= {
      f"{at}.input_layernorm.weight": (width,),
      f"{at}.post_attention_layernorm.weight": (width,),
      f"{at}.self_attn.q_proj.weight": (heads * size, width),
      f"{at}.self_attn.k_proj.weight": (kv_heads * size, width),
      f"{at}.self_attn.v_proj.weight": (kv_heads * size, width),
      f"{at}.self_attn.o_proj.weight": (width, heads * size),
      f"{at}.mlp.gate_proj.weight": (mlp, width),
      f"{at}.mlp.up_proj.weight": (mlp, width),
      f"{at}.mlp.down_proj.weight": (width, mlp),
    }
  draw = np.random.default_rng(0).standard_normal
  safetensors.numpy.save_file(
    {
      name: np.ones(shape, np.float32)
      if "norm" in name
      else (draw(shape) / np.sqrt(shape[-1])).astype(np.float32)
      for name, shape in shapes.items()
    },
    folder / "model.safetensors",
  )
  return folder
