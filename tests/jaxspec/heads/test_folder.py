# SPDX-License-Identifier: Apache-2.0
"""Heads come back as they were kept, and only for their own model.

Held here: folders of every kind round trip bit for bit; another model, another
kind, and files that do not say what their config says are refused, each by
name; the fingerprint does not see the dtype and sees every part of a model.
"""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxspec import heads, sharding
from jaxspec.errors import InputError
from jaxspec.heads import EagleHead, ExitHead, HydraHeads, MedusaHeads
from jaxspec.models.transformer import Transformer, random_source
from tests.conftest import tiny_config
from tests.jaxspec import cycles

KINDS = {
    "medusa": lambda model: MedusaHeads.init(model, heads=2, rank=4),
    "medusa whole": lambda model: MedusaHeads.init(model, heads=3, blocks=2),
    "medusa trimmed": lambda model: MedusaHeads.init(
        model, tokens=[9, 3, 3, 40]),
    "eagle": EagleHead.init,
    "eagle trimmed": lambda model: EagleHead.init(
        model, taps=[0, 0, 1, 2], mlp=8, tokens=range(7, 50)),
    "hydra": lambda model: HydraHeads.init(model, heads=3),
    "hydra trimmed": lambda model: HydraHeads.init(
        model, heads=2, rank=4, tokens=range(7, 50)),
    "exit": lambda model: ExitHead.init(model, layer=1),
    "exit trimmed": lambda model: ExitHead.init(
        model, layer=1, mlp=8, attention=True, tokens=range(7, 50)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_folders_round_trip(small, tmp_path, kind):
  made = KINDS[kind](small)
  heads.save(tmp_path / "new" / "folder", made, small)
  found = heads.load(tmp_path / "new" / "folder", small, kind.split()[0])
  assert cycles.leaves_equal(found.heads, made)
  assert found.choices == () and found.accuracy is None


def test_what_was_measured_comes_back(small, tmp_path):
  accuracy = np.random.default_rng(0).random((2, 5))
  heads.save(tmp_path, KINDS["medusa"](small), small,
             choices=[(0,), (1, 2)], accuracy=accuracy)
  found = heads.load(tmp_path, small, "medusa")
  assert found.choices == ((0,), (1, 2))
  np.testing.assert_array_equal(found.accuracy, accuracy)


LEARNED = heads.Calibration("learned", 0.5, 2.0, 0.1, 0.95,
                            (1.0, -2.0, 0.5, 0.0, 3.0))


@pytest.mark.parametrize("calibration", [
    LEARNED, heads.Calibration("top", 0.0, 1.0, 0.05, 0.9)])
def test_calibrations_come_back(small, tmp_path, calibration):
  heads.save(tmp_path, KINDS["exit"](small), small)
  assert heads.load(tmp_path, small, "exit").calibration is None
  heads.note(tmp_path, LEARNED)
  heads.note(tmp_path, calibration)
  found = heads.load(tmp_path, small, "exit")
  assert found.calibration == calibration
  assert cycles.leaves_equal(found.heads, KINDS["exit"](small))
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      "config.json", "model.safetensors"]
  with pytest.raises(InputError, match="has no config.json"):
    heads.note(tmp_path / "nowhere", LEARNED)


@pytest.mark.parametrize("change, words", [
    (dict(measure="tops"), "one of top, margin, entropy, learned"),
    (dict(measure=["top"]), "calibration must be"),
    (dict(first=3), r"numbers in \[0, 2\]"),
    (dict(later=-0.1), r"numbers in \[0, 2\]"),
    (dict(later=None), "numbers in"), (dict(first=float("nan")), "numbers in"),
    (dict(first=True), "numbers in"), (dict(risk=2), r"numbers in \[0, 1\]"),
    (dict(confidence="x"), "numbers in"), (dict(more=1), "calibration must be"),
    (dict(coefficients=None), "coefficients are 5 numbers"),
    (dict(coefficients=[1, 2]), "coefficients are 5 numbers"),
    (dict(coefficients=[1, 2, 3, 4, "x"]), "coefficients are 5 numbers"),
    (dict(measure="top"), "coefficients are 5 numbers")])
def test_wrong_calibrations_are_refused(small, tmp_path, change, words):
  heads.save(tmp_path, KINDS["exit"](small), small)
  heads.note(tmp_path, LEARNED)
  path = tmp_path / "config.json"
  config = json.loads(path.read_text())
  config["calibration"] |= change
  path.write_text(json.dumps(config))
  with pytest.raises(InputError, match=words):
    heads.load(tmp_path, small, "exit")


def test_gemma_like_and_mixture_models_have_heads(tmp_path):
  """The layer is dense, sees everything, and is shaped like the model's."""
  model = Transformer(
      tiny_config(depth=3, windows=(4, 4, None), experts=4,
                  experts_per_token=2, post_norms=True, qk_norm=True,
                  embed_scale=3.0, logits_cap=5.0), random_source(0))
  for make in (KINDS["eagle"], KINDS["eagle trimmed"]):
    made = make(model)
    assert made.config.windows == (None,) and not made.config.experts
    assert made.config.ropes == model.config.ropes[2:]
    heads.save(tmp_path, made, model)
    assert cycles.leaves_equal(
        heads.load(tmp_path, model, "eagle").heads, made)


def test_heads_lie_beside_the_model(tmp_path):
  """In its dtype and on its mesh."""
  mesh = sharding.make_mesh({"tensor": 2})
  model = Transformer(tiny_config(depth=2), random_source(
      0, jnp.bfloat16, put=lambda x, axes: sharding.place(x, axes, mesh)))
  for kind in ("medusa trimmed", "eagle trimmed"):
    heads.save(tmp_path, KINDS[kind](model), model)
    found = heads.load(tmp_path, model, kind.split()[0]).heads
    floats = [x for x in jax.tree.leaves(found)
              if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.sharding.mesh == mesh for x in floats)
    assert {x.dtype.name for x in floats} <= {"bfloat16", "float32"}
  assert found.layers[0].qkv[...].dtype == jnp.bfloat16
  assert found.layers[0].attn_norm[...].dtype == jnp.float32
  assert found.layers[0].qkv[...].sharding.spec[0] == "tensor"


# Another model.


def test_fingerprint_does_not_see_the_dtype():
  def model(seed, dtype):
    return Transformer(tiny_config(depth=2), random_source(seed, dtype))
  one = heads.fingerprint(model(0, jnp.float32))
  assert one == heads.fingerprint(model(0, jnp.bfloat16))
  assert one != heads.fingerprint(model(1, jnp.float32))
  assert len(one) == 32 and set(one) <= set("0123456789abcdef")


@pytest.mark.parametrize("part", [
    "embedding", "final_norm", "layers.0.qkv", "layers.2.down",
    "layers.3.down"])
def test_fingerprint_sees_every_part(part):
  plain = random_source(0)

  def tuned(path, *rest):
    return plain(path, *rest) + (path == part)
  assert heads.fingerprint(Transformer(tiny_config(), plain)) != (
      heads.fingerprint(Transformer(tiny_config(), tuned)))


def test_heads_of_another_model_are_refused(small, tiny, tmp_path):
  heads.save(tmp_path, KINDS["medusa"](small), small)
  with pytest.raises(InputError) as error:
    heads.load(tmp_path, tiny, "medusa")
  assert heads.fingerprint(small) in str(error.value)
  assert heads.fingerprint(tiny) in str(error.value)
  with pytest.raises(InputError, match="kind 'medusa'; .* of kind 'eagle'"):
    heads.load(tmp_path, small, "eagle")
  with pytest.raises(InputError, match="has no config.json"):
    heads.load(tmp_path / "nowhere", small, "medusa")


# Files that say something else.


@pytest.mark.parametrize("kind, change, words", [
    ("medusa", dict(heads=4), r"'up' is F32\[2, 1, 32, 4\] where .*\[4, 1"),
    ("medusa", dict(rank=None), "tensor 'up' is"),
    ("medusa", dict(vocabulary=3), "no tensor 'tokens'"),
    ("medusa", dict(heads=0), r"heads must be an integer in \[1, 16\], got 0"),
    ("medusa", dict(heads=True), "heads must be an integer"),
    ("medusa", dict(heads=2**40), "heads must be an integer"),
    ("medusa", dict(blocks="1"), "blocks must be an integer"),
    ("medusa", dict(rank=1 << 40), "rank must be an integer"),
    ("medusa", dict(format=2), "format must be"),
    ("medusa", dict(format=None), "format must be"),
    ("medusa", dict(kind=["medusa"]), "of kind"),
    ("medusa", dict(model=None), "for the model None"),
    ("medusa", dict(choices=[[0, 0, 0]]), "choices must be at most"),
    ("medusa", dict(choices=[[-1]]), "choices must be at most"),
    ("medusa", dict(choices=[[]]), "choices must be at most"),
    ("medusa", dict(choices=[0]), "choices must be at most"),
    ("medusa", dict(choices={"0": 1}), "choices must be at most"),
    ("medusa", dict(choices=[[0]] * 1025), r"got \[\[0\], .*\.\.\."),
    ("medusa", dict(accuracy=[[0.5]]), "accuracy must be 2 lists"),
    ("medusa", dict(accuracy=[[0.5], [0.5, 0.1]]), "accuracy must be"),
    ("medusa", dict(accuracy=[["a"], ["b"]]), "accuracy must be"),
    ("medusa", dict(accuracy=[[2.0], [0.5]]), "accuracy must be"),
    ("medusa", dict(accuracy=[[float("nan")], [0.5]]), "accuracy must be"),
    ("medusa trimmed", dict(vocabulary=None), "'tokens' has no place"),
    ("medusa trimmed", dict(vocabulary=2), "tensor 'tokens' is"),
    ("medusa trimmed", dict(vocabulary=65), "vocabulary must be"),
    ("eagle", dict(taps=[2, 1, 0]), "taps must be ascending"),
    ("eagle", dict(taps=[0, 1, 3]), "taps must be ascending"),
    ("eagle", dict(taps=[]), "taps must be ascending"),
    ("eagle", dict(taps="012"), "taps must be ascending"),
    ("eagle", dict(taps=[0, 1]), "'fuse_weight' is"),
    ("eagle", dict(mlp=7), "'layers.0.gate' is"),
    ("eagle", dict(mlp=0), "mlp must be an integer"),
    ("eagle trimmed", dict(vocabulary=None), "has no place"),
    ("exit", dict(layer=2), r"layer must be an integer in \[1, 1\], got 2"),
    ("exit", dict(layer=None), "layer must be an integer"),
    ("exit", dict(mlp=7), "'gate' is"),
    ("exit", dict(attention=True), "no tensor 'layers.0.attn_norm'"),
    ("exit", dict(attention=1), "attention must be true or false"),
    ("exit trimmed", dict(attention=False), "has no place")])
def test_configs_that_say_something_else_are_refused(
    small, tmp_path, kind, change, words):
  heads.save(tmp_path, KINDS[kind](small), small)
  path = tmp_path / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(InputError, match=words):
    heads.load(tmp_path, small, kind.split()[0])


def without(weights, name):
  del weights[name]


@pytest.mark.parametrize("kind, change, words", [
    ("medusa", lambda w: without(w, "up"), "no tensor 'up'"),
    ("medusa", lambda w: without(w, "down"), "no tensor 'down'"),
    ("medusa", lambda w: w.update(up=w["up"][:, :, :, :3].copy()),
     "'up' is F32"),
    ("medusa", lambda w: w.update(more=w["up"]), "'more' has no place"),
    ("medusa", lambda w: w.update(up=w["up"].astype(np.int32)), "is I32"),
    ("medusa trimmed", lambda w: w.update(tokens=w["tokens"][::-1].copy()),
     "tokens must be ascending"),
    ("medusa trimmed", lambda w: w.update(tokens=w["tokens"] + 30),
     "tokens must be ascending ids below 64"),
    ("medusa trimmed", lambda w: w.update(tokens=w["tokens"] - 10),
     "tokens must be ascending"),
    ("medusa trimmed", lambda w: w.update(tokens=w["tokens"].astype(float)),
     "'tokens' is F64"),
    ("eagle", lambda w: without(w, "layers.0.qkv"),
     "no tensor 'layers.0.qkv'"),
    ("eagle trimmed", lambda w: without(w, "lm_head"), "no tensor 'lm_head'"),
])
def test_weights_that_are_not_there_are_named(small, tmp_path, kind, change,
                                              words):
  heads.save(tmp_path, KINDS[kind](small), small)
  path = tmp_path / "model.safetensors"
  weights = safetensors.numpy.load_file(path)
  change(weights)
  safetensors.numpy.save_file(weights, path)
  with pytest.raises(InputError, match=words):
    heads.load(tmp_path, small, kind.split()[0])


def test_broken_files_are_refused(small, tmp_path):
  heads.save(tmp_path, KINDS["medusa"](small), small)
  path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
  whole = path.read_bytes()

  def refused(words):
    with pytest.raises(InputError, match=words):
      heads.load(tmp_path, small, "medusa")

  size = struct.unpack("<Q", whole[:8])[0]
  header, body = whole[8:8 + size], whole[8 + size:]
  twice = header.rstrip()[:-1] + b',"up":' + json.dumps(
      json.loads(header)["up"]).encode() + b"}"
  for content, words in [
      (whole[:-4], "not a whole safetensors file"),
      (whole[:20], "claims a header"),
      (b"", "unreadable header"),
      (struct.pack("<Q", 1 << 60) + header + body, "claims a header"),
      (struct.pack("<Q", len(twice)) + twice + body, "holds 'up' twice")]:
    path.write_bytes(content)
    refused(words)
  path.unlink()
  refused("model.safetensors")
  for content, words in [("[1]", "must hold a JSON object"), ("{", "JSON")]:
    config.write_text(content)
    refused(words)


def test_tokens_that_are_none_are_refused(small):
  for tokens in ([64], [-1], []):
    with pytest.raises(InputError, match="tokens must be ids in"):
      MedusaHeads.init(small, tokens=tokens)
