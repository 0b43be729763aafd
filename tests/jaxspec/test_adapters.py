# SPDX-License-Identifier: Apache-2.0
"""Adapters change a model as the formula says, and no other model.

Held here: an untrained adapter changes no bit; merged is base plus the product
computed by hand, and unmerged says the same; folders come back bit for bit, and
those of another model are refused; a merged model has a fingerprint of its own
even where no weight shows it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxspec import adapters, heads, sharding
from jaxspec.adapters import Adapter
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from jaxspec.models.transformer import Transformer, random_source, source_of
from jaxspec.quantization import quantize
from jaxspec.reading import read
from tests.conftest import tiny_config
from tests.jaxspec import cycles

pytestmark = pytest.mark.usefixtures("quick_compiles")

TOKENS = jnp.asarray(
    np.random.default_rng(0).integers(0, 64, (2, 9)), jnp.int32)


def trained(model, scale=0.1, **options) -> Adapter:
  """An adapter whose every weight is something."""
  adapter = Adapter.init(model, **{"rank": 3} | options)
  rng = np.random.default_rng(5)
  return adapter.replace(weights={
      path: value + scale * rng.standard_normal(value.shape, np.float32)
      for path, value in adapter.weights.items()})


def logits(model):
  return model.unembed(read(model, TOKENS)[model.depth])


# What it does.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_untrained_adapter_changes_no_bit(dtype):
  model = Transformer(tiny_config(), random_source(0, dtype))
  adapter = Adapter.init(model, rank=2)
  assert len(adapter.weights) == 4 * 5 * 2
  made = adapters.merged(model, adapter)
  assert cycles.leaves_equal(jax.tree.leaves(made), jax.tree.leaves(model))
  assert heads.fingerprint(made) == heads.fingerprint(model)
  np.testing.assert_array_equal(logits(adapters.applied(model, adapter)),
                                logits(model))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merged_is_the_sum_computed_by_hand(dtype):
  model = Transformer(tiny_config(), random_source(0, dtype))
  adapter = trained(model, alpha=1.5, targets=["down", "qkv", "gate"],
                    layers=[3, 1])
  assert adapter.layers == (1, 3)
  assert adapter.targets == ("qkv", "gate", "down")
  made = adapters.merged(model, adapter)
  before, after = source_of(model), source_of(made)
  for layer in range(4):
    for name in ("qkv", "out", "gate", "up", "down", "attn_norm"):
      path = f"layers.{layer}.{name}"
      old, new = before(path, None, None), after(path, None, None)
      assert new.dtype == old.dtype
      if layer not in (1, 3) or name not in adapter.targets:
        assert new is old
        continue
      up, down = (np.asarray(adapter.weights[f"{path}.{part}"], np.float64)
                  for part in ("up", "down"))
      change = 1.5 / 3 * np.einsum("...r,rd->...d", up, down)
      assert np.max(np.abs(change)) > 1e-3
      wanted = np.asarray(old, np.float64) + change
      np.testing.assert_allclose(
          np.asarray(new, np.float64), wanted,
          rtol=1e-6 if dtype == jnp.float32 else 2**-8, atol=1e-6)


def test_unmerged_says_the_same():
  model = Transformer(tiny_config(), random_source(0))
  adapter = trained(model)
  beside = logits(adapters.applied(model, adapter))
  np.testing.assert_allclose(
      beside, logits(adapters.merged(model, adapter)), atol=1e-4)
  assert np.max(np.abs(beside - logits(model))) > 0.1


def test_a_merge_can_take_the_model_over():
  model, again = (Transformer(tiny_config(), random_source(0))
                  for _ in range(2))
  adapter = trained(model)
  made = adapters.merged(again, adapter, consume=True)
  wanted = adapters.merged(model, adapter)
  assert cycles.leaves_equal(jax.tree.leaves(made), jax.tree.leaves(wanted))
  assert heads.fingerprint(made) == heads.fingerprint(wanted)
  assert model.layers[0].qkv[...].is_deleted() is False


def test_it_lies_beside_the_model():
  mesh = sharding.make_mesh({"tensor": 2})
  model = Transformer(tiny_config(), random_source(
      0, put=lambda x, axes: sharding.place(x, axes, mesh)))
  adapter = trained(model)
  specs = {path.removeprefix("layers.2."): tuple(w.sharding.spec)
           for path, w in adapter.weights.items()}
  assert specs["qkv.up"][0] == "tensor" and specs["out.down"][1] == "tensor"
  assert specs["up.up"][0] == "tensor" and specs["down.down"][1] == "tensor"
  made = adapters.merged(model, adapter)
  weight = made.layers[0].qkv[...]
  assert weight.sharding.spec[0] == "tensor"


# Whose it is.


@pytest.mark.parametrize("options", [
    dict(layers=[1], targets=["up"]), dict(scale=1e-9)])
def test_a_merged_model_is_another_one(options, tmp_path):
  """Also where a sample of its weights, or no weight at all, tells."""
  def model():
    return Transformer(tiny_config(), random_source(0, jnp.bfloat16))
  plain = model()
  adapter = trained(plain, **options)
  made = adapters.merged(plain, adapter)
  assert heads.fingerprint(made) != heads.fingerprint(plain)
  same = adapters.merged(model(), adapter)
  assert heads.fingerprint(made) == heads.fingerprint(same)
  other = adapters.merged(model(), adapter.replace(alpha=2.5))
  assert heads.fingerprint(made) != heads.fingerprint(other)
  # One derived from it is neither.
  assert made.identity and not quantize(made).identity
  head = heads.ExitHead.init(made, layer=1)
  heads.save(tmp_path, head, made)
  assert cycles.leaves_equal(
      heads.load(tmp_path, same, "exit").heads.tensors(), head.tensors())
  with pytest.raises(InputError, match="was made for the model"):
    heads.load(tmp_path, plain, "exit")
  # Merging twice is not merging once.
  assert heads.fingerprint(adapters.merged(made, Adapter.init(made))) == (
      heads.fingerprint(made))
  assert heads.fingerprint(adapters.merged(made, adapter)) != (
      heads.fingerprint(made))


def test_folders_round_trip(tiny, small, tmp_path):
  adapter = trained(tiny, alpha=0.75, targets=["out", "up"], layers=[0, 2])
  adapters.save(tmp_path / "new" / "folder", adapter, tiny)
  found = adapters.load(tmp_path / "new" / "folder", tiny)
  assert cycles.leaves_equal(found, adapter)
  with pytest.raises(InputError) as error:
    adapters.load(tmp_path / "new" / "folder", small)
  assert "pass adapters of this model" in str(error.value)
  with pytest.raises(InputError, match="kind 'adapter'; .* of kind 'exit'"):
    heads.load(tmp_path / "new" / "folder", tiny, "exit")
  with pytest.raises(InputError, match=r"that jaxspec\.adapters\.save wrote"):
    adapters.load(tmp_path, tiny)


@pytest.mark.parametrize("change, words", [
    (dict(format=2), "format must be"),
    (dict(model="x"), "was made for the model 'x'"),
    (dict(kind="exit"), "is of kind 'exit'"),
    (dict(rank=4), r"'layers.1.qkv.up' is F32\[2, 4, 8, 3\] where .* 4\]"),
    (dict(rank=0), r"rank must be an integer in \[1, 1024\]"),
    (dict(rank=2**40), "rank must be an integer"),
    (dict(alpha=0), "alpha must be a number"),
    (dict(alpha="1"), "alpha must be a number"),
    (dict(alpha=float("nan")), "alpha must be a number"),
    (dict(alpha=True), "alpha must be a number"),
    (dict(targets=["qkv", "qkv"]), "targets must be some of qkv, out"),
    (dict(targets=["down", "qkv"]), "targets must be some of"),
    (dict(targets=[]), "targets must be"),
    (dict(targets="qkv"), "targets must be"),
    (dict(targets=["norm"]), "targets must be"),
    (dict(targets=["qkv"]), r"'layers.1.down.down' has no place in these "),
    (dict(layers=[1, 4]), "layers must be some of 0, 1, 2, 3"),
    (dict(layers=[True]), "layers must be"),
    (dict(layers=[1, 2]), "no tensor 'layers.2.qkv.up'"),
    (dict(layers=None), "layers must be")])
def test_configs_that_say_something_else_are_refused(
    tiny, tmp_path, change, words):
  adapters.save(tmp_path, trained(tiny, targets=["qkv", "down"], layers=[1]),
                tiny)
  path = tmp_path / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(InputError, match=words):
    adapters.load(tmp_path, tiny)


def test_weights_that_are_none_are_refused(tiny, tmp_path):
  adapters.save(tmp_path, trained(tiny, layers=[1]), tiny)
  path = tmp_path / "model.safetensors"
  weights = safetensors.numpy.load_file(path)
  weights["layers.1.out.up"][3, 1] = np.nan
  safetensors.numpy.save_file(weights, path)
  with pytest.raises(InputError, match=r"'layers.1.out.up' holds NaN"):
    adapters.load(tmp_path, tiny)
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(InputError, match="not a whole safetensors file"):
    adapters.load(tmp_path, tiny)


@pytest.mark.parametrize("options, words", [
    (dict(targets=["upp"]), "not 'upp'. Did you mean 'up'"),
    (dict(targets=[]), "must change some of qkv, out, gate"),
    (dict(layers=[4]), r"some of 0-3, got \[4\]"),
    (dict(layers=[]), "some of 0-3"),
    (dict(rank=0), "rank of an adapter must be in"),
    (dict(alpha=0), "alpha of an adapter must be in")])
def test_what_cannot_be_made_is_refused(tiny, options, words):
  with pytest.raises(InputError, match=words):
    Adapter.init(tiny, **options)


def test_experts_are_left_alone():
  model = Transformer(tiny_config(experts=4, experts_per_token=2),
                      random_source(0))
  assert Adapter.init(model).targets == ("qkv", "out")
  with pytest.raises(InputError, match="can change qkv, out, not 'down'"):
    Adapter.init(model, targets=["down"])
  with pytest.raises(InputError, match="were quantized"):
    Adapter.init(quantize(Transformer(tiny_config(), random_source(0))))


@pytest.mark.medium
def test_a_generator_merges_what_it_is_given(tiny_model, tmp_path):
  plain = Generator.load(str(tiny_model), dtype="float32", capacity=64)
  adapter = trained(plain.model, scale=0.3)
  adapters.save(tmp_path / "tuned", adapter, plain.model)
  tuned = Generator.load(str(tiny_model), dtype="float32", capacity=64,
                         adapter=str(tmp_path / "tuned"))
  wanted = adapters.merged(plain.model, adapter)
  assert heads.fingerprint(tuned.model) == heads.fingerprint(wanted)
  options = plain.default_options(max_new_tokens=12)
  (one,), (other,) = (g.generate(["what?"], options) for g in (plain, tuned))
  assert one.token_ids != other.token_ids
  again = Generator(wanted, plain.tokenizer, capacity=64)
  assert again.generate(["what?"], options)[0].token_ids == other.token_ids
  # Who reads the statistics knows whose text it is.
  assert other.stats.line().endswith(f"adapter={tmp_path / 'tuned'}")
  assert "adapter" not in one.stats.line() and one.stats.adapter == ""
  with pytest.raises(InputError, match="has no config.json"):
    Generator.load(str(tiny_model), dtype="float32", adapter="nowhere")
