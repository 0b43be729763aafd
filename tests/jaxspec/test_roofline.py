# SPDX-License-Identifier: Apache-2.0
"""Every device whose figures are known has all of them."""

import pytest

from jaxspec import roofline
from pallas_kernels import compiling
from pallas_kernels.target import CHIPS


def test_chips_have_links_and_links_chips():
  assert roofline.LINKS.keys() == CHIPS.keys()


@pytest.mark.parametrize("topology", compiling.TOPOLOGIES)
def test_devices_are_known_by_what_jax_calls_them(tpu_compiler, topology):
  kind = compiling.device(topology).device_kind
  assert roofline.chip(kind) and roofline.link(kind)
