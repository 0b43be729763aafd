# SPDX-License-Identifier: Apache-2.0
"""`commit_kv` for TPUs: interpreted, with races looked for, and lowered.

Held here: windows written in part and whole, shared by several nodes and left
and met again; rows that keep nothing; pages; slots along lanes; rounding.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import export, lax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import (
  Target,
  aim,
  commit_kv,
  compiling,
  tree_attention,
)
from pallas_kernels.writeback import tpu
from pallas_kernels.writeback.cases import cases
from tests.pallas_kernels.races import none_seen
from tests.pallas_kernels.writeback.places import KINDS, call, meaning, same

pytestmark = pytest.mark.usefixtures("quick_compiles")

RACES = pltpu.InterpretParams(detect_races=True)


def run(arguments, paged=False, interpret=RACES):
  *arguments, scales = arguments
  with aim(Target("tpu", "TPU v5 lite", interpret=interpret)):
    return jax.jit(lambda *args: commit_kv(
        *args, paged=paged, implementation="tpu", scales=scales))(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_is_its_meaning(kind):
  settings = KINDS[kind]
  arguments = call(**settings)
  paged = "pages" in settings
  same(run(arguments, paged), meaning(*arguments, paged=paged))
  none_seen("tpu")


def test_by_the_other_interpreter():
  arguments = call("bfloat16", rows=2, kept=[2, 5], start=[4, 7])
  same(run(arguments, interpret=True), meaning(*arguments))


def test_a_ring_that_comes_back_to_a_window():
  buffers, fresh, path, _, _ = call(
      "bfloat16", rows=1, nodes=20, longest=20, kept=[20], start=[0])
  slots = (jnp.arange(20, dtype=jnp.int32)[None] + 13) % 32
  arguments = (buffers, fresh, path, slots, None)
  same(run(arguments), meaning(*arguments))
  none_seen("tpu")


def test_windows_share_scales_and_come_back_to_them():
  buffers, fresh, path, _, scales = call(
      "int8", room=256, rows=1, nodes=7, longest=7, kept=[7], start=[0])
  slots = jnp.array([[126, 127, 128, 129, 4, 5, 130]], jnp.int32)
  arguments = (buffers, fresh, path, slots, scales)
  same(run(arguments), meaning(*arguments))
  none_seen("tpu")
  # Three windows, of which the last has the scales of the first.
  held = 3 * 128 * (2 * 7 + 2 * 4 * 3) + 3 * 128 * 4 * 2 * 3
  assert held == tpu.moved_bytes([[126, 127, 128, 129, 4, 5, 130]],
                                 (1, 3, 256, 128), 1, 1, 2, 7,
                                 target=Target("tpu")) - 12 * 7


def test_nothing_is_kept():
  arguments = call("bfloat16", kept=[0, 0, 0])
  same(run(arguments), (arguments[0], None))


@pytest.mark.parametrize("changes, reason", [
    (dict(dtype="bfloat16", room=33), "share a word"),
    (dict(dtype="bfloat16", room=32, size=64), "along lanes"),
    (dict(dtype="int8", room=32), "scales lie along lanes"),
    (dict(dtype="float16"), "got float16")])
def test_refuses(changes, reason):
  buffers, fresh, path, slots, scales = call(**changes)
  with pytest.raises(NotImplementedError, match=reason):
    commit_kv(buffers, fresh, path, slots, scales=scales,
              implementation="tpu")
  with aim(Target("tpu", "TPU v5 lite")):        # and falls through
    commit_kv(buffers, fresh, path, slots, scales=scales)


def test_lowers_for_a_tpu():
  arguments = call("bfloat16")[:4]
  with aim(Target("tpu", "TPU v5 lite")):
    lowered = export.export(jax.jit(lambda *args: commit_kv(*args)),
                            platforms=["tpu"])(*arguments)
  assert "tpu_custom_call" in lowered.mlir_module()


def test_counts_what_it_moves():
  """Of bfloat16 two slots share a window, which is read unless it is new."""
  shape = (1, 8, 64, 128)
  def moved(slots):
    return tpu.moved_bytes([slots], shape, 1, 2, 2, len(slots),
                           target=Target("tpu")) - 12 * len(slots)
  token = 8 * 128 * 2
  assert moved([2, 3]) == token * (2 + 2)
  assert moved([3, 4]) == token * (2 + 4 + 4)
  assert moved([64]) == 0
  for case in cases():
    assert case.least_bytes <= case.moved_bytes
  prompt = {case.name: case for case in cases()}["llama3-8b, prompt of 512"]
  assert prompt.moved_bytes <= 1.1 * prompt.least_bytes


@pytest.fixture(scope="module")
def chip(tpu_compiler):
  """A mesh of one v5e that is not there."""
  return Mesh(topologies.get_topology_desc(
      platform="tpu", topology_name="v5e:2x2").devices[:1], ("x",))


def shapes(mesh, rows, heads, room, size):
  """Of a commit: buffers, fresh nodes, path, slots."""
  def shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(
        sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

  return ((shape(jnp.bfloat16, rows, heads, room, size),) * 4,
          (shape(jnp.bfloat16, rows, 8, heads, size),) * 4,
          *[shape(jnp.int32, rows, 5)] * 2)


@pytest.mark.parametrize("room, size, heads", [(4096, 128, 8), (2048, 64, 3)])
def test_no_cache_is_copied(room, size, heads, chip):
  """All of it comes back where it was, compiled for a v5e."""
  # More than the chip holds at once, so that a copy would be in memory.
  arguments = shapes(chip, 32, heads, room, size)
  with aim(Target("tpu", "TPU v5 lite")), jax.set_mesh(chip):
    compiled = jax.jit(lambda *args: commit_kv(*args)[0], donate_argnums=0
                       ).lower(*arguments).compile()
  text, memory = compiled.as_text(), compiled.memory_analysis()
  whole = 4 * 32 * heads * room * size * 2
  assert compiling.called(text)
  assert memory.alias_size_in_bytes == whole
  assert memory.temp_size_in_bytes < 0.01 * whole
  assert not compiling.copied(text, (32, heads, room, size))


@pytest.mark.parametrize("size, heads", [(128, 8), (64, 3)])
def test_no_cache_is_brought_into_the_chip(size, heads, chip):
  """In a loop that attends and commits, where it would fit in."""
  rows, room = 2, 1024
  buffers, fresh, path, _ = shapes(chip, rows, heads, room, size)

  def step(n, state):
    buffers, fresh = state
    index = jnp.broadcast_to(n, (rows, 1))
    held = jnp.broadcast_to(jnp.arange(room)[None], (rows, room))
    attended = [tree_attention(
        fresh[at][:, :1], *buffers[at:at + 2], fresh[at][:, :1],
        fresh[at + 1][:, :1], slot_positions=jnp.where(held < n, held, -1),
        positions=index, fresh_positions=index,
        seen=jnp.ones((1, 1), jnp.uint32), scale=0.1) for at in (0, 2)]
    fresh = tuple(x + attended[at // 2] for at, x in enumerate(fresh))
    committed, _ = commit_kv(buffers, fresh, jnp.broadcast_to(
        jnp.arange(5)[None], path.shape), index + jnp.arange(5)[None])
    return committed, fresh

  with aim(Target("tpu", "TPU v5 lite")), jax.set_mesh(chip):
    text = jax.jit(lambda *args: lax.fori_loop(0, 9, step, args),
                   donate_argnums=0).lower(buffers, fresh).compile().as_text()
  assert len(compiling.called(text)) == 3
  assert not compiling.copied(text, (rows, heads, room, size))
