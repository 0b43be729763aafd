# SPDX-License-Identifier: Apache-2.0
"""A model that recites one cycle of tokens, and heads made by hand for it.

Its stream is the one-hot of the token that was read, untouched by any layer,
and each token has one successor. So it is known what a head must say, and one
that looks a position too far says a wrong token everywhere.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.heads import EagleHead, ExitHead, HydraHeads, MedusaHeads
from jaxspec.models.transformer import Transformer, random_source
from tests.conftest import tiny_config

SIZE = 32
_ORDER = np.random.default_rng(3).permutation(SIZE)


def after(token: int, steps: int = 1) -> int:
  """The token that stands so many places further."""
  at = int(np.flatnonzero(_ORDER == token)[0])
  return int(_ORDER[(at + steps) % SIZE])


def ahead(steps: int) -> np.ndarray:
  """The matrix that takes each one-hot so many places further."""
  matrix = np.zeros((SIZE, SIZE), np.float32)
  for token in range(SIZE):
    matrix[after(token, steps), token] = 1
  return matrix


def recited(prompt: list[int], count: int) -> list[int]:
  """What the model says."""
  return [after(prompt[-1], n + 1) for n in range(count)]


@functools.cache
def model() -> Transformer:
  random = random_source(0)

  def source(path, shape, axes, wanted=None):
    name = path.rsplit(".", 1)[-1]
    if name in ("out", "down"):                 # no layer adds anything
      return jnp.zeros(shape)
    if name.endswith("norm"):
      return jnp.ones(shape)
    if name == "embedding":
      return jnp.eye(SIZE)
    if name == "lm_head":
      return jnp.asarray(ahead(1))
    return random(path, shape, axes, wanted)
  return Transformer(
      tiny_config(vocab=SIZE, width=SIZE, depth=3, tied=False), source)


def medusa_heads(count: int = 3, *, shift: int = 0) -> MedusaHeads:
  """Right, or looking `shift` places too far."""
  up = np.stack([ahead(1 + head + shift)[None] for head in range(count)])
  return MedusaHeads(jnp.asarray(10 * up))


def hydra_heads(count: int = 3, *, by: str = "token", shift: int = 0
                ) -> HydraHeads:
  """Right, or looking `shift` places too far.

  Args:
    by: what they know by: the last "token" they see, or the stream's "state".
  """
  one, none = np.eye(SIZE, dtype=np.float32), np.zeros((SIZE, SIZE))
  state = [ahead(1 + head) if by == "state" else none for head in range(count)]
  # Of each token the first head that sees it sees no other behind it.
  drafted = [one if by == "token" and head == place else none
             for place in range(count) for head in range(place, count)]
  norm = jnp.ones(SIZE)
  return HydraHeads(
      norm, norm, jnp.asarray(np.stack(state), jnp.float32),
      jnp.asarray(np.stack(drafted), jnp.float32),
      jnp.asarray(np.stack([10 * ahead(shift)] * count)))


def eagle_head(*, token: np.ndarray | int = 0, feature: np.ndarray | int = 0,
               taps: tuple[int, ...] = (0, 1, 2)) -> EagleHead:
  """Says what follows token @ (one-hot of token i + 1) + feature @ (of i).

  Its keys and values are random, and of no consequence.
  """
  random = random_source(1)
  join = np.concatenate([np.zeros((SIZE, SIZE)) + token,
                         np.zeros((SIZE, SIZE)) + feature], axis=1)
  fuse = np.concatenate([np.eye(SIZE)] * len(taps), axis=1)

  def source(path, shape, axes, wanted=None):
    made = {"join_weight": join, "fuse_weight": fuse}
    if path in made:
      return jnp.asarray(made[path], jnp.float32)
    if path.endswith((".out", ".down")):
      return jnp.zeros(shape)
    if path.endswith("norm"):
      return jnp.ones(shape)
    return random(path, shape, axes, wanted)
  return EagleHead(model(), source, taps=taps, mlp=8)


def exit_head(layer: int = 1, *, shift: int = 0, attention: bool = False
              ) -> ExitHead:
  """Right, or looking `shift` places too far."""
  random = random_source(2)

  def source(path, shape, axes, wanted=None):
    if path == "lens":
      return jnp.asarray(10 * ahead(shift)) * (shift != 0)
    if path.endswith("norm"):
      return jnp.ones(shape)
    if path in ("down", "layers.0.out"):
      return jnp.zeros(shape)
    return random(path, shape, axes, wanted)
  return ExitHead(model(), source, layer=layer, mlp=8, attention=attention)


def leaves_equal(one, other) -> bool:
  """Whether two pytrees hold the same."""
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return (jax.tree.structure(one) == jax.tree.structure(other)
          and all(a.dtype == b.dtype and np.array_equal(a, b)
                  for a, b in pairs))
