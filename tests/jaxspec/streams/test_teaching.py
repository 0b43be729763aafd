# SPDX-License-Identifier: Apache-2.0
"""What is taught is what a session does.

Packed cells give the logits that rows give; tables of a block change nothing
of each other, bit for bit; the loss of what was taught falls; a run that was
stopped goes on and ends in the same weights.
"""

import dataclasses

import jax
import numpy as np
import pytest

from jaxspec import training
from jaxspec.adapters import Adapter
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.streams import conversion, teaching
from jaxspec.streams import layout as layouts
from jaxspec.streams.conversion import Follow, Table
from jaxspec.streams.layout import Stream, StreamLayout
from jaxspec.streams.model import StreamModel
from tests.conftest import tiny_config
from tests.jaxspec import cycles
from tests.jaxspec.streams.tables import logits, random_table, tinted

pytestmark = pytest.mark.usefixtures("quick_compiles")

TALK = StreamLayout((Stream("user", written=False), Stream("out"),
                     Stream("think")), silence=1)
LAYOUTS = {"counters": layouts.auditing(), "silence": TALK,
           "skipping": dataclasses.replace(TALK, keep_silence=False)}
WIDTH = 64


def recipe(layout, **changes):
  return teaching.Recipe(**dict(
      layout=layout, width=WIDTH, blocks=2, positions=40, steps=12, rate=1e-2,
      silence=0.5) | changes)


def written(layout, height, seed):
  tokens, live = random_table(layout, height, seed=seed)
  learnt = live & layout.writes[None]
  learnt[0] = False
  return Table(tokens, live, learnt)


def read(model, layout, blocks):
  x = jax.jit(teaching.read, static_argnums=1)(
      model, layout, teaching.lay_out(blocks, WIDTH))
  return np.asarray(model.backbone.unembed(x))


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_cells_are_rows(small, name):
  layout, model = LAYOUTS[name], tinted(small)
  tables = [written(layout, n, seed) for seed, n in enumerate((9, 6))]
  own = recipe(layout)
  cells = [teaching.flatten(t, own) for t in tables]
  packed = read(model, layout, [cells])[0]
  start = 0
  for table, some in zip(tables, cells):
    whole = logits(model, layout, table.tokens, table.live)
    here = packed[start:start + len(some["tokens"])]
    np.testing.assert_allclose(
        here, whole[some["rows"], some["streams"]], atol=1e-4)
    start += len(some["tokens"])
    # What is learnt is what comes next in the stream.
    wanted, learnt = conversion.targets(layout, table)
    assert some["learnt"].sum() == learnt.sum() > 0
    np.testing.assert_array_equal(
        some["wanted"], wanted[some["rows"], some["streams"]])
  if name == "skipping":
    # Silence is not computed where nothing is learnt from it.
    drawn = teaching.flatten(tables[0], own, np.random.default_rng(0))
    assert 0 < drawn["learnt"].sum() < cells[0]["learnt"].sum()
    assert len(drawn["tokens"]) < len(cells[0]["tokens"]) < 3 * 9


@pytest.mark.parametrize("name", LAYOUTS)
def test_tables_of_a_block_do_not_see_one_another(small, name):
  layout, model = LAYOUTS[name], tinted(small)
  own = recipe(layout)
  first, second, other = (teaching.flatten(written(layout, n, seed), own)
                          for seed, n in enumerate((6, 5, 5)))
  size = len(first["tokens"])
  # The same cells, but for their words.
  third = second | {"tokens": (second["tokens"] + 17) % 60 + 2}
  both, changed, alone, apart = (
      read(model, layout, [block])[0] for block in (
          [first, second], [first, third], [first, other], [first]))
  for another in (changed, alone, apart):
    np.testing.assert_array_equal(both[:size], another[:size])
  assert np.any(both[size:] != changed[size:])


