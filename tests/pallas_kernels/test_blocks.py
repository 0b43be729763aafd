# SPDX-License-Identifier: Apache-2.0
"""Which blocks are chosen, and what is said of a table that cannot be read."""

import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import blocks
from pallas_kernels.errors import InputError
from pallas_kernels.target import Target

V5E = Target("tpu", "TPU v5 lite")


def write(path, content):
  text = content if isinstance(content, str) else json.dumps(content)
  path.write_text(text, encoding="utf-8")
  return path


@pytest.fixture
def own(tmp_path, monkeypatch):
  """A table of one's own."""
  path = tmp_path / "blocks.json"
  monkeypatch.setenv(blocks.VARIABLE, str(path))
  return lambda content: write(path, content)


def choose(target=V5E, key=(8, "bfloat16"), guess=(128, 256)):
  return blocks.choose("op", target, key, lambda: guess)


def test_without_an_entry_the_heuristic_decides(monkeypatch, own):
  monkeypatch.delenv(blocks.VARIABLE)
  assert choose() == (128, 256)
  monkeypatch.undo()


def test_the_table_comes_first(own, monkeypatch, tmp_path):
  own({"TPU v5 lite": {"op": {"8,bfloat16": [512, 64], "one": 7}}})
  assert choose() == (512, 64)
  assert choose(key="one", guess=3) == 7
  for other in (choose(Target("tpu", "TPU v6 lite")), choose(key=(9,)),
                choose(Target("tpu"))):
    assert other == (128, 256)
  shipped = write(tmp_path / "shipped.json", {"TPU v6 lite": {
      "op": {"8,bfloat16": [1, 1]}}, "TPU v5 lite": {
          "op": {"8,bfloat16": [2, 2]}}})
  monkeypatch.setattr(blocks, "SHIPPED", shipped)
  assert choose() == (512, 64)                          # one's own is first
  assert choose(Target("tpu", "TPU v6 lite")) == (1, 1)


def test_a_table_that_changes_is_read_again(own):
  own({"TPU v5 lite": {"op": {"8,bfloat16": [512, 64]}}})
  assert choose() == (512, 64)
  own({"TPU v5 lite": {"op": {"8,bfloat16": [1024, 64]}}})
  assert choose() == (1024, 64)


@pytest.mark.parametrize("content, message", [
    ("{", "blocks.json is no JSON: "),
    ([], r"blocks.json is \[\], but must be an object with one entry for each "
     "device kind"),
    ({"kind": 3}, "'kind' is 3, but must be .* for each op"),
    ({"kind": {"op": [8]}}, r"'kind': 'op' is \[8\], but must be .* each key"),
    ({"kind": {"op": {"k": []}}}, r"'k' is \[\], but blocks are a positive"),
    ({"kind": {"op": {"k": [8, True]}}}, "'k' is .*, but blocks are"),
    ({"kind": {"op": {"k": [8, -1]}}}, "'k' is .*, but blocks are"),
    ({"kind": {"op": {"k": "8"}}}, "'k' is '8', but blocks are"),
    ({"TPU v5 lite": {"op": {"8,bfloat16": [8]}}},
     r"'op', '8,bfloat16' is \(8,\), but the kernel wants a list of 2"),
    ({"TPU v5 lite": {"op": {"8,bfloat16": 8}}},
     "'op', '8,bfloat16' is 8, but the kernel wants a list of 2 integers; "
     "tune it again"),
])
def test_a_malformed_table(own, content, message):
  own(content)
  with pytest.raises(InputError, match=message):
    choose()


def test_a_table_that_is_not_there(monkeypatch, tmp_path):
  monkeypatch.setenv(blocks.VARIABLE, str(tmp_path / "none.json"))
  with pytest.raises(InputError, match="^there is no table of blocks "
                     ".*none.json' .No such file or directory.$"):
    choose()


def test_the_shipped_table_is_one():
  blocks.load(blocks.SHIPPED)


def test_save_and_load(tmp_path):
  table = {"kind": {"op": {"b": (1, 2), "a": 3}}}
  blocks.save(tmp_path / "t.json", table)
  assert blocks.load(tmp_path / "t.json") == table


def test_a_trial_goes_through_jit(own):
  """Programs are traced anew for other blocks, and found again for the same."""
  own({"TPU v5 lite": {"op": {"8,bfloat16": [512, 64]}}})
  traced = []

  @jax.jit
  def f(x):
    traced.append(choose())
    return x

  x = jnp.zeros(())
  f(x)
  for blocks_ in ((32, 32), (64, 64), (32, 32)):
    with blocks.trial(((("op", "8,bfloat16"), blocks_),)):
      f(x)
  assert traced == [(512, 64), (32, 32), (64, 64)]


def test_what_is_asked_can_be_watched(own):
  own({})
  with blocks.watch() as outer:
    choose()
    with blocks.watch() as inner:
      choose(key="one", guess=3)
  choose(key="two")
  assert outer == {("op", "8,bfloat16"): (128, 256), ("op", "one"): 3}
  assert inner == {("op", "one"): 3}
