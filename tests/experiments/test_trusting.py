# SPDX-License-Identifier: Apache-2.0
"""What trust costs and saves, on a model of which all is known."""

import numpy as np
import pytest

from experiments import trusting
from jaxspec.drafters.early_exit import EarlyExit
from jaxspec.generator import Generator
from tests.jaxspec import cycles

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[3, 9, 2], [7]]
CHAIN = ((0,), (0, 0))


def examine(**options):
  return trusting.examine(
      Generator(cycles.model(), rows=2, capacity=32, **options), PROMPTS, 7)


@pytest.fixture(scope="module")
def plain(quick_compiles):
  return examine()


def trusted(shift):
  drafter = EarlyExit(cycles.exit_head(shift=shift), CHAIN)
  return examine(drafter=drafter, verifier="trusting")


@pytest.mark.slow
def test_a_head_that_knows_costs_nothing(plain):
  found = trusted(0)
  assert [x["answer"] for x in found] == [cycles.recited(p, 7) for p in PROMPTS]
  line = trusting.summarise(found, plain, 1 / 3)
  assert line["own"]["share"] == line["same_answers"]["share"] == 1
  assert line["nats_more"] == pytest.approx(0, abs=1e-5)
  # The first token comes with the prompt; then three a pass.
  assert line["tokens_per_pass"] == 3
  assert line["work"] == pytest.approx((1 + 2 / 3) / 3)


@pytest.mark.slow
def test_a_head_that_errs_shows(plain):
  """Of a root and two wrong drafts, the model says what is behind them."""
  found = trusted(1)
  line = trusting.summarise(found, plain, 1 / 3)
  own = [x["own"] for x in found]
  for x, flags in zip(found, own):
    pairs = zip(x["answer"], x["answer"][1:])
    assert flags[1:] == [b == cycles.after(a) for a, b in pairs]
  assert line["own"]["share"] == np.mean(own) < .7
  assert line["same_answers"]["hits"] == 0 < line["nats_more"]
  assert "| x |" in trusting.table({"x": line})


@pytest.mark.slow
def test_plain_decoding_is_itself(plain):
  line = trusting.summarise(plain, plain, 0)
  assert (line["own"]["share"], line["nats_more"], line["work"]) == (1, 0, 1)
