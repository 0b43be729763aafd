# SPDX-License-Identifier: Apache-2.0
"""`tree_attention` against its definition, in float64 and one head at a time.

Held here: prefixes shorter, as long as and longer than the blocks a CPU reads,
and no multiple of them; rows of every length; slots in any order; pages in any
order; windows, soft caps, masks by row, grouped heads, half precision; what a
slot without a position holds never matters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import tree_attention
from pallas_kernels.attention import op, xla
from pallas_kernels.attention.xla import BLOCK
from tests.pallas_kernels.attention.definition import (
    case,
    eight_bits,
    packed,
    paged,
    reference,
    streamed,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")


def attend(arrays, places, **options):
  return tree_attention(*map(jnp.asarray, arrays), **packed(places),
                        **{"scale": 0.4, **options})


def check(arrays, places, **options):
  options.setdefault("scale", 0.4)
  found = attend(arrays, places, **options)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(
      found, reference(*arrays, **places, **options), atol=2e-5)
  return np.asarray(found)


@pytest.mark.parametrize("slots", [
    0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 37, 2 * BLOCK,
    2 * BLOCK + 60])
def test_lengths_of_the_prefix(slots):
  check(*case(slots))
  if slots > BLOCK:
    # Same program; rows that end within, at and behind every block.
    for lengths in ([0, 0, 0, 0], [0, 0, 1, 0], [BLOCK - 1, 0, 2, BLOCK],
                    [slots, BLOCK + 1, BLOCK, 3]):
      check(*case(slots, lengths))


@pytest.mark.parametrize("window", [1, 2, 9, BLOCK, 400])
def test_windows(window):
  whole = check(*case(200, [0, 3, 150, 200]))
  found = check(*case(200, [0, 3, 150, 200]), window=window)
  assert (np.abs(found - whole).max() < 1e-6) == (window > 200)


@pytest.mark.parametrize("slots", [20, 200])
@pytest.mark.parametrize("options", [
    {}, {"window": 11}, {"logits_soft_cap": 1.5},
    {"window": 11, "logits_soft_cap": 1.5}])
def test_slots_in_any_order(slots, options):
  check(*case(slots, [0, 7, slots - 3, slots], ring=True), **options)


def test_the_soft_cap_and_the_scale_matter():
  plain = check(*case(20))
  for options in ({"logits_soft_cap": 1.5}, {"scale": 0.1}):
    assert np.abs(check(*case(20), **options) - plain).max() > 0.01


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (8, 1), (1, 1)])
@pytest.mark.parametrize("slots", [20, 200])
def test_grouped_heads(heads, groups, slots):
  check(*case(slots, heads=heads, groups=groups))


@pytest.mark.parametrize("slots", [20, 200])
def test_masks_by_row(slots):
  arrays, places = case(slots, by_row=True)
  found = check(arrays, places)
  # A row's own mask, not another's.
  places["mask"] = np.roll(places["mask"], 1, axis=0)
  assert np.abs(check(arrays, places) - found).max() > 0.01


@pytest.mark.parametrize("start", [0, 2])
def test_tokens_stand_anywhere_among_the_nodes(start):
  check(*case(20, start=start), window=4)


def test_rows_do_not_feel_their_neighbours():
  """How far the longest row goes does not change the others."""
  arrays, places = case(300, [40, 40, 40, 300])
  found = np.asarray(attend(arrays, places))
  held = places["slot_positions"].copy()
  held[3] = -1
  alone = attend(arrays, {**places, "slot_positions": held})
  np.testing.assert_allclose(alone[:3], found[:3], atol=1e-6)
  assert np.abs(alone[3] - found[3]).max() > 0.01


@pytest.mark.parametrize("slots", [20, 200])
def test_half_precision(slots):
  """Scores and sums are float32: the error is that of the inputs."""
  arrays, places = case(slots)
  half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
  found = attend(half, places)
  assert found.dtype == jnp.bfloat16
  wanted = reference(*(np.asarray(x, np.float32) for x in half), **places,
                     scale=0.4)
  np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=1.2e-2)
  # A float32 query of half-precision keys comes back in float32.
  query = attend([arrays[0], *half[1:]], places)
  assert query.dtype == jnp.float32
  np.testing.assert_allclose(query, wanted, atol=5e-3)


@pytest.mark.parametrize("page, pages", [(4, 3), (16, 20), (64, 3), (200, 2)])
@pytest.mark.parametrize("backend", ["cpu", "other"])
def test_pages(page, pages, backend, monkeypatch):
  """In blocks of pages, as on a CPU, and at once, as elsewhere."""
  slots = page * pages
  function = tree_attention
  if backend == "other":
    monkeypatch.setattr(
        lax, "platform_dependent",
        lambda *args, cpu, default: default(*args))
    function = functools.partial(xla.tree_attention.__wrapped__, window=None,
                                 logits_soft_cap=None)
  function = jax.jit(functools.partial(function, scale=0.4))
  for lengths in ([0, slots // 2, slots - 1, slots], [1, 0, page, page - 1]):
    arrays, places = case(slots, lengths)
    wanted = reference(*arrays, **places, scale=0.4)
    arrays, table = paged(arrays, places, page, np.random.default_rng(page))
    np.testing.assert_allclose(function(*arrays, **packed(places), table=table),
                               wanted, atol=2e-5)


def test_other_backends_read_a_long_prefix_at_once(monkeypatch):
  monkeypatch.setattr(lax, "platform_dependent",
                      lambda *args, cpu, default: default(*args))
  arrays, places = case(300)
  found = jax.jit(functools.partial(
      xla.tree_attention.__wrapped__, scale=0.4, window=50, table=None,
      logits_soft_cap=None))(*arrays, **packed(places))
  np.testing.assert_allclose(
      found, reference(*arrays, **places, scale=0.4, window=50), atol=2e-5)


@pytest.mark.parametrize("slots", [20, 200])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_eight_bits(slots, dtype):
  arrays, places = case(slots)
  stored, scales, meant = eight_bits(arrays, np.random.default_rng(1), dtype)
  wanted = reference(*meant, **places, scale=0.4)
  found = attend(stored, places, **scales)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, wanted, atol=2e-5)
  # In half precision, as in a model, the error is that of the inputs.
  half = [x.astype(jnp.bfloat16) if x.dtype == np.float32 else x
          for x in stored]
  found = attend(half, places, **scales)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.05)


def test_pages_of_eight_bits():
  """Nor does a free slot's scale leak."""
  arrays, places = case(64)
  stored, scales, meant = eight_bits(arrays, np.random.default_rng(1))
  wanted = reference(*meant, **places, scale=0.4)
  pools, table = paged(stored, places, 16, np.random.default_rng(2))
  scaled, _ = paged(
      (None, *(x[..., None] for x in scales.values()), None, None), places,
      16, np.random.default_rng(2))
  scales = {n: jnp.asarray(x[..., 0]) for n, x in zip(scales, scaled[1:3])}
  assert jnp.isnan(scales["value_scale"]).any()
  np.testing.assert_allclose(
      attend(pools, places, table=jnp.asarray(table), **scales), wanted,
      atol=2e-5)


