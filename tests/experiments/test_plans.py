# SPDX-License-Identifier: Apache-2.0
"""The table of plans counts by hand what the compiler counts."""

import pytest

from experiments import plans
from jaxspec import planning
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_a_line_is_held_against_what_is_counted_by_hand(monkeypatch):
  # Wide enough that what is not a matrix counts little.
  config = tiny_config(depth=3, width=128, mlp=256, heads=4, kv_heads=2,
                       head_size=32, tied=False)
  monkeypatch.setattr(planning, "read_config", lambda name: config)
  line = plans.Line("tiny", "cpu:1", "tensor=1", rows=4, capacity=64,
                    prompt=16, dtype="float32", whole=True)
  found = plans.examine(line)
  assert found["weights_and_cache_to_hand"] == pytest.approx(1, abs=0.02)
  assert found["flops_to_hand"] == pytest.approx(1, abs=0.02)
  assert found["uncounted"] == [] and found["key"] == line.key
  assert found["fits"]
  row = plans.table([found]).splitlines()[-1]
  assert "tiny float32 (whole) | cpu:1 | tensor=1 | 4 |" in row


def test_lines_are_told_apart_and_cover_what_they_must():
  keys = [line.key for line in plans.LINES]
  assert len(set(keys)) == len(keys)
  models = {line.model for line in plans.LINES}
  assert models == {"llama3-8b", "llama3-70b", "llama3.1-70b", "qwen3-8b",
                    "mixtral-8x7b", "qwen3-30b-a3b"}
  for model in models - {"llama3.1-70b"}:
    kinds = {line.topology.partition(":")[0] for line in plans.LINES
             if line.model == model}
    assert {"v5e", "v5p", "v6e", "h100"} <= kinds, model
  drafted = {(line.topology, line.drafter.partition(":")[0])
             for line in plans.LINES if line.speculates}
  assert drafted == {(topology, drafter) for topology in ("v6e:2x2", "h100:1")
                     for drafter in ("prompt_lookup", "medusa")}
  # The file of lines without drafts names none.
  assert not any("drafter" in line.key for line in plans.LINES
                 if not line.speculates)


def test_a_line_is_made_again_when_its_sources_change(monkeypatch):
  line = plans.Line("llama3-8b", "v5e:2x2")
  drafted = plans.Line("llama3-8b", "v5e:2x2", drafter="medusa")
  assert line.sources == plans.Line("llama3-70b", "v5e:4x4").sources
  assert line.sources != drafted.sources
  assert line.sources.partition("-")[0] == drafted.sources.partition("-")[0]
  row = dict(programs={"decode": {}}, sources=line.sources, commit="abc")
  names = ("decode",)
  assert plans.is_made(row, names, line.sources, False)
  assert not plans.is_made(row, names, "other", False)
  assert plans.is_made(row, names, "other", True)
  assert not plans.is_made(row, ("decode", "prefill"), line.sources, True)
  assert not plans.is_made(None, names, line.sources, True)
  old = dict(programs={"decode": {}})             # says nothing of them
  assert not plans.is_made(old, names, line.sources, False)


@pytest.mark.medium
def test_a_line_with_drafts_is_held_against_the_pass_over_them(monkeypatch):
  config = tiny_config(depth=3, width=128, mlp=256, heads=4, kv_heads=2,
                       head_size=32, tied=False)
  monkeypatch.setattr(planning, "read_config", lambda name: config)
  line = plans.Line("tiny", "cpu:1", "tensor=1", rows=2, capacity=64,
                    prompt=16, dtype="float32", whole=True,
                    drafter="prompt_lookup:length=3")
  found = plans.examine(line)
  assert found["nodes"] == 4 and found["key"].endswith("length=3")
  assert found["flops_to_hand"] == pytest.approx(1, abs=0.02)
  assert found["programs"].keys() == {"decode", "plain"}
  assert "at_acceptance" not in found          # of a CPU no figures are known
  row = plans.table([found]).splitlines()[-1]
  assert "tiny float32, prompt_lookup:length=3 (whole) | cpu:1" in row
  assert row.endswith("| not known |")


def test_a_mixture_reads_all_experts_and_multiplies_a_few():
  config = tiny_config(experts=4, experts_per_token=2)
  dense = tiny_config()
  mlp = 3 * config.width * config.mlp
  more = plans.products(config, 1, 0, 0) - plans.products(dense, 1, 0, 0)
  assert more == 2 * config.depth * (mlp + 4 * config.width)
  setup = planning.Setup(config, "", rows=0)
  other = planning.Setup(dense, "", rows=0)
  # Tied: the table is read as the unembedding.
  more = plans.step_bytes(setup) - plans.step_bytes(other)
  assert more == 2 * config.depth * (3 * mlp + 4 * config.width)


@pytest.mark.medium
def test_the_public_figure_is_explained():
  step = dict(seconds=0.02, limit="bandwidth", memory=0.015, arithmetic=0.001,
              interconnect=0.005)
  said = plans.against_the_public_figure(
      dict(roofline=dict(step=step), tokens_per_second_per_row=50.0))
  # Sixteen chips of 819 GB/s over 70 GB.
  assert said["if_each_chip_read_a_sixteenth"] == pytest.approx(187, rel=0.02)
  assert said["published_to_that"] == pytest.approx(0.85, abs=0.02)
  assert said["of_the_step"] == dict(memory=0.75, interconnect=0.25)
  # A sixth of the weights, those of attention, are read by twice as many.
  assert said["weights_each_chip_reads_bytes"] == pytest.approx(
      said["weights_read_bytes"] / 16 * (1 + 1 / 6), rel=0.02)
