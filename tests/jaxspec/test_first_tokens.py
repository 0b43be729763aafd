# SPDX-License-Identifier: Apache-2.0
"""What answers begin with: counted, kept, and guessed where it is likely."""

import dataclasses

import pytest

from jaxspec import first_tokens
from jaxspec.errors import InputError


@pytest.fixture
def table():
  pairs = [(1, 5)] * 8 + [(1, 6)] * 2 + [(2, 6)] * 9 + [(3, 7)] * 12
  return first_tokens.learn(pairs, vocab=8)


def test_shares_are_counted(table):
  assert table.overall == (7, pytest.approx(12 / 31))
  # Nine are too few to be believed.
  assert table.behind == {1: (5, 0.8), 3: (7, 1.0)}


def test_what_is_likely_is_guessed(table):
  def guess(threshold, *prompt):
    return dataclasses.replace(table, threshold=threshold).guess(prompt)
  assert guess(0.5, 4, 1) == [5] and guess(0.8, 1) == [5]
  assert guess(0.81, 1) == []
  assert guess(0.3, 2) == [7] and guess(0.5, 2) == []
  assert first_tokens.learn([], 8).guess([1]) == []


def test_tables_are_kept(table, tmp_path):
  table.save(tmp_path / "a")
  assert first_tokens.load(tmp_path / "a") == table
  assert first_tokens.load(tmp_path / "a", 0.9).threshold == 0.9
  first_tokens.learn([], 8).save(tmp_path / "b")
  assert first_tokens.load(tmp_path / "b").overall is None


@pytest.mark.parametrize("change", [
    ("first tokens 1", "first tokens 2"), ('"vocab": 8', '"vocab": 7'),
    ("0.8", "1.8"), ("{", "["), ('"overall"', '"over"'), ("1.0", '"x"')])
def test_other_files_are_refused(table, tmp_path, change):
  path = tmp_path / "a"
  table.save(path)
  assert change[0] in path.read_text()
  path.write_text(path.read_text().replace(*change))
  with pytest.raises(InputError, match="holds no table of first tokens"):
    first_tokens.load(path)


def test_files_that_are_not_there_are_named(table, tmp_path):
  with pytest.raises(InputError, match="cannot read first tokens from"):
    first_tokens.load(tmp_path / "none")
  with pytest.raises(InputError, match="cannot write"):
    table.save(tmp_path / "no" / "folder")
  with pytest.raises(InputError, match=r"must be in \[0, 1\], got 2"):
    first_tokens.load(tmp_path / "none", 2)
