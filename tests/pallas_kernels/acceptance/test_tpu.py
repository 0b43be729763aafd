# SPDX-License-Identifier: Apache-2.0
"""`accept_nodes` for TPUs: interpreted, with races looked for, and lowered.

Held here: vocabularies that are and are not whole tiles, blocks that reach
beyond the last node, equal scores, what lies beyond the vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import Target, accept_nodes, aim
from pallas_kernels.acceptance.cases import cases
from tests.pallas_kernels.acceptance.test_xla import call, check
from tests.pallas_kernels.races import none_seen

pytestmark = pytest.mark.usefixtures("quick_compiles")


def run(given, interpret=True):
  with aim(Target("tpu", "TPU v5 lite", interpret=interpret)):
    return jax.jit(lambda given: accept_nodes(
        **given, implementation="tpu"))(given)


@pytest.mark.parametrize("sizes", [
    dict(rows=1, nodes=1, vocab=100, ratio=False),
    dict(rows=2, nodes=4, vocab=640),
    dict(rows=3, nodes=3, vocab=2500),
    dict(rows=8, nodes=3, vocab=301),
    dict(rows=2, nodes=5, vocab=257, dtype="bfloat16")], ids=str)
def test_is_its_meaning(sizes):
  given, keys = call(**sizes)
  check(run(given), given, keys)


def test_has_no_races():
  """And scratch, which is full of NaN here, never leaks."""
  given, keys = call(rows=3, nodes=3, vocab=301)
  check(run(given, pltpu.InterpretParams(detect_races=True)), given, keys)
  none_seen("tpu")


def test_of_equal_ones_the_first():
  given, _ = call(rows=2, nodes=2, vocab=900, ratio=False)
  given["logits"] = jnp.zeros_like(given["logits"]).at[..., [700, 130]].set(2.)
  given["temperature"] *= 0
  np.testing.assert_array_equal(run(given).token, 130)


def test_lowers_for_a_tpu_and_reads_each_logit_once():
  given, _ = call()
  with aim(Target("tpu", "TPU v5 lite")):
    lowered = export.export(jax.jit(lambda given: accept_nodes(**given)),
                            platforms=["tpu"])(given)
  assert "tpu_custom_call" in lowered.mlir_module()
  for case in cases():
    assert case.least_bytes <= case.moved_bytes <= 1.01 * case.least_bytes


def test_refuses():
  given, _ = call(rows=1, nodes=1, vocab=8)
  with pytest.raises(NotImplementedError, match="got float16"):
    accept_nodes(**{**given, "logits": given["logits"].astype(jnp.float16)},
                 implementation="tpu")
  wide = jax.ShapeDtypeStruct((1, 1, 1 << 22), jnp.float32)
  with pytest.raises(NotImplementedError, match="VMEM"):
    jax.eval_shape(lambda x: accept_nodes(
        x, temperature=jnp.ones(1), noise=given["noise"], draft=x,
        drafted=jnp.zeros((1, 1), jnp.int32), implementation="tpu"), wide)
