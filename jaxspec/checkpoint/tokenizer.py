# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back.

Wraps a `tokenizers.Tokenizer`, whether it came from tokenizer.json or was
rebuilt from a GGUF file (`gguf_tokenizer`), and adds what a decoder needs: a
stream that gives whole characters only, and the chat template.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxspec.checkpoint import chat
from jaxspec.checkpoint.detokenizer import Detokenizer, detokenizer
from jaxspec.errors import InputError

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")
_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_LARGEST = 256 << 20


class Tokenizer:
  """Encodes, decodes, streams and renders chats.

  Attributes:
    bos_id: the token that begins a text, or None.
    eos_ids: the tokens that end one.
    chat_template: Jinja source, or None.
  """

  def __init__(
      self,
      inner: Any,
      *,
      bos_id: int | None = None,
      eos_ids: Sequence[int] = (),
      add_bos: bool | None = None,
      add_eos: bool | None = None,
      chat_template: str | None = None,
      source_name: str = "tokenizer",
  ):
    """Wraps a `tokenizers.Tokenizer`.

    Args:
      inner: what encodes.
      bos_id: the token that begins a text.
      eos_ids: the tokens that end one.
      add_bos: whether `encode` begins with `bos_id`; None leaves it to the
        post-processor of `inner`, as `add_eos` does.
      add_eos: whether `encode` ends with the first of `eos_ids`.
      chat_template: Jinja source.
      source_name: where all this comes from, for messages.
    """
    self._inner = inner
    # Truncation and padding belong to training; here they would lose text.
    inner.no_truncation()
    inner.no_padding()
    self.bos_id = bos_id
    self.eos_ids = tuple(dict.fromkeys(eos_ids))
    self._add_bos, self._add_eos = add_bos, add_eos
    self.chat_template = chat_template
    self.source_name = source_name

  @classmethod
  def from_folder(cls, folder: str | pathlib.Path) -> "Tokenizer | None":
    """Reads tokenizer.json and what stands beside it, if it is there."""
    folder = pathlib.Path(folder)
    path = folder / _FILE
    if not path.is_file():
      if (folder / "tokenizer.model").is_file():
        raise InputError(
            f"{folder} has tokenizer.model but no {_FILE}; save the tokenizer"
            " once with a fast tokenizer class, which writes it."
        )
      return None
    inner = _open(path)
    settings = _read(folder / _SETTINGS)
    special = _read(folder / "special_tokens_map.json") | settings
    bos = _special_id(inner, special.get("bos_token"))
    eos = _special_id(inner, special.get("eos_token"))
    template = settings.get("chat_template")
    if (folder / _TEMPLATE).is_file():
      template = (folder / _TEMPLATE).read_text(encoding="utf-8")
    return cls(
        inner,
        bos_id=bos,
        eos_ids=[] if eos is None else [eos],
        add_bos=_flag(settings, "add_bos_token", bos),
        add_eos=_flag(settings, "add_eos_token", eos),
        chat_template=_default_template(template),
        source_name=str(folder),
    )

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    ids = self._inner.get_vocab(with_added_tokens=True).values()
    return max(ids, default=-1) + 1

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of what decides the ids; equal for two copies of a tokenizer."""
    content = json.loads(self._inner.to_str())
    content["jaxspec"] = [self.bos_id, self._add_bos, self._add_eos]
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()

  @functools.cached_property
  def vocabulary(self) -> str:
    """SHA-256 of which id means what; equal if ids can be exchanged."""
    ids = self._inner.get_vocab(with_added_tokens=True)
    canonical = json.dumps(ids, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode(errors="replace")).hexdigest()

  def encode(self, text: str, special: bool = True) -> list[int]:
    """Returns the ids of a text.

    Args:
      text: what to encode; special tokens written out in it are recognised.
      special: whether to add the beginning (and end) that the checkpoint asks
        for. A rendered chat has them already: pass False.
    """
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise InputError(
          f"the text holds half a surrogate pair at character {error.start};"
          " pass valid Unicode."
      ) from error
    left_to_inner = self._add_bos is None and self._add_eos is None
    ids = self._inner.encode(
        text, add_special_tokens=special and left_to_inner
    ).ids
    if special and self._add_bos and self.bos_id is not None:
      ids = [self.bos_id, *ids]
    if special and self._add_eos and self.eos_ids:
      ids = [*ids, self.eos_ids[0]]
    return ids

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Returns the text of ids; ids the tokenizer does not know give none."""
    return self._inner.decode(
        [int(i) for i in ids], skip_special_tokens=skip_special
    )

  def stream(self, skip_special: bool = True) -> Detokenizer:
    """Returns what turns ids into text one by one."""
    return detokenizer(self._inner, skip_special)

  def id_of(self, token: str) -> int | None:
    """Returns the id of one token, written as the vocabulary writes it."""
    return self._inner.token_to_id(token)

  def token_of(self, token_id: int) -> str | None:
    """Returns one token, written as the vocabulary writes it."""
    return self._inner.id_to_token(token_id)

  def render(
      self,
      messages: Sequence[Mapping[str, Any]],
      add_generation_prompt: bool = True,
      **variables: Any,
  ) -> str:
    """Returns a conversation as text; encode it with `special=False`."""
    if self.chat_template is None:
      raise InputError(
          f"{self.source_name} has no chat template; pass plain text instead"
          " of messages."
      )
    eos = self.eos_ids[0] if self.eos_ids else None
    named = {
        "bos_token": "" if self.bos_id is None else self.token_of(self.bos_id),
        "eos_token": "" if eos is None else self.token_of(eos),
    }
    return chat.render(
        self.chat_template,
        messages,
        add_generation_prompt=add_generation_prompt,
        source_name=self.source_name,
        **(named | variables),
    )

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes tokenizer.json, its settings and its chat template."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._inner.save(str(folder / _FILE))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if self.bos_id is not None:
      settings["bos_token"] = self.token_of(self.bos_id)
    if self.eos_ids:
      settings["eos_token"] = self.token_of(self.eos_ids[0])
    if self._add_bos is not None:
      settings["add_bos_token"] = self._add_bos
    if self._add_eos is not None:
      settings["add_eos_token"] = self._add_eos
    (folder / _SETTINGS).write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    if self.chat_template is not None:
      (folder / _TEMPLATE).write_text(self.chat_template, encoding="utf-8")


