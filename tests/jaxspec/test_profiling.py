# SPDX-License-Identifier: Apache-2.0
"""Traces hold our marks, and compiles are counted where they happen."""

import jax
import jax.numpy as jnp
import pytest

from jaxspec import profiling
from jaxspec.errors import InputError


def test_compiles_are_counted_once_a_program():
  double = jax.jit(lambda x: x * 2 + 1)
  x, y = jnp.arange(3), jnp.arange(5)
  with profiling.count_compiles() as compiles:
    double(x)
    assert compiles.count == 1
    double(x)
    assert compiles.count == 1
    double(y)
  assert compiles.count == 2
  assert compiles.seconds > 0
  double(jnp.arange(7))
  assert compiles.count == 2


def test_counters_nest():
  triple = jax.jit(lambda x: x * 3 + 1)
  x, y = jnp.arange(4), jnp.arange(6)
  with profiling.count_compiles() as outer:
    with profiling.count_compiles() as inner:
      triple(x)
    triple(y)
  assert (outer.count, inner.count) == (2, 1)


def test_counting_ends_with_an_error():
  with pytest.raises(KeyError), profiling.count_compiles() as compiles:
    raise KeyError
  jax.jit(lambda x: x * 5 + 1)(jnp.arange(3))
  assert compiles.count == 0


def test_a_trace_holds_steps_and_is_readable(tmp_path):
  square = jax.jit(lambda x: x * x)
  x = jnp.arange(8)
  with profiling.trace(tmp_path / "deep" / "trace"):
    for number in range(3):
      with profiling.step("decode", number):
        square(x).block_until_ready()
  (file,) = tmp_path.rglob("*.xplane.pb")
  names = [
    event.name
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes
    for line in plane.lines
    for event in line.events
  ]
  assert names.count("decode") == 3


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_directory_no_trace(nothing, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with profiling.trace(nothing):
    pass
  assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_says_where(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(InputError, match="cannot write a trace to .*file"):
    with profiling.trace(tmp_path / "file" / "trace"):
      pass
