# SPDX-License-Identifier: Apache-2.0
"""Text that heads learn from: a model's own answers, and any other.

A head has to foretell what its model says, so the best text is what the model
says: to prompts from files, or to prompts it wrote itself. For these it is
handed its chat template up to where the user's words would stand
(arXiv:2406.08464), in every second case after it wrote a system turn in the
same way, so that there are prompts of many kinds.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxspec.errors import InputError

Message = Mapping[str, str]
Conversation = Sequence[Message]

_MARK = "\x11here\x11"
# What a user asks may be long; a system turn is a sentence or two.
_USER, _SYSTEM = 320, 96
_SHORTEST = 12               # characters of a prompt that asks for something


@dataclasses.dataclass(frozen=True)
class Text:
  """Tokens, of which the first are a prompt's; 0 where there was none."""

  tokens: Sequence[int]
  prompt_length: int


def invent(generator: Any, count: int, *, seed: int = 0,
           on_progress: Callable[[int, int], None] | None = None
           ) -> list[Conversation]:
  """Prompts that the model writes, as conversations without the answer.

  Args:
    generator: a `Generator` of a model with a chat template.
    count: how many to write; fewer come back, since some do not end or are
      no prompts.
    on_progress: called with how many turns are written, and their number.

  Raises:
    InputError: the model has no chat template, or one that changes what users
      write.
  """
  done, turns = 0, count + (count + 1) // 2

  def write(openings, limit, salt):
    def told(index, completion):
      nonlocal done
      done += 1
      if on_progress:
        on_progress(done, turns)
    options = [generator.default_options(
        max_new_tokens=limit, temperature=1.0,
        seed=(seed * 1_000_003 + 2 * n + salt) % 2**32)
        for n in range(len(openings))]
    found = generator.generate(openings, options, on_completion=told)
    return [c.text.strip() if c.finish_reason == "stop" else ""
            for c in found]

  tokenizer = generator.tokenizer
  opening = _before(tokenizer, [{"role": "system", "content": _MARK},
                                {"role": "user", "content": "?"}])
  systems = [""] * (count // 2) + write(
      [opening] * (count - count // 2), _SYSTEM, salt=0)
  heads = [[{"role": "system", "content": text}] if text else []
           for text in systems]
  openings = [_before(tokenizer, [*head, {"role": "user", "content": _MARK}])
              for head in heads]
  users = write(openings, _USER, salt=1)
  return [[*head, {"role": "user", "content": text}]
          for head, text in zip(heads, users) if len(text) >= _SHORTEST]


def _before(tokenizer: Any, messages: Conversation) -> list[int]:
  """A conversation up to where its mark stands."""
  if tokenizer is None:
    raise InputError("the checkpoint has no tokenizer, so that the model "
                     "cannot write prompts; pass --data=FILE.jsonl")
  before, mark, _ = tokenizer.render(messages).partition(_MARK)
  if not mark:
    raise InputError("the chat template changes what users write, so that the "
                     "model cannot write prompts; pass --data=FILE.jsonl")
  return tokenizer.encode(before, special=False)


def encode(tokenizer: Any, item: "str | Conversation") -> Text:
  """Tokens of a text, or of a conversation that ends with an answer.

  One that ends with something else is a prompt, up to where the answer begins.
  """
  if isinstance(item, str):
    return Text(tokenizer.encode(item), 0)
  def ids(messages, **settings):
    return tokenizer.encode(tokenizer.render(messages, **settings),
                            special=False)
  if not answered(item):
    prompt = ids(item)
    return Text(prompt, len(prompt))
  prompt, whole = ids(item[:-1]), ids(item, add_generation_prompt=False)
  same = next((n for n, pair in enumerate(zip(prompt, whole))
               if pair[0] != pair[1]), min(len(prompt), len(whole)))
  return Text(whole, same)


def answered(item: "str | Conversation") -> bool:
  """Whether there is nothing left to answer."""
  return isinstance(item, str) or item[-1]["role"] == "assistant"


def read(path: str | pathlib.Path) -> list[str | Conversation]:
  """Prompts and texts of a JSONL file.

  A line is an object with one of `text`; `messages`, a conversation; and
  `prompt`, `question` or `turns` (the first of them), what a user says.

  Returns:
    A string for a text, else a conversation.

  Raises:
    InputError: names the line that is wrong.
  """
  path = pathlib.Path(path).expanduser()
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
  except OSError as e:
    raise InputError(f"--data={path}: {e.strerror}") from e
  except UnicodeDecodeError as e:
    raise InputError(f"--data={path}: byte {e.start} is not UTF-8; save the "
                     "file as UTF-8") from e
  found = [_item(line, f"{path}:{number}")
           for number, line in enumerate(lines, 1) if line.strip()]
  if not found:
    raise InputError(f"--data={path} holds no line")
  return found


def _item(line: str, where: str) -> str | Conversation:
  try:
    item = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise InputError(f"{where} is not JSON: {e}") from e
  keys = ("text", "messages", "prompt", "question", "turns")
  found = [key for key in keys if isinstance(item, dict) and key in item]
  if len(found) != 1:
    raise InputError(f"{where} must be an object with one of "
                     f"{', '.join(keys)}, and has {', '.join(found) or 'none'}")
  (key,) = found
  value = item[key]
  if key == "turns" and isinstance(value, list) and value:
    value = value[0]
  if key == "messages":
    if not isinstance(value, list) or not value or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str) for m in value):
      raise InputError(f"{where}: messages must be objects with role and "
                       "content, as text")
    return value
  if not isinstance(value, str) or not value:
    raise InputError(f"{where}: {key} must hold text, got {value!r:.60}")
  return value if key == "text" else [{"role": "user", "content": value}]
