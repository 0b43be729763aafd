# SPDX-License-Identifier: Apache-2.0
"""The text heads learn from: every kind is there, and nothing else."""

import inspect
import json
import pathlib
import shutil
import statistics
import tempfile
import textwrap

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import lessons
from jaxspec import corpus


@pytest.fixture
def folders(tmp_path, monkeypatch):
  # All of the library takes a while to parse.
  monkeypatch.setattr(lessons, "sources", lambda: [
      pathlib.Path(inspect.getfile(module))
      for module in (shutil, statistics, tempfile, textwrap)])
  if "questions" not in flags.FLAGS:
    lessons.define_flags()
  flags.FLAGS.mark_as_parsed()
  prose, german = tmp_path / "prose", tmp_path / "german"
  prose.mkdir()
  german.mkdir()
  said = [f"Sentence {n} says what a program number {n} may do. " * 4
          for n in range(60)]
  (prose / "a.en.html").write_text(
      "<html>" + "".join(f"<p>{s}<b>bold</b> &amp;</p>" for s in said))
  (prose / "a.fr.html").write_text(f"<p>{'Rien de tout cela. ' * 20}</p>")
  (german / "witze").write_text("\n%\n".join(
      f"Dies ist der Spruch Nummer {n}, und er ist lang genug dafür, auch so. "
      "\n\t\t-- Wer" for n in range(20)))
  (german / "witze.dat").write_bytes(b"\0")
  questions = tmp_path / "q.jsonl"
  questions.write_text("".join(json.dumps(
      {"question": f"How much is {n} + 1?",
       "answer": f"It is <<{n}+1={n + 1}>>{n + 1}."}) + "\n"
      for n in range(40)))
  return prose, german, questions


def test_all_kinds_are_there(folders, tmp_path):
  prose, german, questions = folders
  with flagsaver.flagsaver(
      questions=str(questions), output=str(tmp_path / "out"),
      prose=[str(prose)], german=str(german), prompts=40, worked=20,
      prose_texts=3, code_texts=4, held_out=20):
    lessons.main(["lessons"])
    first = (tmp_path / "out/prompts.jsonl").read_text()
    lessons.main(["lessons"])
    assert (tmp_path / "out/prompts.jsonl").read_text() == first
  prompts = [p[0]["content"]
             for p in corpus.read(tmp_path / "out/prompts.jsonl")]
  texts = corpus.read(tmp_path / "out/texts.jsonl")
  assert len(prompts) == 40
  for start, count in (("How much is", 10), ("Summarize: ", 5),
                       ("Translate German to English: Dies ist", 5),
                       ("Write a Python function ", 5)):
    assert sum(p.startswith(start) for p in prompts) >= count - 2, start
  assert any(topic in p for p in prompts for topic in lessons.TOPICS)
  whole = [t for t in texts if not isinstance(t, str)]
  assert len(whole) == 20 and all(corpus.answered(t) for t in whole)
  assert not any("<<" in t[-1]["content"] for t in whole)
  asked = {t[0]["content"] for t in whole}
  assert not asked & set(prompts)              # a question is used once
  kept = {p[0]["content"]
          for p in corpus.read(tmp_path / "out/held_out.jsonl")}
  assert len(kept) >= 15 and not kept & (asked | set(prompts))
  plain = [t for t in texts if isinstance(t, str)]
  assert len(plain) == 7
  assert not any("Rien" in t or "<b>" in t or "&amp;" in t for t in prompts
                 if t.startswith("Summarize"))


def test_without_prose_it_says_what_is_missing(folders, tmp_path):
  _, german, questions = folders
  with flagsaver.flagsaver(
      questions=str(questions), output=str(tmp_path / "out"),
      prose=[str(tmp_path / "nowhere")], german=str(german)):
    with pytest.raises(SystemExit, match="--prose holds no text"):
      lessons.main(["lessons"])
