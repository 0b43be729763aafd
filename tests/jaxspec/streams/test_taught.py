# SPDX-License-Identifier: Apache-2.0
"""Folders of streams: what is written is read, and only for its own model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import adapters
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.streams import layout as layouts
from jaxspec.streams import taught
from tests.conftest import tiny_config

LAYOUT = layouts.auditing(positions="rows").without("auditor", "user")


@pytest.fixture
def folder(small, tmp_path):
  adapter = adapters.Adapter.init(small, rank=2)
  adapter = adapter.replace(weights=jax.tree.map(
      lambda w: w + 0.1, adapter.weights))
  taught.save(tmp_path, small, LAYOUT, jnp.ones((4, 32)), adapter)
  return tmp_path


def test_what_is_written_is_read(folder, small):
  model, layout = taught.load(folder, small)
  assert layout == LAYOUT == taught.layout_of(folder)
  np.testing.assert_array_equal(model.embedding, np.ones((4, 32)))
  changed = model.backbone.layers[0].out[...]
  assert np.any(np.asarray(changed) != np.asarray(small.layers[0].out[...]))
  # Without an adapter the model is as it was.
  taught.save(folder / "plain", small, layouts.reading(), jnp.ones((3, 32)))
  model, _ = taught.load(folder / "plain", small)
  assert model.backbone is small


def test_what_is_for_another_model_is_refused(folder):
  other = Transformer(tiny_config(depth=2), random_source(1))
  with pytest.raises(InputError, match="made for the model"):
    taught.load(folder, other)


@pytest.mark.parametrize("change, words", [
    ({"layout": None}, "list of streams"),
    ({"layout": {"streams": [{"name": "a", "wrong": 1}]}}, "no field"),
    ({"adapter": "../elsewhere"}, "adapter must be"),
    ({"ids": 3}, r"\[3, 32\]"),
    ({"kind": "adapter"}, "of kind"),
])
def test_a_wrong_config_is_one_sentence(folder, small, change, words):
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(InputError, match=words):
    taught.load(folder, small)
