# SPDX-License-Identifier: Apache-2.0
"""`accept_nodes` for GPUs: simulated, with races looked for.

Held here: vocabularies whose last tile reaches back, more tiles than are on
their way, greedy rows, the ratio test, equal scores, parts of a vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Target, accept_nodes, aim
from pallas_kernels.acceptance import gpu
from tests.pallas_kernels.acceptance.test_xla import call, check

try:
  InterpretGPUParams = plgpu.InterpretGPUParams
except AttributeError:           # jax 0.10
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

pytestmark = pytest.mark.usefixtures("quick_compiles")

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  monkeypatch.setattr(gpu, "_TILE", 256)
  monkeypatch.setattr(gpu, "_PIECE", 128)
  monkeypatch.setattr(gpu, "_AHEAD", 2)


def run(given):
  with aim(Target("gpu", H100,
                  interpret=InterpretGPUParams(detect_races=True))):
    return jax.jit(lambda given: accept_nodes(
        **given, implementation="gpu"))(given)


@pytest.mark.parametrize("sizes, blocks", [
    (dict(rows=2, nodes=1, vocab=1100), 1),
    (dict(rows=2, nodes=2, vocab=776, dtype="bfloat16", ratio=False), 8)],
    ids=str)
def test_is_its_meaning(sizes, blocks, monkeypatch, capfd):
  monkeypatch.setattr(gpu, "_BLOCKS", blocks)
  given, keys = call(**sizes)
  check(run(given), given, keys)
  assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_of_equal_ones_the_first_and_parts_have_their_place(monkeypatch):
  monkeypatch.setattr(gpu, "_BLOCKS", 4)
  given, _ = call(rows=2, nodes=1, vocab=600, ratio=False)
  whole = accept_nodes(**given)
  given["logits"] = given["logits"].at[1, 0].set(0.).at[
      1, 0, jnp.array([500, 330])].set(2.)
  found = run(given)
  assert int(found.token[1, 0]) == 330             # a greedy row
  assert int(found.token[0, 0]) == int(whole.token[0, 0])
  part = given | {"logits": given["logits"][..., 300:],
                  "first": jnp.int32(300)}
  wanted = accept_nodes(**part)
  np.testing.assert_array_equal(run(part).token, wanted.token)


@pytest.mark.parametrize("vocab, dtype, reason", [
    (128, "float32", "a multiple of 4 from 256 to 16777216, got 128"),
    (301, "float32", "got 301"), (512, "float16", "got float16")])
def test_refuses_and_falls_through(vocab, dtype, reason):
  given, keys = call(vocab=vocab, ratio=False, rows=1, nodes=1)
  cast = {**given, "logits": given["logits"].astype(dtype)}
  with pytest.raises(NotImplementedError, match=reason):
    accept_nodes(**cast, implementation="gpu")
  with aim(Target("gpu", H100)):
    if dtype == "float32":
      check(accept_nodes(**given), given, keys)
