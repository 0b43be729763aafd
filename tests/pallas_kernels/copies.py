# SPDX-License-Identifier: Apache-2.0
"""Copies into fast memory that a kernel begins, and under which conditions."""

import jax
import jax.extend


def copies(jaxpr, primitive, *, outside):
  """How many, in all of a kernel or outside its conditions.

  Args:
    primitive: the name of what begins a copy.
  """
  count = 0
  for eqn in jaxpr.eqns:
    count += eqn.primitive.name == primitive
    if not outside or eqn.primitive.name != "cond":
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        count += copies(inner, primitive, outside=outside)
  return count