def test_scales_come_in_pairs():
  arrays, places = case(20)
  stored, scales, _ = eight_bits(arrays, np.random.default_rng(1))
  del scales["value_scale"]
  with pytest.raises(ValueError, match="key_scale and value_scale go together"):
    attend(stored, places, **scales)


@pytest.mark.parametrize("slots, page", [(20, None), (200, None), (192, 16)])
def test_streams_side_by_side(slots, page):
  """A token sees what comes before it, in the streams it may read."""
  arrays, places = case(slots)
  places = streamed(places, slots)
  wanted = reference(*arrays, **places, scale=0.4, window=90)
  if page:
    arrays, places["table"] = paged(arrays, places, page,
                                    np.random.default_rng(slots))
  np.testing.assert_allclose(attend(arrays, places, window=90), wanted,
                             atol=2e-5)


def test_a_kernel_of_one_stream_says_so(monkeypatch):
  monkeypatch.setitem(op._IMPLEMENTATIONS, "other", xla.tree_attention)
  arrays, places = case(20)
  rows, tokens = arrays[0].shape[:2]
  attend(arrays, places, implementation="other")
  places |= dict(slot_streams=np.zeros((rows, 20), np.int32),
                 readable=np.ones(tokens, np.uint32))
  with pytest.raises(NotImplementedError, match="one stream"):
    attend(arrays, places, implementation="other")
  np.testing.assert_array_equal(
      attend(arrays, places, implementation=("other", "xla")),
      attend(arrays, places))


@pytest.mark.parametrize("slots", [8, 4 * BLOCK + 24])
@pytest.mark.parametrize("options", [
    {}, {"window": 11, "logits_soft_cap": 1.5}], ids=["plain", "warped"])
def test_slots_that_are_split_over_devices(slots, options):
  """Also where a device holds nothing that a row sees."""
  arrays, places = case(slots, [0, 1, slots // 2, slots])
  arrays, places = tuple(map(jnp.asarray, arrays)), packed(places)
  mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
  split = {name: P(None, "d") if name == "slot_positions" else P()
           for name in places}

  @functools.partial(
      jax.shard_map, mesh=mesh, out_specs=P(), check_vma=False,
      in_specs=(P(), P(None, None, "d"), P(None, None, "d"), P(), P(), split))
  def part(query, key, value, fresh_key, fresh_value, places):
    return tree_attention(query, key, value, fresh_key, fresh_value, scale=0.4,
                          across="d", **places, **options)

  np.testing.assert_allclose(
      jax.jit(part)(*arrays, places),
      tree_attention(*arrays, **places, scale=0.4, **options), atol=2e-6)


def test_a_kernel_of_whole_rows_says_so():
  arrays, places = case(8)
  with pytest.raises(NotImplementedError, match="over devices; use 'xla'"):
    attend(arrays, places, across="d", implementation="tpu")
