# SPDX-License-Identifier: Apache-2.0
"""The GPU kernel says what the reference says; its blocks do not race."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import Target, aim, proposal_head
from tests.pallas_kernels.head.made import asked, made

pytestmark = pytest.mark.usefixtures("quick_compiles")


def interpreter():
  if hasattr(plgpu, "InterpretGPUParams"):
    return plgpu.InterpretGPUParams(detect_races=True)
  # jax 0.10 has it, but not in public.
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
  return InterpretGPUParams(detect_races=True)


@pytest.mark.medium
@pytest.mark.parametrize("rows, width, vocab, count, cap, wanted", [
    (3, 128, 304, 1, None, {}),
    (9, 64, 408, 3, 5.0, dict(drawn=True, trimmed=True))])
def test_as_the_reference(rows, width, vocab, count, cap, wanted, capfd):
  """Vocabularies whose last tile reaches back into the one before it."""
  arguments = made(0, rows, width, vocab, jnp.bfloat16)
  wanted = asked(1, rows, vocab, **wanted)

  def say():
    return proposal_head(*arguments, eps=1e-5, count=count,
                         logits_soft_cap=cap, **wanted)

  with aim(Target("gpu", "NVIDIA H100 80GB HBM3", implementation="gpu",
                  interpret=interpreter())):
    found = say()
  expected = say()
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  for a, b in zip(jax.tree.leaves(found)[1:], jax.tree.leaves(expected)[1:]):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-5)
  assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("wanted", [{}, dict(drawn=True, trimmed=True)])
def test_lowers_for_a_gpu(wanted):
  arguments = made(0, 8, 576, 1000, jnp.bfloat16)
  run = functools.partial(proposal_head, eps=1e-5, count=4,
                          **asked(1, 8, 1000, **wanted))
  hopper = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
  with jax.sharding.use_abstract_mesh(
      AbstractMesh((), (), abstract_device=hopper)), aim(
          Target("gpu", "NVIDIA H100 80GB HBM3", implementation="gpu")):
    exported = export.export(
        jax.jit(run), platforms=["cuda"], disabled_checks=[
            export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")])(
                *arguments)
  assert "mosaic_gpu" in exported.mlir_module()


@pytest.mark.parametrize("changes, reason", [
    (dict(dtype=jnp.float32), "x must be bfloat16"),
    (dict(width=96), "the width must be a multiple of 64, got 96"),
    (dict(vocab=1001), "a multiple of 8 from 128 to 16777216, got 1001"),
    (dict(vocab=64), "a multiple of 8 from 128 to 16777216, got 64"),
    (dict(masked=True), "bits of `allowed`")])
def test_what_it_does_not_take(changes, reason):
  vocab = changes.get("vocab", 256)
  arguments = made(0, 2, changes.get("width", 64), vocab,
                   changes.get("dtype", jnp.bfloat16))
  wanted = asked(0, 2, vocab, masked=changes.get("masked", False))
  with pytest.raises(NotImplementedError,
                     match=f"^proposal_head: gpu: .*{reason}.*'xla'"):
    proposal_head(*arguments, eps=1e-5, implementation="gpu", **wanted)
