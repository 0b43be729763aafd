# SPDX-License-Identifier: Apache-2.0
"""EAGLE's layer: which features it reads. What it says, its drafter's tests
hold."""

import pytest

from jaxspec import heads


@pytest.mark.parametrize("depth, taps", [
    (1, (0, 0, 1)), (2, (0, 1, 2)), (4, (1, 2, 2)), (32, (2, 16, 29))])
def test_taps_are_low_middle_and_high(depth, taps):
  assert heads.default_taps(depth) == taps
