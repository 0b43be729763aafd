# SPDX-License-Identifier: Apache-2.0
"""The notebook of sessions: its cells run in order, as in a notebook."""

import re

import pytest

from tests.experiments import notebooks


def test_the_first_cell_installs_and_no_output_is_kept():
  first = notebooks.cells("sessions")[0]
  assert first == notebooks.cells("quickstart")[0]
  assert not notebooks.outputs("sessions")


@pytest.mark.slow
def test_the_cells_run(monkeypatch, capsys):
  notebooks.run("sessions", monkeypatch)
  out = capsys.readouterr().out
  assert int(re.findall(r"heard after (\d+) rows", out)[0]) <= 3
  # What was not read yet when it was interrupted is gone.
  assert "birds Stop." in out and "alone" not in out
  assert "reaches: True False" in out
  assert "open: not the same\nclosed: the same\n" in out
