# SPDX-License-Identifier: Apache-2.0
"""Eight CPU devices, no silent broadcasting, and a tiny model for all."""

import os

# A TPU compiler without a TPU (see tests/jaxspec/test_memory.py): these keep
# it from looking for one, and let test processes load it side by side.
os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled",
    TPU_MIN_LOG_LEVEL="3", TPU_STDERR_LOG_LEVEL="3")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxspec.models.layers import Rope  # noqa: E402
from jaxspec.models.transformer import Config, Transformer, random_source  # noqa: E402


def tiny_config(**changes) -> Config:
  """Four layers of a Llama, small enough to compile in a second."""
  sizes = dict(
      family="llama", vocab=64, width=32, depth=4, heads=4, kv_heads=2,
      head_size=8, mlp=48, context=1024, tied=True)
  sizes.update(changes)
  depth = sizes["depth"]
  sizes.setdefault("ropes", (Rope(1e4),) * depth)
  sizes.setdefault("windows", (None,) * depth)
  return Config(**sizes)


@pytest.fixture(scope="session")
def tiny() -> Transformer:
  """A model whose greedy text repeats itself now and then."""
  return Transformer(tiny_config(), random_source(0, scale=1.5))


@pytest.fixture(scope="session")
def small() -> Transformer:
  """Two layers, one of which sees eight positions."""
  return Transformer(tiny_config(depth=2, windows=(8, None)),
                     random_source(0, scale=1.5))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Each compiled program holds memory maps, of which a process has 65530."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compiles():
  """Compiles without XLA's costly passes: half the time, the same meaning."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
