# SPDX-License-Identifier: Apache-2.0
"""Tokens to text, one at a time, in whole characters.

Half a character is never emitted, and the pieces joined are what decoding all
ids at once gives. Byte-level tokens go through an incremental UTF-8 decoder;
SentencePiece's byte tokens wait until their run ends, since one bad byte
spoils a whole run; any other tokenizer is compared with its own decoding.
"""

import codecs
import functools
import json
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Detokenizer(Protocol):
  """Turns a sequence of ids into text."""

  def push(self, token_id: int) -> str:
    """Takes one id; returns the text that is certain now."""
    ...

  def finish(self) -> str:
    """Returns what was held back; the sequence has ended."""
    ...


def detokenizer(inner: Any, skip_special: bool) -> Detokenizer:
  """Returns the detokenizer that belongs to a `tokenizers.Tokenizer`."""
  kinds = _decoders(inner)
  if [kind["type"] for kind in kinds] == ["ByteLevel"]:
    return _ByteLevel(inner, skip_special)
  if "ByteFallback" in [k["type"] for k in kinds] and all(
      _understood(kind) for kind in kinds
  ):
    return _ByteFallback(inner, skip_special, kinds)
  return _Compared(inner, skip_special)


class _ByteLevel:
  """Each character of a token stands for one byte (GPT-2's alphabet)."""

  def __init__(self, inner: Any, skip_special: bool):
    self._inner = inner
    self._skipped = _special(inner) if skip_special else frozenset()
    self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

  def push(self, token_id: int) -> str:
    token = self._inner.id_to_token(token_id)
    if token is None or token_id in self._skipped:
      return ""
    alphabet = byte_alphabet()
    try:
      piece = bytes(alphabet[character] for character in token)
    except KeyError:  # An added token, written as it is.
      piece = token.encode()
    return self._utf8.decode(piece)

  def finish(self) -> str:
    return self._utf8.decode(b"", final=True)


class _ByteFallback:
  """SentencePiece: pieces are text, and <0x0A> is a byte."""

  def __init__(self, inner: Any, skip_special: bool, kinds: list[dict]):
    self._inner = inner
    self._skipped = _special(inner) if skip_special else frozenset()
    self._replaced = [
        (k["pattern"]["String"], k["content"])
        for k in kinds
        if k["type"] == "Replace"
    ]
    self._strip = sum(k["start"] for k in kinds if k["type"] == "Strip")
    self._run = bytearray()

  def push(self, token_id: int) -> str:
    token = self._inner.id_to_token(token_id)
    if token is None or token_id in self._skipped:
      return ""
    for old, new in self._replaced:
      token = token.replace(old, new)
    if (byte := _byte(token)) is not None:
      self._run.append(byte)
      return ""
    return self._emit(self._end_run() + token)

  def finish(self) -> str:
    return self._emit(self._end_run())

  def _end_run(self) -> str:
    run, self._run = bytes(self._run), bytearray()
    try:
      return run.decode()
    except UnicodeDecodeError:
      return "\ufffd" * len(run)

  def _emit(self, text: str) -> str:
    while self._strip and text:
      if text[0] != " ":
        self._strip = 0
        break
      text, self._strip = text[1:], self._strip - 1
    return text


class _Compared:
  """Any other tokenizer: the text grows by what its own decoding adds."""

  def __init__(self, inner: Any, skip_special: bool):
    self._inner, self._skip = inner, skip_special
    self._ids: list[int] = []
    self._given = ""

  def push(self, token_id: int) -> str:
    self._ids.append(token_id)
    whole = self._whole()
    return "" if whole.endswith("\ufffd") else self._grown(whole)

  def finish(self) -> str:
    return self._grown(self._whole())

  def _whole(self) -> str:
    return self._inner.decode(self._ids, skip_special_tokens=self._skip)

  def _grown(self, whole: str) -> str:
    if not whole.startswith(self._given):
      return ""  # The decoder rewrote its past; wait for it to catch up.
    new = whole[len(self._given) :]
    self._given = whole
    return new


@functools.cache
def byte_alphabet() -> dict[str, int]:
  """GPT-2's alphabet: printable bytes are themselves, others move up."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  moved = [byte for byte in range(256) if byte not in plain]
  return {chr(byte): byte for byte in plain} | {
      chr(256 + i): byte for i, byte in enumerate(moved)
  }


def _decoders(inner: Any) -> list[dict]:
  if inner.decoder is None:
    return []
  # The state of a decoder is its part of tokenizer.json.
  state = json.loads(inner.decoder.__getstate__())
  return state["decoders"] if state["type"] == "Sequence" else [state]


def _understood(kind: dict) -> bool:
  if kind["type"] == "Replace":
    return "String" in kind["pattern"]
  if kind["type"] == "Strip":
    return kind["content"] == " " and kind["stop"] == 0
  return kind["type"] in ("ByteFallback", "Fuse")


def _special(inner: Any) -> frozenset[int]:
  return frozenset(
      i for i, t in inner.get_added_tokens_decoder().items() if t.special
  )


def _byte(token: str) -> int | None:
  if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
    try:
      return int(token[3:5], 16)
    except ValueError:
      return None
  return None
