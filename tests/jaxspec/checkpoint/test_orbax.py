# SPDX-License-Identifier: Apache-2.0
"""Orbax folders: saved from one mesh, restored onto another, self-contained."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import sharding
from jaxspec.checkpoint import open_checkpoint, orbax
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer, abstract_source


@pytest.fixture
def saved(folder, tmp_path):
  """The small model of `folder`, as an Orbax folder."""
  first = open_checkpoint(str(folder))
  target = tmp_path / "orbax"
  orbax.save(
      target,
      first.config,
      first.weight,
      tokenizer=first.tokenizer,
      generation=first.generation,
  )
  shutil.rmtree(tmp_path / "model", ignore_errors=False)
  return first, target


def test_folder_is_enough_by_itself(folder, tmp_path):
  first = open_checkpoint(str(folder))
  weights = {path: first.weight(path) for path in first.shapes}
  tokenizer = first.tokenizer
  orbax.save(
      tmp_path / "o",
      first.config,
      weights.__getitem__,
      tokenizer=tokenizer,
      generation=first.generation,
  )
  shutil.rmtree(folder)
  second = open_checkpoint(str(tmp_path / "o"))
  assert second.config == first.config
  assert second.generation == first.generation
  assert second.tokenizer.fingerprint == tokenizer.fingerprint
  for path, weight in weights.items():
    found = second.weight(path)
    assert found.dtype == weight.dtype
    np.testing.assert_array_equal(found, weight)


def _abstract(config, mesh, dtype):
  """Shapes, dtypes and shardings by path, as `Transformer` asks for them."""
  like = {}
  inner = abstract_source(dtype, mesh)

  def source(path, shape, axes, wanted=None):
    like[path] = inner(path, shape, axes, wanted)
    return like[path]

  Transformer(config, source)
  return like


def test_restore_onto_another_mesh(folder, tmp_path):
  first = open_checkpoint(str(folder))
  one = sharding.make_mesh({"tensor": 2})
  source = first.source(
      lambda array, axes: sharding.place(array, axes, one), jnp.float32
  )
  like = _abstract(first.config, one, jnp.float32)
  arrays = {}

  def keep(path, shape, axes, wanted=None):
    arrays[path] = source(path, shape, axes, wanted)
    return arrays[path]

  Transformer(first.config, keep)
  assert like.keys() == arrays.keys() == first.shapes.keys()
  orbax.save(tmp_path / "o", first.config, arrays.__getitem__)
  two = sharding.make_mesh({"data": 2, "tensor": 1})
  for mesh, dtype in ((two, jnp.float32), (one, jnp.bfloat16)):
    like = _abstract(first.config, mesh, dtype)
    second = open_checkpoint(str(tmp_path / "o"))
    model = Transformer(
        second.config,
        second.source(
            lambda array, axes: pytest.fail("not through the host"), like=like
        ),
    )
    qkv = model.layers[1].qkv[...]
    assert qkv.sharding == like["layers.1.qkv"].sharding
    assert qkv.dtype == dtype
    np.testing.assert_array_equal(qkv, first.weight("layers.1.qkv"))
    assert model.final_norm[...].dtype == jnp.float32


def test_weights_pass_through_put_too(saved):
  _, target = saved
  checkpoint = open_checkpoint(str(target))
  source = checkpoint.source(
      lambda array, axes: jnp.asarray(array), jnp.float32
  )
  model = Transformer(checkpoint.config, source)
  np.testing.assert_array_equal(
      model.layers[0].down[...], checkpoint.weight("layers.0.down")
  )


def test_existing_folder_is_kept(saved):
  first, target = saved
  with pytest.raises(InputError, match="already holds"):
    orbax.save(target, first.config, lambda path: None)


def test_save_cut_short(saved):
  _, target = saved
  (target / orbax.MARK).unlink()
  with pytest.raises(InputError):
    open_checkpoint(str(target))
  with pytest.raises(InputError, match="cut short"):
    orbax.Orbax(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 9"),
        ({"config": None}, "lacks its config"),
        ({"config": {"family": "llama"}}, "sizes of a model"),
    ],
)
def test_mark_that_is_refused(saved, change, message):
  _, target = saved
  path = target / orbax.MARK
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(InputError, match=message):
    open_checkpoint(str(target))


def test_sizes_that_are_not_the_weights(saved):
  _, target = saved
  path = target / orbax.MARK
  content = json.loads(path.read_text())
  content["config"]["mlp"] = 47
  path.write_text(json.dumps(content))
  with pytest.raises(InputError, match=r"gate.*\(48, 32\).*\(47, 32"):
    open_checkpoint(str(target))
  content["config"] |= {"mlp": 48, "qk_norm": True}
  path.write_text(json.dumps(content))
  with pytest.raises(InputError, match="no weight 'layers.0.q_norm'"):
    open_checkpoint(str(target))


def test_shapes_asked_for_are_checked(saved):
  _, target = saved
  checkpoint = open_checkpoint(str(target))
  wrong = {"final_norm": jax.ShapeDtypeStruct((31,), jnp.float32)}
  with pytest.raises(InputError, match=r"final_norm.*\(32,\), \(31,\)"):
    checkpoint.restore(wrong)


def test_weights_that_are_gone(saved):
  _, target = saved
  shutil.rmtree(target / "weights")
  with pytest.raises(InputError, match="no whole Orbax checkpoint"):
    open_checkpoint(str(target))
