# SPDX-License-Identifier: Apache-2.0
"""What would be measured on a card, on little of it and without one."""

import dataclasses
import json
import math

import jax.numpy as jnp
import pytest

from experiments import kernels_gpu
from experiments.kernels_gpu import Card, Layer
from pallas_kernels.target import Target
from tests.pallas_kernels import samples

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def card():
  """Times by hand: every call takes two microseconds."""
  return dataclasses.replace(Card.dry(), clock=lambda *unused: 2e-6)


def test_an_op(card):
  found = kernels_gpu.measure_op(samples.case(), card)
  assert found["right"] and found["error"] < 1e-2 and found["equal"] == 1
  assert found["seconds"] == found["xla_seconds"] == 2e-6
  assert found["share_of_floor"] == pytest.approx(
      samples.case().least_bytes / 819e9 / 2e-6)


def test_an_op_that_gives_something_else(card):
  def tpu(x, w, state, *, target):
    y, state = samples._xla(x, w, state)
    return y.at[0, 0].add(10), state
  found = kernels_gpu.measure_op(samples.case(tpu=tpu), card)
  assert not found["right"] and found["error"] > 0.1


def test_ops_that_refuse_or_fail(card):
  def broken(x, w, state, *, target):
    raise RuntimeError("out of memory\nand more")
  found = kernels_gpu.measure_ops(
      [samples.case(dtype=jnp.float16), samples.case("b", tpu=broken),
       samples.case("c")], card)
  assert "no TPU has float16" in found[0]["refuses"]
  assert found[1]["failed"] == "RuntimeError: out of memory"
  assert found[2]["right"]
  shown = kernels_gpu.table({"ops": found}).splitlines()
  assert shown[3] == "| bump | b | RuntimeError: out of memory |  |  |  |  |"
  assert shown[4].startswith("| bump | c | yes | ")


def test_compare():
  x = jnp.array([1.0, -4.0, jnp.inf])
  same = kernels_gpu.compare({"a": x, "n": jnp.arange(4)},
                             {"a": x, "n": jnp.arange(4)})
  assert same == {"error": 0.0, "equal": 1.0, "right": True}
  off = kernels_gpu.compare(x.at[0].add(0.5), x)
  assert off["error"] == pytest.approx(0.125) and not off["right"]
  assert kernels_gpu.compare(x.at[2].set(9), x)["error"] == math.inf
  ints = kernels_gpu.compare(jnp.arange(4), jnp.array([0, 1, 2, 9]))
  assert ints["equal"] == 0.75 and not ints["right"]


def test_attention(card):
  """The others that run here agree with ours; the rest say why not."""
  layer = Layer(rows=2, heads=4, kv_heads=2, size=16, held=40,
                dtype=jnp.float32)
  card = dataclasses.replace(card, target=Target("cpu", "cpu"))
  runs = {r["name"]: r for r in kernels_gpu.measure_attention(layer, 3, card)}
  for name in ("ours, xla", "jax.nn, xla"):
    assert runs[name]["right"] and runs[name]["error"] < 1e-5
    assert runs[name]["share_of_bandwidth"] > 0
  assert "cuDNN" in runs["jax.nn, cudnn"]["failed"]
  assert "it takes one token" in runs["jax decode_attention"]["failed"]


def test_a_card_nobody_knows():
  with pytest.raises(SystemExit, match="nothing is known of 'cpu'"):
    Card.here(3)


def test_weights_are_made_on_the_device():
  config = kernels_gpu.tiny()
  model = kernels_gpu.Transformer(config, kernels_gpu.device_source(
      jnp.bfloat16))
  gate, up = (getattr(model.layers[0], name)[...] for name in ("gate", "up"))
  assert gate.dtype == jnp.bfloat16
  assert float(jnp.std(gate.astype(jnp.float32))) == pytest.approx(
      config.width ** -0.5, rel=0.05)
  assert not jnp.array_equal(gate, up)
  weights = 2 * (2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 128) + 256 * 64) + (
      4 * 5 * 64)                                  # norms are in float32
  keys = 2 * 2 * 10 * 2 * 16 * 2
  assert kernels_gpu.pass_bytes(model, 10) == weights + keys


def test_dry_run(tmp_path, monkeypatch):
  """All of it, and what is written."""
  from absl import flags
  values = flags.FlagValues()
  monkeypatch.setattr(kernels_gpu, "FLAGS", values)
  for name, kind in (("dry_run", flags.DEFINE_boolean),
                     ("parts", flags.DEFINE_list), ("op", flags.DEFINE_list),
                     ("output", flags.DEFINE_string)):
    kind(name, None, "", flag_values=values)
  values(["test", "--dry_run", "--parts=ops,model", "--op=",
          f"--output={tmp_path / 'k.json'}"])
  monkeypatch.setattr(kernels_gpu, "collect", lambda ops: [
      samples.case(), samples.case("larger", columns=1024)])
  kernels_gpu.main([])
  written = json.loads((tmp_path / "k.json").read_text())
  assert written["dry_run"] and written["target"] == "TPU v5 lite"
  (op,) = written["runs"]["ops"]
  assert op["case"] == "small, bump 8" and op["right"]
  for found in written["runs"]["model"].values():
    assert "seconds_per_token" in found["decode"]
    assert [r["nodes"] for r in found["passes"]] == [1, 8]
    assert all("seconds" in r for r in found["passes"])
