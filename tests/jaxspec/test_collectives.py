# SPDX-License-Identifier: Apache-2.0
"""What devices of a slice say to each other in a decoding step.

Read in programs compiled for TPUs that are not there, of models as wide as
published ones and one layer deep; `test_planning.py` holds that layers add up.
"""

import dataclasses
import importlib.util

import pytest

from jaxspec import planning
from jaxspec.models import architectures
from jaxspec.planning import Setup

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="pip install jax[tpu] for the TPU compiler")

ROWS = 8


def plan(name: str, topology: str, drafter: str = "autoregressive",
         **mesh: int):
  """Of one layer."""
  config = dataclasses.replace(
      planning.shallow(architectures.sizes(name), 1), vocab=1024)
  return planning.make(Setup(config, topology, tuple(mesh.items()), drafter,
                             rows=ROWS), ["decode"])


def exchanged(plan, scope: str) -> list[tuple[str, int, int, float, str]]:
  """What a scope exchanges, and what for."""
  cost = plan.programs["decode"].costs.get(scope)
  return [] if cost is None else [
      (c.kind, c.bytes, c.devices, c.times, c.name.rpartition("/")[2])
      for c in cost.collectives]


def check_silence(plan) -> None:
  """Keys, values and drafts stay where they are."""
  for scope in ("propose", "commit", "observe"):
    assert not exchanged(plan, scope)
  for c in plan.programs["decode"].costs["score"].collectives:
    assert "attention" not in c.name and "write" not in c.name
  # One number and one token of each node's best, of each shard.
  for kind, size, *_ in exchanged(plan, "verify"):
    assert kind in ("all-gather", "all-reduce")
    assert size <= 4 * ROWS * 8 * plan.nodes


@pytest.mark.parametrize("topology, data", [
    ("v6e:2x4", 1), pytest.param("v5p:2x2x2", 1, marks=pytest.mark.medium),
    pytest.param("v5e:4x4", 2, marks=pytest.mark.slow)])
def test_a_tensor_parallel_layer_sums_twice(topology, data):
  """Behind attention and behind the MLP, each the stream.

  What goes into these sums is float32, and what comes out of them bfloat16;
  the larger is counted.
  """
  found = plan("llama3-70b", topology, data=data, tensor=8)
  stream = ROWS // data * 8192 * 2
  score = exchanged(found, "score")
  assert {(*c[:3], c[4]) for c in score} == {
      ("all-reduce", 2 * stream, 8, "dot_general"),     # attention
      ("all-reduce", 2 * stream, 8, "psum"),            # the MLP's kernel
      ("all-reduce", stream, 8, "gather")}              # the embedding
  assert sum(c[3] for c in score) == 3
  check_silence(found)
  # Weights are read once, and nothing else that counts.
  layer = 8192 * (10240 + 8192 + 3 * 28672)
  read = 2 * (layer + 1024 * 8192) / 8 + found.cache
  assert found.programs["decode"].costs["score"].bytes == pytest.approx(
      read, rel=0.02)


@pytest.mark.medium
def test_nodes_that_are_verified_together_sum_as_often():
  """As one node does, each of their streams."""
  found = plan("llama3-70b", "v6e:2x4", "prompt_lookup:length=7", tensor=8)
  stream = ROWS * 8 * 8192 * 2
  score = exchanged(found, "score")
  assert {(*c[:3], c[4]) for c in score} == {
      ("all-reduce", 2 * stream, 8, "dot_general"),
      ("all-reduce", 2 * stream, 8, "psum"),
      ("all-reduce", stream, 8, "gather")}
  assert sum(c[3] for c in score) == 3 and found.nodes == 8
  check_silence(found)


@pytest.mark.medium
def test_slots_that_are_split_merge_what_they_saw():
  """Once: of each softmax its largest score, its sum and its values; no key."""
  found = plan("llama3-70b", "v6e:2x4", tensor=4, sequence=2)
  stream, heads = ROWS * 8192 * 2, ROWS * 64 // 4
  score = exchanged(found, "score")
  assert {(*c[:3], c[4]) for c in score} == {
      ("all-gather", 2 * 4 * heads * (2 + 128), 2, "all_gather"),
      ("all-reduce", 2 * stream, 4, "dot_general"),     # attention
      ("all-reduce", 2 * stream, 8, "psum"),            # the MLP's kernel
      ("all-reduce", stream, 8, "gather")}              # the embedding
  assert sum(c[3] for c in score) == 4
  for scope in ("propose", "commit", "observe"):
    assert not exchanged(found, scope)
  # A fourth of what attention weighs, an eighth of the others.
  read = (2 * 8192 * (10240 + 8192) / 4
          + 2 * 8192 * (3 * 28672 + 1024) / 8 + found.cache)
  assert found.programs["decode"].costs["score"].bytes == pytest.approx(
      read, rel=0.02)
  whole = ROWS * 8 * 2048 * 128 * 2 * 2
  assert found.cache == pytest.approx(whole / 8, rel=0.01)


@pytest.mark.medium
def test_experts_that_are_spread_sum_once():
  """Behind attention over tensor shards; behind experts over all."""
  found = plan("qwen3-30b-a3b", "v6e:2x4", expert=2, tensor=4)
  stream = ROWS * 2048 * 2
  score = exchanged(found, "score")
  assert sorted(score, key=lambda c: c[4]) == [
      ("all-reduce", 2 * stream, 4, 1, "dot_general"),
      ("all-reduce", stream, 4, 1, "gather"),           # the embedding
      ("all-reduce", 2 * stream, 8, 1, "psum")]
  check_silence(found)
