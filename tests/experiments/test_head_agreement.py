# SPDX-License-Identifier: Apache-2.0
"""Agreement of heads: asked at the right places, and counted right."""

import jax
import numpy as np
import pytest

from experiments import head_agreement
from experiments.exactness import Journal
from jaxspec import heads
from jaxspec.generator import Generator
from tests.jaxspec import cycles

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = {"qa": [[5, 9, 2], [7]], "rag": [[1, 1, 4, 30, 8]]}


@pytest.fixture(scope="module")
def answers(quick_compiles, tmp_path_factory):
  path = tmp_path_factory.mktemp("answers") / "x.jsonl"
  made = Generator(cycles.model(), rows=2, capacity=64)
  found = head_agreement.answer(made, PROMPTS, 6, Journal(path, []),
                                say=lambda _: None)
  made.generate = None                # what is there is not made again
  assert head_agreement.answer(made, PROMPTS, 6, Journal(path, []),
                               say=lambda _: None) == found
  return found


@pytest.fixture(scope="module")
def found(answers):
  some = {"knows": cycles.exit_head(attention=True),
          "errs": cycles.exit_head(shift=1), "medusa": cycles.medusa_heads(2),
          "far": cycles.medusa_heads(2, shift=1)}
  return head_agreement.examine(cycles.model(), some, answers, places=8)


@pytest.mark.slow
def test_heads_are_asked_at_every_place(answers, found):
  assert [a["answer"] for a in answers] == [
      cycles.recited(p, 6) for texts in PROMPTS.values() for p in texts]
  for text in found:
    marks = text["marks"]
    for name in ("model", "knows", "errs"):
      assert [m[:2] for m in marks[name]] == [(0, n) for n in range(6)]
      assert {m[2] for m in marks[name]} == {name != "errs"}
    for name, right in (("medusa", True), ("far", False)):
      assert [m[:2] for m in marks[name]] == [
          *((1, n) for n in range(1, 6)), *((2, n) for n in range(2, 6))]
      assert {m[2] for m in marks[name]} == {right}
    assert all(0 < m[3] <= 1 for some in marks.values() for m in some)


def test_confidence_is_that_of_the_law(small):
  """Of a head that can say a few tokens alone, as of the whole."""
  head = heads.ExitHead.init(small, layer=1, tokens=range(0, 64, 2))
  one = {"category": "x", "prompt": [3, 4, 5], "answer": [6, 7]}
  (text,) = head_agreement.examine(small, {"h": head}, [one], places=2)
  from jaxspec import loop
  tokens = np.array([[3, 4, 5, 6, 7]], np.int32)
  prefix = jax.jit(lambda: loop.prefill(
      small, (1,), tokens, np.array([5], np.int32), chunk=512,
      dtype=np.dtype("float32")))()
  logits = np.asarray(head(small, prefix.features[0]))[0, 2:4]
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  np.testing.assert_allclose([m[3] for m in text["marks"]["h"]], p.max(-1),
                             rtol=1e-4)
  assert [m[2] for m in text["marks"]["h"]] == (
      2 * p.argmax(-1) == [6, 7]).tolist()


def answered(category, prompt, answer):
  return {"category": category, "prompt": prompt, "answer": answer}


def test_tables_know_the_other_half_alone():
  some = [answered("a", [1], [2, 3, 2, 3]), answered("a", [1], [2, 3, 2, 4]),
          answered("b", [9], [5, 6]), answered("b", [1], [2, 3])]
  found = head_agreement.tables(some)
  rights = [{n: [m[2] for m in marks] for n, marks in t["marks"].items()}
            for t in found]
  # The first half is judged by the second, in which 2 stands first twice and
  # 3 mostly behind 2.
  assert rights[0] == {"first token": [True], "bigram": [
      True, True, True, True], "first token by category": [True]}
  # Behind 3 stands 2 in the first half; behind 2 always 3.
  assert rights[1]["bigram"] == [True, True, True, False]
  assert rights[2] == {"first token": [False], "bigram": [False, False],
                       "first token by category": [False]}
  assert found[2]["marks"]["bigram"][0][3] == 0


@pytest.mark.slow
def test_agreement_by_place_and_by_threshold(found, tmp_path):
  lines = head_agreement.summarise(found, {"knows": 1, "errs": 1})
  by = {(x["head"], x["ahead"], x["category"], x["place"]): x for x in lines}
  assert by["knows", 0, "all", "all"]["share"] == 1
  assert by["knows", 0, "all", "0"]["of"] == 3
  assert by["knows", 0, "all", "2-3"]["of"] == 6
  assert by["errs", 0, "qa", "all"] | {"hits": 0, "of": 12} == by[
      "errs", 0, "qa", "all"]
  assert by["medusa", 2, "all", "all"]["of"] == 12
  assert ("medusa", 2, "all", "1") not in by
  curves = {n: head_agreement.retractions(found, n) for n in ("knows", "errs")}
  first = curves["errs"]["first"][0]
  assert (first["emission"]["share"], first["retraction"]["share"]) == (1, 1)
  assert curves["knows"]["tokens"][0]["retraction"]["hits"] == 0
  assert "| knows | 1 | 0 | 100.0% |" in head_agreement.table(lines)
  head_agreement.plot(lines, curves, tmp_path / "x.png")
  assert (tmp_path / "x.png").stat().st_size > 1000


def test_places_have_names():
  assert [head_agreement.place_of(n) for n in (0, 1, 2, 3, 7, 31, 32, 99)] == [
      "0", "1", "2-3", "2-3", "4-7", "16-31", "32-", "32-"]


def test_each_trained_head_has_an_untrained_one_beside_it(small, tmp_path):
  heads.save(tmp_path / "a", heads.ExitHead.init(small, layer=1), small)
  heads.save(tmp_path / "m", heads.MedusaHeads.init(small, heads=2), small)
  found = head_agreement.load_heads(
      small, [str(tmp_path / "a"), str(tmp_path / "m")], [1])
  assert list(found) == ["a", "m", "untrained 1"]
  assert found["m"].count == 2 and found["untrained 1"].layer == 1
