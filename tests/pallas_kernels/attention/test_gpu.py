# SPDX-License-Identifier: Apache-2.0
"""`tree_attention`'s GPU kernel against the definition, interpreted.

Held here: rows of every length over several blocks and shares of them, pages,
windows and caps, more than one tile of rows, what free slots hold, races.
"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import Target, aim, blocks, compiling, tree_attention
from pallas_kernels.attention import gpu
from pallas_kernels.attention.cases import cases
from pallas_kernels.case import Case
from tests.pallas_kernels.attention.definition import (
    case,
    packed,
    paged,
    reference,
)
from tests.pallas_kernels.races import none_seen

H100 = Target("gpu", "NVIDIA H100 80GB HBM3",
              interpret=InterpretGPUParams(detect_races=True))


@pytest.fixture(autouse=True)
def transposed_operands(monkeypatch):
  """The interpreter's `wgmma` does not know `transpose_ref`; here it does."""
  whether = threading.local()
  product = gpu_callbacks.wgmma

  def wgmma(*, b_transforms, **arguments):
    kept = tuple(x for x in b_transforms if hasattr(x, "indices")
                 or isinstance(x, gpu_callbacks.NOOP_TRANSFORMS))
    whether.so = len(kept) < len(b_transforms)
    return product(b_transforms=kept, **arguments)

  class Numpy:
    def __getattr__(self, name):
      return getattr(np, name)

    def matmul(self, a, b, **options):
      return np.matmul(a, b.T if whether.so else b, **options)

  monkeypatch.setattr(gpu_callbacks, "wgmma", wgmma)
  monkeypatch.setattr(gpu_callbacks, "np", Numpy())


def check(arrays, places, page=None, **options):
  half = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in arrays]
  wanted = reference(*half, **places, scale=0.4, **options)
  free = (places["slot_positions"] < 0)[:, None, :, None]
  for n in (1, 2):
    half[n] = np.where(free, np.nan, half[n])
  table = None
  if page:
    half, table = paged(half, places, page, np.random.default_rng(0))
    table = jnp.asarray(table)
  found = gpu.tree_attention(
      *(jnp.asarray(x, jnp.bfloat16) for x in half), **packed(dict(places)),
      target=H100, **{"scale": 0.4, "window": None, "logits_soft_cap": None,
                      "table": table, **options})
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=3e-2)
  none_seen("gpu")


@pytest.mark.medium
@pytest.mark.parametrize("options", [
    {}, {"window": 70, "logits_soft_cap": 3.0}])
def test_contiguous(options):
  """Five blocks of slots in two shares."""
  check(*case(512, [0, 512, 70, 300], size=64, ring=bool(options)), **options)


def test_pages():
  check(*case(256, [0, 256, 64, 130], size=64), page=128)


def test_two_tiles_of_rows():
  check(*case(64, [0, 64, 1, 63], size=64, tokens=40, nodes=40, start=0))


@pytest.mark.medium
@pytest.mark.parametrize("tree, size", [
    ("root", 64), ("chain of 8", 128), ("tree of 63", 64)])
def test_trees(tree, size):
  check(*case(64, tree=tree, size=size))


@pytest.mark.medium
@pytest.mark.parametrize("size, options", [
    (128, {}), (256, {"window": 70, "logits_soft_cap": 3.0})])
def test_larger_heads(size, options):
  """Of which those of 256 are summed in two parts."""
  check(*case(192, [0, 192, 70, 130], size=size), **options)


def chosen(arrays, places, sizes):
  """Within, these are the blocks of a call."""
  with blocks.watch() as asked:
    jax.eval_shape(lambda: gpu.tree_attention(
        *(jnp.asarray(x, jnp.bfloat16) for x in arrays),
        **packed(dict(places)), target=H100, scale=0.4, window=None,
        logits_soft_cap=None, table=None))
  (key,) = asked
  return blocks.trial(((key, sizes),))


@pytest.mark.medium
def test_blocks_that_a_table_has():
  """More of them than are on their way, so that their places are used again."""
  arrays, places = case(256, [0, 256, 70, 200], size=64)
  with chosen(arrays, places, (2, 1)):
    check(arrays, places)


def test_a_table_changes_what_is_lowered(monkeypatch, tmp_path):
  (one,) = (c for c in cases() if c.name == "llama3-8b, decode of 4096")
  file = tmp_path / "blocks.json"
  monkeypatch.setenv(blocks.VARIABLE, str(file))

  def lowered():
    device = AbstractDevice(compiling.GPU.kind, 132, "gpu")
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((), (), abstract_device=device)), aim(compiling.GPU):
      return jax.jit(functools.partial(one.call, implementation="gpu")).trace(
          *one.arguments).lower(lowering_platforms=("cuda",)).as_text()

  for splits in (2, 5):
    blocks.save(file, {compiling.GPU.kind: {"tree_attention": {
        "8,1,32,8,128,5120": (3, splits)}}})
    jax.clear_caches()                 # a table is read when it is traced
    assert f"tensor<{splits}x8x8x64x128xf32>" in lowered()
  blocks.save(file, {compiling.GPU.kind: {"tree_attention": {
      "8,1,32,8,128,5120": (16, 2)}}})
  jax.clear_caches()
  with pytest.raises(NotImplementedError, match="16 blocks of heads of 128 on "
                     "their way take 57. KiB of shared memory; use 'xla'"):
    lowered()


@pytest.mark.parametrize("slots, size, dtype, options, message", [
    (64, 64, jnp.float32, {}, "key is float32"),
    (64, 32, jnp.bfloat16, {}, "head size 32"),
    (100, 64, jnp.bfloat16, {}, "100 slots: they must be a multiple of 64"),
    (64, 64, jnp.bfloat16, {"key_scale": jnp.ones((4, 2, 64)),
                            "value_scale": jnp.ones((4, 2, 64))}, "scales"),
])
def test_what_is_refused(slots, size, dtype, options, message):
  arrays, places = case(slots, size=size)
  with pytest.raises(NotImplementedError, match=message):
    gpu.tree_attention(
        *(jnp.asarray(x, dtype) for x in arrays), **packed(places),
        target=H100, scale=0.4, window=None, logits_soft_cap=None, table=None,
        **options)


@pytest.mark.medium
@pytest.mark.parametrize("size", [64, 128, 256])
def test_every_head_size_that_is_taken_lowers_for_an_h100(size):
  """What is too much for its shared memory is told of when it is lowered."""
  arrays, places = case(64, size=size)
  shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays]

  def call(*arrays, implementation):
    return tree_attention(*arrays, **packed(dict(places)), scale=0.4,
                          window=40, logits_soft_cap=3.0,
                          implementation=implementation)

  outcome = compiling.lower_gpu(Case("tree_attention", "", call, tuple(shapes),
                                     1, 1, 1, sample=None))
  assert outcome.status == "lowers", outcome.reason


def test_cases_lower_for_an_h100():
  device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
  ours = {c.name: c for c in cases()}
  checks = [export.DisabledSafetyCheck.custom_call(name)
            for name in ("mosaic_gpu", "mosaic_gpu_v2")]
  with jax.sharding.use_abstract_mesh(
      AbstractMesh((), (), abstract_device=device)), aim(Target("gpu")):
    for name in ("llama3-8b, verify 8, pages of 4096",
                 "smollm2-135m, verify 8, window 1024 of 4096"):
      lowered = export.export(
          jax.jit(lambda *args, c=ours[name]: c.call(
              *args, implementation="gpu")),
          platforms=["cuda"], disabled_checks=checks)(*ours[name].arguments)
      assert "mosaic_gpu" in lowered.mlir_module()
