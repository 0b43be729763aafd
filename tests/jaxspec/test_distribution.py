# SPDX-License-Identifier: Apache-2.0
"""The law: what the loop samples is distributed as plain decoding is.

Held here: the joint law of a whole short answer. All 4,096 answers of four
tokens of a tiny model are enumerated by plain forward passes and plain NumPy,
and 2^18 decoded ones must agree (chi-square, alpha 1e-6), with temperature and
top-p away from 1.

The joint law, because a test of the first token is blind to what comes after
it: decoders that write stale keys, take the bonus token from the wrong node,
or filter nothing when they verify have a first token that is just right (last
column of the table that `-s` prints), and wrong texts. Each of the bugs in
`mutants.py` must be caught here; that is what the test is worth.

With the exact verifier an answer is a function of its seed. So the two drafters
must give the very same counts, and a verifier whose noise depends on the node,
which no law can show, is caught by that.
"""

import numpy as np
import pytest

from tests.jaxspec import mutants
from tests.jaxspec.mutants import ALPHA, HARMLESS, MUTANTS, ROWS, TREES

# 2^18 samples take minutes on two cores.
pytestmark = pytest.mark.slow

_rows: list[tuple] = []


@pytest.fixture(scope="module", autouse=True)
def table():
  yield
  mutants.show(_rows)


def check(tree: str, sampler: str, size: int) -> None:
  found = mutants.sample(tree, sampler, size)
  law = mutants.law(sampler)
  assert found.counts.sum() == size
  # Drafts were accepted, and drafts were refused: both paths were walked.
  assert found.accepted > size
  assert found.drafted - found.accepted > size // 2
  joint = mutants.p_value(found.counts, law)
  _rows.append((None, tree, joint, mutants.p_value(
      mutants.first_token(found.counts), mutants.first_token(law))))
  assert joint > ALPHA


@pytest.mark.parametrize("tree, sampler", [("chain", "warm"),
                                           ("tree", "cool")])
def test_joint_law(tree, sampler):
  check(tree, sampler, 2**18)


@pytest.mark.nightly
@pytest.mark.parametrize("sampler", mutants.SAMPLERS)
@pytest.mark.parametrize("tree", TREES)
def test_joint_law_of_four_million(tree, sampler):
  check(tree, sampler, 2**22)


def test_the_law_is_that_of_texts_and_not_of_tokens():
  """The test can only see stale keys if older tokens matter."""
  logits, texts = mutants.model_logits(), mutants.texts()
  spread = [logits[texts[:, 2] == t, 3].std(axis=0).mean()
            for t in range(mutants.VOCAB)]
  assert np.mean(spread) > 0.2
  assert mutants.law("cool").sum() == pytest.approx(1)
  assert np.sum(mutants.law("cool") > 0) > 300


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("mutant, tree", [
    *((mutant, "tree") for mutant in MUTANTS), ("stale_keys", "chain"),
    ("leniency", "chain")])
def test_mutants_are_killed(mutant, tree):
  row = mutants.judge(mutant, tree, 4 * ROWS)
  _rows.append(row)
  if (mutant, tree) in HARMLESS:
    assert row[2] > ALPHA
  else:
    assert row[2] < ALPHA, f"{mutant} survives with {tree}"


@pytest.mark.usefixtures("quick_compiles")
def test_a_first_token_test_is_blind():
  """What most projects test would pass these three decoders."""
  for mutant in ("stale_keys", "bonus_shift", "filter_skipped"):
    joint, first = mutants.judge(mutant, "tree", 4 * ROWS)[2:]
    assert joint < ALPHA
    assert first > 1e-3


@pytest.mark.usefixtures("quick_compiles")
def test_the_answer_is_a_function_of_the_seed():
  """Same seed, same tokens: across drafters, and only with shared noise."""
  counts = {tree: mutants.sample(tree, "cool", ROWS).counts for tree in TREES}
  np.testing.assert_array_equal(counts["chain"], counts["tree"])
  by_node = mutants.sample("tree", "cool", ROWS, mutant="noise_by_node")
  assert np.any(by_node.counts != counts["chain"])


@pytest.mark.nightly
@pytest.mark.parametrize("sampler", mutants.SAMPLERS)
def test_kill_table(sampler):
  """Every bug, with both drafters, under every sampler that shows it."""
  for row in mutants.kill_table(2**18, sampler):
    _rows.append(row)
    mutant, tree, joint, _ = row
    silent = mutant is None or (mutant, tree) in HARMLESS
    # Without top-p or a temperature there is no order to get wrong.
    silent |= mutant == "warp_order" and sampler == "min_p"
    assert silent or joint < ALPHA, f"{mutant} survives {tree}, {sampler}"
