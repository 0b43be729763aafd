# SPDX-License-Identifier: Apache-2.0
"""How calls are checked while tests run (see addopts in pyproject.toml)."""

import functools

import beartype
import jax
from beartype.roar import BeartypeCallHintViolation

_check = beartype.beartype(
  conf=beartype.BeartypeConf(
    # An int may stand for a float, as everywhere in Python.
    is_pep484_tower=True,
    # What cannot be checked (`Self`, a plain Protocol) goes unchecked and is
    # listed among pytest's warnings.
    warning_cls_on_decorator_exception=UserWarning,
  )
)


def check(function):
  """Checks calls, but for those in which JAX rebuilds a pytree of ours.

  It puts shapes, shardings and descriptions where arrays were.
  """
  checked = _check(function)
  if isinstance(function, type):
    return checked

  @functools.wraps(function)
  def call(*args, **kwargs):
    try:
      return checked(*args, **kwargs)
    except BeartypeCallHintViolation:
      # The first argument of `__init__` has no leaves yet.
      values = (*args[1:], *kwargs.values())
      if not any(map(_stands_in, jax.tree.leaves(values))):
        raise

  return call


def _stands_in(leaf) -> bool:
  if isinstance(leaf, (jax.sharding.Sharding, jax.ShapeDtypeStruct,
                       jax.stages.ArgInfo)):
    return True
  # Some have no public name.
  return type(leaf).__module__.startswith("jax._src") and not isinstance(
      leaf, (jax.Array, jax.core.ShapedArray))
