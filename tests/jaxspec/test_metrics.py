# SPDX-License-Identifier: Apache-2.0
"""The stats line, its formulas, and counts that add up."""

import dataclasses
import json

import pytest

from jaxspec import metrics
from jaxspec.metrics import Stats

MEMORY = "hbm 21.3/31.2 GiB"


def speculative() -> Stats:
  return Stats(
    prompt_tokens=512,
    prompt_seconds=0.0841,
    first_token_seconds=0.091,
    new_tokens=257,
    decode_seconds=1.42,
    passes=78,
    drafted=312,
    accepted=178,
    drafted_by_position=[78, 78, 78, 78],
    accepted_by_position=[65, 48, 37, 28],
    accepted_by_node=[65, 48, 37, 28],
    scored=390,
    draft_length=4,
    wall_seconds=1.6,
  )


def plain() -> Stats:
  return Stats(
    prompt_tokens=8,
    prompt_seconds=0.004,
    first_token_seconds=0.005,
    new_tokens=65,
    decode_seconds=0.64,
    passes=64,
    scored=64,
    wall_seconds=0.7,
  )


def test_the_line_is_the_documented_one():
  assert speculative().line(MEMORY) == (
    "prompt 512 tok 84.1 ms (6088/s) | ttft 91 ms | decode 256 tok 1.42 s "
    "(180/s) | spec k=4 drafts=78 accepted=178/312 (57.1%) mean_len=3.28 "
    "pos=[.83 .62 .47 .36] | compiles 0 | hbm 21.3/31.2 GiB | "
    "seed=0 verify=exact"
  )


def test_plain_decoding_has_no_spec_part():
  assert plain().line("") == (
    "prompt 8 tok 4.0 ms (2000/s) | ttft 5 ms | decode 64 tok 640.0 ms (100/s) "
    "| compiles 0 | seed=0 verify=exact"
  )


def test_a_drafter_that_found_nothing_still_says_so():
  stats = dataclasses.replace(plain(), draft_length=8)
  stats.reconcile()
  assert "spec k=8 drafts=0 accepted=0/0 (0.0%) mean_len=1.00 pos=[]" in (
    stats.line("")
  )


def test_programs_from_the_cache_are_told_apart():
  stats = dataclasses.replace(plain(), compiles=5, compiles_cached=4)
  stats.reconcile()
  assert "| compiles 5 (4 cached) |" in stats.line("")
  with pytest.raises(AssertionError, match="compiles_cached"):
    dataclasses.replace(stats, compiles_cached=6).reconcile()


def test_memory_is_measured_where_none_is_given():
  assert any(unit in plain().line() for unit in ("| rss ", "| hbm "))


def test_the_line_of_nothing_divides_by_nothing():
  assert "0 tok 0.0 ms (-/s)" in Stats(requests=0).line("")


def test_formulas_are_those_of_vllm():
  stats = speculative()
  assert stats.drafts == 78
  assert stats.mean_length == pytest.approx(1 + 178 / 78)
  assert stats.acceptance_rate == pytest.approx(178 / 312)
  assert stats.rates_by_position == pytest.approx(
    [65 / 78, 48 / 78, 37 / 78, 28 / 78]
  )


def test_totals_add_counts_and_average_the_first_token():
  a, b = speculative(), plain()
  whole = metrics.total([a, b], wall_seconds=2.0)
  whole.reconcile()
  assert whole.requests == 2
  assert whole.new_tokens == 257 + 65
  assert whole.passes == 78 + 64
  assert whole.accepted_by_position == [65, 48, 37, 28]
  assert whole.first_token_seconds == pytest.approx((0.091 + 0.005) / 2)
  assert whole.draft_length == 4
  assert whole.wall_seconds == 2.0
  assert whole.line("").startswith("2 requests 2.00 s (161/s) | prompt 520 tok")


def test_totals_leave_their_parts_alone():
  one = speculative()
  whole = metrics.total([one], wall_seconds=9.0)
  assert whole.wall_seconds == 9.0 and one.wall_seconds == 1.6
  assert metrics.total([]).requests == 0
  metrics.total([]).reconcile()


def test_totals_name_what_differs():
  a, b = plain(), dataclasses.replace(plain(), seed=7, verifier="typical")
  assert metrics.total([a, b]).line("").endswith("seed=mixed verify=mixed")
  assert metrics.total([a, a]).line("").endswith("seed=0 verify=exact")


def test_totals_pad_shorter_drafts():
  short = dataclasses.replace(
    speculative(),
    drafted_by_position=[10, 8],
    accepted_by_position=[5, 1],
  )
  whole = metrics.total([short, speculative(), short])
  assert whole.drafted_by_position == [98, 94, 78, 78]
  assert whole.accepted_by_position == [75, 50, 37, 28]


@pytest.mark.parametrize(
  "wrong, word",
  [
    (dict(new_tokens=256), "new_tokens"),
    (dict(dropped=1), "new_tokens"),
    (dict(passes=79), "new_tokens"),
    (dict(accepted=177, new_tokens=256), "accepted_by_position"),
    (dict(drafted=170), "drafted"),
    (dict(accepted_by_position=[79, 48, 37, 14]), r"accepted_by_position\[0\]"),
    (dict(accepted_by_position=[65, 37, 48, 28]), r"accepted_by_position\[2\]"),
    (dict(drafted_by_position=[78, 78, 78, 79]), "drafted"),
    (dict(passes=70, dropped=-8), "drafts"),
  ],
)
def test_counts_that_do_not_add_up_are_named(wrong, word):
  speculative().reconcile()
  with pytest.raises(AssertionError, match=word):
    dataclasses.replace(speculative(), **wrong).reconcile()


def test_tokens_behind_a_stop_string_are_accounted_for():
  dataclasses.replace(speculative(), new_tokens=250, dropped=7).reconcile()


def test_what_was_shown_too_early_is_told():
  stats = dataclasses.replace(speculative(), shown=40, retracted=4,
                              retracted_seconds=0.2)
  stats.reconcile()
  assert ("| shown 40 tok early, 4 taken back (10.0%) after 50.0 ms | compiles"
          in stats.line(""))
  whole = metrics.total([stats, speculative(), stats])
  assert (whole.shown, whole.retracted) == (80, 8)
  assert whole.seconds_before_retraction == pytest.approx(0.05)
  assert stats.as_dict()["retraction_rate"] == pytest.approx(0.1)
  kept = dataclasses.replace(stats, retracted=0, retracted_seconds=0.0)
  assert "| shown 40 tok early, 0 taken back (0.0%) | comp" in kept.line("")
  assert "early" not in speculative().line("")
  with pytest.raises(AssertionError, match="retracted"):
    dataclasses.replace(stats, retracted=41).reconcile()


def test_json_holds_fields_and_formulas():
  record = json.loads(json.dumps(speculative().as_dict()))
  assert record["drafted"] == 312 and record["accepted"] == 178
  assert record["drafts"] == 78 and record["prompt_seconds"] == 0.0841
  assert record["mean_length"] == pytest.approx(3.282, abs=1e-3)
