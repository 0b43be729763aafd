# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel says what the reference says, and reads nothing else.

The vocabularies here end within a tile, and what the interpreter puts behind
the end is NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import Target, aim, proposal_head
from pallas_kernels.head import tpu
from tests.pallas_kernels.head.made import asked, made
from tests.pallas_kernels.races import none_seen

pytestmark = pytest.mark.usefixtures("quick_compiles")

ONE = Target("tpu", "TPU v5 lite", interpret=True)
# Its two cores walk a half each.
TWO = Target("tpu", "TPU v5p", interpret=True)
ALL = dict(masked=True, drawn=True, trimmed=True)


def say(target, *arguments, **wanted):
  def run(*arguments):
    return proposal_head(*arguments, eps=1e-5, **wanted)
  with aim(target):
    return jax.jit(run)(*arguments)


def alike(target, arguments, **wanted):
  found = say(target, *arguments, **wanted)
  expected = say(None, *arguments, **wanted)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  for a, b in zip(jax.tree.leaves(found)[1:], jax.tree.leaves(expected)[1:]):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-5)


# A width of whole vectors lies as it is named, another one turned.
@pytest.mark.medium
@pytest.mark.parametrize("target, dtype, rows, width, vocab, count, wanted", [
    (ONE, jnp.bfloat16, 1, 40, 130, 1, {}),
    (TWO, jnp.float32, 5, 128, 700, 16, {}),
    (ONE, jnp.float32, 64, 40, 390, 2, ALL),
    (TWO, jnp.bfloat16, 3, 256, 1300, 4, ALL)])
def test_as_the_reference(target, dtype, rows, width, vocab, count, wanted):
  alike(target, made(0, rows, width, vocab, dtype), count=count,
        logits_soft_cap=None if wanted else 25.0,
        **asked(1, rows, vocab, **wanted))


def test_of_equal_tokens_the_first_comes_first():
  """Across tiles, across halves, and where a candidate has to go again."""
  x, norm, unembedding = made(4, 3, 128, 900)
  unembedding = jnp.asarray(np.asarray(unembedding)[np.arange(900) % 90])
  alike(TWO, (x, norm, unembedding), count=8)


def test_logits_of_any_size():
  """A row of zeros, one of huge logits, one where the first is the largest."""
  x, norm, unembedding = made(5, 3, 128, 500)
  x = x.at[0].set(0)
  norm = norm * 1e4
  unembedding = unembedding.at[0].set(unembedding[0] * 9)
  found = say(ONE, x, norm, unembedding, count=2)
  expected = say(None, x, norm, unembedding, count=2)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
  np.testing.assert_allclose(found.entropy[0], np.log(500), rtol=1e-5)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5p"])
def test_no_races_and_nothing_read_beyond(kind):
  target = Target("tpu", kind, interpret=pltpu.InterpretParams(
      detect_races=True))
  wanted = (dict(masked=True) if kind == "TPU v5p"
            else dict(drawn=True, trimmed=True))
  alike(target, made(6, 2, 128, 300), count=2, **asked(7, 2, 300, **wanted))
  none_seen("tpu")


@pytest.mark.parametrize("width", [576, 4096])
def test_lowers_for_a_tpu(width):
  arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype)
               for a in made(0, 8, width, 1000, jnp.bfloat16)]
  run = functools.partial(proposal_head, eps=1e-5, count=4)
  with aim(Target("tpu", "TPU v6 lite")):
    exported = export.export(jax.jit(run), platforms=["tpu"])(*arguments)
  assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.parametrize("changes, reason", [
    (dict(rows=65), "65 rows: a tile serves 1 to 64"),
    (dict(count=17), "count=17: candidates are kept for up to 16"),
    (dict(dtype=jnp.float16), "x must be bfloat16 or float32, got float16"),
    (dict(other=jnp.bfloat16), "must be of one dtype, got float32 and bfloa")])
def test_what_it_does_not_take(changes, reason):
  x, norm, unembedding = made(0, changes.get("rows", 2), 8, 40,
                              changes.get("dtype", jnp.float32))
  unembedding = unembedding.astype(changes.get("other", unembedding.dtype))
  run = functools.partial(proposal_head, x, norm, unembedding, eps=1e-5,
                          count=changes.get("count", 1))
  with pytest.raises(NotImplementedError, match=f"^proposal_head: tpu: .*"
                     f"{reason}.*'xla'"):
    run(implementation="tpu")
  with aim(ONE):
    assert np.isfinite(run().entropy).all()        # the reference takes it


def test_bytes_are_little_more_than_the_weights():
  moved = tpu.moved_bytes(64, 576, 49152, 2, 8, target=TWO, masked=True,
                          drawn=True)
  assert 49152 * 576 * 2 < moved < 1.02 * 49152 * 576 * 2
