# SPDX-License-Identifier: Apache-2.0
"""Chat templates: what Jinja gives, and templates that mean harm."""

import re

import jinja2
import jinja2.sandbox
import pytest

from jaxspec.checkpoint import chat, open_checkpoint
from jaxspec.checkpoint.tokenizer import Tokenizer
from jaxspec.errors import InputError
from tests.jaxspec.checkpoint.small_checkpoints import byte_level

CHATML = (
    "{% for message in messages %}{% if loop.first and"
    " messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' +"
    " message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if tools is defined and tools is not none %}
    {{- tools | tojson(indent=4) }}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{{- system_message }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+
        message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant!') }}"
    "{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
QWEN = """{%- set ns = namespace(multi=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool>')) %}
        {%- set ns.multi = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {{- '<|im_start|>' ~ message.role ~ loop.index0 ~ ns.last ~ content }}
{%- endfor %}
"""
MESSAGES = [
    {"role": "user", "content": " Hi <b>you</b> & 'me' é\n"},
    {"role": "assistant", "content": "<think>x</think>\n\nok"},
    {"role": "user", "content": "more"},
]


def by_jinja(template: str, **variables) -> str:
  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True
  )
  environment.filters["tojson"] = chat._tojson
  environment.globals["raise_exception"] = refuse
  return environment.from_string(template).render(**variables)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, QWEN])
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_equal_jinja(template, prompt):
  variables = {
      "bos_token": "<s>",
      "eos_token": "</s>",
      "tools": [{"name": "f", "é": "<&>", "n": 1.5, "z": None}],
  }
  ours = chat.render(
      template, MESSAGES, add_generation_prompt=prompt, **variables
  )
  assert ours == by_jinja(
      template, messages=MESSAGES, add_generation_prompt=prompt, **variables
  )


def test_date():
  found = chat.render("{{ strftime_now('%Y') }}", [])
  assert re.fullmatch(r"20\d\d", found)


def test_refusal_names_template_line_and_reason():
  template = "one\n{{ raise_exception('Only users speak') }}"
  with pytest.raises(
      InputError, match="m: chat_template, line 2 refuses.*Only users speak"
  ):
    chat.render(template, MESSAGES, source_name="m")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("one\n{% for x in %}", "line 2 is broken"),
        ("one\n\n{{ messages[0].content.nothing() }}", "line 3 is broken"),
        ("{{ nothing.at.all }}", "line 1 is broken"),
        ("{% include 'other' %}", "line 1 is broken"),
        ("{{ messages | no_such_filter }}", "is broken"),
        ("{{ strftime_now(3) }}", "is broken"),
        ("{{ messages | tojson(indent={}) }}", "is broken"),
    ],
)
def test_broken_template(template, message):
  with pytest.raises(InputError, match=message):
    chat.render(template, MESSAGES)


def test_endless_template_runs_out_of_fuel():
  bomb = "{% for a in range(9999) %}" * 5 + "x" + "{% endfor %}" * 5
  with pytest.raises(InputError, match="line 1 ran out of its 1000 steps"):
    chat.render(bomb, MESSAGES, fuel=1000)
  with pytest.raises(InputError, match="chat_template"):
    chat.render("{{ 'x' * 1000000000000 }}", MESSAGES)
  with pytest.raises(InputError, match="characters, more than"):
    chat.render("x" * (chat.LARGEST + 1), MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ strftime_now.__self__ }}",
    ],
)
def test_no_python_object_is_reached(template):
  try:
    assert chat.render(template, MESSAGES) == ""
  except InputError:
    pass


def test_tokenizer_renders(folder):
  tokenizer = open_checkpoint(str(folder)).tokenizer
  text = tokenizer.render([{"role": "user", "content": "hello"}])
  assert text == (
      "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
  )
  ids = tokenizer.encode(text, special=False)
  assert ids[0] == tokenizer.bos_id and ids.count(262) == 1


def test_tokenizer_without_template():
  with pytest.raises(InputError, match="no chat template"):
    Tokenizer(byte_level()).render(MESSAGES)
