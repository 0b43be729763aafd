# SPDX-License-Identifier: Apache-2.0
"""Real text as prompts of the lengths that an experiment wants."""

from collections.abc import Sequence
from typing import Any


def chat_ids(tokenizer: Any, texts: Sequence[str], length: int,
             count: int) -> list[list[int]]:
  """`count` chats of exactly `length` tokens each, made of real text.

  Messages are taken evenly from `texts`; a long one is cut, a short one is
  followed by the next. What the chat template puts around stays whole.
  """
  mark = "\x00message\x00"
  head, _, tail = tokenizer.render(
      [{"role": "user", "content": mark}]).partition(mark)
  head, tail = (tokenizer.encode(part, special=False) for part in (head, tail))
  room = length - len(head) - len(tail)
  if room < 1:
    raise ValueError(f"the chat template alone takes {length - room} tokens; "
                     f"raise --prompt_tokens above {length}")
  made = []
  for number in range(count):
    at = number * len(texts) // count
    ids: list[int] = []
    while len(ids) < room:
      ids += tokenizer.encode(texts[at % len(texts)] + "\n\n", special=False)
      at += 1
    made.append([*head, *ids[:room], *tail])
  return made
