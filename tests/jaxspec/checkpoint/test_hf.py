# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: read, written, and every way they can be broken."""

import json
import pathlib
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxspec.checkpoint import hf, open_checkpoint
from jaxspec.errors import InputError
from tests.jaxspec.checkpoint.small_checkpoints import (
  LLAMA,
  llama_tensors,
  write_folder,
)


def put(array, axes):
  del axes
  return jnp.asarray(array)


def test_weights_are_assembled(folder):
  checkpoint = open_checkpoint(str(folder))
  tensors = llama_tensors()
  q = tensors["model.layers.1.self_attn.q_proj.weight"].reshape(2, 2, 8, 32)
  k = tensors["model.layers.1.self_attn.k_proj.weight"].reshape(2, 8, 32)
  v = tensors["model.layers.1.self_attn.v_proj.weight"].reshape(2, 8, 32)
  qkv = checkpoint.weight("layers.1.qkv")
  assert qkv.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(qkv[:, :2], q)
  np.testing.assert_array_equal(qkv[:, 2], k)
  np.testing.assert_array_equal(qkv[:, 3], v)
  np.testing.assert_array_equal(
      checkpoint.weight("layers.0.up"),
      tensors["model.layers.0.mlp.up_proj.weight"],
  )
  assert checkpoint.weight("layers.0.out").shape == (32, 32)
  assert checkpoint.eos_ids == (261, 262)
  assert checkpoint.tokenizer.bos_id == 261


def test_source_gives_dtypes_and_checks_shapes(folder):
  checkpoint = open_checkpoint(str(folder))
  source = checkpoint.source(put, jnp.float32)
  assert source("layers.0.down", (32, 48), (None, None)).dtype == jnp.float32
  own = checkpoint.source(put)
  assert own("layers.0.down", (32, 48), (None, None)).dtype == jnp.bfloat16
  assert own("final_norm", (32,), (None,), jnp.float32).dtype == jnp.float32
  with pytest.raises(InputError, match=r"layers.0.down.*\(32, 48\).*\(48, 32"):
    source("layers.0.down", (48, 32), (None, None))
  with pytest.raises(InputError, match="no weight 'layers.2.down'"):
    source("layers.2.down", (32, 48), (None, None))


@pytest.mark.parametrize("shard_bytes", [8_000, 5_000_000_000])
def test_write_reads_back(folder, tmp_path, shard_bytes):
  first = open_checkpoint(str(folder))
  target = tmp_path / "copy"
  hf.write(
      target,
      first.config,
      first.weight,
      tokenizer=first.tokenizer,
      generation=first.generation,
      shard_bytes=shard_bytes,
  )
  assert (target / hf.INDEX).exists() == (shard_bytes == 8_000)
  second = open_checkpoint(str(target))
  assert second.config == first.config
  assert second.generation == first.generation
  assert second.tokenizer.chat_template == first.tokenizer.chat_template
  for path in first.shapes:
    np.testing.assert_array_equal(first.weight(path), second.weight(path))
  text = "hello the 12 worlds"
  assert second.tokenizer.encode(text) == first.tokenizer.encode(text)
  assert not list(target.glob("part-*"))


def test_missing_shard(folder, tmp_path):
  first = open_checkpoint(str(folder))
  target = tmp_path / "copy"
  hf.write(target, first.config, first.weight, shard_bytes=8_000)
  shard = sorted(target.glob("*.safetensors"))[1]
  kept = shard.read_bytes()
  shard.unlink()
  with pytest.raises(InputError, match=f"{shard.name}.*missing"):
    open_checkpoint(str(target))
  # A shard that holds other tensors than the index says.
  shard.write_bytes(sorted(target.glob("*.safetensors"))[0].read_bytes())
  with pytest.raises(InputError, match="in both|does not hold"):
    open_checkpoint(str(target))
  shard.write_bytes(kept)
  index = json.loads((target / hf.INDEX).read_text())
  index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
  (target / hf.INDEX).write_text(json.dumps(index))
  with pytest.raises(InputError, match="elsewhere.*missing"):
    open_checkpoint(str(target))


def test_missing_tensor_wrong_shape_and_unknown_tensor(tmp_path):
  tensors = llama_tensors()
  del tensors["model.layers.1.mlp.up_proj.weight"]
  with pytest.raises(InputError, match="layers.1.mlp.up_proj.*missing"):
    open_checkpoint(str(write_folder(tmp_path / "a", tensors=tensors)))
  tensors = llama_tensors()
  tensors["model.norm.weight"] = np.ones(31, np.float32)
  with pytest.raises(InputError, match=r"model.norm.*\(31,\).*\(32,\)"):
    open_checkpoint(str(write_folder(tmp_path / "b", tensors=tensors)))
  tensors = llama_tensors()
  tensors["model.layers.0.self_attn.o_proj.bias"] = np.ones(32, np.float32)
  with pytest.raises(InputError, match="o_proj.bias.*no place"):
    open_checkpoint(str(write_folder(tmp_path / "c", tensors=tensors)))


