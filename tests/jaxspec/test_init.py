# SPDX-License-Identifier: Apache-2.0
"""The face of the package: what it names is there, and loads late."""

import subprocess
import sys

import pytest

import jaxspec


def test_what_it_names_is_there():
  for name in jaxspec.__all__:
    assert getattr(jaxspec, name).__name__ == name
    assert name in dir(jaxspec)
  with pytest.raises(AttributeError, match="no attribute 'Generater'"):
    _ = jaxspec.Generater


def test_importing_it_loads_nothing():
  code = ("import sys, jaxspec; "
          "print([m for m in ('jax', 'absl', 'flax') if m in sys.modules])")
  found = subprocess.run([sys.executable, "-c", code], check=True,
                         capture_output=True, text=True)
  assert found.stdout.strip() == "[]"
