# SPDX-License-Identifier: Apache-2.0
"""The flags of profile, and what a person reads of a trace."""

import json

import pytest

from jaxspec import __main__ as front_door
from tests.jaxspec.test_traces import tpu_trace


def run(*flags: str) -> int:
  return front_door.main(["profile", *flags])


def test_shares_of_stages_are_printed(tmp_path, capsys):
  (tmp_path / "host.xplane.pb").write_bytes(tpu_trace())
  file = tmp_path / "found.json"
  assert run(f"--profile_dir={tmp_path}", f"--json={file}", "--top=2") == 0
  out = capsys.readouterr().out
  assert "jit_decode: 0.0 ms, 100.0% of all" in out
  assert [line.split()[0] for line in out.splitlines()[1:4]] == [
      "score", "commit", "no"]
  assert "75.7%" in out and "score: fusion.2, dot" in out
  assert "while.1" not in out                     # not among the first two
  found = json.loads(file.read_text())["jit_decode"]
  assert found["scopes"]["score"] == pytest.approx(1060e-12)
  assert len(found["operations"]) == 2


@pytest.mark.parametrize("flags, words", [
    ([], "--profile_dir is missing"), (["--profile_dir=none"], "no trace"),
    (["--profile_dir=.", "--top=-1"], "at least 0")])
def test_a_wrong_call_is_one_line_and_exit_code_2(
    flags, words, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert run(*flags) == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1


def test_a_trace_without_programs_is_explained(tmp_path, capsys):
  (tmp_path / "host.xplane.pb").write_bytes(b"")
  assert run(f"--profile_dir={tmp_path}") == 2
  assert "holds no operation" in capsys.readouterr().err
