# SPDX-License-Identifier: Apache-2.0
"""`tree_attention`'s TPU kernel against the definition, interpreted.

Held here: prefixes of less than a unit, of several units and blocks, and of
none; slots or sizes in lanes; pages in any order; heads and tokens split over
steps and cores; windows, caps, masks of several words; eight bits; no race, no
read of what no row holds, nothing from free slots and scratch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import Target, aim, tree_attention
from pallas_kernels.attention import tpu
from pallas_kernels.attention.cases import cases
from tests.pallas_kernels.attention.definition import (
    TREES,
    case,
    eight_bits,
    packed,
    paged,
    reference,
    streamed,
)
from tests.pallas_kernels.races import none_seen

pytestmark = pytest.mark.usefixtures("quick_compiles")

V5E = Target("tpu", "TPU v5 lite", interpret=True)
RACES = Target("tpu", "TPU v5 lite",
               interpret=pltpu.InterpretParams(detect_races=True))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of 32 slots of two padded float32 heads: several a prefix."""
  monkeypatch.setattr(tpu, "_BLOCK_BYTES", 32 << 10)


def attend(arrays, places, target=V5E, **options):
  return tpu.tree_attention(
      *map(jnp.asarray, arrays), **packed(places), target=target,
      **{"scale": 0.4, "window": None, "logits_soft_cap": None, "table": None,
         **options})


def check(arrays, places, poison=True, target=V5E, atol=2e-5, **options):
  wanted = reference(*arrays, **places, scale=0.4, **options)
  if poison:
    arrays = list(arrays)
    for n in (1, 2):
      free = (places["slot_positions"] < 0)[:, None, :, None]
      arrays[n] = np.where(free, np.nan, arrays[n])
  found = attend(arrays, places, target, **options)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, wanted, atol=atol)


def plan(arrays, places, target=V5E):
  return tpu._plan(arrays[0].shape, arrays[1].shape, arrays[1].dtype,
                   places["slot_positions"].shape[1], False, False, target)


@pytest.mark.medium
@pytest.mark.parametrize("slots, size, blocks, slots_minor, options", [
    (77, 128, 1, False, {}), (256, 128, 2, False, {}),
    (300, 16, 1, True, {}), (384, 16, 2, True, {}),
    (384, 16, 2, True, {"window": 70, "logits_soft_cap": 1.5})])
def test_prefixes(slots, size, blocks, slots_minor, options, monkeypatch):
  monkeypatch.setattr(tpu, "_COPY_BYTES", 1)
  arrays, places = case(slots, size=size)
  found = plan(arrays, places)
  assert (found.blocks, found.slots_minor) == (blocks, slots_minor)
  # Same program; rows that end within, at and behind blocks, or hold nothing;
  # slots that are held in any order.
  for lengths in (None, [0, 0, 0, 0], [slots, 0, 0, 1],
                  [0, slots // 3, slots // 2 + 1, 3]):
    check(*case(slots, lengths, size=size), **options)
    check(*case(slots, lengths, size=size, ring=True), **options)


@pytest.mark.medium
@pytest.mark.parametrize("target, rows, options", [
    (V5E, 2048, {}), (V5E, 24, {"window": 9}),
    (Target("tpu", "TPU v5", interpret=True), 24, {})])
def test_heads_and_tokens_are_split(target, rows, options, monkeypatch):
  """Over steps and cores; masks of two words, one for each row."""
  monkeypatch.setattr(tpu, "_ROWS", rows)
  arrays, places = case(256, heads=4, groups=4, tokens=37, nodes=40, start=2,
                        by_row=True, size=128)
  found = plan(arrays, places, target)
  assert (found.cores, found.heads, found.tokens) == (
      2 if target.kind == "TPU v5" else 1, *((4, 37) if rows > 24 else (1, 16)))
  check(arrays, places, target=target, **options)


@pytest.mark.medium
@pytest.mark.parametrize("tree", TREES)
def test_trees(tree):
  """Of SmolLM2's heads, with slots in lanes, and of Llama's."""
  for size in (64, 128):
    # (Scores are larger in large heads, and so is how they are rounded.)
    check(*case(256, tree=tree, size=size), atol=4e-5)


def test_more_nodes_than_lanes():
  """Some see themselves alone, and nothing before that."""
  arrays, places = case(20, [0, 9, 0, 20], tokens=10, nodes=150, start=140)
  check(arrays, places)
  places["mask"] = np.eye(150, dtype=bool)[140:]
  check(arrays, places)


@pytest.mark.parametrize("page, size", [(16, 128), (128, 16)])
def test_pages(page, size):
  """In any order. A page that no row holds is not even looked up."""
  slots = page * 6
  for lengths in ([0, slots // 2, slots - 1, slots], [1, 0, page, page - 1]):
    arrays, places = case(slots, lengths, size=size)
    wanted = reference(*arrays, **places, scale=0.4)
    arrays, table = paged(arrays, places, page, np.random.default_rng(page))
    held = np.arange(6)[None] * page < np.array(lengths)[:, None]
    table = jnp.asarray(np.where(held, table, 1 << 20))
    found = attend(arrays, places, table=table)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"window": 90}])
def test_streams_side_by_side(options, monkeypatch):
  """A token sees what comes before it, in the streams it may read."""
  monkeypatch.setattr(tpu, "_COPY_BYTES", 1)
  arrays, places = case(384, size=16)
  assert plan(arrays, places).blocks == 2
  check(arrays, streamed(places, 1), **options)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_eight_bits(dtype):
  arrays, places = case(256, size=128)
  stored, scales, meant = eight_bits(arrays, np.random.default_rng(1), dtype)
  # The scale of a free slot is left over too.
  free = jnp.asarray(places["slot_positions"] < 0)[:, None]
  scales = {n: jnp.where(free, jnp.nan, x) for n, x in scales.items()}
  np.testing.assert_allclose(
      attend(stored, places, **scales),
      reference(*meant, **places, scale=0.4), atol=2e-5)


def test_pages_of_eight_bits():
  arrays, places = case(96, size=128)
  stored, scales, meant = eight_bits(arrays, np.random.default_rng(1))
  scaled = (None, *(np.asarray(x)[..., None] for x in scales.values()), None,
            None)
  pools, table = paged(stored, places, 32, np.random.default_rng(2))
  scaled, _ = paged(scaled, places, 32, np.random.default_rng(2))
  scales = {n: jnp.asarray(x[..., 0]) for n, x in zip(scales, scaled[1:3])}
  assert jnp.isnan(scales["value_scale"]).any()
  np.testing.assert_allclose(
      attend(pools, places, table=jnp.asarray(table), **scales),
      reference(*meant, **places, scale=0.4), atol=2e-5)


def test_half_precision():
  arrays, places = case(256, size=128)
  half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
  found = attend(half, places)
  assert found.dtype == jnp.bfloat16
  wanted = reference(*(np.asarray(x, np.float32) for x in half), **places,
                     scale=0.4)
  np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=2e-2)


