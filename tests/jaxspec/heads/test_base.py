# SPDX-License-Identifier: Apache-2.0
"""The likeliest tokens are those of the logits, however they are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import kernels, sharding
from jaxspec.heads.base import by_kernel, likeliest

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("trimmed", [False, True])
def test_kernel_and_logits_agree(small, trimmed):
  x = jnp.asarray(np.random.default_rng(0).standard_normal(
      (2, 3, small.config.width)), jnp.float32)
  rows = small.unembedding[jnp.arange(0, small.vocab, 2)] if trimmed else None
  law = np.asarray(jax.nn.log_softmax(small.unembed(x, rows)))
  expected = np.argsort(-law, axis=-1, kind="stable")[..., :5]
  for choice in ("xla", "interpret"):
    mesh = sharding.make_mesh()
    with kernels.on(mesh, kernels.choose(choice, mesh)):
      assert by_kernel(small.unembedding, 5) == (choice == "interpret")
      found, chance = jax.jit(likeliest, static_argnums=2)(small, x, 5, rows)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(
        chance, np.take_along_axis(law, expected, axis=-1), atol=1e-5)


def test_no_kernel_where_the_vocabulary_is_split_or_too_small(small):
  mesh = sharding.make_mesh({"tensor": 2})
  with kernels.on(mesh, kernels.choose("interpret", mesh)):
    assert not by_kernel(small.unembedding, 5)
  mesh = sharding.make_mesh()
  with kernels.on(mesh, kernels.choose("interpret", mesh)):
    assert not by_kernel(small.unembedding, small.vocab + 1)
