# SPDX-License-Identifier: Apache-2.0
"""Every case of every op: compiled for real chips, and counted."""

import pathlib
import zlib

import jax
import pytest

from pallas_kernels import compiling, floors, records, support
from pallas_kernels.case import collect
from pallas_kernels.matmul.cases import exits

RESULTS = pathlib.Path(floors.__file__).parents[1] / "experiments/results"
CASES = [pytest.param(case, id=f"{case.op}: {case.name}")
         for case in collect()]


def by_day(case, topology):
  """Whether it is compiled in the quick tests: a second of CPU each.

  The odd sizes of SmolLM2 for one chip and a GPU, an eighth of the others for
  another chip and a GPU. (What is written down is asked for all.)
  """
  if case.name.startswith("smollm2"):
    return topology in ("v5e", "h100")
  return topology in ("tpu7x", "h100") and zlib.crc32(
      case.name.encode()) % 8 == 0


@pytest.fixture(scope="module")
def device(tpu_compiler):
  """A device of a topology, by its name."""
  return compiling.device


@pytest.mark.parametrize("case, topology", [
    pytest.param(case, topology, id=f"{topology}, {case.op}: {case.name}",
                 marks=() if by_day(case, topology) else pytest.mark.slow)
    for case in collect() for topology in compiling.TOPOLOGIES])
def test_the_tpu_compiler_takes_it(case, topology, device):
  outcome = compiling.compile_tpu(case, topology, device(topology))
  assert outcome.status == "compiles", outcome.reason


# What no GPU kernel takes of each op's cases, by words of their names.
NOT_FOR_GPUS = {
    "tree_attention": ("int8", "float8", "streams"),
    "proposal_head": ("constrained", "say 10"),
    "streamed_matmul": ("int4",), "quantized_matmul": ("int4",),
    "fused_mlp": ("int8", "smollm2")}


@pytest.mark.parametrize("case", [
    pytest.param(case, id=f"{case.op}: {case.name}",
                 marks=() if by_day(case, "h100") else pytest.mark.slow)
    for case in collect()])
def test_a_gpu_takes_it_or_says_why_not(case):
  outcome = compiling.lower_gpu(case)
  refused = any(word in case.name for word in NOT_FOR_GPUS.get(case.op, ()))
  assert outcome.status == ("refuses" if refused else "lowers"), outcome.reason
  assert not refused or "use " in outcome.reason


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_moves_hardly_more_than_it_must(case):
  arguments = _bytes(case.arguments)
  results = _bytes(jax.eval_shape(
      lambda *args: case.call(*args, implementation="xla"), *case.arguments))
  assert 0 < case.least_bytes <= arguments + results
  assert case.least_bytes <= (case.least_units or case.least_bytes)
  assert 1 <= floors.grain(case) <= floors.MOST
  # A slot is no unit of memory; of all other ops the least bytes are whole
  # units.
  assert case.op == "commit_kv" or floors.grain(case) == floors.ratio(case)


@pytest.mark.parametrize("case", CASES)
def test_samples_fit(case):
  if _bytes(case.arguments) > 64 << 20:
    pytest.skip("large")
  made = case.sample(0)
  assert jax.tree.structure(made) == jax.tree.structure(case.arguments)
  assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(
      jax.tree.leaves(made), jax.tree.leaves(case.arguments)))


@pytest.mark.medium
def test_the_table_in_the_readme():
  """Renew it: python -m pallas_kernels support --readme=FILE."""
  text = (pathlib.Path(floors.__file__).parent / "README.md").read_text()
  assert text == support.insert(text, support.table(
      support.ask_all(collect())))


def test_the_floors_written_down_are_of_all_cases():
  """Renew them: python -m pallas_kernels floors --json=FILE."""
  rows = records.load(RESULTS / "kernels_floors.json")
  found = {(row["op"], row["case"]) for row in rows}
  assert {(case.op, case.name) for case in collect()} <= found
  assert all(row["ratio_to_units"] <= floors.MOST for row in rows
             if row["op"] != "early_exit_stream")
  assert [row for row in rows if row["op"] == "early_exit_stream"
          ] == floors.exit_records(list(exits()))


def test_what_leaving_early_saves_in_the_readme():
  """Renew it: python -m pallas_kernels floors --readme=FILE."""
  text = (pathlib.Path(floors.__file__).parent / "README.md").read_text()
  assert text == support.insert(
      text, floors.exit_table(list(exits())), "exits")


def test_every_case_is_written_down_for_every_target():
  """Renew it: python -m pallas_kernels compile --json=FILE, which goes on."""
  rows = records.load(RESULTS / "kernels_compile.json")
  assert {(row["op"], row["case"], row["target"]) for row in rows} >= {
      (case.op, case.name, target) for case in collect()
      for target in [*compiling.TOPOLOGIES, "h100"]}
  assert all(compiling.read(row).good for row in rows)
  text = (pathlib.Path(floors.__file__).parent / "README.md").read_text()
  assert text == support.insert(text, compiling.summary(rows), "compiled")


def _bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
