# SPDX-License-Identifier: Apache-2.0
"""There is no kernel for GPUs yet: it says so, and XLA does the work."""

import pytest

from pallas_kernels import Target, accept_nodes, aim
from tests.pallas_kernels.acceptance.test_xla import call, check

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_refuses_and_falls_through():
  given, keys = call()
  with pytest.raises(NotImplementedError, match="use it"):
    accept_nodes(**given, implementation="gpu")
  with aim(Target("gpu", "NVIDIA H100 80GB HBM3")):
    check(accept_nodes(**given), given, keys)
