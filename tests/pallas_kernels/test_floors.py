# SPDX-License-Identifier: Apache-2.0
"""Least times by hand, and what is shown of them."""

import dataclasses

import jax
import pytest

from pallas_kernels import floors, support
from pallas_kernels.case import collect
from pallas_kernels.dispatch import dispatch
from pallas_kernels.errors import InputError
from pallas_kernels.matmul.cases import DEPTHS, SHARES, exits
from pallas_kernels.matmul.stream import expected_bytes
from pallas_kernels.target import CHIPS, Chip, Target, aim
from tests.pallas_kernels import samples

# A byte takes a second, and so do ten operations.
CHIP = Chip(1.0, 10.0, 20.0, 1, 1)


def test_the_longer_of_two_times():
  case = samples.case()
  f = floors.floor(case, "by hand", CHIP)
  assert f.memory_seconds == case.least_bytes
  assert f.compute_seconds == case.operations / 10
  assert f.bound == "memory" and f.seconds == f.memory_seconds
  f = floors.floor(case, "by hand", Chip(1e9, 10.0, 20.0, 1, 1))
  assert f.bound == "compute" and f.seconds == f.compute_seconds


def test_published_figures():
  """A v5e reads its whole memory in 21 ms, an H100 in 26."""
  seconds = {kind: chip.memory / chip.bandwidth for kind, chip in CHIPS.items()}
  assert seconds["TPU v5 lite"] == pytest.approx(0.021, rel=0.01)
  assert seconds["NVIDIA H100 80GB HBM3"] == pytest.approx(0.0256, rel=0.01)


def test_what_is_shown():
  case = samples.case()
  lines = floors.table([case]).splitlines()
  assert lines[0].count("|") == lines[2].count("|") == len(CHIPS) + 8
  assert lines[2].startswith("| bump | small, bump 8 | 0.3072 | 0.3072 | 1.000 "
                             "|  | 0.0021 | 0.375 | ")
  (record,) = floors.records([case])
  assert record["ratio"] == record["ratio_to_units"] == 1.0
  assert record["chips"]["TPU v5 lite"]["seconds"] == pytest.approx(
      case.least_bytes / 819e9)


FIRST = list({case.op: case for case in reversed(collect())}.values())


