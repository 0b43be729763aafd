# SPDX-License-Identifier: Apache-2.0
"""Every device whose figures are known has all of them, and what they say of
an exchange is what a person counts."""

import pytest

from jaxspec import roofline
from jaxspec.hlo import Collective, Cost
from pallas_kernels import compiling
from pallas_kernels.target import CHIPS


def test_chips_have_links_and_links_chips():
  assert roofline.LINKS.keys() == CHIPS.keys()


@pytest.mark.parametrize("topology", compiling.TOPOLOGIES)
def test_devices_are_known_by_what_jax_calls_them(tpu_compiler, topology):
  kind = compiling.device(topology).device_kind
  assert roofline.chip(kind) and roofline.link(kind)


# A v5e sends 200 GB/s over four links, of which an exchange along an axis uses
# two: 100 GB/s. An H100 has 450 GB/s and all of it.
@pytest.mark.parametrize("kind, collective, devices, size, sent, seconds", [
    # 3 MB over 8: each device sends 2 * 7/8 of it, and half of the ring is
    # four hops, twice.
    ("TPU v5 lite", "all-reduce", 8, 3e6, 5.25e6, 52.5e-6 + 8e-6),
    ("TPU v5 lite", "all-gather", 8, 3e6, 2.625e6, 26.25e-6 + 4e-6),
    ("TPU v5 lite", "reduce-scatter", 4, 4e6, 3e6, 30e-6 + 2e-6),
    ("TPU v5 lite", "collective-permute", 8, 1e6, 1e6, 10e-6 + 1e-6),
    ("TPU v5 lite", "all-reduce", 1, 3e6, 0, 0),
    ("NVIDIA H100 80GB HBM3", "all-reduce", 8, 9e6, 15.75e6, 35e-6 + 8e-6),
    # Two of six links of 600 GB/s.
    ("TPU v5", "all-reduce", 2, 2e6, 2e6, 10e-6 + 2e-6)])
def test_an_exchange_takes_what_is_counted_by_hand(
    kind, collective, devices, size, sent, seconds):
  one = Collective(collective, int(size), devices, 1.0, "score", "")
  assert one.sent == pytest.approx(sent)
  wire = roofline.link(kind)
  assert wire and roofline._exchange(one, wire) == pytest.approx(seconds)


def test_a_step_of_70_billion_weights_on_16_chips_waits_for_exchanges():
  """Two sums a layer of eight rows over eight chips, as they are counted."""
  rows, width, depth = 8, 8192, 80
  size = rows * width * 2
  sums = Collective("all-reduce", size, 8, 2.0 * depth, "score", "")
  cost = Cost(4e9, {"bf16": 1e9}, [sums])
  time = roofline.least(cost, "TPU v5 lite")
  one = 2 * 7 / 8 * size / 100e9 + 8e-6
  assert time.interconnect == pytest.approx(160 * one)
  assert time.interconnect == pytest.approx(1.647e-3, rel=1e-3)
  assert time.seconds == pytest.approx(4e9 / 819e9 + 160 * one)


def test_eight_bits_and_32_have_peaks_of_their_own():
  def seconds(kind, **flops):
    return roofline.least(Cost(0, flops), kind).arithmetic
  assert seconds("TPU v5 lite", bf16=197e12) == pytest.approx(1)
  assert seconds("TPU v5 lite", s8=393e12) == pytest.approx(1)
  assert seconds("TPU v5 lite", f32=197e12) == pytest.approx(6)
  assert seconds("NVIDIA H200", f32=989e12) == pytest.approx(14.8)
  assert seconds("TPU7x", s8=1153e12) == pytest.approx(1)   # no published int8
  assert seconds("TPU7x", f32=1153e12) == pytest.approx(6)
