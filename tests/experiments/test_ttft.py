# SPDX-License-Identifier: Apache-2.0
"""Time to the first token: what is measured is there, and is counted right."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import provisional, ttft
from experiments.provisional import PLAIN, Costs, Method
from jaxspec import loop
from jaxspec.confidence import confidence
from jaxspec.drafters.early_exit import EarlyExit
from jaxspec.errors import InputError
from jaxspec.heads import ExitHead
from jaxspec.models.transformer import random_source
from jaxspec.options import Options
from tests.jaxspec import batches, cycles

CHAIN = ((0,), (0, 0), (0, 0, 0))
NAME = "x, 3 drafts"


def bench(model, head, rows=2, chunk=16):
  method = Method(NAME, "x", 3, EarlyExit(head, CHAIN))
  return ttft.Bench(model, [method], rows, capacity=96, chunk=chunk)


def options(count):
  return [Options(max_new_tokens=12, seed=n) for n in range(count)]


@pytest.fixture(scope="module")
def records(quick_compiles):
  """Of a head that knows, and one that does not."""
  found, bench_ = {}, bench(
      cycles.model(), cycles.exit_head(attention=True))
  for name, shift in (("knows", 0), ("errs", 1)):
    head = cycles.exit_head(shift=shift, attention=True)
    bench_.generators[NAME].drafter = EarlyExit(head, CHAIN)
    # Cut to whole chunks, so that there is a control; and of unlike lengths.
    for group, texts in (("64", [[5, 9] * 32, [7, 1] * 32]),
                         ("qa", [[5, 9, 2], [7]])):
      record = ttft.measure(bench_, texts, options(2), 1, retries=0,
                            max_foreign=99)
      found.setdefault(name, []).append({
          "rows": 2, "temperature": 0.0, "number": 0, "group": group,
          "kind": "length" if group == "64" else "category", **record})
  return found


@pytest.mark.slow
def test_every_time_is_there_and_in_order(records):
  for record in itertools.chain(*records.values()):
    own, plain = record["methods"][NAME], record["methods"][PLAIN]
    for row in range(2):
      for run in (own, plain):
        times = [run["settled"][k][row] for k in ("1", "4", "8")]
        assert 0 < times[0] <= times[1] <= times[2]
      assert 0 < own["provisional"] < own["drafted"] < own["settled"]["1"][row]
    assert own["tokens"] == plain["tokens"]
    assert all(len(t) == 8 for t in plain["tokens"])
  assert "x, chunk-major" in records["knows"][0]["methods"]
  assert "x, chunk-major" not in records["knows"][1]["methods"]


@pytest.mark.slow
def test_a_head_that_knows_is_never_taken_back(records):
  knows = provisional.asked(records["knows"], NAME)
  errs = provisional.asked(records["errs"], NAME)
  assert all(all(x.stood) for x in knows) and len(knows) == 4
  assert not any(any(x.stood) for x in errs)
  # Drafts that stand are settled at once.
  assert all(x.settled(4) == x.settled(1) for x in knows)
  assert all(x.settled(4) > x.settled(1) for x in errs)
  assert records["errs"][0]["methods"][NAME]["accepted"] == [0, 0]
  # One of three layers; and the last of four chunks through it.
  assert knows[0].own["below"] == pytest.approx(1 / 3)
  assert records["knows"][0]["methods"]["x, chunk-major"][
      "below"] == pytest.approx((3 + 1 / 3) / 4)
  for name, stood in (("knows", True), ("errs", False)):
    control = provisional.asked(records[name], "x, chunk-major")
    assert [x.stood for x in control] == [[stood]] * 2
    assert all(x.own["tokens"][x.row][0] == x.plain["tokens"][x.row][0]
               for x in control)


@pytest.mark.slow
def test_the_control_and_confidence_are_the_heads_own(small, quick_compiles):
  """Also where layers attend; and whatever else is in the batch."""
  head = ExitHead(small, random_source(4), layer=1, mlp=8, attention=True)
  made = bench(small, head)
  texts = [(p * 9)[:48] for p in batches.prompts(2)]
  layers = made.run(NAME, texts, 64, options(2))
  chunks = made.control(NAME, texts, options(2))
  plain = made.run(PLAIN, texts, 64, options(2))
  assert [g[:1] for g in layers["guessed"]] == chunks["guessed"]
  assert [t[:1] for t in plain["tokens"]] == chunks["tokens"]
  assert layers["tokens"] == plain["tokens"]
  with pytest.raises(InputError, match="not several chunks of 16"):
    made.control(NAME, [t[:40] for t in texts], options(2))

  @jax.jit
  def wanted(tokens, length):
    prefix = loop.prefill(small, (1,), tokens, length, chunk=512,
                          dtype=jnp.dtype("float32"))
    logits = head(small, head.attended(prefix.features[0]))
    return confidence(logits[0], "top")

  for row, text in enumerate(texts):
    whole = np.array([[*text, *layers["guessed"][row]]], np.int32)
    np.testing.assert_allclose(
        layers["sure"][row],
        wanted(whole, np.array([whole.size], np.int32))[len(text) - 1:-1],
        atol=1e-4)


# Arithmetic.


def fake(guessed, sure, tokens, provisional=1.0, first=4.0, plain=4.0):
  """A record of one request, with times in seconds."""
  own = {"guessed": [guessed], "sure": [sure], "tokens": [tokens],
         "provisional": provisional, "drafted": 1.5, "quiet": True,
         "below": 1 / 3,
         "drafts": [4], "accepted": [1],
         "settled": {"1": [first], "4": [first + 1], "8": [None]}}
  return {"rows": 1, "temperature": 0.0, "kind": "category", "group": "qa",
          "prompt_tokens": [10], "methods": {
              PLAIN: {"tokens": [tokens], "quiet": True, "settled": {
                  "1": [plain], "4": [plain + 2], "8": [plain + 4]}},
              "x": own}}


def test_what_is_shown_counts_and_what_is_taken_back_does_not():
  records = [fake([1, 2], [0.9, 0.95], [1, 2, 3]),
             fake([1, 2], [0.8, 0.1], [1, 9, 3]),
             fake([5, 2], [0.7, 0.9], [1, 2, 3], first=5.0),
             fake([5, 2], [0.2, 0.9], [5, 2, 3])]
  some = provisional.asked(records, "x")
  assert [x.stood for x in some] == [
      [True, True], [True, False], [False, False], [True, True]]
  assert some[0].sure == [0.9, 0.9] and some[3].sure == [0.2, 0.2]
  shows = Method("x", "x", 2, None, first=0.5, later=0.5)
  found = provisional.line(records, "x", shows, None)
  def counts(x):
    return x["hits"], x["of"]
  assert counts(found["first_emission"]) == (3, 4)
  assert counts(found["first_retraction"]) == (1, 3)
  assert counts(found["token_emission"]) == (5, 8)
  assert counts(found["token_retraction"]) == (2, 5)
  assert counts(found["first_agreement"]) == (3, 4)
  assert found["shown_in_vain_ms"] == {
      "count": 1, "p50": 4000, "p95": 4000, "p99": 4000}
  assert found["provisional_earlier"]["p50"] == 0.75
  assert found["settled_later"]["1"]["p99"] == pytest.approx(
      np.percentile([0, 0, 0.25, 0], 99))
  assert found["settled_later"]["8"] == {"count": 0}
  # Two of four come right and early, the third is settled a quarter late.
  assert found["mean_first_right_earlier"] == pytest.approx(
      (0.75 + 0.75 - 0.25 + 0) / 4)
  assert found["first_shown_ms"]["p50"] == 1000
  # Later ones have a threshold of their own.
  found = provisional.shown(some, 0.75, 0.92)
  assert counts(found["first_emission"]) == (2, 4)
  assert counts(found["token_emission"]) == (3, 8)
  assert counts(found["token_retraction"]) == (0, 3)


def test_waste_is_what_fell_and_the_head():
  costs = Costs(layer=10, depth=30, unembed=100, head=7, exit=10)
  assert costs.waste(4, 1) == {"lower": 300, "upper": 3 * 300, "head": 28}
  records = [fake([1], [0.9], [1, 2, 3])]
  found = provisional.wasted(records, "x", costs)
  assert (found["drafts"], found["accepted"]) == (4, 1)
  assert found["of_plain_decoding"] == pytest.approx(
      (300 + 900 + 28) / (12 * 300 + 3 * 100))


def test_costs_are_twice_the_weights(small):
  head = ExitHead.init(small, layer=1, mlp=8, tokens=range(16))
  costs = Costs.of(small, head)
  width, kv, size = 32, 2, 8
  layer = (kv * 4 * size * width + width * width + 3 * 48 * width)
  assert (costs.layer, costs.unembed) == (2 * layer, 2 * 64 * width)
  assert costs.head == 2 * (width * width + 3 * 8 * width + 16 * width)


def test_tables_are_judged_on_what_they_have_not_seen():
  first = [("a", 1), ("a", 1), ("a", 1), ("b", 2), ("b", 2), ("c", 3)]
  found = provisional.priors(first)
  assert found["unigram"][:4] == [(1, 0.4), (1, 0.4), (1, 0.4), (1, 0.6)]
  assert found["by_category"] == [(1, 1)] * 3 + [(2, 1)] * 2 + [(-1, 0)]


def test_a_disturbed_or_compiling_sample_is_taken_again(monkeypatch):
  took = []

  def sample():
    took.append(0)
    if len(took) == 1:
      jax.jit(lambda x: x + len(took))(1.0)
    return {"n": len(took)}
  assert ttft.undisturbed(sample, 0, 99)["n"] == 2

  class Load:
    cores = 1.0
    def __enter__(self): return self
    def __exit__(self, *_): return None
  monkeypatch.setattr(ttft.machine, "ForeignLoad", Load)
  found = ttft.undisturbed(sample, 2, 0.2)
  assert found["n"] == 5 and found["quiet"] is False


@pytest.mark.slow
def test_the_whole_is_written(records, tmp_path):
  both = [{**r, "group": g, "kind": "category"}
          for r, g in zip((records["knows"][1], records["errs"][1]),
                          ("qa", "rag"))] + records["knows"][:1]
  shows = Method(NAME, "x", 3, None)
  summary = provisional.summarise(both, {NAME: shows}, {
      NAME: Costs(10, 2, 100, 7, 1)})
  lines = {(x["group"], x["method"]): x for x in summary["lines"]}
  assert lines["qa", NAME]["first_agreement"]["share"] == 1
  assert lines["rag", NAME]["first_agreement"]["share"] == 0
  assert lines["all", NAME]["requests"] == 4
  sources = summary["priors"][0]["sources"]
  assert set(sources) == {"unigram", "by_category", NAME}
  assert f"| {NAME} |" in provisional.table(summary["lines"])
  provisional.plot(summary, tmp_path / "x.png")
  assert (tmp_path / "x.png").stat().st_size > 1000


def test_batches_are_no_larger_than_asked():
  chats = {"qa": [[1] * n for n in (9, 3, 7, 5, 8)]}
  swept = {64: [[2] * 64] * 6, 128: [[2] * 128] * 6}
  found = list(ttft.batches(2, chats, swept, 4, 3, 128))
  assert [(k, g) for k, g, *_ in found] == [("length", "64")] * 3 + [
      ("category", "qa")] * 2
  assert [list(map(len, t)) for *_, t in found[3:]] == [[3, 5], [7, 9]]
