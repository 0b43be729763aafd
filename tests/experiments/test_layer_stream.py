# SPDX-License-Identifier: Apache-2.0
"""What is counted of a tiny model, and what is modelled by hand."""

import dataclasses

import pytest

from experiments import layer_stream
from experiments.layer_stream import Chips, Sizes
from tests.jaxspec import cycles

pytestmark = pytest.mark.usefixtures("quick_compiles")

# A byte and a hop take a second, a link takes no time; three layers of ten
# bytes, an unembedding of five and a head of seven.
CHIPS = Chips(1.0, float("inf"), 1.0)
SIZES = Sizes("by hand", depth=3, width=4, layer=10.0, unembedding=5.0,
              head=7.0)


@pytest.fixture(scope="module")
def runs():
  """A head that knows, on three stages."""
  return layer_stream.measure(
      cycles.model(), {"knows": cycles.exit_head()}, [[5, 9, 2], [7]],
      stages=[3, 8], temperatures=[0.0], new_tokens=12)


@pytest.mark.slow
def test_ticks_are_counted(runs):
  waits, guesses = runs                       # eight stages there cannot be
  assert not waits["guess"] and guesses["guess"]
  for run in runs:
    assert run["texts_that_differ"] == 0 and run["settled"] == 2 * 11
  assert waits["ticks_per_token"] == 3 and waits["wasted_share"] == 0
  # The first token of the answer is the prompt's; the next fills the pipe.
  assert guesses["right"] == guesses["guesses"] == 2 * 10
  assert guesses["ticks"] == 2 * (3 + 10)
  assert guesses["wasted_share"] == 0 and guesses["idle_share"] > 0


def test_times_by_hand():
  layers = (1, 1, 1)
  assert layer_stream.stage_times(SIZES, layers, CHIPS, True) == [17, 10, 15]
  assert layer_stream.pipeline_time(SIZES, layers, CHIPS) == 35 + 3
  # A tick: the slowest stage, a hop, and half a ring of three.
  assert layer_stream.stream_time(SIZES, layers, CHIPS, 1.0) == 17 + 2.5
  assert layer_stream.stream_time(SIZES, layers, CHIPS, 0.0) == 3 * (17 + 2.5)
  # Two sums a layer and one at the top, of half a ring each.
  assert layer_stream.tensor_time(SIZES, 3, CHIPS) == pytest.approx(
      35 / 3 + 7 * 1.5)


def test_where_tensor_parallelism_wins():
  hop = layer_stream.crossing(SIZES, (1, 1, 1), CHIPS, 0.9)
  assert hop > 0
  for factor, wins in ((0.5, True), (2.0, False)):
    chips = dataclasses.replace(CHIPS, hop=factor * hop)
    assert (layer_stream.tensor_time(SIZES, 3, chips)
            < layer_stream.stream_time(SIZES, (1, 1, 1), chips, 0.9)) == wins
  # With few right guesses the stream waits for more hops than the sums do.
  many = dataclasses.replace(SIZES, depth=1)
  assert layer_stream.crossing(many, (1, 0, 0), CHIPS, 0.0) == float("inf")


@pytest.mark.slow
def test_what_is_shown(runs, tmp_path):
  lines = layer_stream.model_times(runs, [SIZES], CHIPS)
  assert len(lines) == 1 and lines[0]["layers"] == [1, 1, 1]
  assert lines[0]["stream_at_best"] <= lines[0]["stream"]
  shown = layer_stream.table(runs, lines)
  assert "| knows | 3 | 0 | 3.00 | 1.18 | 100% | 0% |" in shown
  layer_stream.plot(runs, [SIZES], CHIPS, tmp_path / "plot.png")
  assert (tmp_path / "plot.png").stat().st_size > 1000
