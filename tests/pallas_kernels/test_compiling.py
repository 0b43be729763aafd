# SPDX-License-Identifier: Apache-2.0
"""What is said of kernels that compile, and of those that do not."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compiling, records, schedules
from pallas_kernels.case import collect
from pallas_kernels.errors import InputError
from tests.pallas_kernels import samples

ROOT = pathlib.Path(compiling.__file__).parent.parent


@pytest.fixture(scope="module")
def v5e():
  try:
    found = compiling.device("v5e")
  except InputError as e:
    pytest.skip(str(e))
  cache = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  yield found
  jax.config.update("jax_enable_compilation_cache", cache)


def test_a_kernel_that_compiles(v5e):
  outcome = compiling.compile_tpu(samples.case(), "v5e", v5e)
  assert outcome.good and outcome.status == "compiles" and not outcome.reason
  assert outcome.kernels == ("bump.1",)
  # Three inputs and two outputs, twice each but for the one that stays.
  assert 0.13e6 < outcome.vmem < 0.5e6
  assert outcome.temporaries < 1e4 and outcome.schedule is None


@pytest.mark.parametrize("case, status, reason", [
    (samples.case(columns=520), "fails",
     "ValueError: 520 columns are no multiple of 128"),
    (samples.case(dtype=jnp.float16), "refuses",
     "bump: tpu: no TPU has float16; use bfloat16, or xla"),
    (samples.case(tpu=lambda x, w, state, *, target: samples._xla(x, w, state)),
     "fails", "no kernel is in the program"),
    # Nothing takes over the memory of what another type is made of.
    (samples.case(donated=(1,)), "fails", "262144 bytes are donated, but 0 are "
     "taken over"),
])
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_kernel_that_does_not(v5e, case, status, reason):
  outcome = compiling.compile_tpu(case, "v5e", v5e)
  assert (outcome.status, outcome.reason) == (status, reason)
  assert not outcome.good


def test_the_compilers_reason_is_told(v5e):
  """Mosaic's, which lowering alone does not know."""
  from jax.experimental import pallas as pl

  def kernel(x, y):
    y[...] = x[:, pl.ds(8 * pl.program_id(0), 128)]

  def tpu(x, w, state, *, target):
    y = pl.pallas_call(
        kernel, grid=(2,), in_specs=[pl.BlockSpec(x.shape, lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
    return y, state

  outcome = compiling.compile_tpu(samples.case(tpu=tpu), "v5e", v5e)
  assert outcome.status == "fails"
  assert "multiple of 128" in outcome.reason


def test_a_gpu_may_refuse():
  refused = compiling.lower_gpu(samples.case())
  assert refused.good and refused.status == "refuses"
  assert refused.reason == "bump: gpu: rows below 64; use xla"
  cheats = samples.case(gpu=lambda x, w, state, *, target: samples._xla(
      x, w, state))
  failed = compiling.lower_gpu(cheats)
  assert not failed.good and failed.reason == "no kernel is in the program"


def test_a_gpu_kernel_lowers():
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def gpu(x, w, state, *, target):
    def body(x, out):
      out[...] = x[...] + 1
    y = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(
        state.shape, state.dtype))(state)
    return x, y

  outcome = compiling.lower_gpu(samples.case(gpu=gpu, rows=128))
  assert outcome.status == "lowers", outcome.reason


@pytest.fixture
def copied(tmp_path, monkeypatch):
  """The package, where its files may be edited."""
  here = tmp_path / records._HERE.name
  shutil.copytree(records._HERE, here, ignore=shutil.ignore_patterns("*.pyc"))
  monkeypatch.setattr(records, "_HERE", here)
  records.sources.cache_clear()
  yield here
  records.sources.cache_clear()


OPS = list({case.op: case for case in collect()}.values())


def folder(case):
  return compiling._module(case.sample).split(".")[1]


def test_what_is_found_depends_on_the_sources_of_its_op(copied):
  """Also where a call is settled in part, and so is no function."""
  def digests():
    records.sources.cache_clear()
    return {(folder(case), name, case.op): compiling.source_of(case, name)
            for case in OPS for name in ("v5e", "h100")}

  assert any(isinstance(case.call, functools.partial) for case in OPS)
  before, folders = digests(), sorted(set(map(folder, OPS)))
  # Ops of one folder share their files, others do not; nor do platforms.
  assert len(set(before.values())) == 2 * len(folders) == 10
  edits = [*((f, file, name) for f in folders
             for file, name in (("tpu", "v5e"), ("gpu", "h100"))),
           ("matmul", "cases", None), ("matmul", "op", None)]
  for edited, file, name in edits:
    path = copied / edited / f"{file}.py"
    text = path.read_text()
    path.write_text(text + "# Edited.\n")
    changed = {at for at, digest in digests().items() if digest != before[at]}
    path.write_text(text)
    wanted = {at for at in before if at[0] == edited and name in (at[1], None)}
    # A kernel may ask that of another folder what it takes.
    assert wanted <= changed, (edited, file)
    assert not [at for at in changed if name not in (at[1], None)], edited
  assert digests() == before


def test_unknown_topologies():
  with pytest.raises(InputError, match="'v9'; there are v5e, v5p, v6e, tpu7x"):
    compiling.device("v9")


def test_the_table():
  good = compiling.Outcome(
      "op", "a | b", "v5e", "compiles", seconds=0.51, vmem=3 << 20,
      temporaries=2048, schedule=schedules.Schedule(
          300, 200, {"MXU": 0.5, "VALU": 0.001, "SALU": 0.9}, 4, 2))
  bad = compiling.Outcome("op", "c", "v6e", "fails", "too large")
  lines = compiling.table([good, bad]).splitlines()
  assert lines[2:] == [
      r"| op | a \| b | v5e | compiles | 0.5 | 3.00 | 2 | 300 | 200 | MXU 50% "
      "| 4 |",
      "| op | c | v6e | fails: too large | 0.0 |  |  |  |  |  |  |"]
  assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


UTILIZATION = """== CAPACTIY:
MXU, VALU, XLU, EUP, VLOAD:FILL, VSTORE:SPILL
    4     2     1     1     3     1
== UTILIZATION:
0 1 0 0 0 0
0 1 0 0 0 0
4 2 0 0 2 0
0 2 0 0 0 1
0 0 0 0 0 0
0 2 0 0 0 0
0 1 0 0 0 0
"""
BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s4898_s0 = inlined_call_operand.hbm [shape: bf16[8,4096]]
 0x1 : not a bundle */ }
   0x1 LB: > { %v0 = vld }
   0x2 LB: > > { %v1 = vmatmul }
   0x3 PF: > > { %v2 = vadd }
   0x4   :  {}
   0x5   : > { %v4 = vadd
 window_bounds: (1, 32) */ }
   0x6   :  { %5 = vsyncpa [#allocation4], 0 }
"""


def test_schedules_are_read():
  """The loop that works is told from the one around it."""
  schedule = schedules.parse(UTILIZATION, BUNDLES)
  assert schedules._loops(BUNDLES) == [0, 1, 2, 2, 2, 1, 0]
  assert (schedule.bundles, schedule.loop) == (7, 3)
  assert (schedule.spills, schedule.fills) == (1, 2)
  assert schedule.utilization["MXU"] == pytest.approx(4 / 12)
  assert schedule.utilization["VALU"] == pytest.approx(4 / 6)


def test_two_loops_side_by_side():
  assert schedules._loops(textwrap.dedent("""\
      0x1 LB: > { a }
      0x2 LB: > { b }
      0x3   : > { c }
      0x4   :  { d }
      0x5 LB: > { e }""")) == [1, 2, 2, 0, 3]


def test_what_the_compiler_dumps_is_read(v5e, tmp_path):
  """In a process of its own: libtpu reads its flags once."""
  program = f"""
    import dataclasses, json, pathlib
    from pallas_kernels import compiling
    from tests.pallas_kernels import samples
    dump = pathlib.Path({str(tmp_path / "dump")!r})
    compiling.prepare(dump)
    outcome = compiling.compile_tpu(
        samples.case(), "v5e", compiling.device("v5e"), dump)
    assert not list(dump.iterdir())
    print(json.dumps(dataclasses.asdict(outcome)))"""
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)],
                        cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  schedule = json.loads(done.stdout.splitlines()[-1])["schedule"]
  assert 50 < schedule["loop"] < schedule["bundles"] < 500
  assert 0.02 < schedule["utilization"]["MXU"] < 1
  assert schedule["spills"] == 0
