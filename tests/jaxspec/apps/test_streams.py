# SPDX-License-Identifier: Apache-2.0
"""The streams command: a row a line, words in from flags and from stdin, and
what is wrong is one sentence."""

import io
import json
import os
import re
import sys
import termios
import threading

import pytest

from jaxspec import __main__ as front_door
from jaxspec.apps import streams as app
from jaxspec.streams.session import Row

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def run(tiny_model, capsys):
  def run(*argv):
    status = front_door.main([
        "streams", "--compilation_cache_dir=", f"--model={tiny_model}",
        "--dtype=float32", "--room=24", "--max_new_tokens=6",
        "--given=assistant=A:", *argv])
    out = capsys.readouterr()
    return status, out.out, out.err
  return run


@pytest.mark.medium
def test_a_row_a_line(run):
  status, out, err = run("--push=user=hi there", "--prefix=Be brief.",
                         "--emit=jsonl")
  rows = [json.loads(line) for line in out.splitlines()]
  assert status == 0
  assert [row["row"] for row in rows] == list(range(len(rows)))
  assert [row["given"] for row in rows[:3]] == [True, True, False]
  assert "".join(row["texts"]["user"] for row in rows) == "hi there"
  assert rows[1]["texts"] == {"user": "", "assistant": ":"}
  spoken = [row["tokens"]["assistant"] for row in rows]
  assert len([t for t in spoken if t is not None]) == 2 + 6
  assert spoken[8:] == [None] * (len(rows) - 8) and len(rows) == 10
  assert "10 rows of 2 streams, 8 passes" in err
  # The same as columns.
  status, out, _ = run("--push=user=hi there", "--prefix=Be brief.")
  header, *lines = out.splitlines()
  assert header == "user\tassistant" and len(lines) == len(rows)
  assert "".join(line.split("\t")[0] for line in lines) == "hi there"


@pytest.mark.medium
def test_two_devices_write_the_same(run):
  argv = ["--push=user=hi there", "--emit=jsonl"]
  status, out, _ = run(*argv, "--mesh=tensor=2")
  assert status == 0 and out == run(*argv)[1] and out.count("\n") > 8


def test_lines_are_read_while_it_writes(run, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.StringIO(
      "user: one\nnobody: two\nthree\n\nuser: four\n"))
  status, out, err = run("--listen", "--emit=jsonl")
  said = "".join(json.loads(line)["texts"]["user"]
                 for line in out.splitlines())
  assert status == 0 and said == " one four"
  assert "no stream 'nobody'" in err and "must look like STREAM: words" in err


@pytest.fixture
def typed(run, monkeypatch):
  """Types lines, each when a certain row is shown, and gives the rows."""
  def typed(lines, *argv):
    shown, rows = threading.Condition(), []
    show = app._show_json

    def note(row):
      show(row)
      with shown:
        rows.append(row)
        shown.notify_all()

    class Stdin(io.StringIO):
      def __iter__(self):
        for number, line in lines:
          with shown:
            assert shown.wait_for(lambda least=number: rows and (
              rows[-1].number >= least), timeout=60)
          yield line + "\n"
    monkeypatch.setattr(app, "_show_json", note)
    monkeypatch.setattr(sys, "stdin", Stdin())
    status, _, err = run("--listen", "--emit=jsonl", "--stride=1",
                         "--room=200", "--max_new_tokens=150", "--ignore_eos",
                         *argv)
    assert status == 0, err
    assert [row.number for row in rows] == list(range(len(rows)))
    return rows
  return typed


@pytest.mark.medium
def test_stop_ends_the_writing(typed):
  """What waits is forgotten; nothing is written until something is typed."""
  rows = typed([(10, "/stop")], "--push=user=" + "x" * 100)
  assert 11 <= len(rows) < 60
  read = "".join(row["user"] for row in rows)
  assert set(read) == {"x"} and len(read) < 60


@pytest.mark.medium
@pytest.mark.parametrize("line, read", [("user: on", " on"), ("", "")])
def test_what_is_typed_after_a_stop_lets_it_go_on(typed, line, read):
  rows = typed([(10, "/stop"), (10, "nobody: no"), (10, line)],
               "--push=user=" + "x" * 100)
  assert "".join(row["user"] for row in rows).lstrip("x") == read
  said = [row.tokens[1] for row in rows[2:]]
  assert len(said) >= 150 and None not in said[:150]


