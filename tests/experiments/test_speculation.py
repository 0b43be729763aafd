# SPDX-License-Identifier: Apache-2.0
"""What is made of the runs: speeds, expectations, and the table."""

import json

import pytest

from experiments import speculation
from experiments.speculation import PLAIN


def run(drafter, seconds, *, tokens=9, passes=8, scored=8, category="qa",
        accepted=(0, 0), differs=False):
  return {
      "drafter": drafter, "category": category, "temperature": 0.0, "batch": 0,
      "seconds": seconds, "foreign_cores": 0.0,
      "texts": [[1] * (tokens - 1) + [2 if differs else 1]],
      "passes": [passes], "steps": passes, "scored": [scored], "drafted": [8],
      "drafted_by_position": [4, 4], "accepted_by_position": list(accepted)}


SECTION = {
    "dtype": "float32", "rows": 1, "cost_curve": {"1": 0.1, "5": 0.2},
    "runs": [
        run(PLAIN, 0.8), run(PLAIN, 1.6, category="rag"),
        # Half as many passes, each three nodes wide.
        run("x", 0.6, passes=4, scored=12, accepted=(3, 1)),
        run("x", 0.4, passes=4, scored=12, accepted=(3, 1), category="rag",
            differs=True)]}


def test_speed_is_seconds_a_token_of_plain_decoding():
  runs = SECTION["runs"]
  assert speculation.speed(runs, "x", "qa", 0.0) == pytest.approx(0.8 / 0.6)
  assert speculation.speed(runs, "x", "rag", 0.0) == pytest.approx(4)
  assert speculation.speed(runs, "x", None, 0.0) == pytest.approx(2.4)


def test_a_summary_reconciles_with_its_runs():
  lines = {(x["drafter"], x["category"]): x
           for x in speculation.summary(SECTION)}
  whole = lines["x", "all"]
  assert whole["tokens_per_pass"] == pytest.approx(2)
  assert whole["mean_width"] == pytest.approx(3)
  # Two tokens for a pass that costs half as much again.
  assert whole["expected_speed"] == pytest.approx(2 / 1.5)
  assert whole["tokens_per_second"] == pytest.approx(16)
  assert whole["acceptance_by_position"] == [6 / 8, 2 / 8]
  assert (whole["texts_that_differ"], whole["texts"]) == (1, 2)
  assert lines["x", "qa"]["texts_that_differ"] == 0
  assert lines[PLAIN, "all"]["speed"] == 1


def test_the_table_and_the_plot_show_every_category(tmp_path):
  lines = speculation.summary(SECTION)
  table = speculation.table(lines)
  assert "| drafter | tokens/pass | all | qa | rag |" in table
  assert "| x | 2.00 | 2.40 | 1.33 | 4.00 |" in table
  assert PLAIN not in table
  speculation.plot(lines, tmp_path / "plot.png")
  assert (tmp_path / "plot.png").stat().st_size > 1000


def test_prompts_are_drawn_from_every_category(tmp_path):
  path = tmp_path / "in.jsonl"
  names = (*speculation.CATEGORIES, "coding", "stem")
  path.write_text("".join(
      json.dumps({"category": name, "turns": [f"{name} {i}", "again"]}) + "\n"
      for i in range(4) for name in names))
  found = speculation.read_prompts(str(path), 2)
  assert set(found) == {*speculation.CATEGORIES, "mt_bench"}
  assert found["qa"] == ["qa 0", "qa 2"]
  assert found["mt_bench"] == ["coding 0", "coding 2"]


def test_names_are_short():
  assert speculation.short(
      "adaptive:drafter=[union:drafters=[a;b],nodes=12],sizes=[1;2]") == (
          "adaptive[union[a;b] 12],sizes=[1;2]")
