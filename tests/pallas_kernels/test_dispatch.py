# SPDX-License-Identifier: Apache-2.0
"""`implementation=`: who is asked, in which order, and what is explained."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pack, tree_attention
from pallas_kernels.dispatch import dispatch


def refuse(*args, **kwargs):
  raise NotImplementedError("odd sizes")


def reject(*args, **kwargs):
  raise NotImplementedError("not on this machine")


def named(name):
  return lambda *args, **kwargs: (name, args, kwargs)


OPS = {"refuses": refuse, "fast": named("fast"), "rejects": reject,
       "xla": named("xla")}


@pytest.mark.parametrize("implementation, taken", [
    (None, "fast"), ("xla", "xla"), ("fast", "fast"), (["xla", "fast"], "xla"),
    (("refuses", "rejects", "xla"), "xla"), (["refuses", "fast"], "fast")])
def test_who_is_taken(implementation, taken):
  """The first of those wanted that takes the arguments, as they were given."""
  assert dispatch("op", OPS, implementation, 1, 2, x=3) == (
      taken, (1, 2), {"x": 3})


def test_nobody_behind_the_taken_one_is_asked():
  asked = []
  ops = {"a": lambda: asked.append("a"), "b": lambda: asked.append("b")}
  dispatch("op", ops, None)
  assert asked == ["a"]


@pytest.mark.parametrize("implementation, message", [
    ("refuses", "^op: refuses: odd sizes$"),
    (["rejects", "refuses"],
     "^op: rejects: not on this machine; refuses: odd sizes$"),
    ([], "^op: $")])
def test_every_reason_is_in_the_message(implementation, message):
  with pytest.raises(NotImplementedError, match=message):
    dispatch("op", OPS, implementation)


@pytest.mark.parametrize("implementation", ["tpu", ["refuses", "tpu"]])
def test_a_name_nobody_has(implementation):
  with pytest.raises(ValueError, match="^op has no implementation 'tpu'; "
                     "it has refuses, fast, rejects, xla$"):
    dispatch("op", OPS, implementation)


def test_other_errors_are_not_fallen_back_from():
  def broken():
    raise TypeError("a bug")
  with pytest.raises(TypeError, match="a bug"):
    dispatch("op", {"broken": broken, "xla": named("xla")}, None)


def test_an_op_takes_its_implementations_by_name():
  x, at = jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1), jnp.int32)

  def run(implementation):
    return tree_attention(
        x, x, x, x, x, slot_positions=at, positions=at, fresh_positions=at,
        seen=pack(jnp.ones((1, 1), bool)), scale=1.0,
        implementation=implementation)

  for implementation in (None, "xla", ["xla"]):
    np.testing.assert_allclose(run(implementation), x)
  with pytest.raises(ValueError, match="tree_attention has no implementation "
                     "'xlaa'; it has .*xla"):
    run("xlaa")
