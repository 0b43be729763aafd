# SPDX-License-Identifier: Apache-2.0
"""The law: what the loop samples is distributed as plain decoding is.

Held here: the joint law of a whole short answer. All 4,096 answers of four
tokens of a tiny model are enumerated by plain forward passes and plain NumPy,
and 2^15 decoded ones (at night 2^18) must agree (chi-square, alpha 1e-6), with
temperature and top-p away from 1.

The joint law, because a test of the first token is blind to what comes after
it: every decoder of `mutants.py` has a first token that is just right (last
column of the table that `-s` prints), and wrong texts. Each must be caught
here; that is what the test is worth. A bug is judged beside a decoder without
one that is the same program, with as many samples and the same seeds.

With the exact verifier an answer is a function of its seed. So all drafters
must give the very same counts, and a verifier whose noise depends on the node,
which no law can show, is caught by that.
"""

import numpy as np
import pytest

from jaxspec.verifiers.exact import exact
from jaxspec.verifiers.rejection import Rejection
from tests.jaxspec import mutants
from tests.jaxspec.mutants import (
  ALPHA,
  BUGS,
  DRAFT_BUGS,
  HARMLESS,
  ROWS,
)

SAMPLES = 2 * ROWS                   # of a bug
VERIFIERS = {"exact": exact, "rejection": Rejection()}
# A verifier, and a drafter that suits it: drafts are drawn for rejection.
PAIRS = [("exact", "chain"), ("exact", "tree"),
         ("rejection", "drawn chain"), ("rejection", "drawn tree")]
MORE_PAIRS = [("exact", "stubborn"), ("rejection", "tree"),
              ("rejection", "with replacement")]

_rows: list[tuple] = []


@pytest.fixture(scope="module", autouse=True)
def table():
  yield
  print()
  mutants.show(_rows)


def check(verifier: str, drafter: str, sampler: str, size: int) -> None:
  found = mutants.sample(drafter, sampler, size, verifier=VERIFIERS[verifier])
  law = mutants.law(sampler)
  assert found.counts.sum() == size
  # Drafts were accepted, and drafts were refused: both paths were walked.
  assert found.accepted > size // 4
  assert found.drafted - found.accepted > size // 4
  joint = mutants.joint_p_value(found.counts, law)
  _rows.append((None, drafter, joint, mutants.p_value(
      mutants.beginning(found.counts), mutants.beginning(law))))
  assert joint > ALPHA


# By day of trees alone, of which a chain is one.
SMALL = [pytest.param(*pair, sampler,
                      marks=[pytest.mark.medium] * (sampler == "cool"))
         for pair in (PAIRS[1], PAIRS[3])
         for sampler in mutants.SAMPLERS if sampler != "open"]


@pytest.mark.parametrize("verifier, drafter, sampler", SMALL)
def test_joint_law(verifier, drafter, sampler):
  check(verifier, drafter, sampler, 2**15)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", mutants.SAMPLERS)
@pytest.mark.parametrize("verifier, drafter", PAIRS + MORE_PAIRS)
def test_joint_law_everywhere(verifier, drafter, sampler):
  check(verifier, drafter, sampler, 2**18)


@pytest.mark.nightly
@pytest.mark.parametrize("sampler", mutants.SAMPLERS)
@pytest.mark.parametrize("verifier, drafter", [PAIRS[1], PAIRS[3]])
def test_joint_law_of_four_million(verifier, drafter, sampler):
  check(verifier, drafter, sampler, 2**22)


def test_the_law_is_that_of_texts_and_not_of_tokens():
  """The test can only see stale keys if older tokens matter."""
  logits, texts = mutants.model_logits(), mutants.texts()
  spread = [logits[texts[:, 2] == t, 3].std(axis=0).mean()
            for t in range(mutants.VOCAB)]
  assert np.mean(spread) > 0.2
  assert mutants.law("cool").sum() == pytest.approx(1)
  assert np.sum(mutants.law("cool") > 0) > 300


@pytest.mark.medium
@pytest.mark.parametrize("other", [
    "tree", pytest.param("stubborn", marks=pytest.mark.slow)])
def test_the_answer_is_a_function_of_the_seed(other):
  """Same seed, same tokens: across drafters, and only with shared noise."""
  chain, found = (mutants.sample(drafter, "cool", ROWS).counts
                  for drafter in ("chain", other))
  np.testing.assert_array_equal(chain, found)
  by_node = mutants.sample("tree", "cool", ROWS, bug="noise_by_node")
  assert np.any(by_node.counts != chain)
  other_seeds = mutants.sample("chain", "cool", ROWS, seed=1)
  assert np.any(other_seeds.counts != chain)