def kernels(jaxpr):
  """The calls of kernels in a program."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
    for inner in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
        yield from kernels(inner)


# Bytes by hand of the first case of ops that move the same whatever rows hold,
# all of SmolLM2: what is multiplied, weights, scales, rows that are live, layer
# and whether any is, what comes out.
BY_HAND = {
    "streamed_matmul": ("gate, 8 rows, bf16", 8 * 576 * 2 + 1536 * 576 * 2
                        + 8 * 4 + 2 * 4 + 8 * 1536 * 4),
    "quantized_matmul": ("gate, 8 rows, int8", 8 * 576 * 2 + 1536 * 576
                         + 1536 * 4 + 2 * 4 + 8 * 1536 * 4),
    "fused_mlp": ("1 rows, bf16", 576 * 2 + 3 * 1536 * 576 * 2
                  + 576 * 4 + 4 + 2 * 4 + 576 * 4),
    # Of a row come out four sums, and three numbers of a candidate.
    "proposal_head": ("say 1 for 1", 576 * 2 + 49152 * 576 * 2 + 576 * 4
                      + (4 + 3) * 4),
}


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.op)
def test_a_kernel_tells_the_compiler_what_it_costs(case):
  """How much rows hold is not known when it does: what they have room for."""
  with aim(Target("tpu", "TPU v5 lite")):
    traced = jax.make_jaxpr(lambda *args: case.call(
        *args, implementation="tpu"))(*case.arguments)
  (call,) = kernels(traced.jaxpr)
  cost = call.params["cost_estimate"]
  if case.op != "accept_nodes":        # which multiplies no matrices
    assert cost.flops >= 0.98 * case.operations
  assert cost.bytes_accessed >= 0.98 * case.least_bytes
  if case.op in BY_HAND:
    name, count = BY_HAND[case.op]
    assert case.name.endswith(name) and "smollm2" in case.name
    assert cost.bytes_accessed == case.moved_bytes == count
    assert cost.flops == pytest.approx(case.operations, rel=0.02)


def test_what_is_read_falls_to_the_lower_layers_when_all_rows_leave():
  """And not before; by hand, of the 30 layers of SmolLM2 ten are the lower."""
  found = {(e.model, e.rows, e.share): e for e in exits()}
  weights, rows = 3 * 576 * 1536 * 2, 8
  beside = rows * 576 * 2 + rows * 576 * 4 + 576 * 4 + 4 * rows + 8
  for share in SHARES:
    e = found["smollm2-135m", rows, share]
    read = 10 if share == 1 else 30
    assert e.moved_bytes == read * weights + 30 * beside
    assert found["smollm2-135m", 1, share].moved_bytes is None or share % 1 == 0
  for (_, rows, share), e in found.items():
    full = found[e.model, rows, 0.0]
    assert e.depth == DEPTHS[e.model] and e.lower == e.depth // 3
    # Almost: rows come and go in every layer.
    assert e.mean_bytes == pytest.approx(expected_bytes(
        share, rows=rows, lower=e.lower, depth=e.depth,
        layer_bytes=full.moved_bytes // e.depth), rel=0.02)
    if share == 1:
      assert e.moved_bytes == e.mean_bytes
      assert e.moved_bytes / full.moved_bytes == pytest.approx(
          e.lower / e.depth, rel=0.02)
  shown = floors.exit_table(list(exits())).splitlines()
  assert shown[2].endswith("| 160 | 160 | 160 | 160 | 54 |")
  assert len(shown) == 2 + 3 * 3


def test_where_a_unit_of_memory_is_larger_than_what_is_written():
  case = dataclasses.replace(samples.case(), moved_bytes=3 << 20,
                             least_units=2 << 20)
  assert floors.grain(case) == 1.5
  assert "| 1.500 |" in floors.table([case])


def test_support_is_what_the_dispatcher_says():
  answers = support.ask_all([samples.case()])
  assert {(a.probe, a.implementation): a.taken for a in answers} == {
      (probe, name): taken
      for probe, tpu in (("small, bump 8", True),
                         ("small, bump 8, float32", True),
                         ("small, bump 8, float16", False))
      for name, taken in (("tpu", tpu), ("gpu", False), ("xla", True))}
  assert support.table(answers).splitlines() == [
      "| op | | tpu | gpu | xla |", "|---|---|---|---|---|",
      "| bump | small, bump 8 | yes | no (1) | yes |",
      "| bump | small, bump 8, float32 | yes | no (1) | yes |",
      "| bump | small, bump 8, float16 | no (2) | no (1) | yes |", "",
      "1. rows below 64; use xla",
      "2. no TPU has float16; use bfloat16, or xla"]


def test_models_that_are_answered_alike_are_one_row():
  answers = [a for name, case in (
      ("smollm2-135m, bump 8", samples.case()),
      ("llama3-70b, one of 8, bump 8", samples.case()),
      ("smollm2-135m wide, bump 8", samples.case()),
      ("llama3-8b wide, bump 8", samples.case(dtype="float16")))
             for a in support.ask(case, name)]
  assert [line.split("|")[2].strip()
          for line in support.table(answers).splitlines()[2:5]] == [
              "bump 8", "smollm2-135m wide, bump 8", "llama3-8b wide, bump 8"]


def test_a_table_in_a_readme():
  text = "a\n<!-- support -->\nold\n<!-- end of support -->\nb\n"
  assert support.insert(text, "new") == text.replace("old", "new")
  with pytest.raises(InputError, match="has no lines '<!-- support -->'"):
    support.insert("a", "new")


def test_an_implementation_that_is_not_there():
  case = samples.case()
  only = lambda *args, implementation: dispatch(
      "bump", {"xla": samples._xla}, implementation, *args)
  answers = support.ask(dataclasses.replace(case, call=only))
  assert [a.taken for a in answers] == [None, None, True]


def test_a_mistake_is_no_refusal():
  with pytest.raises(ValueError, match="520 columns are no multiple of 128"):
    support.ask(samples.case(columns=520))
