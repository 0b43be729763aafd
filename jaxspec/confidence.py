# SPDX-License-Identifier: Apache-2.0
"""How sure a head is of the token that it finds likeliest, in [0, 1].

  top       the probability of that token
  margin    by how much it exceeds that of the next
  entropy   one minus the entropy, as a share of the largest there can be
  learned   the chance that the model says so too: a logistic regression on
            the log odds of the three and the place in the answer, whose
            coefficients `jaxspec.calibration` fits
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MEASURES = ("top", "margin", "entropy", "learned")
COEFFICIENTS = 5
# Odds beyond this are all the same.
_LEAST = 1e-6


def signs(logits: Float[Array, "*rows V"]) -> Float[Array, "*rows 3"]:
  """The measures that need nothing but the law: top, margin, entropy."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  p = jnp.exp(log_p)
  best = jnp.argmax(log_p, axis=-1, keepdims=True)
  at = jax.lax.broadcasted_iota(jnp.int32, log_p.shape, log_p.ndim - 1)
  top = jnp.max(p, axis=-1)
  next_ = jnp.max(jnp.where(at == best, 0.0, p), axis=-1)
  entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
  return told(top, top - next_, entropy, logits.shape[-1])


def told(top: Float[Array, "*rows"], margin: Float[Array, "*rows"],
         entropy: Float[Array, "*rows"], count: int
         ) -> Float[Array, "*rows 3"]:
  """What `signs` gives, of a law over `count` tokens of which this is known."""
  return jnp.stack([top, margin, 1 - entropy / np.log(max(count, 2))], axis=-1)


def features(found: Any, place: Any) -> list[Any]:
  """What `learned` goes by, in NumPy or on the device.

  Args:
    found: what `signs` gave.
    place: of the token in its answer, from 0.
  """
  np_ = jnp if isinstance(found, jax.Array) else np
  kept = np_.clip(found, _LEAST, 1 - _LEAST)
  odds = np_.log(kept) - np_.log1p(-kept)
  place = np_.log1p(np_.maximum(place, 0) * 1.0)
  return [np_.ones_like(place), *(odds[..., n] for n in range(3)), place]


def chance(found: Any, place: Any, coefficients: Any) -> Any:
  """The chance that `learned` tells."""
  np_ = jnp if isinstance(found, jax.Array) else np
  score = sum(c * f for c, f in zip(coefficients, features(found, place)))
  return 1 / (1 + np_.exp(-np_.clip(score, -30.0, 30.0)))


def confidence(logits: Float[Array, "B V"], measure: str,
               place: Int[Array, "B"] | None = None,
               coefficients: Float[Array, "F"] | None = None
               ) -> Float[Array, "B"]:
  """How sure a head is.

  Args:
    place: of the token in its answer, from 0; for `learned`.
    coefficients: as many as `COEFFICIENTS`; for `learned`.
  """
  return sureness(signs(logits), measure, place, coefficients)


def sureness(found: Float[Array, "B 3"], measure: str,
             place: Int[Array, "B"] | None = None,
             coefficients: Float[Array, "F"] | None = None
             ) -> Float[Array, "B"]:
  """The same, of what `signs` gave."""
  if measure != "learned":
    return found[:, MEASURES.index(measure)]
  if place is None or coefficients is None:
    raise ValueError("the measure learned goes by place and coefficients")
  return chance(found, place, [coefficients[n] for n in range(COEFFICIENTS)])