@pytest.mark.medium
@pytest.mark.parametrize("bug", BUGS)
def test_mutants_are_killed(bug):
  row = mutants.judge(bug, "tree", SAMPLES)
  _rows.append(row)
  healthy = bug == "none" or (bug, "tree") in HARMLESS
  assert healthy == (row[2] > ALPHA)


@pytest.mark.medium
@pytest.mark.parametrize("bug", DRAFT_BUGS)
def test_mutants_of_draft_probabilities_are_killed(bug):
  row = mutants.judge(bug, "drawn tree", SAMPLES, "warm")
  _rows.append(row)
  assert (bug == "none") == (row[2] > ALPHA)
  assert row[3] > 1e-3               # and the first token shows none of them


@pytest.mark.medium
@pytest.mark.parametrize("verifier, drafter", [PAIRS[1], PAIRS[3]])
def test_no_bug_planted_is_the_package(verifier, drafter):
  """What the bugs are judged beside decodes what the package decodes."""
  np.testing.assert_array_equal(
      mutants.sample(drafter, "cool", ROWS, bug="none").counts,
      mutants.sample(drafter, "cool", ROWS,
                     verifier=VERIFIERS[verifier]).counts)


@pytest.mark.slow
def test_two_percent_leniency_is_seen_where_nothing_is_ruled_out():
  """Elsewhere an answer that cannot be gives it away; here the law must.

  Of two tokens: fewer cells, of which each has more to say.
  """
  law = mutants.beginning(mutants.law("open"), 2)
  honest, lenient = (
      mutants.p_value(mutants.beginning(mutants.sample(
          "stubborn", "open", 2**17, bug=bug).counts, 2), law)
      for bug in ("none", "leniency"))
  assert honest > ALPHA > lenient > 0


@pytest.mark.medium
@pytest.mark.parametrize("bug", [
    bug for bug in BUGS if bug != "none" and (bug, "tree") not in HARMLESS])
def test_a_first_token_test_is_blind(bug):
  """What most projects test would pass every one of these decoders."""
  joint, first = mutants.judge(bug, "tree", SAMPLES)[2:]
  assert joint < ALPHA
  assert first > 1e-3


def test_a_ruled_out_answer_is_one_too_many():
  """The verdict on counts itself, on laws that need no decoder."""
  law = np.array([0.5, 0.3, 0.2, 0.0])
  assert mutants.p_value(np.array([5000, 3000, 2000, 0]), law) > 0.9
  assert mutants.p_value(np.array([5000, 3000, 2000, 1]), law) == 0
  assert mutants.p_value(np.array([5300, 2700, 2000, 0]), law) < ALPHA
  # What is too rare to be counted by itself is counted together.
  rare = np.array([0.9998, 0.0001, 0.0001])
  assert mutants.p_value(np.array([10000, 0, 0]), rare) > ALPHA
  assert mutants.p_value(np.array([9900, 50, 50]), rare) < ALPHA


@pytest.mark.nightly
@pytest.mark.parametrize("sampler", mutants.SAMPLERS)
def test_kill_table(sampler):
  """Every bug, with every drafter, under every sampler that shows it."""
  survivors = []
  # Where nothing is ruled out, it takes more of them to see stale keys.
  size = 2**18 if sampler == "open" else 2**16
  for row in mutants.kill_table(size, sampler):
    _rows.append(row)
    bug, drafter, joint, _ = row
    silent = bug == "none" or (bug, drafter) in HARMLESS
    # Where there is no filter, none can be skipped or come too early.
    silent |= sampler == "open" and bug in ("filter_skipped", "warp_order")
    # Where no answer that is ruled out gives it away, leniency needs the test
    # above, which has fewer cells.
    if bug == "leniency" and (sampler == "open" or drafter == "stubborn"):
      continue
    if silent != (joint > ALPHA):
      survivors.append(row)
  assert not survivors, survivors


@pytest.mark.nightly
def test_kill_table_of_draft_probabilities():
  survivors = []
  for row in mutants.draft_kill_table(2**18):
    _rows.append(row)
    bug, drafter, joint, _ = row
    silent = bug == "none" or (bug, drafter) in HARMLESS
    if silent != (joint > ALPHA):
      survivors.append(row)
  assert not survivors, survivors