def test_head_may_be_tied_by_its_absence(tmp_path):
  tensors = llama_tensors()
  del tensors["lm_head.weight"]
  hf_config = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"}
  found = open_checkpoint(str(write_folder(tmp_path / "a", hf_config, tensors)))
  assert found.config.tied
  with pytest.raises(InputError, match="lm_head.weight"):
    open_checkpoint(str(write_folder(tmp_path / "b", tensors=tensors)))


def test_unreadable_dtype(tmp_path):
  tensors = llama_tensors()
  tensors["model.norm.weight"] = np.ones(32, np.int8)
  checkpoint = open_checkpoint(str(write_folder(tmp_path / "a", None, tensors)))
  with pytest.raises(InputError, match="model.norm.weight.*I8"):
    checkpoint.weight("final_norm")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scan_for_nan(tmp_path, value):
  tensors = llama_tensors()
  tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = value
  checkpoint = open_checkpoint(str(write_folder(tmp_path / "a", None, tensors)))
  source = checkpoint.source(put, check_finite=True)
  source("layers.1.down", (32, 48), (None, None))
  with pytest.raises(InputError, match="layers.0.down.*NaN"):
    source("layers.0.down", (32, 48), (None, None))


def test_truncation_at_every_kind_of_offset(folder):
  path = folder / "model.safetensors"
  whole = path.read_bytes()
  header = int.from_bytes(whole[:8], "little")
  cuts = {0, 1, 7, 8, 9, header // 2, header + 7, header + 8, len(whole) - 1}
  cuts |= set(range(0, len(whole), len(whole) // 60))
  for cut in cuts:
    path.write_bytes(whole[:cut])
    with pytest.raises(InputError, match="model.safetensors"):
      open_checkpoint(str(folder))


def _raw(header: dict | str, payload: bytes) -> bytes:
  text = header if isinstance(header, str) else json.dumps(header)
  return struct.pack("<Q", len(text)) + text.encode() + payload


_ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 120_000_000) + b"{}",
        _raw('{"a":' * 5000, b""),
        _raw({"a": _ONE | {"shape": [1 << 40, 1 << 40]}}, bytes(8)),
        _raw({"a": _ONE | {"data_offsets": [0, 1 << 40]}}, bytes(8)),
        _raw({"a": _ONE | {"data_offsets": [8, 0]}}, bytes(8)),
        _raw({"a": _ONE, "b": _ONE}, bytes(8)),
        _raw({"a": _ONE}, bytes(16)),
        _raw({"a": _ONE | {"shape": [-2]}}, bytes(8)),
        _raw({"a": _ONE | {"dtype": "Q99"}}, bytes(8)),
        _raw("[1, 2]", b""),
        _raw(f'{{"a": {json.dumps(_ONE)}, "a": {json.dumps(_ONE)}}}', bytes(8)),
    ],
)
def test_hostile_headers(folder, content):
  (folder / "model.safetensors").write_bytes(content)
  with pytest.raises(InputError, match="model.safetensors|tensor"):
    open_checkpoint(str(folder))


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_raises_input_error_alone(tmp_path, data):
  folder = tmp_path / "fuzz"
  if not folder.exists():
    write_folder(folder)
    (folder / "whole").write_bytes((folder / "model.safetensors").read_bytes())
  content = bytearray((folder / "whole").read_bytes())
  header = 8 + int.from_bytes(content[:8], "little")
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, header + 64))
    content[at] = data.draw(st.integers(0, 255))
  (folder / "model.safetensors").write_bytes(content)
  try:
    with open_checkpoint(str(folder)) as checkpoint:
      for path in checkpoint.shapes:
        checkpoint.weight(path)
  except InputError:
    pass


_JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 1 << 70)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    key=st.sampled_from([
        *LLAMA,
        "rope_scaling",
        "rope_parameters",
        "layer_types",
        "head_dim",
        "hidden_act",
        "quantization_config",
        "sliding_window",
    ]),
    value=_JUNK,
)
def test_odd_config_raises_input_error_alone(tmp_path, key, value):
  folder = tmp_path / "fuzz"
  if not folder.exists():
    write_folder(folder)
  (folder / "config.json").write_text(json.dumps(LLAMA | {key: value}))
  try:
    open_checkpoint(str(folder)).close()
  except InputError:
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "'lama' is not supported.*mean 'llama'"),
        ({"model_type": None}, "None is not supported.*llama, mistral"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "32"}, "whole number, found '32'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "relu"}, "hidden_act='relu'.*silu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"vocab_size": 299}, r"embed_tokens.*\(300, 32\).*\(299, 32\)"),
    ],
)
def test_config_that_is_refused(folder, change, message):
  (folder / "config.json").write_text(json.dumps(LLAMA | change))
  with pytest.raises(InputError, match=message) as caught:
    open_checkpoint(str(folder))
  assert str(folder) in str(caught.value)


