# SPDX-License-Identifier: Apache-2.0
"""How sure a head is, against the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.confidence import COEFFICIENTS, chance, confidence, signs

LAWS = np.array([[.7, .2, .1, 0], [.25, .25, .25, .25], [1, 0, 0, 0]])


def logits():
  with np.errstate(divide="ignore"):
    return jnp.asarray(np.log(LAWS) + 3, jnp.float32)


@pytest.mark.parametrize("measure, wanted", [
    ("top", [.7, .25, 1]), ("margin", [.5, 0, 1]),
    ("entropy", [1 + sum(x * np.log(x) for x in (.7, .2, .1)) / np.log(4),
                 0, 1])])
def test_measures(measure, wanted):
  np.testing.assert_allclose(confidence(logits(), measure), wanted, atol=1e-6)


def test_what_is_learned_is_a_logistic_regression():
  weights = np.array([.3, 1.2, -.4, .6, -.5])
  found = np.array([[.7, .5, .4], [.25, .1, .3]])
  place = np.array([0, 7])
  odds = np.log(found / (1 - found))
  score = weights[0] + odds @ weights[1:4] + weights[4] * np.log1p(place)
  np.testing.assert_allclose(chance(found, place, weights),
                             1 / (1 + np.exp(-score)), rtol=1e-6)
  assert len(weights) == COEFFICIENTS


def test_the_device_says_what_the_host_says():
  weights, place = np.array([.3, .2, -.1, .2, -.5]), np.array([0, 3, 40])
  told = jax.jit(lambda: confidence(logits(), "learned", jnp.asarray(place),
                                    jnp.asarray(weights, jnp.float32)))()
  wanted = chance(np.asarray(signs(logits())), place, weights)
  np.testing.assert_allclose(told, wanted, rtol=1e-4)
  assert np.all((np.asarray(told) > 0) & (np.asarray(told) < 1))
