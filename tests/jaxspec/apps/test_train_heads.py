# SPDX-License-Identifier: Apache-2.0
"""The train_heads command: from prompts to folders of heads.

Held here: what it writes loads and drafts; a run that was stopped while it
answered or learnt goes on, and ends as one that was not; prompts longer than a
text are left out; what cannot be is refused before any work.
"""

import json
import pathlib
import sys
import types

import numpy as np
import pytest

from jaxspec import __main__ as front_door
from jaxspec import heads, training
from jaxspec.apps import train_heads
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from tests.jaxspec import cycles

pytestmark = pytest.mark.usefixtures("quick_compiles")

HEADS = ("--heads=exit:layer=2,mlp=16,attention=True,tokens=60",
         "--heads=medusa:heads=2", "--heads=hydra:heads=2,rank=8,tokens=60",
         "--heads=eagle:mlp=16,tokens=60")


def run(model, output, *argv):
  return front_door.main([
      "train_heads", "--compilation_cache_dir=", f"--model={model}",
      "--dtype=float32", f"--output={output}", "--answer_tokens=8",
      "--longest=64", "--steps=6", "--batch_tokens=128", *argv])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "in.jsonl"
  lines = [{"prompt": f"what is {n}?"} for n in range(7)]
  lines += [{"text": f"the number {n} is a number" * 3} for n in range(11)]
  lines += [{"prompt": "too long " * 20}, {"messages": [
      {"role": "user", "content": "hi"},
      {"role": "assistant", "content": "hello"}]}]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


