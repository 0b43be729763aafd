# SPDX-License-Identifier: Apache-2.0
"""Chat templates, rendered in a sandbox.

A template comes with the weights and is as little to be trusted: MiniJinja
reaches no Python object, and fuel bounds how long it runs. The functions and
filters are those that Hugging Face gives to templates.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxspec.errors import InputError

# Enough for a conversation of thousands of turns (about one a token of the
# template and turn); a nested-loop bomb is stopped in hundredths of a second.
FUEL = 10_000_000
LARGEST = 1 << 20
_NAME = "chat_template"


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    source_name: str = "",
    fuel: int = FUEL,
    **variables: Any,
) -> str:
  """Returns the text of a conversation.

  Args:
    template: Jinja source.
    messages: each with a `role` and a `content`.
    add_generation_prompt: whether to open the assistant's turn.
    source_name: where the template comes from, for messages.
    fuel: steps after which it is stopped.
    **variables: what else the template may name (bos_token, tools, ...).

  Raises:
    InputError: the template is broken, refuses the messages, or runs too long.
  """
  import minijinja  # Loaded when a template is rendered.

  where = f"{source_name}: " if source_name else ""
  if len(template) > LARGEST:
    raise InputError(
        f"{where}{_NAME} has {len(template)} characters, more than {LARGEST};"
        " pass a template of your own."
    )
  environment = minijinja.Environment(
      fuel=fuel,
      pycompat=True,
      trim_blocks=True,
      lstrip_blocks=True,
      auto_escape_callback=lambda name: False,
  )
  refusal: list[str] = []

  def raise_exception(message: str) -> None:
    refusal.append(str(message))
    raise ValueError(message)

  environment.add_function("raise_exception", raise_exception)
  environment.add_function("strftime_now", _strftime_now)
  environment.add_filter("tojson", _tojson)
  try:
    environment.add_template(_NAME, template)
    return environment.render_template(
        _NAME,
        messages=[dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
  except Exception as error:  # What a function raised arrives as it was.
    raise _explained(error, template, where, refusal, fuel) from error


def _explained(
    error: Exception, template: str, where: str, refusal: list[str], fuel: int
) -> InputError:
  line = getattr(error, "line", None)
  if refusal:
    # Whoever refuses has no line of its own: take the one with its words.
    for number, text in enumerate(template.splitlines(), 1):
      if "raise_exception" in text and refusal[0] in text:
        line = number
  at = f"{where}{_NAME}" + (f", line {line}" if line else "")
  if refusal:
    return InputError(f"{at} refuses these messages: {refusal[0]}")
  if "fuel" in str(error):
    return InputError(
        f"{at} ran out of its {fuel} steps; shorten the conversation or pass"
        " another template."
    )
  reason = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
  return InputError(f"{at} is broken ({reason}); pass another template.")


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)  # noqa: DTZ005


def _tojson(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
  """JSON as Hugging Face's filter gives it: no HTML escapes."""
  return json.dumps(
      value,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=tuple(separators) if separators else None,
      sort_keys=sort_keys,
  )