def test_columns_fit_the_terminal(monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "41")
  columns = app._Columns(("user", "out"))
  columns.show(Row(0, ("user", "out"), (1, 2), ("\n", "日本" * 20),
                   (None, None), given=True))
  header, row = capsys.readouterr().out.splitlines()
  assert "user" in header and "·" in row and row.count("日") <= 10


@pytest.fixture
def terminal():
  ours, theirs = os.openpty()
  yield ours, theirs
  os.close(ours)
  os.close(theirs)


def test_a_line_is_typed_below_the_rows(terminal, capsys):
  """And what is typed wrong can be taken back."""
  ours, theirs = terminal
  usual = termios.tcgetattr(theirs)
  with app._Prompt(theirs) as prompt:
    assert not termios.tcgetattr(theirs)[3] & termios.ECHO
    lines = iter(prompt)
    os.write(ours, "user: hö\x7fi\n/stop\nhalf".encode())
    assert [next(lines), next(lines)] == ["user: hi\n", "/stop\n"]
    os.write(ours, b" a line\x04")
    assert not list(lines)
    capsys.readouterr()
    with prompt.aside():
      print("a row")
    assert capsys.readouterr().out == "\r\x1b[Ka row\n> half a line"
  assert termios.tcgetattr(theirs) == usual


def test_a_long_line_shows_its_end(terminal, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "12")
  prompt = app._Prompt(terminal[1])
  prompt._typed = "日本語 and more"
  prompt._draw()
  assert capsys.readouterr().out == ">  and more"


def test_rows_are_columns_while_somebody_types(run, terminal, monkeypatch):
  ours, theirs = terminal
  enter = app._Prompt.__enter__

  def type_at_once(self):
    enter(self)
    os.write(ours, b"user: one\n\x04")
    return self
  monkeypatch.setattr(app._Prompt, "__enter__", type_at_once)
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  with os.fdopen(os.dup(theirs)) as stdin:
    monkeypatch.setattr(sys, "stdin", stdin)
    status, out, _ = run("--listen", "--stride=2")
  rows = [line.rpartition("\r\x1b[K")[2] for line in out.split("\n")]
  rows = [row for row in rows if "\x1b[0m" in row]
  assert status == 0 and len(rows) >= 1 + 2 + 6
  assert "\x1b[1muser" in rows[0] and "\x1b[2;32mA" in rows[1]
  heard = re.findall(r"\x1b\[0;36m(.)", "".join(rows))
  assert "".join(heard).replace(" ", "") == "one"


@pytest.mark.parametrize("argv, words", [
    (["--layout=readin"], "Did you mean 'reading'?"),
    (["--push=hi"], "must look like STREAM=WORDS"),
    (["--silence_penalty=assistant"], "must look like STREAM=NUMBER"),
    (["--push=usr=hi"], "Did you mean 'user'?"),
    (["--hide=assistant=usr"], "Did you mean 'user'?"),
    (["--stride=0"], "--stride must be at least 1"),
])
def test_a_wrong_flag_is_one_line(run, argv, words):
  status, out, err = run(*argv)
  assert status == 2 and not out
  assert words in err and err.count("\n") == 1


@pytest.mark.parametrize("argv, words", [
    (["--hide=user=user"], "from itself"),
    (["--layout=auditing"], "auditor has nothing to go on from"),
    (["--row_drafter=lookip"], "Did you mean 'lookup'?"),
    (["--room=1000"], "context of 512"),
    (["--silence_penalty=assistant=2"], "no silence token"),
    (["--cache=window"], "use contiguous or paged"),
    (["--prefix=" + "x" * 9, "--prefix_room=8"], "or prefix_room larger"),
    (["--quiet=3"], "no silence token; leave it out"),
    (["--kernels=tpu"], "kernels=tpu is not for the devices"),
    (["--stop=x"], "stop texts are not looked for"),
    (["--stream_embedding=/nowhere"], "holds no table"),
])
def test_what_the_model_cannot_serve_is_one_line(run, argv, words):
  status, out, err = run(*argv)
  assert status == 2 and not out
  assert words in err and err.count("\n") == 1
