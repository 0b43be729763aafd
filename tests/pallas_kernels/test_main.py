# SPDX-License-Identifier: Apache-2.0
"""`python -m pallas_kernels`: what it prints, writes, and exits with."""

import json
import re

import jax
import pytest

from pallas_kernels import __main__ as front_door
from pallas_kernels import blocks, compiling, timing, tuning
from pallas_kernels import case as case_lib
from tests.pallas_kernels import samples


@pytest.fixture
def cases(monkeypatch):
  """Some of a small op, instead of all there are."""
  found = [samples.case(), samples.case("wide, bump 8", columns=1024)]
  monkeypatch.setattr(case_lib, "collect", lambda ops=(): found)
  return found


@pytest.fixture
def unprepared(monkeypatch):
  """Leaves the process as it is, but for the compilation cache."""
  cache = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  monkeypatch.setattr(compiling, "prepare", lambda dump: None)
  yield
  jax.config.update("jax_enable_compilation_cache", cache)


@pytest.mark.parametrize("argv, message", [
    ([], "the first argument must be one of compile, tune, floors, support, "
     "got ''"),
    (["train"], "must be one of .*, got 'train'"),
    (["floors", "--chip=v5e"], "Unknown command line flag 'chip'"),
    (["floors", "all"], "expected flags alone, got 'all'"),
    (["floors", "--op=nothing"], "there are no cases of an op 'nothing'"),
    (["floors", "--json=/nowhere/at/all.json"], "--json=/nowhere/at/all.json "
     "cannot be written"),
    (["compile", "--topologies=v9"], "unknown topology 'v9'; there are v5e"),
    (["tune"], "say where the table goes, with --output=FILE"),
    (["tune", "--output=x.json"], "this machine has only a cpu"),
    (["tune", "--interpret", "--output=/nowhere/at/all.json"],
     "/nowhere/at/all.json: there is no such folder"),
])
def test_bad_input_is_one_sentence(argv, message, capsys, monkeypatch):
  monkeypatch.setattr(compiling, "prepare", lambda dump: None)
  assert front_door.main(argv) == 2
  out, err = capsys.readouterr()
  assert err.startswith("pallas_kernels: ") and err.count("\n") == 1
  assert re.search(message, err), err


@pytest.mark.parametrize("argv", [
    ["--help"], *([name, "--help"] for name in front_door._COMMANDS)])
def test_help(argv, capsys):
  assert front_door.main(argv) == 0
  out, err = capsys.readouterr()
  assert "usage: python -m pallas_kernels" in out and not err


def test_floors(cases, capsys, tmp_path):
  assert front_door.main(["floors", f"--json={tmp_path / 'f.json'}"]) == 0
  assert capsys.readouterr().out.count("| bump |") == 2
  records = json.loads((tmp_path / "f.json").read_text())["rows"]
  assert [r["case"] for r in records] == ["small, bump 8", "wide, bump 8"]


def test_support(cases, capsys, tmp_path):
  assert front_door.main(["support", f"--json={tmp_path / 's.json'}"]) == 0
  assert "| bump | wide, bump 8 | yes | no (1) | yes |" in (
      capsys.readouterr().out)
  assert len(json.loads((tmp_path / "s.json").read_text())["rows"]) == 3 * 4


@pytest.mark.usefixtures("unprepared")
def test_compile(cases, capsys, tmp_path, monkeypatch):
  pytest.importorskip("libtpu")
  file = tmp_path / "c.json"
  argv = ["compile", "--topologies=v5e", "--noschedule", f"--json={file}"]
  assert front_door.main(argv) == 0
  out = capsys.readouterr().out
  assert "| bump | small, bump 8 | v5e | compiles | " in out
  assert out.endswith("\n2 compiles, 2 refuses\n")
  assert [r["status"] for r in json.loads(file.read_text())["rows"]] == [
      "compiles", "compiles", "refuses", "refuses"]
  # Only what is new is compiled again, and what is no more is forgotten.
  del cases[0]
  cases.append(samples.case("odd", columns=520))
  asked = []
  compile_tpu = compiling.compile_tpu
  monkeypatch.setattr(compiling, "compile_tpu", lambda case, *args: (
      asked.append(case.name), compile_tpu(case, *args))[1])
  readme = tmp_path / "README.md"
  readme.write_text("<!-- compiled -->\n<!-- end of compiled -->\n")
  assert front_door.main(argv[:3] + [f"--json={file}", "--nogpu",
                                     f"--readme={readme}"]) == 1
  assert "| bump | odd | v5e | fails: ValueError: 520 columns" in (
      capsys.readouterr().out)
  assert asked == ["odd"]
  assert [(r["case"], r["target"]) for r in json.loads(file.read_text())[
      "rows"]] == [("wide, bump 8", "v5e"), ("wide, bump 8", "h100"),
                   ("odd", "v5e")]
  assert "| bump | 0" in readme.read_text()
  assert "| 1 of 2 |  |  |  | 0 of 1 |" in readme.read_text()


def test_tune(cases, capsys, tmp_path, monkeypatch):
  """The table is added to."""
  monkeypatch.setattr(tuning, "FACTORS", (1, 4))
  file = tmp_path / "blocks.json"
  blocks.save(file, {"TPU v6 lite": {"bump": {"8,512": 64}}})
  monkeypatch.setattr(timing, "measure", lambda *args, **kw: 1.0 / dict(
      blocks.trial.value).get(("bump", "8,1024"), 1))
  assert front_door.main(["tune", "--interpret", f"--output={file}"]) == 0
  out = capsys.readouterr().out
  assert "bump 8,1024: 512 takes" in out
  assert out.endswith(f"2 entries for 'TPU v5 lite' in {file}\n")
  assert blocks.load(file) == {
      "TPU v6 lite": {"bump": {"8,512": 64}},
      "TPU v5 lite": {"bump": {"8,512": 128, "8,1024": 512}}}


def test_tune_without_a_table(cases, tmp_path, monkeypatch):
  """From nothing, with the clock that is used on a device."""
  monkeypatch.setattr(tuning, "FACTORS", (1, 2))
  file = tmp_path / "blocks.json"
  del cases[1:]
  assert front_door.main(["tune", "--interpret", f"--output={file}"]) == 0
  assert list(blocks.load(file)["TPU v5 lite"]["bump"]) == ["8,512"]


def test_tune_refuses_a_table_that_is_none(cases, tmp_path, capsys):
  file = tmp_path / "blocks.json"
  file.write_text("[]")
  assert front_door.main(["tune", "--interpret", f"--output={file}"]) == 2
  assert "must be an object" in capsys.readouterr().err
  assert file.read_text() == "[]"
