# SPDX-License-Identifier: Apache-2.0
"""Blocks are tried, and the fastest of those that work are written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import blocks, timing, tuning
from pallas_kernels.case import collect
from pallas_kernels.target import Target, aim
from tests.pallas_kernels import samples

INTERPRETED = Target("tpu", "TPU v5 lite", interpret=True)


@pytest.fixture(autouse=True)
def few(monkeypatch):
  """Fewer neighbours, so that tests are quick."""
  monkeypatch.setattr(tuning, "FACTORS", (0.5, 1, 2))


@pytest.fixture
def clock(monkeypatch):
  """Times by hand: what each size of block takes."""
  takes = {}

  def measure(call, arguments, donated, **unused):
    del call, arguments, donated, unused
    return takes.get(dict(blocks.trial.value)["bump", "8,512"], 1.0)

  monkeypatch.setattr(timing, "measure", measure)
  return takes


def tune(*cases):
  return list(tuning.tune(cases, INTERPRETED))


def test_the_fastest_is_entered(clock):
  clock[256] = 0.5
  (trials,) = tune(samples.case())
  # 128 is the heuristic's.
  assert [t.blocks for t in trials] == [128, 64, 256]
  assert all(t.seconds for t in trials)
  assert tuning.winner(trials).blocks == 256
  table = {"TPU v5 lite": {"other": {"k": 1}}}
  tuning.enter(table, INTERPRETED, trials)
  assert table == {"TPU v5 lite": {"other": {"k": 1}, "bump": {"8,512": 256}}}


def test_the_heuristic_stays_where_nothing_is_clearly_faster(clock):
  clock[256] = 0.99
  (trials,) = tune(samples.case())
  assert tuning.winner(trials).blocks == 128


def test_a_key_is_tried_once(clock):
  assert len(tune(samples.case(), samples.case("the same"))) == 1


def test_what_does_not_compile_is_no_candidate(clock):
  def tpu(x, w, state, *, target):
    if blocks.choose("bump", target, "8,512", lambda: 128) > 128:
      raise RuntimeError("out of VMEM\nand much more")
    return samples._xla(x, w, state)

  (trials,) = tune(samples.case(tpu=tpu))
  vain = {t.blocks: t.reason for t in trials if t.seconds is None}
  assert vain == {256: "out of VMEM"}


@pytest.mark.parametrize("wrong", [
    lambda y, state: (y, state + 1), lambda y, state: (y * 1.1, state)])
def test_what_gives_another_result_is_no_candidate(clock, wrong):
  clock[64] = 0.1

  def tpu(x, w, state, *, target):
    y, state = samples._xla(x, w, state)
    if blocks.choose("bump", target, "8,512", lambda: 128) == 64:
      return wrong(y, state)
    return y, state

  (trials,) = tune(samples.case(tpu=tpu))
  (vain,) = (t for t in trials if t.seconds is None)
  assert vain.blocks == 64 and "another" in vain.reason
  assert tuning.winner(trials).blocks == 128


def test_several_choices_one_after_another(monkeypatch):
  """The second is tried with the best of the first."""
  def measure(*unused, **also_unused):
    now = dict(blocks.trial.value)
    return {64: 0.5}.get(now["bump", "a"], 1.0) * (
        {(4, 32): 0.5}.get(now.get(("bump", "b")), 1.0))

  monkeypatch.setattr(timing, "measure", measure)
  asked = []

  def tpu(x, w, state, *, target):
    asked.append((blocks.choose("bump", target, "a", lambda: 128),
                  blocks.choose("bump", target, "b", lambda: (4, 16))))
    return samples._xla(x, w, state)

  first, second = tune(samples.case(tpu=tpu))
  assert tuning.winner(first).blocks == 64
  assert tuning.winner(second).blocks == (4, 32)
  assert len(second) == 9 and (64, (4, 32)) in asked
  assert (128, (4, 32)) not in asked


def test_an_entry_stands_where_it_is_looked_for():
  """A kernel may be made of another op's, and ask for that one's blocks."""
  def tpu(x, w, state, *, target):
    blocks.choose("other", target, "key", lambda: 128)
    return samples._xla(x, w, state)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timing, "measure", lambda *args, **kw: 1 / dict(
        blocks.trial.value)["other", "key"])
    (trials,) = tune(samples.case(tpu=tpu))
  table = {}
  tuning.enter(table, INTERPRETED, trials)
  assert table == {"TPU v5 lite": {"other": {"key": 256}}}


def test_what_refuses_is_told():
  (trials,) = tune(samples.case(dtype=jnp.float16))
  assert trials[0].seconds is None and "no TPU has float16" in trials[0].reason


GPU = Target("gpu", "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("op, name, wanted", [
    ("tree_attention", "llama3-8b, decode of 4096",
     {("tree_attention", "8,1,32,8,128,5120"): (4, 2)}),
    ("quantized_matmul", "llama3-8b gate, 8 rows, int8",
     {("streamed_matmul", "1,14336,4096,int8"): (128, 6)}),
    ("fused_mlp", "llama3-8b, 1 rows, bf16",
     {("fused_mlp", "2,14336,4096,bfloat16"): (128, 4),
      ("fused_mlp", "1,4096,14336,bfloat16"): (128, 6)})])
def test_kernels_of_a_gpu_ask_too(op, name, wanted):
  (case,) = (c for c in collect([op]) if c.name == name)
  with aim(GPU), blocks.watch() as asked:
    jax.eval_shape(lambda *args: case.call(*args, implementation="gpu"),
                   *case.arguments)
  assert asked == wanted
  assert all(len(tuning.candidates(guess)) > 4 for guess in asked.values())


def test_candidates():
  assert tuning.candidates(1) == [1, 2]
  assert tuning.candidates(8) == [8, 4, 16]
  assert tuning.candidates((1, 8)) == [
      (1, 8), (1, 4), (1, 16), (2, 4), (2, 8), (2, 16)]


def test_without_an_accelerator():
  with pytest.raises(tuning.InputError, match="this machine has only a cpu"):
    tuning.local_target()
  assert tuning.local_target(interpret=True).interpret is True


def test_calls_wait_for_one_another():
  """As many as were asked for, each on what the one before left behind."""
  case = samples.case()
  x, w, state = case.sample(0)
  seen = []

  def call(x, w, state):
    y, after = case.call(x, w, state)
    jax.debug.callback(lambda s: seen.append(float(s)), state[0, 0],
                       ordered=True)
    return y, after

  run = timing.repeated(call, case.donated)
  total = run(3, x, w, state)
  jax.effects_barrier()
  start = float(state[0, 0])
  np.testing.assert_allclose(seen, [start, start + 1, start + 2], rtol=1e-6)
  y = float(case.call(x, w, state)[0][0, 0])
  np.testing.assert_allclose(total, 3 * y, rtol=1e-2)


def test_a_donated_argument_needs_a_result_like_it():
  case = samples.case()
  with pytest.raises(ValueError, match="is donated, and no result is like it"):
    timing.repeated(case.call, (1,))(1, *case.sample(0))


def test_measured_times_grow_with_the_work():
  def call(x):
    return jax.lax.fori_loop(0, 40, lambda _, y: jnp.sin(x @ y), x)
  small, large = (timing.measure(call, (jnp.ones((n, n)),), repeats=3,
                                 seconds=0.01) for n in (8, 256))
  assert 0 < small < large
