# SPDX-License-Identifier: Apache-2.0
"""Flags are added once, and what the user says stays.

That they do what they are for, a compiled program shows: `test_memory.py`.
"""

import os

from jaxspec import libtpu


def test_flags_are_added_and_said_ones_stay(monkeypatch):
  monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
  libtpu.set_flags()
  name, value = next(iter(libtpu.FLAGS.items()))
  assert os.environ["LIBTPU_INIT_ARGS"] == f"--{name}={value}"
  libtpu.set_flags()
  assert os.environ["LIBTPU_INIT_ARGS"] == f"--{name}={value}"
  monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--other=1 --{name}=true")
  libtpu.set_flags()
  assert os.environ["LIBTPU_INIT_ARGS"] == f"--other=1 --{name}=true"