@pytest.fixture(scope="module")
def whole(tiny_model, data, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "whole"
  assert run(tiny_model, folder, *HEADS, f"--data={data}") == 0
  return folder


def loaded(folder, model):
  return [heads.load(folder / name, model, name.split("_")[0]).heads
          for name in ("exit_2", "medusa", "hydra", "eagle")]


@pytest.mark.medium
def test_what_it_writes_can_be_loaded(whole, tiny_model):
  plain = Generator.load(str(tiny_model), dtype="float32", capacity=64)
  head, medusa, hydra, eagle = loaded(whole, plain.model)
  assert head.layer == 2 and len(head.tokens[...]) == 60 and medusa.count == 2
  assert hydra.count == 2 and len(hydra.tokens) == 60
  assert len(eagle.tokens[...]) == 60


@pytest.mark.medium
@pytest.mark.parametrize("drafter", [
    "medusa:heads=[{}/medusa],nodes=8",
    # (`drafters/test_contract.py` drafts with folders of every kind.)
    pytest.param("early_exit:heads=[{}/exit_2],length=2",
                 marks=pytest.mark.slow),
    pytest.param("hydra:heads=[{}/hydra],nodes=8", marks=pytest.mark.slow),
    pytest.param("eagle:heads=[{}/eagle],tree=chain,depth=2",
                 marks=pytest.mark.slow)])
def test_what_it_writes_drafts(whole, tiny_model, drafter):
  plain, drafting = (
      Generator.load(str(tiny_model), dtype="float32", capacity=64, **more)
      for more in ({}, {"drafter": drafter.format(whole)}))
  options = plain.default_options(max_new_tokens=16)
  (wanted,) = plain.generate(["what is 3?"], options)
  (found,) = drafting.generate(["what is 3?"], options)
  assert found.token_ids == wanted.token_ids
  assert found.stats.drafted > 0


def test_it_tells_what_came_of_it(whole):
  report = json.loads((whole / "report.json").read_text())
  assert sorted(report) == ["eagle", "exit_2", "hydra", "medusa"]
  assert [len(report[name]["agreement"]) for name in sorted(report)] == [
      3, 1, 2, 2]
  for found in report.values():
    assert found["tokens"] > 0 and found["learnt_texts"] == 17
    assert all(0 <= x <= 1 for x in found["agreement"] + found["untrained"])
  assert len(training.read_curve(whole)) == 6
  assert (whole / "curve.png").read_bytes()[:4] == b"\x89PNG"
  for name in ("medusa", "hydra"):
    config = json.loads((whole / name / "config.json").read_text())
    assert np.array(config["accuracy"]).shape == (2, 10)
  answers = [json.loads(line) for line in
             (whole / "answers.jsonl").read_text().splitlines()]
  assert [len(a["token_ids"]) for a in answers] == [8] * 7


@pytest.mark.medium
@pytest.mark.parametrize("stage", ["answering", "learning"])
def test_a_stopped_run_goes_on(whole, tiny_model, data, tmp_path, stage,
                               monkeypatch, capsys):
  class Stop(Exception):
    pass

  generate, save = Generator.generate, training._Curve.add

  def some(self, prompts, options, *, on_completion):
    def told(index, completion):
      on_completion(index, completion)
      if index == 2:
        raise KeyboardInterrupt
    return generate(self, prompts, options, on_completion=told)

  def stop(self, step, marks):
    save(self, step, marks)
    if step == 4:
      raise KeyboardInterrupt

  argv = (*HEADS, f"--data={data}")
  with monkeypatch.context() as patch:
    if stage == "answering":
      patch.setattr(Generator, "generate", some)
    else:
      patch.setattr(training._Curve, "add", stop)
    assert run(tiny_model, tmp_path / "run", *argv) == 130
  assert run(tiny_model, tmp_path / "run", *argv) == 2
  assert "pass --resume" in capsys.readouterr().err
  assert run(tiny_model, tmp_path / "run", *argv, "--steps=7",
             "--resume") == 2
  assert "--steps=6, and 7 is asked for" in capsys.readouterr().err
  assert run(tiny_model, tmp_path / "run", *argv, "--resume") == 0
  for name in ("answers.jsonl", "prompts.jsonl", "report.json",
               training.CURVE):
    assert (tmp_path / "run" / name).read_text() == (whole / name).read_text()
  model = Generator.load(str(tiny_model), dtype="float32", capacity=64).model
  assert all(cycles.leaves_equal(a.tensors(), b.tensors()) for a, b in
             zip(loaded(whole, model), loaded(tmp_path / "run", model)))


LAYERSKIP = ("--recipe=layerskip", "--data=x", "--heads=exit:layer=2")


def quality(folder):
  return json.loads((folder / "report.json").read_text())["model"]


@pytest.mark.slow
def test_layerskip_tunes_the_model_too(tiny_model, data, tmp_path, capsys):
  """Heads are for the tuned model, and with both the text is the same."""
  folder = tmp_path / "run"
  argv = ("--recipe=layerskip", "--adapter_rank=2", "--model_rate=0.01",
          "--adapter_targets=qkv,down", "--adapter_layers=0-1+3",
          "--curriculum=gradual", "--layer_dropout=0.3", "--exit_scale=2",
          "--heads=exit:layer=2,mlp=16", f"--data={data}")
  assert run(tiny_model, folder, *argv) == 0
  config = json.loads((folder / "adapter" / "config.json").read_text())
  assert config["rank"] == 2 and config["alpha"] == 4
  assert config["targets"] == ["qkv", "down"] and config["layers"] == [0, 1, 3]
  found = quality(folder)
  assert found["perplexity"] != found["base_perplexity"] > 1
  assert 0.2 < found["agreement"] <= 1 and found["divergence"] > 0
  assert "% agreement with the frozen model" in capsys.readouterr().out

  def load(**options):
    return Generator.load(str(tiny_model), dtype="float32", capacity=64,
                          **options)
  plain, tuned = load(), load(adapter=str(folder / "adapter"))
  with pytest.raises(InputError, match="pass heads of this model"):
    heads.load(folder / "exit_2", plain.model, "exit")
  skipping = load(
      adapter=str(folder / "adapter"),
      drafter=f"early_exit:heads=[{folder / 'exit_2'}],length=2")
  options = plain.default_options(max_new_tokens=16)
  wanted, answer = (g.generate(["what is 3?"], options)[0]
                    for g in (tuned, skipping))
  assert answer.token_ids == wanted.token_ids and answer.stats.drafted > 0
  # Heads and adapter go on from where they are, in other recipes.
  assert run(tiny_model, tmp_path / "more", "--recipe=heads", "--steps=2",
             f"--adapter={folder / 'adapter'}", f"--heads={folder / 'exit_2'}",
             f"--data={data}") == 0
  (begun, ended) = (heads.load(place / "exit_2", tuned.model, "exit").heads
                    for place in (folder, tmp_path / "more"))
  assert np.any(begun.lens[...] != ended.lens[...])
  assert cycles.leaves_equal(
      train_heads._head(str(folder / "exit_2"), tuned.model, range).tensors(),
      begun.tensors())


@pytest.mark.slow
def test_a_whole_model_is_an_ordinary_checkpoint(tiny_model, data, tmp_path):
  folder = tmp_path / "run"
  assert run(tiny_model, folder, "--recipe=layerskip", "--adapter_rank=0",
             "--heads=exit:layer=2,mlp=16", "--steps=2", "--model_rate=0.01",
             f"--data={data}") == 0
  assert not (folder / "adapter").exists()
  tuned = Generator.load(str(folder / "model"), dtype="float32", capacity=64)
  plain = Generator.load(str(tiny_model), dtype="float32", capacity=64)
  assert tuned.eos_ids == plain.eos_ids and tuned.defaults == plain.defaults
  assert not np.array_equal(tuned.model.layers[3].down[...],
                            plain.model.layers[3].down[...])
  heads.load(folder / "exit_2", tuned.model, "exit")


@pytest.mark.slow
def test_a_draft_model_is_a_checkpoint_of_fewer_layers(
    tiny_model, data, tmp_path):
  folder = tmp_path / "run"
  assert run(tiny_model, folder, "--recipe=draft_model", "--draft_layers=3",
             "--model_rate=0.003", f"--data={data}") == 0
  found = quality(folder)
  assert found["divergence"] < found["untrained"]["divergence"]
  assert found["base_perplexity"] == found["untrained"]["base_perplexity"]
  plain = Generator.load(str(tiny_model), dtype="float32", capacity=64)
  drafting = Generator.load(
      str(tiny_model), dtype="float32", capacity=64,
      drafter=f"draft_model:model=[{folder / 'draft'}],length=2")
  assert drafting.drafter.model.depth == 3
  options = plain.default_options(max_new_tokens=16)
  wanted, answer = (g.generate(["what is 3?"], options)[0]
                    for g in (plain, drafting))
  assert answer.token_ids == wanted.token_ids and answer.stats.accepted > 0


def test_the_model_may_write_the_prompts(tiny_model, tmp_path, monkeypatch):
  from jaxspec import corpus
  asked = []

  def invent(generator, count, *, seed, on_progress):
    asked.append((count, seed))
    return [[{"role": "user", "content": f"number {n}?"}] for n in range(count)]

  monkeypatch.setattr(corpus, "invent", invent)
  assert run(tiny_model, tmp_path / "run", "--heads=medusa:heads=1",
             "--data=self:20", "--seed=5", "--steps=2") == 0
  assert asked == [(20, 5)]
  lines = (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()
  assert len(lines) == 20 and "number 19?" in lines[-1]


def test_a_data_set_of_the_hub(tiny_model, data, tmp_path, monkeypatch):
  place = tmp_path / "snapshot"
  (place / "train").mkdir(parents=True)

  def download(name, repo_type, allow_patterns):
    assert (name, repo_type) == ("some/set", "dataset")
    return str(place)

  hub = types.SimpleNamespace(snapshot_download=download)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  argv = ("--heads=medusa:heads=1", "--data=some/set", "--steps=2")
  assert run(tiny_model, tmp_path / "empty", *argv) == 2
  (place / "train" / "a.jsonl").write_text(data.read_text())
  assert run(tiny_model, tmp_path / "run", *argv) == 0


@pytest.mark.parametrize("argv, words", [
    ((), "--heads is missing"),
    (("--heads=medusa",), "--data is missing"),
    (("--heads=medusa", "--data=nowhere.jsonl"), "nowhere.jsonl: No such"),
    (("--heads=eggle", "--data=x"), "Did you mean 'eagle'"),
    (("--heads=exit", "--data=x"), r"exit needs layer=N in [1, 3]"),
    (("--heads=exit:layer=4", "--data=x"), r"integer in [1, 3], got 4"),
    (("--heads=exit:layer=1,attention=2", "--data=x"), "True or False"),
    (("--heads=exit:layer=1,tokens=9999", "--data=x"), "tokens must be"),
    (("--heads=medusa:hads=2", "--data=x"), "no option 'hads=2'"),
    (("--heads=medusa", "--data=x", "--adapter_rank=2"),
     "--adapter_rank is for --recipe=layerskip, and this is heads"),
    (("--recipe=draft_model", "--data=x", "--layer_dropout=0.1"),
     "--layer_dropout is for --recipe=layerskip"),
    (("--recipe=draft_model", "--data=x", "--heads=medusa"),
     "leave out --heads"),
    (("--recipe=draft_model", "--data=x", "--draft_layers=4"),
     "draft_layers must be an integer in [1, 3]"),
    (("--recipe=draft_model", "--data=x", "--draft_layers=0"),
     "draft_layers must be an integer in [1, 3]"),
    (("--recipe=layerskip", "--data=x"), "--heads is missing"),
    ((*LAYERSKIP, "--heads=medusa"), "teaches exits"),
    ((*LAYERSKIP, "--adapter=x"), "leave out --adapter, or"),
    ((*LAYERSKIP, "--adapter_rank=-1"), "adapter_rank must be"),
    ((*LAYERSKIP, "--adapter_rank=0", "--adapter_alpha=1"),
     "--adapter_alpha is for an adapter"),
    ((*LAYERSKIP, "--adapter_targets=qvk"), "Did you mean 'qkv'"),
    ((*LAYERSKIP, "--adapter_layers=4"), "adapter_layers=4 must name some"),
    ((*LAYERSKIP, "--curriculum=turns"), "curriculum 'turns' is unknown"),
    ((*LAYERSKIP, "--curriculum=all:every=2"), "no option 'every=2'"),
    ((*LAYERSKIP, "--curriculum=rotational:every=0"), "every must be"),
    ((*LAYERSKIP, "--layer_dropout=1.5"), "layer_dropout must be a number"),
    ((*LAYERSKIP, "--exit_scale=-1"), "exit_scale must be a number"),
    ((*LAYERSKIP, "--model_rate=2"), "model_rate must be a number")])
def test_what_cannot_be_is_refused(tiny_model, tmp_path, capsys, argv, words):
  assert run(tiny_model, tmp_path / "run", *argv) == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1
  assert not list(pathlib.Path(tmp_path).glob("run/exit*"))


def test_a_folder_with_other_things_is_left_alone(tiny_model, tmp_path, capsys):
  (tmp_path / "mine.txt").write_text("mine")
  assert run(tiny_model, tmp_path, "--heads=medusa", "--data=x") == 2
  assert "is not empty" in capsys.readouterr().err
  assert (tmp_path / "mine.txt").read_text() == "mine"
