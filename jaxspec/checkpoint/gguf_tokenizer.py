# SPDX-License-Identifier: Apache-2.0
"""Rebuilds a tokenizer from a GGUF file's metadata.

A GGUF names its pre-tokenizer ("smollm", "llama-bpe") instead of holding it,
so what each name means is written here, for the families that are supported.
A name that is not here is refused: a wrong split gives other tokens without a
sign of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxspec.checkpoint.tokenizer import Tokenizer, turn_ends
from jaxspec.errors import InputError, nearest

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6
_SPACE = "\u2581"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str, line_end: str = r"[\r\n]*") -> str:
  return (
      rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
      rf"| ?[^\s\p{{L}}\p{{N}}]+{line_end}|{_TAIL}"
  )


_GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3 = _words(r"\p{N}{1,3}")
_QWEN2 = _words(r"\p{N}")
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)


@dataclasses.dataclass(frozen=True)
class _Split:
  """Regular expressions that cut text in turn, and what goes with them."""

  regexes: tuple[str, ...]
  ignore_merges: bool = False
  add_bos: bool = False


_DIGITS = _Split((r"\p{N}", _GPT2))
_SPLITS = {
    "gpt-2": _Split((_GPT2,)),
    "default": _Split(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
        _Split((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Split((_LLAMA3,))),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _Split((_QWEN2,))
    ),
    "tekken": _Split((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": _Split((
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    )),
}


def build(values: dict[str, Any], source_name: str) -> Tokenizer | None:
  """Returns the tokenizer that the metadata describes, or None for none."""
  kind = values.get(_KEY + "model")
  if kind is None or (isinstance(kind, str) and kind == "none"):
    return None
  try:
    if not isinstance(kind, str):
      raise InputError(f"{_KEY}model must be text, found {kind!r}.")
    if kind == "gpt2":
      inner, add_bos = _byte_level(values)
    elif kind == "llama":
      inner, add_bos = _sentencepiece(values)
    else:
      raise InputError(
          f"tokenizer model {kind!r} is not supported; the supported ones are"
          f" gpt2, llama.{nearest(str(kind), ['gpt2', 'llama'])}"
      )
    return _finish(inner, values, add_bos, source_name)
  except InputError as error:
    raise InputError(f"{source_name}: {error}") from error
  except Exception as error:  # The tokenizers library raises bare Exception.
    raise InputError(
        f"{source_name}: its tokenizer cannot be built ({error}); fetch it"
        " again."
    ) from error


def _finish(
    inner: Any, values: dict[str, Any], add_bos: bool, source_name: str
) -> Tokenizer:
  from tokenizers import processors

  bos, eos = _id(inner, values, "bos"), _id(inner, values, "eos")
  add_bos = bool(values.get(_KEY + "add_bos_token", add_bos))
  add_eos = bool(values.get(_KEY + "add_eos_token", False))
  around = [("bos", bos, add_bos), ("eos", eos, add_eos)]
  used = {
      name: inner.id_to_token(i)
      for name, i, wanted in around
      if wanted and i is not None
  }
  if used:
    # Part of the tokenizer itself, so that a saved copy does the same.
    first = [used["bos"]] if "bos" in used else []
    last = [used["eos"]] if "eos" in used else []
    inner.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, "$B"],
        special_tokens=[(t, inner.token_to_id(t)) for t in used.values()],
    )
  ends = [eos, _id(inner, values, "eot"), *turn_ends(inner)]
  template = values.get("tokenizer.chat_template")
  return Tokenizer(
      inner,
      bos_id=bos,
      eos_ids=[i for i in ends if i is not None],
      chat_template=template if isinstance(template, str) else None,
      source_name=source_name,
  )


def _byte_level(values: dict[str, Any]) -> tuple[Any, bool]:
  """GPT-2's kind: merges over bytes, after a split by regular expressions."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  name = values.get(_KEY + "pre")
  if not isinstance(name, str) or name not in _SPLITS:
    raise InputError(
        f"pre-tokenizer {name!r} is not known; the known ones are"
        f" {', '.join(_SPLITS)}.{nearest(str(name), _SPLITS)}"
    )
  split = _SPLITS[name]
  tokens, kinds = _tokens(values), _kinds(values)
  merges = values.get(_KEY + "merges")
  if not isinstance(merges, list):
    raise InputError("the tokenizer has no merges; fetch it again.")
  pairs = []
  for merge in merges:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
      raise InputError(f"merge {merge!r} is no pair of tokens; fetch it again.")
    pairs.append((left, right))
  inner = tokenizers.Tokenizer(
      models.BPE(
          vocab=_vocabulary(tokens),
          merges=pairs,
          ignore_merges=split.ignore_merges,
      )
  )
  inner.pre_tokenizer = pre_tokenizers.Sequence([
      *(
          pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
          for regex in split.regexes
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])
  inner.decoder = decoders.ByteLevel()
  _add_tokens(inner, tokens, kinds)
  return inner, split.add_bos


def _sentencepiece(values: dict[str, Any]) -> tuple[Any, bool]:
  """Llama 2's kind: pieces with scores, best score merged first."""
  import tokenizers
  from tokenizers import decoders, models, normalizers

  tokens, kinds = _tokens(values), _kinds(values)
  scores = values.get(_KEY + "scores")
  if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
    raise InputError(
        f"the tokenizer needs {len(tokens)} scores, one a token; fetch it"
        " again."
    )
  vocabulary = _vocabulary(tokens)
  unknown = values.get(_KEY + "unknown_token_id")
  if unknown is None:
    unknown = next((i for i, k in enumerate(kinds) if k == _UNKNOWN), None)
  inner = tokenizers.Tokenizer(
      models.BPE(
          vocab=vocabulary,
          merges=_merges(vocabulary, tokens, kinds, scores),
          unk_token=_token(tokens, unknown),
          fuse_unk=True,
          byte_fallback=_BYTE in kinds,
      )
  )
  prefix = bool(values.get(_KEY + "add_space_prefix", True))
  spaces = normalizers.Replace(" ", _SPACE)
  inner.normalizer = (
      normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
      if prefix
      else normalizers.Sequence([spaces])
  )
  inner.decoder = decoders.Sequence([
      decoders.Replace(_SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *([decoders.Strip(" ", 1, 0)] if prefix else []),
  ])
  _add_tokens(inner, tokens, kinds)
  return inner, True


def _merges(
    vocabulary: dict[str, int],
    tokens: Sequence[str],
    kinds: Sequence[int],
    scores: np.ndarray,
) -> list[tuple[str, str]]:
  """Every way to make a piece from two others, best piece first."""
  found = []
  for i in np.argsort(-scores.astype(np.float64), kind="stable").tolist():
    token = tokens[i]
    if len(token) < 2 or kinds[i] in (_CONTROL, _UNKNOWN, _BYTE, _USER):
      continue
    pairs = [
        (token[:cut], token[cut:])
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    found += pairs
  return found


def _add_tokens(
    inner: Any, tokens: Sequence[str], kinds: Sequence[int]
) -> None:
  """Makes the tokens known that are never split nor merged."""
  from tokenizers import AddedToken

  special = [
      AddedToken(token, special=True, normalized=False)
      for token, kind in zip(tokens, kinds, strict=True)
      if kind in (_CONTROL, _UNKNOWN) and token
  ]
  plain = [
      AddedToken(token, special=False, normalized=False)
      for token, kind in zip(tokens, kinds, strict=True)
      if kind == _USER and token
  ]
  inner.add_special_tokens(special)
  inner.add_tokens(plain)


def _tokens(values: dict[str, Any]) -> list[str]:
  tokens = values.get(_KEY + "tokens")
  if not isinstance(tokens, list) or not tokens:
    raise InputError("the tokenizer has no tokens; fetch it again.")
  return tokens


def _kinds(values: dict[str, Any]) -> list[int]:
  tokens = _tokens(values)
  kinds = values.get(_KEY + "token_type")
  if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
    raise InputError(
        f"the tokenizer needs {len(tokens)} token types, one a token; fetch it"
        " again."
    )
  return kinds.tolist()


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
  vocabulary = {token: i for i, token in enumerate(tokens)}
  if len(vocabulary) != len(tokens):
    twice = next(t for i, t in enumerate(tokens) if vocabulary[t] != i)
    raise InputError(
        f"token {twice!r} has two ids in the tokenizer; use another conversion"
        " of the model."
    )
  return vocabulary


def _token(tokens: Sequence[str], i: Any) -> str | None:
  return tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else None


def _id(inner: Any, values: dict[str, Any], name: str) -> int | None:
  """Returns the id of a named special token, if the tokenizer has it."""
  i = values.get(f"{_KEY}{name}_token_id")
  if not isinstance(i, int) or isinstance(i, bool):
    return None
  return i if i >= 0 and inner.id_to_token(i) is not None else None
