# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels, simulated: equal to their meaning, without races."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import QArray, Target, blocks, quantized
from pallas_kernels.matmul import gpu, xla
from tests.pallas_kernels.copies import copies
from tests.pallas_kernels.matmul.weights import normal, weight
from tests.pallas_kernels.races import none_seen

try:
  InterpretGPUParams = plgpu.InterpretGPUParams
except AttributeError:           # jax 0.10
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

pytestmark = pytest.mark.usefixtures("quick_compiles")

H100 = Target("gpu", "NVIDIA H100 80GB HBM3")
SIMULATED = Target("gpu", H100.kind,
                   interpret=InterpretGPUParams(detect_races=True))
BF16 = jnp.bfloat16
MLP = dict(eps=1e-5, activation="silu")


def streamed(target=SIMULATED):
  return jax.jit(functools.partial(gpu.streamed_matmul, target=target))


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_product(kind):
  x = normal(3, 192, dtype=BF16).at[1].set(jnp.nan)
  stack = weight(kind, 2, 256, 192, dtype=BF16)
  live = jnp.array([True, False, True])
  y = streamed()(x, stack, jnp.int32(1), live)
  none_seen("gpu")
  np.testing.assert_allclose(
      y, xla.streamed_matmul(x, stack, jnp.int32(1), live), atol=1e-5)
  assert np.abs(y).max() > 1


def test_nothing_is_read_when_all_rows_have_left():
  """No copy starts but behind the question whether a row is live."""
  live, layer = jnp.zeros(2, bool), jnp.int32(0)
  x = normal(2, 128, dtype=BF16)
  stack = jnp.full((1, 128, 128), jnp.nan, BF16)
  y = streamed()(x, stack, layer, live)
  np.testing.assert_array_equal(y, np.zeros((2, 128)))
  mlp = functools.partial(gpu.fused_mlp, target=H100, **MLP)
  for f, arguments, kernels in (
      (streamed(H100), (x, stack, layer, live), 1),
      (mlp, (x, normal(1, 128), stack, stack, stack, layer, live), 2)):
    found = [kernel for call in _calls(jax.make_jaxpr(f)(*arguments).jaxpr)
             for kernel in call.params["jaxprs"]]
    assert len(found) == kernels
    for kernel in found:
      assert not copies(kernel, "copy_gmem_to_smem", outside=True)
      assert copies(kernel, "copy_gmem_to_smem", outside=False)


def _calls(jaxpr):
  """Calls of kernels."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "mpmd_map":
      yield eqn
    else:
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        yield from _calls(inner)


def test_blocks_that_a_table_has():
  """Each place of three is used again, by half of the outputs of a tile."""
  x, stack = normal(2, 320, dtype=BF16), weight("plain", 1, 128, 320,
                                                dtype=BF16)
  key = "streamed_matmul", "1,128,320,bfloat16"

  def y(sizes, target=SIMULATED):
    with blocks.trial(((key, sizes),)):
      return streamed(target)(x, stack, jnp.int32(0), None)

  half = y((64, 3))
  none_seen("gpu")
  np.testing.assert_allclose(half, xla.streamed_matmul(
      x, stack, jnp.int32(0), None), atol=1e-5)
  for sizes in ((96, 1), (256, 1), (128, 6), (32, 1)):
    with pytest.raises(NotImplementedError, match="tune again, or use"):
      y(sizes)
  with blocks.trial(((key, (64, 3)),)):
    found, = _calls(jax.make_jaxpr(streamed(H100))(
        x, stack, jnp.int32(0), None).jaxpr)
  assert found.params["meshes"][0].grid == (2,)


def test_mlp():
  x, norm = normal(2, 128, dtype=BF16), 1 + 0.1 * normal(2, 128, seed=2)
  arguments = (x, norm, *(weight("plain", 2, 128, 128, seed=seed, dtype=BF16)
                          for seed in (3, 4, 5)), jnp.int32(1), None)
  y = jax.jit(functools.partial(gpu.fused_mlp, target=SIMULATED, **MLP))(
      *arguments)
  none_seen("gpu")
  # A hidden value may be rounded the other way.
  np.testing.assert_allclose(y, xla.fused_mlp(*arguments, **MLP), atol=1e-2)


@pytest.mark.parametrize("kind,rows,width,mlp", [
    ("plain", 1, 4096, 14336), ("plain", 64, 576, 1536),
    ("int8", 8, 4096, 14336)])
def test_lowers_for_h100(kind, rows, width, mlp):
  shape = jax.ShapeDtypeStruct

  def f(x, values, scale, layer, live):
    stack = values if kind == "plain" else QArray(values, scale)
    return gpu.streamed_matmul(x, stack, layer, live, target=H100)

  lowered = export.export(
      jax.jit(f), platforms=["cuda"],
      disabled_checks=[
          export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")])(
              shape((rows, width), BF16),
              shape((4, mlp, width), BF16 if kind == "plain" else jnp.int8),
              shape((4, mlp), jnp.float32), shape((), jnp.int32),
              shape((rows,), jnp.bool_))
  assert "mosaic_gpu_v2" in lowered.mlir_module()


def test_refusals_say_what_else_to_do():
  x, stack = normal(2, 64, dtype=BF16), normal(1, 128, 64, dtype=BF16)
  refused = [
      (normal(65, 64, dtype=BF16), stack, "up to 64 rows"),
      (x, quantized.quantize_groups(stack, 32), "only QArrays"),
      (x.astype(jnp.float32), stack, "bfloat16"),
      (x, stack[:, :100], "outputs by the 128"),
  ]
  for rows, weights, reason in refused:
    with pytest.raises(NotImplementedError, match=reason) as error:
      gpu.streamed_matmul(rows, weights, jnp.int32(0), None, target=H100)
    assert "implementation='xla'" in str(error.value)
