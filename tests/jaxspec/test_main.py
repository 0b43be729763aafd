# SPDX-License-Identifier: Apache-2.0
"""The front door finds commands by looking, and explains itself."""

import pathlib
import subprocess
import sys

import pytest

from jaxspec import __main__ as front_door
from jaxspec.apps import launch


def test_commands_are_the_files_that_define_main(tmp_path, monkeypatch):
  (tmp_path / "launch.py").write_text('"""Shared."""\n')
  (tmp_path / "sing.py").write_text('"""Sings.\n\nLoudly."""\ndef main(s): 0')
  (tmp_path / "hum.py").write_text("def hum(): 0")
  monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
  assert front_door.commands() == {"sing": "Sings."}


def test_every_command_has_flags_and_a_summary():
  found = front_door.commands()
  assert "decode" in found and "convert" in found
  assert all(summary.endswith(".") for summary in found.values())


@pytest.mark.parametrize("ask", ["--help", "-h", "help"])
def test_help_lists_commands(ask, capsys):
  assert front_door.main([ask]) == 0
  out = capsys.readouterr().out
  for name, summary in front_door.commands().items():
    assert f"  {name}" in out and summary in out


@pytest.mark.parametrize("name", sorted(front_door.commands()))
def test_every_command_has_help(name, capsys):
  assert front_door.main([name, "--help"]) == 0
  out = capsys.readouterr().out
  assert front_door.commands()[name] in out
  assert "--config" in out
  assert ("--profile_dir" if name == "profile" else "--model") in out


@pytest.mark.parametrize(
  "argv, words",
  [
    ([], "the first argument must be a command"),
    (["--model=x"], "the first argument must be a command"),
    (["decoed"], "unknown command 'decoed'"),
    (["decoed"], "Did you mean 'decode'?"),
    (["decode", "--promt=x"], "unknown flag --promt. Did you mean 'prompt'?"),
    (["decode", "--drater", "x"], "Did you mean 'drafter'?"),
    (["decode", "hello"], "expected flags alone, got 'hello'"),
    (["decode", "--rows=many"], "--rows=many"),
    (["decode", "--temperature=warm"], "--temperature=warm"),
    (["decode", "--mesh=tensor"], "must look like data=1,tensor=2"),
    (["decode", "--logit_bias=x=1"], "must look like 15=-100,22=2.5"),
    (["decode", "--stop_token_ids=a"], "must be whole numbers"),
    (["decode", "--prompt"], "--prompt"),
    (["decode"], "pass one of --prompt=TEXT and --prompts=FILE.jsonl"),
  ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(argv, words, capsys):
  assert front_door.main(argv) == 2
  out, err = capsys.readouterr()
  assert words in err
  assert err.startswith("jaxspec: ") and err.count("\n") == 1
  assert out == ""


def test_interrupts_and_bugs(capsys):
  def interrupt():
    raise KeyboardInterrupt

  def bug():
    raise KeyError("ours")

  def full():
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

  assert launch.guard(interrupt) == 130
  assert capsys.readouterr().err == "jaxspec: interrupted\n"
  with pytest.raises(KeyError):
    launch.guard(bug)
  assert launch.guard(full) == 2
  assert "ran out of memory; lower --rows" in capsys.readouterr().err


def test_the_module_runs_and_help_loads_no_jax():
  code = (
    "import sys; from jaxspec import __main__ as door;"
    "door.main(['decode', '--help']); sys.exit('jax' in sys.modules)"
  )
  root = pathlib.Path(front_door.__file__).parent.parent
  subprocess.run(
    [sys.executable, "-c", code], cwd=root, check=True, capture_output=True
  )
  done = subprocess.run(
    [sys.executable, "-m", "jaxspec", "decode", "--promt=x"],
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr == (
    "jaxspec: unknown flag --promt. Did you mean 'prompt'?\n"
  )
