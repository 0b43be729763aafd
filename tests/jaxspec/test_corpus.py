# SPDX-License-Identifier: Apache-2.0
"""Text that heads learn from.

Held here: where a prompt ends and its answer begins; prompts that the model
writes stand where its template has a user's words, and depend on the seed
alone; lines that say nothing are named.
"""

import json

import pytest

from jaxspec import corpus
from jaxspec.corpus import Text
from jaxspec.errors import InputError
from jaxspec.generator import Generator


@pytest.fixture(scope="module")
def generator(tiny_model):
  return Generator.load(str(tiny_model), dtype="float32", rows=3, capacity=480)


def text_of(generator, ids):
  return generator.tokenizer.decode(list(ids), skip_special=False)


def test_an_answer_begins_behind_its_prompt(generator):
  user = {"role": "user", "content": "hi there"}
  tokenizer = generator.tokenizer
  prompt = corpus.encode(tokenizer, [user])
  assert text_of(generator, prompt.tokens) == "[user] hi there\n"
  assert prompt.prompt_length == len(prompt.tokens)
  assert not corpus.answered([user])
  talk = [user, {"role": "assistant", "content": "hello"}]
  assert corpus.answered(talk)
  told = corpus.encode(tokenizer, talk)
  assert text_of(generator, told.tokens) == (
      "[user] hi there\n[assistant] hello\n")
  assert told.prompt_length == prompt.prompt_length
  assert corpus.encode(tokenizer, "plain") == Text(
      tokenizer.encode("plain"), 0)
  assert corpus.answered("plain")


@pytest.mark.slow
def test_the_model_writes_where_a_user_would(generator, monkeypatch):
  """Every second conversation has a system turn of its own."""
  seen = []
  real = generator.generate

  def generate(prompts, options, on_completion=None):
    seen.extend(zip((text_of(generator, p) for p in prompts), options))
    found = real(prompts, options, on_completion=on_completion)
    for n, completion in enumerate(found):
      # What a random model says never ends, nor is it text.
      completion.finish_reason = "stop" if n != 1 else "length"
      completion.text = f" what about {n}? "
    return found

  monkeypatch.setattr(generator, "generate", generate)
  monkeypatch.setattr(corpus, "_USER", 6)
  monkeypatch.setattr(corpus, "_SYSTEM", 5)
  told = []
  found = corpus.invent(generator, 5, seed=3,
                        on_progress=lambda *x: told.append(x))
  openings = [opening for opening, _ in seen]
  assert openings[:3] == ["[system] "] * 3
  # The second system turn did not end, and so there is none.
  assert openings[3:] == [
      "[user] ", "[user] ", "[system] what about 0?\n[user] ", "[user] ",
      "[system] what about 2?\n[user] "]
  assert [len(c) for c in found] == [1, 2, 1, 2]
  assert found[1][0] == {"role": "system", "content": "what about 0?"}
  assert [c[-1] for c in found] == [
      {"role": "user", "content": f"what about {n}?"} for n in (0, 2, 3, 4)]
  assert told[-1] == (8, 8)
  assert len({o.seed for _, o in seen}) == len(seen)
  assert {o.temperature for _, o in seen} == {1.0}


@pytest.mark.slow
def test_prompts_depend_on_the_seed_alone(generator, monkeypatch):
  monkeypatch.setattr(corpus, "_USER", 6)
  monkeypatch.setattr(corpus, "_SHORTEST", 0)
  monkeypatch.setattr(corpus, "_SYSTEM", 5)
  one = corpus.invent(generator, 4)
  assert one == corpus.invent(generator, 4)
  assert len(one) == 4


def test_without_a_template_nothing_is_invented(generator, monkeypatch):
  monkeypatch.setattr(generator, "tokenizer", None)
  with pytest.raises(InputError, match="no tokenizer.*--data"):
    corpus.invent(generator, 2)


def test_a_template_that_changes_words_is_refused(generator, monkeypatch):
  monkeypatch.setattr(generator.tokenizer, "chat_template", "always this")
  with pytest.raises(InputError, match="changes what users write"):
    corpus.invent(generator, 2)


def test_lines_are_texts_or_conversations(tmp_path):
  path = tmp_path / "in.jsonl"
  talk = [{"role": "user", "content": "a"}]
  path.write_text("\n".join(map(json.dumps, [
      {"text": "plain", "more": 1}, {"prompt": "p"}, {"question": "q"},
      {"turns": ["t", "u"]}, {"messages": talk}])) + "\n\n")
  assert corpus.read(path) == [
      "plain", *([{"role": "user", "content": c}] for c in "pqt"), talk]


@pytest.mark.parametrize("line, words", [
    ("{", ":1 is not JSON"), ("[]", "one of text, .* and has none"),
    ('{"text": "a", "prompt": "b"}', "has text, prompt"),
    ('{"text": 3}', "text must hold text, got 3"),
    ('{"prompt": ""}', "prompt must hold text"),
    ('{"turns": []}', "turns must hold text"),
    ('{"messages": []}', "messages must be objects"),
    ('{"messages": [{"role": "user"}]}', "messages must be objects"),
    ("", "holds no line")])
def test_lines_that_say_nothing_are_named(tmp_path, line, words):
  path = tmp_path / "in.jsonl"
  path.write_text(line + "\n")
  with pytest.raises(InputError, match=words):
    corpus.read(path)


def test_files_that_cannot_be_read_are_named(tmp_path):
  with pytest.raises(InputError, match="No such file"):
    corpus.read(tmp_path / "none")
  path = tmp_path / "in.jsonl"
  path.write_bytes(b'{"text": "\xff"}')
  with pytest.raises(InputError, match="byte 10 is not UTF-8"):
    corpus.read(path)
