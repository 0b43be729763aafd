# SPDX-License-Identifier: Apache-2.0
"""Conversions keep every weight, and a folder appears whole or not at all."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxspec import __main__ as front_door
from jaxspec import checkpoint


def run(*argv) -> int:
  return front_door.main(["convert", *map(str, argv)])


def weights(folder):
  with checkpoint.open_checkpoint(str(folder)) as opened:
    return {path: np.asarray(opened.weight(path)) for path in opened.shapes}


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_weights_sizes_and_tokenizer_survive(
  form, tiny_model, tmp_path, capsys
):
  out = tmp_path / "deep" / "out"
  assert (
    run(f"--model={tiny_model}", f"--output={out}", f"--format={form}") == 0
  )
  before, after = weights(tiny_model), weights(out)
  assert before.keys() == after.keys()
  for path in before:
    np.testing.assert_array_equal(before[path], after[path])
  with (
    checkpoint.open_checkpoint(str(tiny_model)) as a,
    checkpoint.open_checkpoint(str(out)) as b,
  ):
    assert a.config == b.config
    assert a.generation == b.generation
    assert a.eos_ids == b.eos_ids
    text = "good day"
    assert a.tokenizer.encode(text) == b.tokenizer.encode(text)
    assert a.tokenizer.chat_template == b.tokenizer.chat_template
  assert f"wrote {out}" in capsys.readouterr().err
  assert [p.name for p in out.parent.iterdir()] == ["out"]
  assert out.stat().st_mode & 0o500 == 0o500


def test_there_and_back_gives_the_same_file(tiny_model, tmp_path):
  orbax, back = tmp_path / "orbax", tmp_path / "back"
  assert (
    run(f"--model={tiny_model}", f"--output={orbax}", "--format=orbax") == 0
  )
  assert run(f"--model={orbax}", f"--output={back}") == 0
  file = "model.safetensors"
  first = safetensors.numpy.load_file(tiny_model / file)
  last = safetensors.numpy.load_file(back / file)
  assert first.keys() == last.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], last[name])
  config = json.loads((back / "config.json").read_text())
  assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_weights_can_be_narrowed(form, tiny_model, tmp_path):
  out = tmp_path / "out"
  argv = [f"--format={form}", "--dtype=bfloat16"]
  assert run(f"--model={tiny_model}", f"--output={out}", *argv) == 0
  for path, array in weights(out).items():
    assert array.dtype == ml_dtypes.bfloat16, path


@pytest.mark.parametrize(
  "argv, words",
  [
    ([], "--output=FOLDER is missing"),
    (["--output=x", "--format=safetensor"], "Did you mean 'safetensors'?"),
    (["--output=x", "--dtype=bf16"], "must be float32 or bfloat16"),
    (["--output=x", "--model=nowhere/"], "nowhere"),
    (["--output=/dev/null/x"], "cannot make /dev/null/x"),
  ],
)
def test_a_wrong_call_is_one_line(
  argv, words, tiny_model, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  assert run(f"--model={tiny_model}", *argv) == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tiny_model, tmp_path, capsys):
  (tmp_path / "kept").write_text("mine")
  assert run(f"--model={tiny_model}", f"--output={tmp_path}") == 2
  assert "is there already" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_an_interrupt_leaves_no_folder(tiny_model, tmp_path, monkeypatch):
  from jaxspec.checkpoint.hf import HuggingFace

  def interrupt(self, path):
    raise KeyboardInterrupt

  monkeypatch.setattr(HuggingFace, "weight", interrupt)
  assert run(f"--model={tiny_model}", f"--output={tmp_path / 'out'}") == 130
  assert not list(tmp_path.iterdir())
