# SPDX-License-Identifier: Apache-2.0
"""The train_streams command: from chats to a folder that streams reads.

Held here: what it writes loads in the streams command, and another model
refuses it; a run ended by the clock goes on and ends as one that was not; what
cannot be is refused before there is a run.
"""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from jaxspec import __main__ as front_door
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from jaxspec.streams import taught

pytestmark = pytest.mark.usefixtures("quick_compiles")


def learn(model, output, *argv):
  return front_door.main([
      "train_streams", "--compilation_cache_dir=", f"--model={model}",
      f"--output={output}", "--cells=128", "--positions=64", "--rate=0.003",
      "--adapter_rank=4", *argv])


def run(model, output, *argv):
  return learn(
      model, output, "--layout=auditing", "--silence=~",
      "--column=auditor={{ row.answer[:2] }}", "--steps=6", "--asked=2", *argv)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "in.jsonl"
  lines = [{"question": f"what is {n}?", "answer": f"it is {n + 1}"}
           for n in range(15)]
  lines += [{"messages": [{"role": "user", "content": "hi"},
                          {"role": "assistant", "content": "hello"}],
             "answer": "unused"},
            [{"user": "a b", "assistant": "c"}, {"auditor": "x"}]]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


@pytest.fixture(scope="module")
def whole(tiny_model, data, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "whole"
  assert run(tiny_model, folder, f"--data={data}") == 0
  return folder


def tensors(folder):
  return {name: safetensors.numpy.load_file(
      folder / "streams" / name / "model.safetensors")
      for name in (".", "adapter")}


def streams(model, folder, *argv):
  return front_door.main([
      "streams", "--compilation_cache_dir=", f"--model={model}",
      "--dtype=float32", f"--taught={folder}/streams", "--push=user=what is 3?",
      "--room=20", "--emit=jsonl", *argv])


@pytest.mark.medium
def test_what_it_writes_is_read(whole, tiny_model, capsys):
  assert streams(tiny_model, whole) == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert set(rows[0]["tokens"]) == {"user", "assistant", "auditor"}
  assert len(rows) == 20
  assert "".join(row["texts"]["user"] for row in rows) == "what is 3?"
  report = json.loads((whole / "report.json").read_text())
  for when in ("before", "after"):
    assert set(report[when]["streams"]) == {"assistant", "auditor"}
    assert report[when]["delay"]["assistant"]["tables"] == 2
  assert report["steps"] == 6
  late = report["delay_of_data"]["assistant"]
  # "what is 3?" of 10 letters; five words behind is behind all of them.
  assert late["median"] == 1 and late["early"] == 0
  found = tensors(whole)
  assert np.any(found["."]["stream_embedding"] != 0)
  assert any(name.endswith("qkv.up") for name in found["adapter"])


@pytest.mark.medium
def test_streams_without_silence_learn_to_go_on(tiny_model, tmp_path, capsys):
  """The published layout: each counts for itself, from given words on."""
  data = tmp_path / "in.jsonl"
  data.write_text("".join(json.dumps(
      {"question": f"what is {n}?", "answer": f"it is {n + 1}"}) + "\n"
                          for n in range(4)))
  argv = [tiny_model, tmp_path / "run", "--layout=reading", f"--data={data}",
          "--given=assistant=A:", "--steps=2", "--judged=2"]
  assert learn(*argv) == 2
  error = capsys.readouterr().err
  lead = re.search(r"--lead=assistant=\d+ or more, or --position_rule=rows",
                   error)
  assert lead and error.count("\n") == 1
  assert learn(*argv, "--lead=assistant=40") == 0
  layout = taught.layout_of(tmp_path / "run" / "streams")
  assert layout.positions == "counters" and layout.leads.tolist() == [0, 40]
  capsys.readouterr()
  assert streams(tiny_model, tmp_path / "run", "--given=assistant=A:") == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert "".join(row["texts"]["assistant"] for row in rows).startswith("A:")
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  assert report["after"]["streams"]["assistant"]["words"] > 0


def test_another_model_refuses_it(whole, tiny_model, tmp_path, capsys):
  for file in tiny_model.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  weights = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  weights["model.embed_tokens.weight"] *= 1.5
  safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
  capsys.readouterr()
  assert streams(tmp_path, whole) == 2
  error = capsys.readouterr().err
  assert "made for the model" in error and error.count("\n") == 1
  assert streams(tiny_model, whole, "--layout=reading") == 2
  assert "both say it" in capsys.readouterr().err


@pytest.mark.medium
def test_a_run_that_the_clock_ended_goes_on(whole, tiny_model, data, tmp_path,
                                            capsys):
  folder = tmp_path / "run"
  argv = [tiny_model, folder, f"--data={data}", "--asked=0", "--judged=1"]
  assert run(*argv, "--minutes=0") == 0
  assert "at step 1 of 6" in capsys.readouterr().err
  assert run(*argv, "--resume", "--steps=7") == 2
  assert "--steps=6" in capsys.readouterr().err
  # What is learnt is the same with a silence penalty, which is for use.
  assert run(*argv, "--resume", "--silence_penalty=assistant=3") == 0
  assert taught.layout_of(folder / "streams").penalties.tolist() == [0, 3, 0]
  for name, found in tensors(folder).items():
    for path, value in tensors(whole)[name].items():
      np.testing.assert_array_equal(found[path], value)


@pytest.mark.slow
def test_a_whole_model_learns(tiny_model, data, tmp_path):
  folder = tmp_path / "run"
  assert run(tiny_model, folder, f"--data={data}", "--adapter_rank=0",
             "--asked=0", "--judged=1", "--steps=2") == 0
  before, after = (Generator.load(str(f), dtype="float32", capacity=64).model
                   for f in (tiny_model, folder / "model"))
  model, layout = taught.load(folder / "streams", after)
  assert model.backbone is after and layout.silence == 93
  with pytest.raises(InputError, match="made for the model"):
    taught.load(folder / "streams", before)


@pytest.mark.parametrize("argv, words", [
    (["--silence=ab"], "is 2 tokens"),
    (["--silence=</s>"], "ends a text"),
    (["--silence=h"], "holds the silence token"),
    (["--column=auditor"], "must look like"),
    (["--column=auditor={{ row.x.y }}"], "is broken"),
    (["--follow=auditor=assistant:x"], "number of words"),
    (["--follow=auditor=asistant:1"], "Did you mean 'assistant'?"),
    (["--follow=assistant=auditor:1"], "in a circle"),
    (["--silence_penalty=assistant=x"], "from 0 on"),
    (["--cells=2"], "cells must be an integer"),
    (["--silence_share=2"], "silence_share must be a number"),
    (["--adapter_rank=0", "--adapter_alpha=3"], "leave one out"),
    (["--position_rule=counters"], "is for streams without --silence"),
    (["--lead=assistant=3"], "is for streams without --silence"),
])
def test_what_cannot_be_is_one_line(tiny_model, data, tmp_path, capsys, argv,
                                    words):
  refused(capsys, tmp_path / "run", words, run(
      tiny_model, tmp_path / "run", f"--data={data}", *argv))


@pytest.mark.parametrize("argv, words", [
    (["--keep_silence"], "--keep_silence is for --silence"),
    (["--lead=assistant=x"], "must be a whole number"),
    (["--lead=asistant=1"], "Did you mean 'assistant'?"),
    (["--position_rule=row"], "Did you mean 'rows'?"),
    (["--position_rule=rows", "--lead=assistant=1"], "use counters"),
])
def test_what_cannot_be_without_silence(tiny_model, data, tmp_path, capsys,
                                        argv, words):
  refused(capsys, tmp_path / "run", words, learn(
      tiny_model, tmp_path / "run", f"--data={data}", *argv))


def refused(capsys, folder, words, status):
  assert status == 2
  error = capsys.readouterr().err
  assert words in error and error.count("\n") == 1
  assert not folder.exists()
