# SPDX-License-Identifier: Apache-2.0
"""Laws of a pass over rows, which hold for every layout.

Row by row is what one pass over the table gives; streams change places with
their ids; a peer in the same row changes nothing; what a stream must not see
changes nothing of it, bit for bit.
"""

import dataclasses

import numpy as np
import pytest

from jaxspec.models.transformer import Transformer, random_source
from jaxspec.streams import layout as layouts
from jaxspec.streams.layout import Stream, StreamLayout
from tests.conftest import tiny_config
from tests.jaxspec.streams.tables import logits, random_table, tinted

pytestmark = pytest.mark.usefixtures("quick_compiles")

PREFIX, HEIGHT = [9, 4, 7, 5, 3], 8
ROWS = [1] * HEIGHT
SKIPPING = StreamLayout(
    (Stream("user", written=False), Stream("out"), Stream("think")),
    silence=1, keep_silence=False)
GUARDED = StreamLayout(
    (Stream("user", written=False, reads=()), Stream("tool", written=False),
     Stream("out", reads=("user", "guard")),
     Stream("guard", reads=("user", "out")), Stream("audit")), silence=1)
# Programs are compiled for a layout and a height: few of each.
LAYOUTS = {"auditing": layouts.auditing(), "skipping": SKIPPING}


@pytest.fixture(scope="module")
def model(small):
  return tinted(small)


def changed(tokens: np.ndarray, *at) -> np.ndarray:
  """Other tokens there, none of them silence."""
  new = tokens.copy()
  new[at] = (new[at] + 11) % 60 + 2
  return new


@pytest.mark.parametrize("name", LAYOUTS)
def test_row_by_row_is_one_pass(model, name):
  cells = random_table(LAYOUTS[name], HEIGHT)
  live = cells[1]
  whole = logits(model, LAYOUTS[name], *cells, prefix=PREFIX)
  rows = logits(model, LAYOUTS[name], *cells, prefix=PREFIX, steps=ROWS)
  np.testing.assert_allclose(rows[live], whole[live], atol=2e-5)


@pytest.mark.medium
@pytest.mark.parametrize("changes", [
    dict(family="gemma2", post_norms=True, attention_cap=50.0, logits_cap=30.0,
         windows=(8, None), activation="gelu_pytorch_tanh"),
    dict(family="qwen3_moe", qk_norm=True, experts=4, experts_per_token=2)],
    ids=lambda changes: changes["family"])
def test_row_by_row_is_one_pass_of_any_family(changes):
  """What a hidden stream says changes nothing either."""
  model = tinted(Transformer(tiny_config(depth=2, **changes),
                             random_source(0, scale=1.5)))
  layout = LAYOUTS["skipping"].without("out", "think")
  tokens, live = random_table(layout, HEIGHT)
  whole = logits(model, layout, tokens, live, prefix=PREFIX)
  rows = logits(model, layout, tokens, live, prefix=PREFIX, steps=ROWS)
  np.testing.assert_allclose(rows, whole, atol=2e-5)
  layout = dataclasses.replace(layout, streams=(
      dataclasses.replace(layout.streams[0], reads=()), *layout.streams[1:]))
  before, after = (logits(model, layout, cells, live, prefix=PREFIX)
                   for cells in (tokens, changed(tokens, slice(None), 2)))
  np.testing.assert_array_equal(before[:, :2], after[:, :2])
  assert not np.allclose(before[:, 2], after[:, 2], atol=1e-2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_streams_change_places_with_their_ids(model, name):
  layout, order = LAYOUTS[name], [2, 0, 1]
  tokens, live = random_table(layout, HEIGHT)
  one = logits(model, layout, tokens, live, prefix=PREFIX)[:, order]
  tokens, live = tokens[:, order], live[:, order]
  other = logits(model, layout.permuted(order), tokens, live, prefix=PREFIX)
  np.testing.assert_allclose(other[live], one[live], atol=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("steps", [None, ROWS])
def test_a_peer_in_the_same_row_changes_nothing(model, name, steps):
  layout = LAYOUTS[name]
  tokens, live = random_table(layout, HEIGHT)
  before = logits(model, layout, tokens, live, prefix=PREFIX, steps=steps)
  for stream in range(layout.count):
    after = logits(model, layout, changed(tokens, -1, stream), live,
                   prefix=PREFIX, steps=steps)
    same = np.ones(before.shape[:2], bool)
    same[-1, stream] = False
    np.testing.assert_array_equal(before[same], after[same])
    assert not np.allclose(before[-1, stream], after[-1, stream], atol=1e-2)


@pytest.mark.parametrize("steps", [None, ROWS])
def test_what_must_not_be_seen_changes_nothing(model, steps):
  """Bit for bit, also where one could tell by way of a third stream."""
  tool, audit = GUARDED.place("tool"), GUARDED.place("audit")
  tokens, live = random_table(GUARDED, HEIGHT)

  def says(tokens):
    return logits(model, GUARDED, tokens, live, prefix=PREFIX, steps=steps)
  before = says(tokens)
  for hidden in (tool, audit):
    after = says(changed(tokens, slice(None), hidden))
    for name in ("user", "out", "guard"):
      at = GUARDED.place(name)
      assert not GUARDED.reaches[at, hidden]
      np.testing.assert_array_equal(before[:, at], after[:, at])
  # Who may see it does.
  assert GUARDED.reaches[audit, tool]
  after = says(changed(tokens, 3, tool))
  assert not np.allclose(before[-1, audit], after[-1, audit], atol=1e-3)


def test_a_silent_key_that_is_not_kept_is_as_if_it_were_not_there(model):
  tokens, live = random_table(SKIPPING, HEIGHT, holes=0.4)
  there = tokens != SKIPPING.silence
  whole = logits(model, SKIPPING, tokens, live, prefix=PREFIX)
  alone = logits(model, SKIPPING, tokens, there, prefix=PREFIX)
  np.testing.assert_array_equal(whole[there], alone[there])
  kept = logits(model, dataclasses.replace(SKIPPING, keep_silence=True),
                tokens, live, prefix=PREFIX)
  assert not np.allclose(whole[-1], kept[-1], atol=1e-2)


def test_other_streams_are_seen_by_count_and_not_by_row(model):
  """A stream that is ahead is not read ahead."""
  layout = LAYOUTS["auditing"]
  tokens, _ = random_table(layout, HEIGHT)
  live = np.ones(tokens.shape, bool)
  live[:4, 1] = False                   # the answer begins four rows later
  before = logits(model, layout, tokens, live, prefix=PREFIX)
  after = logits(model, layout, changed(tokens, 1, 0), live, prefix=PREFIX)
  # Its first two tokens have counts 0 and 1: they see one of the question.
  np.testing.assert_array_equal(before[4:6, 1], after[4:6, 1])
  assert not np.allclose(before[6, 1], after[6, 1], atol=1e-3)
