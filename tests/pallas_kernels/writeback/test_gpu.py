# SPDX-License-Identifier: Apache-2.0
"""There is no kernel for GPUs yet: it says so, and XLA does the work."""

import pytest

from pallas_kernels import Target, aim, commit_kv
from tests.pallas_kernels.writeback.places import call, meaning, same


def test_refuses_and_falls_through():
  arguments = call("float32")
  with pytest.raises(NotImplementedError, match="use it"):
    commit_kv(*arguments[:4], implementation="gpu")
  with aim(Target("gpu", "NVIDIA H100 80GB HBM3")):
    same(commit_kv(*arguments[:4]), meaning(*arguments))
