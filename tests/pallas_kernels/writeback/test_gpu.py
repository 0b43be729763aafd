# SPDX-License-Identifier: Apache-2.0
"""`commit_kv` for GPUs: simulated, with races looked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Target, aim, commit_kv
from pallas_kernels.writeback import gpu
from tests.pallas_kernels.writeback.places import KINDS, call, meaning, same

try:
  InterpretGPUParams = plgpu.InterpretGPUParams
except AttributeError:           # jax 0.10
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

pytestmark = pytest.mark.usefixtures("quick_compiles")

H100 = "NVIDIA H100 80GB HBM3"


def run(arguments, paged=False):
  *arguments, scales = arguments
  with aim(Target("gpu", H100,
                  interpret=InterpretGPUParams(detect_races=True))):
    return jax.jit(lambda *args: commit_kv(
        *args, paged=paged, implementation="gpu", scales=scales))(*arguments)


@pytest.mark.parametrize("kind", ["rounded to bfloat16", "narrow int8 pages"])
def test_is_its_meaning(kind, monkeypatch, capfd):
  """Nodes that are not kept, and free slots, hold NaN."""
  monkeypatch.setattr(gpu, "_TOGETHER", 1)           # a buffer a block
  arguments = call(**KINDS[kind], nodes=4, longest=3)
  paged = "pages" in KINDS[kind]
  found = run(arguments, paged)
  same(found, meaning(*arguments, paged=paged))
  assert not np.array_equal(*(x[0][0].astype(jnp.float32)
                              for x in (found, arguments)), equal_nan=True)
  assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("changes, reason", [
    (dict(dtype="float32", size=2), "heads of 2 float32"),
    (dict(dtype="float16"), "got float16")])
def test_refuses_and_falls_through(changes, reason):
  buffers, fresh, path, slots, _ = call(**changes)
  with pytest.raises(NotImplementedError, match=reason):
    commit_kv(buffers, fresh, path, slots, implementation="gpu")
  with aim(Target("gpu", H100)):
    same(commit_kv(buffers, fresh, path, slots),
         meaning(buffers, fresh, path, slots, None))