@pytest.mark.parametrize("page", [None, 16])
def test_no_race_and_no_read_out_of_bounds(page, monkeypatch):
  """As on a TPU: copies land when awaited, scratch begins as NaN."""
  monkeypatch.setattr(tpu, "_COPY_BYTES", 1)
  slots = 96 if page else 256
  arrays, places = case(slots, [0, slots, 1, slots - 20], size=128)
  wanted = reference(*arrays, **places, scale=0.4)
  table = None
  if page:
    arrays, table = paged(arrays, places, page, np.random.default_rng(0))
    table = jnp.asarray(np.where(
        np.arange(slots // page)[None] * page <
        np.array([0, slots, 1, slots - 20])[:, None], table, 1 << 20))
  found = attend(arrays, places, RACES, table=table)
  np.testing.assert_allclose(found, wanted, atol=2e-5)
  none_seen("tpu")


def test_any_lengths():
  """Of one program: what rows hold, and how far back they see."""
  @settings(max_examples=12, deadline=None, derandomize=True)
  @given(st.lists(st.integers(0, 256), min_size=4, max_size=4),
         st.booleans(), st.integers(0, 100))
  def run(lengths, ring, seed):
    arrays, places = case(256, lengths, ring=ring, seed=seed, size=128)
    check(arrays, places)
    check(arrays, places, window=60)
  run()


def small(**changes):
  arrays, places = case(20)
  arrays = list(map(jnp.asarray, arrays))
  for at, x in changes.items():
    arrays[int(at[1:])] = x(arrays[int(at[1:])])
  return arrays, places


def half(x):
  return x.astype(jnp.bfloat16)


@pytest.mark.parametrize("arrays, message", [
    (case(0), "no slots"),
    (case(1100, size=16), "1100 slots of float32.*multiple of 128"),
    (case(20, size=12), "head size 12"),
    (small(_3=half), "fresh keys of bfloat16"),
    (small(_2=half), "keys of float32 with values of bfloat16"),
    (small(_1=lambda x: x.astype(jnp.float16),
           _2=lambda x: x.astype(jnp.float16),
           _3=lambda x: x.astype(jnp.float16),
           _4=lambda x: x.astype(jnp.float16)), "float16"),
])
def test_what_is_refused(arrays, message):
  with pytest.raises(NotImplementedError, match=message):
    attend(*arrays)


def test_the_public_function_takes_it_for_a_tpu(monkeypatch):
  asked = []
  monkeypatch.setattr(tpu, "_attend", lambda *args, plan, **_: asked.append(
      plan) or args[0])
  arrays, places = case(256, size=128)
  with aim(V5E):
    tree_attention(*map(jnp.asarray, arrays), **packed(places), scale=0.4)
  assert len(asked) == 1


def test_cases_lower_for_a_tpu_and_move_little(monkeypatch):
  monkeypatch.undo()
  device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1,
                          platform="tpu")
  found = list(cases())
  assert len({c.name for c in found}) == len(found) > 20
  for c in found:
    assert 1 <= c.moved_bytes / c.least_bytes < 1.1, c.name
  with (jax.sharding.use_abstract_mesh(
      AbstractMesh((1,), ("x",), abstract_device=device)), aim(
          Target("tpu", "TPU v5 lite"))):
    for c in (found[1], found[-2]):
      lowered = export.export(
          jax.jit(functools.partial(c.call, implementation="tpu")),
          platforms=["tpu"])(*c.arguments)
      assert "tpu_custom_call" in lowered.mlir_module()
