# SPDX-License-Identifier: Apache-2.0
"""A part of a weight is read from the parts of tensors that make it."""

import itertools

import numpy as np
import pytest

from jaxspec.models import weights
from tests.conftest import tiny_config

MOE = dict(experts=4, experts_per_token=2)
STACKED = dict(fused_gate_up="", fused_down="", stacked_gate="gates",
               stacked_up="ups", stacked_down="downs")


class File:
  """Random tensors, and how much of them was read."""

  def __init__(self, config, names, fused):
    self._draw = np.random.default_rng(0).standard_normal
    self._tensors, self.read_numbers = {}, 0
    self._config, self._names, self._fused = config, names, fused

  def has(self, name):
    return self._fused or name.endswith(("gates", "ups", "downs"))

  def _read(self, name, shape, part):
    whole = self._tensors.setdefault(name, self._draw(shape, np.float32))
    assert whole.shape == shape
    self.read_numbers += whole[part].size
    return whole[part]

  def weight(self, path, part=None):
    return weights.assemble(path, self._config, self._names, self._read,
                            self.has, part)


@pytest.mark.parametrize(
  "sizes, names, fused",
  [
    (dict(qkv_bias=True, qk_norm=True, post_norms=True), {}, False),
    (dict(kv_heads=4), dict(norm_offset=1.0), False),
    (MOE, {}, False),
    (MOE, {}, True),
    (MOE, STACKED, False),
  ],
  ids=["dense", "one query a head", "experts apart", "experts fused",
       "experts stacked"],
)
def test_a_part_is_that_part_and_no_more_is_read(sizes, names, fused):
  config = tiny_config(depth=1, tied=False, **sizes)
  file = File(config, weights.Names(**names), fused)
  for path, shape in weights.shapes(config).items():
    whole = file.weight(path)
    assert whole.shape == shape
    # Halves of every dimension, and quarters of every two.
    halves = [(slice(0, n), slice(0, n // 2), slice(n // 2, n)) for n in shape]
    for part in itertools.product(*halves):
      file.read_numbers = 0
      found = file.weight(path, part)
      np.testing.assert_array_equal(found, whole[part])
      # Query, key and value of one head stand together in the weight alone,
      # and so do gate and up of experts; meshes split by heads and experts.
      among = dict(qkv=(1, 2), qkv_bias=(1, 2), gate_up=(1, 2)).get(
          path.rpartition(".")[2], ())
      if all(part[i] == slice(0, shape[i]) for i in among):
        assert file.read_numbers == found.size
      else:
        assert file.read_numbers <= whole.size


def test_jax_asks_with_open_slices():
  file = File(tiny_config(), weights.Names(), False)
  part = (slice(None), slice(None), slice(None), slice(8, None))
  np.testing.assert_array_equal(file.weight("layers.0.qkv", part),
                                file.weight("layers.0.qkv")[part])
