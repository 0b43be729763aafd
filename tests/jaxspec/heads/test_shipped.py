# SPDX-License-Identifier: Apache-2.0
"""Heads that come with the package are found by model, kind and name.

Held here: a folder goes before a name, the exit nearest to a third of the
depth before others, and heads of another model are not found; what is shipped
is small, says on what it was taught and loads for its model.
"""

import json

import pytest

from jaxspec import drafters, heads
from jaxspec.errors import InputError
from jaxspec.heads import ExitHead, MedusaHeads, shipped
from tests.jaxspec import cycles


@pytest.fixture
def place(tmp_path, monkeypatch, tiny):
  """Exits behind three layers, and two kinds of others."""
  monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
  for layer in (1, 2, 3):
    heads.save(tmp_path / f"tiny/exit_{layer}",
               ExitHead.init(tiny, layer=layer, mlp=8), tiny)
  heads.save(tmp_path / "tiny/medusa", MedusaHeads.init(tiny, heads=2), tiny)
  other = cycles.model()
  heads.save(tmp_path / "other/exit_9", ExitHead.init(other, layer=1, mlp=8),
             other)
  return tmp_path


def test_found_by_model_kind_and_name(place, tiny):
  assert list(shipped.names(tiny, "exit")) == ["exit_1", "exit_2", "exit_3"]
  assert list(shipped.names(tiny, "medusa")) == ["medusa"]
  assert list(shipped.names(cycles.model(), "exit")) == ["exit_9"]
  assert heads.find("", tiny, "exit") == place / "tiny/exit_1"
  assert heads.find("exit_3", tiny, "exit") == place / "tiny/exit_3"
  folder = place / "other/exit_9"
  assert heads.find(str(folder), tiny, "exit") == folder


@pytest.mark.parametrize("text, kind, match", [
    ("exit_4", "exit", "there are exit_1, exit_2, exit_3. Did you mean"),
    ("exit_9", "exit", "exit_9 is no folder, nor shipped for this model"),
    ("x", "eagle", "x is no folder, and no heads of kind eagle are shipped"),
    ("", "eagle", "no heads of kind eagle are shipped for this model; pass")])
def test_what_there_is_not(place, tiny, text, kind, match):
  with pytest.raises(InputError, match=match):
    heads.find(text, tiny, kind)


def test_drafters_take_them_by_name(place, tiny):
  target = drafters.Target(tiny)
  assert drafters.parse("early_exit", target).head.layer == 1
  assert drafters.parse("early_exit:heads=exit_3", target).head.layer == 3
  assert drafters.parse("medusa", target).heads.count == 2


def test_what_is_shipped_is_small_and_says_what_it_is():
  files = [f for f in shipped.SHIPPED.rglob("*") if f.is_file()]
  assert files, "nothing is shipped"
  assert sum(f.stat().st_size for f in files) <= 12e6
  for model in shipped.SHIPPED.iterdir():
    card = (model / "CARD.md").read_text()
    kinds = [json.loads((f / "config.json").read_text())["kind"]
             for f in sorted(model.iterdir()) if f.is_dir()]
    assert kinds == ["exit", "exit", "exit", "medusa"]
    for folder in model.iterdir():
      assert not folder.is_dir() or folder.name in card