def test_config_that_is_no_json(folder):
  for content in ("", "[]", "{", "\x00"):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json"):
      open_checkpoint(str(folder))


def test_tokenizer_with_more_ids_than_the_model(tmp_path):
  tensors = llama_tensors()
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    tensors[name] = tensors[name][:262]
  folder = write_folder(tmp_path / "a", LLAMA | {"vocab_size": 262}, tensors)
  checkpoint = open_checkpoint(str(folder))
  with pytest.raises(InputError, match="ids up to 262.*vocabulary is 262"):
    checkpoint.tokenizer  # noqa: B018


def test_no_tokenizer_is_none(folder):
  (folder / "tokenizer.json").unlink()
  checkpoint = open_checkpoint(str(folder))
  assert checkpoint.tokenizer is None
  assert checkpoint.eos_ids == (261, 262)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
  (tmp_path / "pickles").mkdir()
  (tmp_path / "pickles" / "config.json").write_text(json.dumps(LLAMA))
  (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"\x80\x04")
  (tmp_path / "empty").mkdir()
  monkeypatch.chdir(tmp_path)
  for name, message in {
      "pickles": "pickle checkpoints are not loaded; convert to safetensors",
      "pickles/pytorch_model.bin": "pickle checkpoints are not loaded",
      "nothing.pt": "pickle checkpoints are not loaded",
      "empty": "no config.json",
      "smollm2-135": "mean 'smollm2-135m'",
      "nothing.gguf": "no model 'nothing.gguf'",
      "a/b/c": "no model 'a/b/c'",
      "": "empty",
      "\x00": "not a path|no model",
  }.items():
    with pytest.raises(InputError, match=message):
      open_checkpoint(name)


def test_hub_that_cannot_be_reached(monkeypatch):
  import huggingface_hub

  def refuse(*unused, **also_unused):
    raise OSError("no route to host\nmore\nlines")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
  with pytest.raises(InputError, match=r"org/model.*no route to host\)") as e:
    open_checkpoint("org/model")
  assert "\n" not in str(e.value)


def test_hub_snapshot_is_opened(folder, monkeypatch):
  import huggingface_hub

  asked = {}

  def download(hub_id, **rest):
    asked[hub_id] = rest
    return str(folder)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  checkpoint = open_checkpoint("org/model")
  assert checkpoint.source_name == "org/model"
  assert "*.safetensors" in asked["org/model"]["allow_patterns"]


def test_multimodal_gemma_gives_its_text_model(tmp_path):
  text = LLAMA | {"model_type": "gemma3_text", "head_dim": 8}
  del text["tie_word_embeddings"]
  rng = np.random.default_rng(0)
  tensors = {
      f"language_model.{name}": tensor
      for name, tensor in llama_tensors().items()
      if name != "lm_head.weight"
  }
  for i in range(2):
    for norm, size in {
        "self_attn.q_norm": 8,
        "self_attn.k_norm": 8,
        "pre_feedforward_layernorm": 32,
        "post_feedforward_layernorm": 32,
    }.items():
      tensors[f"language_model.model.layers.{i}.{norm}.weight"] = (
          rng.standard_normal(size).astype(ml_dtypes.bfloat16)
      )
  tensors["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
  folder = write_folder(
      tmp_path / "a", {"model_type": "gemma3", "text_config": text}, tensors
  )
  checkpoint = open_checkpoint(str(folder))
  stored = tensors["language_model.model.layers.1.self_attn.q_norm.weight"]
  np.testing.assert_array_equal(
      checkpoint.weight("layers.1.q_norm"), stored.astype(np.float32) + 1
  )
  assert checkpoint.config.family == "gemma3" and checkpoint.config.tied


def test_source_name_of_folder(folder):
  assert open_checkpoint(str(folder)).source_name == str(folder)
  assert isinstance(folder, pathlib.Path)


def test_written_safetensors_carry_their_format(folder, tmp_path):
  first = open_checkpoint(str(folder))
  hf.write(tmp_path / "b", first.config, first.weight, dtype=np.float16)
  found = safetensors.numpy.load_file(tmp_path / "b" / "model.safetensors")
  assert {t.dtype for t in found.values()} == {np.dtype(np.float16)}
  assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == (
      "float16"
  )
