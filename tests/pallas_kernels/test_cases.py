# SPDX-License-Identifier: Apache-2.0
"""Every case of every op: compiled for real chips, and counted."""

import importlib.util

import jax
import pytest

from pallas_kernels import compiling, floors
from pallas_kernels.case import collect

CASES = [pytest.param(case, id=f"{case.op}: {case.name}")
         for case in collect()]
# What of each topology takes seconds; the others are compiled by night.
QUICK = ("v5e", "tpu7x")


@pytest.fixture(scope="module")
def device():
  """A device of a topology, by its name."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("pip install jax[tpu] for the TPU compiler")
  cache = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  yield compiling.device
  jax.config.update("jax_enable_compilation_cache", cache)


@pytest.mark.parametrize("topology", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in compiling.TOPOLOGIES])
@pytest.mark.parametrize("case", CASES)
def test_the_tpu_compiler_takes_it(case, topology, device):
  outcome = compiling.compile_tpu(case, topology, device(topology))
  assert outcome.status == "compiles", outcome.reason


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_takes_it_or_says_why_not(case):
  outcome = compiling.lower_gpu(case)
  assert outcome.status in ("lowers", "refuses"), outcome.reason
  assert outcome.status == "lowers" or outcome.reason


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_moves_hardly_more_than_it_must(case):
  arguments = _bytes(case.arguments)
  results = _bytes(jax.eval_shape(
      lambda *args: case.call(*args, implementation="xla"), *case.arguments))
  assert 0 < case.least_bytes <= arguments + results
  assert 1 <= floors.ratio(case) <= floors.MOST


@pytest.mark.parametrize("case", CASES)
def test_samples_fit(case):
  if _bytes(case.arguments) > 64 << 20:
    pytest.skip("large")
  same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype),
                      case.sample(0), case.arguments)
  assert jax.tree.all(same)


def _bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
