# SPDX-License-Identifier: Apache-2.0
"""A generator without a model, for tests in milliseconds, and a tiny model."""

import json
import sys
import types
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from jaxspec.answers import Completion, TextEvent
from jaxspec.drift import DriftMonitor
from jaxspec.metrics import Stats
from jaxspec.options import Options


class FakeGenerator:
  """Answers a prompt with itself in capitals, the last prompt first."""

  loaded: dict[str, Any] = {}
  options: Options = Options()
  chat: bool = False
  prompts: list = []
  defaults: dict[str, Any] = {}
  # Raised when this many prompts are done.
  fails_after: int | None = None
  failure: type[BaseException] = KeyboardInterrupt

  @classmethod
  def load(cls, model, **settings):
    on_progress = settings.pop("on_progress")
    if on_progress is not None:
      on_progress("weights", 1, 1)
    FakeGenerator.loaded = dict(settings, model=model)
    return cls()

  def __init__(self):
    self.drift = DriftMonitor()

  def default_options(self, **given):
    return Options(**(self.defaults | given))

  def _complete(self, prompt, options):
    FakeGenerator.options = options
    text = prompt if isinstance(prompt, str) else repr(prompt)
    stats = Stats(
      prompt_tokens=len(text),
      prompt_seconds=0.01,
      new_tokens=4,
      passes=2,
      drafted=4,
      accepted=1,
      drafted_by_position=[2, 2],
      accepted_by_position=[1, 0],
      accepted_by_node=[1, 0],
      scored=6,
      draft_length=2,
      seed=options.seed,
      drafter="fake",
      task=options.task,
    )
    logprobs = [-0.5] * 4 if options.logprobs else None
    return Completion(
      text, text.upper(), [1, 2, 3, 4], "length", logprobs, stats
    )

  def generate(self, prompts, options, *, chat=False, on_completion=None):
    FakeGenerator.chat = chat
    FakeGenerator.prompts = list(prompts)
    if isinstance(options, Options):
      options = [options] * len(prompts)
    done = {}
    for at in reversed(range(len(prompts))):
      if len(done) == self.fails_after:
        raise self.failure("as asked")
      done[at] = self._complete(prompts[at], options[at])
      self.drift.add(done[at].stats)
      if on_completion is not None:
        on_completion(at, done[at])
    return [done[at] for at in range(len(prompts))]

  def stream(self, prompt, options, *, chat=False):
    FakeGenerator.chat = chat
    completion = self._complete(prompt, options)
    yield TextEvent("a guess", settled=False)
    for word in completion.text.split(" "):
      if self.fails_after == 0:
        raise self.failure("as asked")
      yield TextEvent(word + ".", settled=True)
    yield TextEvent("", settled=True, completion=completion)


@pytest.fixture
def fake(monkeypatch):
  """Puts the fake in place of the real generator, and returns its class."""
  module = types.ModuleType("jaxspec.generator")
  monkeypatch.setitem(module.__dict__, "Generator", FakeGenerator)
  for name in ("defaults", "fails_after", "failure"):
    monkeypatch.setattr(FakeGenerator, name, getattr(FakeGenerator, name))
  monkeypatch.setitem(sys.modules, "jaxspec.generator", module)
  return FakeGenerator


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