def turn_ends(inner: Any) -> list[int]:
  """Returns the special tokens that are known to end a turn in chats."""
  special = {
      token.content: i
      for i, token in inner.get_added_tokens_decoder().items()
      if token.special
  }
  return [special[token] for token in _TURN_ENDS if token in special]


def _open(path: pathlib.Path) -> Any:
  import tokenizers  # Loaded when a tokenizer is opened.

  if path.stat().st_size > _LARGEST:
    raise InputError(f"{path} is larger than {_LARGEST} bytes; fetch it again.")
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The library raises bare Exception.
    raise InputError(
        f"{path} is not a tokenizer ({error}); fetch it again."
    ) from error


def _read(path: pathlib.Path) -> dict:
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(
        f"{path} is not valid JSON ({error}); fetch it again."
    ) from error
  if not isinstance(found, dict):
    raise InputError(f"{path} must hold a JSON object; fetch it again.")
  return found


def _special_id(inner: Any, token: Any) -> int | None:
  content = token.get("content") if isinstance(token, dict) else token
  return inner.token_to_id(content) if isinstance(content, str) else None


def _flag(settings: dict, key: str, token: int | None) -> bool | None:
  value = settings.get(key)
  return bool(value and token is not None) if isinstance(value, bool) else None


def _default_template(template: Any) -> str | None:
  """Old files may hold several templates by name."""
  if isinstance(template, list):
    found = [t for t in template if isinstance(t, dict)]
    template = {t.get("name"): t.get("template") for t in found}.get("default")
  return template if isinstance(template, str) else None