def test_a_block_ends_with_a_whole_row():
  own = recipe(TALK, width=20)
  cells = teaching.flatten(written(TALK, 12, 0), own)
  assert len(cells["tokens"]) == 18 and cells["rows"].max() == 5
  with pytest.raises(InputError, match="no table"):
    teaching.Order([], own)


def test_every_block_is_read_once_in_a_round():
  tables = [written(TALK, n, n) for n in range(4, 15)]
  order = teaching.Order(tables, recipe(TALK))
  count = len(order.blocks)
  steps = -(-count // 2)

  def names(batches):
    return sorted(row.tobytes() for b in batches for row in np.asarray(b.tokens)
                  if row.any())
  whole = names(order.once())
  assert len(set(whole)) == count > 3
  assert set(names(map(order.batch, range(steps)))) == set(whole)
  assert set(names(map(order.batch, range(steps, 2 * steps)))) == set(whole)
  assert 0.6 < order.filled <= 1


# A run.


def echoes():
  """The answer is the question, two words behind; remarks are its double."""
  rng = np.random.default_rng(0)
  tables = []
  for _ in range(24):
    words = rng.integers(10, 30, 5).tolist()
    tables.append(conversion.side_by_side(
        TALK, {"user": words, "out": [*words, 2],
               "think": [*[w + 30 for w in words[:2]], 2]},
        {"out": Follow("user", 2), "think": Follow("out", 1)},
        begins=lambda token: True, ends={"out", "think"}))
  return tables


def run(folder, steps=12, rank=4, until=lambda: False, on_step=None):
  model = Transformer(tiny_config(depth=2), random_source(0))
  body = teaching.Whole(model)
  if rank:
    body = teaching.LowRank(model, Adapter.init(model, rank=rank))
  pupils = {teaching.MODEL: body,
            teaching.STREAMS: teaching.Tints.init(model, TALK)}
  return model, training.fit(
      model, pupils, echoes(), recipe(TALK, steps=steps), folder, every=4,
      course=teaching, until=until, on_step=on_step)


@pytest.mark.parametrize("rank", [
    pytest.param(4, marks=pytest.mark.slow), 0])
def test_what_is_taught_is_foretold(tmp_path, rank):
  model, taught = run(tmp_path, steps=60 if rank else 30, rank=rank)
  own, tables = recipe(TALK), echoes()
  tints = teaching.Tints.init(model, TALK)
  before = teaching.examine(StreamModel(model, tints.embedding), tables, own)
  after = teaching.examine(taught.model, tables, own)
  assert (taught.adapter is None) == (rank == 0)
  assert set(after) == {"out", "think"}
  for name in after:
    assert after[name]["loss"] < before[name]["loss"] - 1
    assert after[name]["silence_loss"] < before[name]["silence_loss"] - 1
    assert after[name]["words"] == {"out": 144, "think": 72}[name]
  assert np.any(np.asarray(taught.model.embedding) != 0)
  curve = training.read_curve(tmp_path)
  assert curve[-1]["heads"]["out"]["loss"] < curve[0]["heads"]["out"]["loss"]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(tmp_path):
  """Killed between checkpoints, then ended by the clock, then whole."""
  class Stop(Exception):
    pass

  def stop(step, marks):
    if step == 6:
      raise Stop
  with pytest.raises(Stop):
    run(tmp_path / "a", on_step=stop)
  steps = []
  run(tmp_path / "a", until=lambda: len(steps) == 3,
      on_step=lambda step, marks: steps.append(step))
  assert steps == [5, 6, 7]
  run(tmp_path / "a", on_step=lambda step, marks: steps.append(step))
  assert steps == list(range(5, 13))
  _, broken = run(tmp_path / "a")
  _, whole = run(tmp_path / "b")
  assert cycles.leaves_equal(broken.adapter.weights, whole.adapter.weights)
  np.testing.assert_array_equal(broken.model.embedding, whole.model.embedding)
  assert (training.read_curve(tmp_path / "a")
          == training.read_curve(tmp_path / "b"))
