# SPDX-License-Identifier: Apache-2.0
"""The calibrate command: from held-out prompts to thresholds beside a head.

Held here: what it writes reaches the drafter; answers are kept and not made
twice; a head that knows nothing is never shown, and that is said; the table of
first tokens is shown before the prompt is read; what is wrong is one sentence.
"""

import json

import pytest

from jaxspec import __main__ as front_door
from jaxspec import first_tokens, heads
from jaxspec.generator import Generator
from jaxspec.heads import ExitHead, MedusaHeads
from jaxspec.options import Options

pytestmark = pytest.mark.usefixtures("quick_compiles")


def run(model, *argv):
  return front_door.main([
      "calibrate", "--compilation_cache_dir=", f"--model={model}",
      "--dtype=float32", "--answer_tokens=6", "--longest=40", "--risk=0.5",
      "--confidence=0.9", "--length=2", *argv])


@pytest.fixture(scope="module")
def model(tiny_model):
  return Generator.load(str(tiny_model), dtype="float32", capacity=64).model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "in.jsonl"
  lines = [{"prompt": f"what is {n}?"} for n in range(14)]
  lines += [{"prompt": "too long " * 20}, {"messages": [
      {"role": "user", "content": "hi"},
      {"role": "assistant", "content": "hello"}]}]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


@pytest.fixture
def folder(model, tmp_path):
  heads.save(tmp_path / "head", ExitHead.init(model, layer=3), model)
  return tmp_path / "head"


@pytest.mark.medium
@pytest.mark.parametrize("measure", ["top", "learned"])
def test_thresholds_reach_the_drafter(tiny_model, model, data, folder,
                                      tmp_path, measure, capsys):
  output, kept = tmp_path / "out.json", tmp_path / "answers.jsonl"
  argv = (f"--heads={folder}", f"--data={data}", f"--measure={measure}",
          f"--output={output}", f"--answers={kept}")
  assert run(tiny_model, *argv) == 0
  found = heads.load(folder, model, "exit").calibration
  assert (found.measure, found.risk, found.confidence) == (measure, 0.5, 0.9)
  assert (found.coefficients is not None) == (measure == "learned")
  report = json.loads(output.read_text())[str(folder)]
  assert report["calibration"]["first"] == found.first
  assert report["layer"] == 3
  assert report["texts"] == (8 if measure == "learned" else 12)
  shares = [row["shown"] for row in report["later"]]
  assert shares == sorted(shares) and shares[-1] > 0
  assert all(row["low"] <= row["retracted"] <= row["high"]
             for name in ("first", "later", "alone") for row in report[name])
  told = capsys.readouterr().out
  assert "first tokens" in told and ("shown from" in told
                                     or "never shown" in told)
  assert [len(json.loads(line)["token_ids"]) for line in
          kept.read_text().splitlines()] == [6] * 14
  made = Generator.load(str(tiny_model), dtype="float32", capacity=64,
                        drafter=f"early_exit:heads=[{folder}]")
  assert (made.drafter.show, made.drafter.show_first) == (
      found.later, found.first)
  # The answers are there; from a spoilt one something else would follow.
  before = kept.read_bytes()
  assert run(tiny_model, *argv) == 0
  assert kept.read_bytes() == before
  assert json.loads(output.read_text())[str(folder)] == report


@pytest.mark.slow
def test_a_head_that_knows_nothing_is_not_shown(tiny_model, model, data,
                                                folder, tmp_path, capsys):
  heads.save(folder, ExitHead.init(model, layer=1, tokens=[3]), model)
  table = tmp_path / "first.json"
  assert run(tiny_model, f"--heads={folder}", f"--data={data}",
             f"--first_tokens={table}") == 0
  found = heads.load(folder, model, "exit").calibration
  assert found.first == found.later == heads.NEVER
  told = capsys.readouterr().out
  assert told.count("never shown") == 2
  assert "% of 15 answers begin with token" in told
  # The table is shown while the prompt is not read yet.
  known = first_tokens.load(table, 0.0)
  token = known.guess([1])
  made = Generator.load(str(tiny_model), dtype="float32", capacity=64,
                        first_tokens=known)
  events = list(made.stream("what is 3?", Options(max_new_tokens=4)))
  assert not events[0].settled
  assert events[0].text == made.tokenizer.decode(token)
  assert events[1].settled and events[1].replaces == len(events[0].text)
  assert events[-1].completion.stats.shown == 1
  held = list(made.stream("what is 3?", Options(max_new_tokens=4),
                          hold_until_settled=True))
  assert all(e.settled and not e.replaces for e in held)
  assert held[-1].completion.stats.shown == 0
  assert held[-1].completion.text == events[-1].completion.text


@pytest.mark.parametrize("argv, words", [
    ((), "--heads is missing"),
    (("--heads=x",), "--data is missing"),
    (("--heads=x", "--data=nowhere.jsonl"), "nowhere.jsonl: No such"),
    (("--heads=x", "--data={data}"), "x has no config.json"),
    (("--heads=x", "--data={data}", "--risk=1"), "--risk must be between 0"),
    (("--heads=x", "--data={data}", "--length=0"), "--length must be in [1"),
    (("--heads=x", "--data={data}", "--measure=tops"), "measure"),
    (("--heads={medusa}", "--data={data}"), "pass a folder of kind 'exit'"),
    (("--heads={exit}", "--data={data}", "--risk=0.1"), "by fewer than 44"),
    (("--heads={exit}", "--data={text}"), "is no answer to a prompt")])
def test_what_cannot_be_is_one_sentence(tiny_model, model, data, folder,
                                        tmp_path, capsys, argv, words):
  heads.save(tmp_path / "medusa", MedusaHeads.init(model), model)
  text = tmp_path / "text.jsonl"
  text.write_text('{"text": "once upon a time"}\n')
  argv = [arg.format(data=data, exit=folder, medusa=tmp_path / "medusa",
                     text=text) for arg in argv]
  assert run(tiny_model, *argv) == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1
