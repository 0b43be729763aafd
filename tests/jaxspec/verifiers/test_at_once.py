# SPDX-License-Identifier: Apache-2.0
"""Samples drawn behind all nodes at once are those of a walk down the tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import sampling, sharding
from jaxspec.base import Proposal
from jaxspec.tree import branching
from jaxspec.verifiers.exact import exact
from pallas_kernels import Target, aim

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROWS, VOCAB = 4, 64


def scene():
  """Proposals many of whose nodes are the sample behind their parents."""
  rng = np.random.default_rng(0)
  tree = branching((2, 2))
  size = tree.size
  history = sampling.History(
      jnp.zeros((ROWS, 16), jnp.int32), jnp.full(ROWS, 4), jnp.full(ROWS, 6),
      jnp.zeros((ROWS, size), jnp.int32), jnp.zeros((ROWS, size, size), bool))
  asked = sampling.defaults(ROWS, 2).replace(
      key=jax.random.split(jax.random.key(3), ROWS),
      temperature=jnp.asarray([0.9, 0.0, 1.2, 0.0]))
  positions = 6 + jnp.broadcast_to(jnp.asarray(tree.depths), (ROWS, size))
  laws = sampling.Laws(
      jnp.asarray(rng.standard_normal((ROWS, size, VOCAB)) * 2, jnp.float32),
      asked, history, positions)
  behind = np.stack([laws.draw(jnp.full(ROWS, n)) for n in range(size)], 1)
  tokens = behind[:, np.maximum(tree.parents, 0)]
  wrong = rng.random(tokens.shape) < 0.4
  wrong[3] = True
  tokens = np.where(wrong, (tokens + 1) % VOCAB, tokens)
  return Proposal(jnp.asarray(tokens), tree), laws


@pytest.mark.parametrize("implementation", [
    "xla", pytest.param("tpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", [
    pytest.param({}, marks=pytest.mark.slow), {"data": 2, "tensor": 2}],
                         ids=str)
def test_is_the_walk(implementation, mesh):
  proposal, laws = scene()
  wanted = exact(proposal, laws)
  assert int(wanted.kept.max()) > 2 and int(wanted.kept.min()) == 1
  target = Target("tpu", "TPU v5 lite", implementation, interpret=True)
  with aim(target), jax.set_mesh(sharding.make_mesh(mesh)):
    found = jax.jit(lambda proposal, laws: exact(proposal, laws))(
        proposal, laws)
  np.testing.assert_array_equal(found.kept, wanted.kept)
  np.testing.assert_array_equal(found.next_token, wanted.next_token)
  for path, other, kept in zip(found.path, wanted.path, wanted.kept):
    np.testing.assert_array_equal(path[:kept], other[:kept])
