# SPDX-License-Identifier: Apache-2.0
"""Tables of stream embeddings: found by either name, refused if of another
width, added to every token of their stream."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from jaxspec.checkpoint.hf import HuggingFace
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.options import Options
from jaxspec.streams import layout as layouts
from jaxspec.streams import model as models
from jaxspec.streams.model import StreamModel
from jaxspec.streams.session import Streams
from tests.conftest import tiny_config
from tests.jaxspec.streams import tables
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


def published(folder, backbone, table, **config):
  """A folder as section 7 of arXiv:2605.12460 published it: a Qwen3, a vector
  for each stream, and in each layer a norm that only gates by role would use.
  """
  tensors = tables.published_tensors(backbone) | {
      "model.channel_embedding.weight": np.asarray(table)} | {
          f"model.layers.{at}.self_attn.gate_in_norm.weight": np.ones(
              backbone.config.width, np.float32)
          for at in range(backbone.depth)}
  folder.mkdir()
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(
      tables.published_config(backbone, "qwen3") | {
          "architectures": ["Qwen3ForCausalLM"], "num_channels": len(table),
          **config}))
  return str(folder)


@pytest.fixture(scope="module")
def qwen():
  config = tiny_config(family="qwen3", depth=2, qk_norm=True)
  return tinted(Transformer(config, random_source(0, scale=1.5)), ids=10)


@pytest.mark.medium
def test_a_published_folder_answers_as_its_model(
    qwen, tmp_path, quick_compiles):
  layout = layouts.thoughts(1)
  folder = published(tmp_path / "stream-qwen3", qwen.backbone, qwen.embedding,
                     role_gating_enabled=False)
  loaded = Generator.load(folder, dtype="float32")
  options = Options(max_new_tokens=12)

  def rows(streams):
    with streams.open(given={"output": [5]}, options=options) as session:
      session.push("user", [7, 9, 30])
      return [row.tokens for row in session.rows(8)]
  found = rows(Streams.of(loaded, layout, embedding=folder, room=24))
  assert found == rows(Streams(qwen, layout, room=24))
  bare = rows(Streams(StreamModel(qwen.backbone), layout, room=24))
  assert found[4:] != bare[4:] and len(found) > 12


def test_gates_by_role_are_refused(qwen, tmp_path):
  folder = published(tmp_path / "gated", qwen.backbone, qwen.embedding,
                     role_gating_enabled=True)
  with pytest.raises(InputError, match="role_gating_enabled=true"):
    HuggingFace(folder)
  with HuggingFace(published(tmp_path / "silent", qwen.backbone,
                             qwen.embedding)) as checkpoint:
    assert checkpoint.config.family == "qwen3"


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
