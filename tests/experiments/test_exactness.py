# SPDX-License-Identifier: Apache-2.0
"""The exactness experiment: it sees what it should, and excuses little."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import exactness
from experiments.exactness import Combination
from jaxspec.generator import Generator
from jaxspec.options import Options, as_request
from jaxspec.sampling import gumbel

SAMPLED = Options(max_new_tokens=12, temperature=0.8, top_p=0.9)


def options(one, index):
  if one.sampled:
    return dataclasses.replace(SAMPLED, seed=index)
  return Options(max_new_tokens=12)


@pytest.fixture
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 64, 6).tolist() * 2 for _ in range(8)]


@pytest.fixture
def make(small):
  def generator(one):
    model = exactness.with_windows(small, 4 if one.windowed else None)
    return Generator(model, drafter=one.drafter, rows=one.rows, capacity=48,
                     cache=one.cache)
  return generator


PLAN = [
    (plain := Combination(windowed=True), None),
    (dataclasses.replace(plain, cache="window", rows=3,
                         drafter="prompt_lookup:length=3"), plain)]


@pytest.mark.slow
def test_speculation_is_exact_and_a_second_run_reads_it(
    make, prompts, quick_compiles, tmp_path):
  def run(make):
    said = []
    journal = exactness.Journal(tmp_path / "x.partial", {"seed": 0})
    runs = exactness.run(PLAN, make, prompts, options, texts=3,
                         journal=journal, say=said.append)
    return runs, said
  runs, said = run(make)
  assert not exactness.failures(runs)
  found = runs[1]
  assert found["prompts"] == len(prompts) and found["accepted"] > 0
  assert 0 < found["rounding"]["gap"] < 1e-4
  assert exactness.summarise(runs)["float32"]["diverged"] == found["diverged"]

  def never(one):
    raise AssertionError(f"{one} was decoded again")
  assert run(never) == (runs, said)
  # Another setting is another result.
  with pytest.raises(AssertionError, match="decoded again"):
    exactness.run(PLAN, never, prompts, options, texts=3, say=said.append,
                  journal=exactness.Journal(tmp_path / "x.partial", {}))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_wrong_token_is_not_excused(make, prompts, quick_compiles, sampled):
  one = Combination(sampled=sampled)
  plain = make(one)
  reference = exactness.decode(plain, one, prompts[:2],
                               lambda i: options(one, i))
  reference["answers"] = {str(k): v for k, v in reference["answers"].items()}
  first, second = reference["answers"].values()
  wrong = [*first[:2], (first[2] + 1) % 64, *first[3:]]
  differences = exactness.judge(
      plain, reference, {"answers": {"0": wrong, "1": second[:-1]}},
      prompts[:2], lambda i: options(one, i), gap=1e-4)
  assert [(d["prompt"], d["position"], d["excused"]) for d in differences] == [
      (0, 2, False), (1, 11, False)]
  assert differences[0]["margin"] > 1e-4 and differences[0]["top2"] > 1e-4
  assert differences[1]["margin"] == math.inf


def test_the_margin_of_a_greedy_token():
  logits = np.array([1.0, 4.0, 3.5, 0.0], np.float32)
  found = exactness.margin(logits, 1, 2, Options(), 7)
  assert found == {"margin": 0.5, "by_top_p": False, "top2": 0.5}
  assert exactness.margin(logits, 1, 3, Options(), 7)["margin"] == 4.0


def test_the_margin_of_a_token_that_top_p_ruled_out():
  """It is far from the threshold, or close to it; its noise may be large."""
  probs = np.array([0.6, 0.295, 0.1, 0.005])
  logits = np.log(probs) * SAMPLED.temperature
  for seed in range(100):
    one = dataclasses.replace(SAMPLED, seed=seed, top_p=0.89)
    key = as_request([one], [1], (), vocab=4, stops=1, biases=1).sampling.key
    noise = np.asarray(gumbel(key, jnp.full(1, 9), 4))[0]
    scores = np.log(probs) + noise
    if scores.argmax() == 2:                # ruled out, for 0.895 >= 0.89
      break
  ours = int(scores[:2].argmax())
  found = exactness.margin(logits.astype(np.float32), ours, 2, one, 9)
  way = math.log(0.895 / 0.105) - math.log(0.89 / 0.11)
  assert found["margin"] == pytest.approx(way * one.temperature, rel=1e-3)
  assert found["by_top_p"]
  far = exactness.margin(logits.astype(np.float32), ours, 2,
                         dataclasses.replace(one, top_p=0.7), 9)
  assert far["margin"] > 1.0


def test_what_must_not_be():
  run = {"name": "x", "drafter": "prompt_lookup", "accepted": 3,
         "unexcused": 0}
  assert not exactness.failures([run])
  assert "not explained" in exactness.failures([run | {"unexcused": 1}])[0]
  assert "nothing" in exactness.failures([run | {"accepted": 0}])[0]


def test_the_plan_covers_every_prompt_cache_and_batch():
  plan = exactness.plan("prompt_lookup", 8, 3, 2)
  covered = {}
  for one, reference in plan:
    assert reference is None or (reference, None) in plan
    if one.speculative and one.dtype == "float32":
      assert one.windowed == (one.cache == "window")
      for key in ((one.cache, one.sampled), (one.rows, one.sampled)):
        covered.setdefault(key, set()).update(one.indices(200))
  for sampled in (False, True):
    for key in ("contiguous", "paged", "window", 1, 8):
      assert covered[key, sampled] == set(range(200))
