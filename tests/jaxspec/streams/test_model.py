# SPDX-License-Identifier: Apache-2.0
"""Tables of stream embeddings: found by either name, refused if of another
width, added to every token of their stream."""

import dataclasses

import numpy as np
import pytest
import safetensors.numpy

from jaxspec.errors import InputError
from jaxspec.streams import layout as layouts
from jaxspec.streams import model as models
from jaxspec.streams.model import StreamModel
from tests.jaxspec.streams.tables import tinted


def test_a_table_is_found_by_either_name(small, tmp_path):
  assert models.load(tmp_path, small) is None
  table = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
  models.save(tmp_path / "ours", table)
  (tmp_path / "theirs").mkdir()
  safetensors.numpy.save_file(
      {"model.channel_embedding.weight": table, "other": table[:1]},
      tmp_path / "theirs" / "model.safetensors")
  for folder in ("ours", "theirs"):
    found = models.load(tmp_path / folder, small)
    np.testing.assert_array_equal(np.asarray(found), table)
  models.save(tmp_path / "narrow", table[:, :8])
  with pytest.raises(InputError, match="32 wide"):
    models.load(tmp_path / "narrow", small)
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / "x.safetensors").write_bytes(b"no")
  with pytest.raises(InputError, match="cannot read"):
    models.load(tmp_path / "bad", small)


def test_each_stream_has_its_own_and_the_prefix_another(small):
  model = tinted(small, ids=4)
  layout = layouts.auditing()
  np.testing.assert_array_equal(
      model.tint(layout), np.asarray(model.embedding)[[1, 2, 3, 0]])
  bare = dataclasses.replace(layout, prefix_id=None)
  assert not np.asarray(model.tint(bare))[-1].any()
  assert StreamModel(small).tint(layout) is None


def test_layouts_beyond_the_model_are_refused(small):
  with pytest.raises(InputError, match="id 2, and the model has embeddings"):
    tinted(small, ids=2).check(layouts.reading())
  with pytest.raises(InputError, match="silence token 481"):
    tinted(small).check(layouts.thoughts())
  tinted(small).check(layouts.thoughts(1))
