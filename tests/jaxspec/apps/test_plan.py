# SPDX-License-Identifier: Apache-2.0
"""The flags of plan, and what a person reads of it."""

import json
import math
import re

import pytest

from jaxspec import __main__ as front_door
from jaxspec import planning
from jaxspec.apps import plan as app
from jaxspec.hlo import Collective, Cost, Operation

GIB = 1 << 30


@pytest.fixture
def made(monkeypatch):
  """Plans without a compiler; the setups that were planned."""
  setups = []

  def make(setup, names=None, *, workers=1, scaled=False):
    setups.append(setup)
    cost = Cost(8e9, {"bf16": 1e12}, [Collective(
        "all-reduce", 131072, 8, 160.0, "score", "")])
    program = planning.Program("decode", 3.0, 0, 0, GIB, 0, {"score": cost})
    weights = planning.estimate(setup)
    return planning.Plan(
        setup, "TPU v5 lite", 15.75 * GIB, weights, 0, 0, 0, 0, 4, 3,
        {"decode": program, "prefill": program, "plain": program}, scaled)

  monkeypatch.setattr(planning, "make", make)
  monkeypatch.setattr(planning, "capacity_of", lambda topology: 15.75 * GIB)
  monkeypatch.setattr(planning, "devices", lambda topology: list(
      range(math.prod(map(int, topology.partition(":")[2].split("x"))))))
  return setups


def run(*flags: str) -> int:
  return front_door.main(["plan", *flags])


def test_it_says_what_fits_and_what_limits(made, capsys, tmp_path):
  file = tmp_path / "plan.json"
  assert run("--model=llama3-8b", "--topology=v5e:2x4", "--rows=1,8",
             "--drafter=prompt_lookup", "--acceptance=0.5",
             f"--json={file}") == 0
  out = capsys.readouterr().out
  assert [s.rows for s in made] == [1, 8]
  assert all(s.mesh == (("tensor", 8),) for s in made)
  assert "fits: 12.85 of 15.75 GiB on each device stay free" in out
  assert "160 all-reduce 20.00 MiB" in out
  assert "one pass over 4 nodes" in out and "bandwidth" in out
  assert "at 1.88 tokens a pass" in out
  assert "1.88 times plain decoding" in out
  one, eight = json.loads(file.read_text())
  assert one["setup"]["rows"] == 1 and eight["fits"]
  assert eight["tokens_per_pass"] == 1.875
  assert eight["programs"]["decode"]["collectives"]["all-reduce"] == {
      "times": 160.0, "bytes": 160.0 * 131072}


@pytest.mark.medium
def test_what_does_not_fit_comes_with_changes_that_do(made, capsys):
  assert run("--model=llama3-8b", "--topology=v5e:1x1", "--rows=2") == 1
  out = capsys.readouterr().out
  assert re.search(r"does not fit: 0\.\d\d GiB more than there are", out)
  assert "it fits, compiled, with\n    --topology=v5e:2x2" in out


@pytest.mark.medium
def test_a_sweep_ranks_by_price(made, capsys):
  assert run("--model=llama3-8b", "--topology=v5e:2x4,v5e:2x2", "--sweep",
             "--rows=4", "--price=v5e=3.6") == 0
  lines = capsys.readouterr().out.splitlines()
  lines = [line for line in lines[2:] if "does not fit" not in line]
  costs = [float(line.split()[0]) for line in lines]
  assert costs == sorted(costs) and len(costs) >= 4
  # All take as long here, so that fewer chips are cheaper.
  assert "v5e:2x2" in lines[0] and "v5e:2x4" in lines[-1]


def test_a_profile_without_a_device():
  setup = planning.Setup(planning.read_config("llama3-8b"), "v5e:1x1",
                         (("tensor", 1),))
  layer, commit = Cost(819e6), Cost(0, {"bf16": 197e9})
  program = planning.Program(
      "decode", costs={"score": Cost(2 * 819e6), "commit": commit}, operations=[
          Operation("score", "fusion", "jit(decode)/while/body/score/dot", 1.0,
                    layer),
          Operation("score", "fusion", "jit(decode)/while/body/score/dot", 1.0,
                    layer),
          Operation("commit", "custom-call", "commit_kv", 1.0, commit)])
  plan = planning.Plan(setup, "TPU v5 lite", 16e9, 1, 0, 0, 0, 0, 1, 0,
                       {"decode": program})
  lines = app.profile(plan)
  assert lines[2].split() == ["score", "2.000", "66.7%", "1562.1", "0.00",
                              "bandwidth"]
  assert lines[3].split()[-1] == "arithmetic"
  assert lines[6].split()[-4:] == ["2", "score:", "dot", "(fusion)"]
  assert "commit: commit_kv (custom-call)" in lines[7]


def test_a_picture_is_drawn(made, tmp_path):
  pytest.importorskip("matplotlib")
  file = tmp_path / "plan.png"
  assert run("--model=llama3-8b", "--topology=v5e:2x4", "--rows=1,8",
             f"--plot={file}") == 0
  assert file.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("flags, words", [
    ([], "--topology is missing"),
    (["--topology=v5e:2x2", "--rows=0"], "must be at least 1"),
    (["--topology=v5e:2x2", "--model=llama3-9b"], "Did you mean 'llama3-8b'"),
    (["--topology=v5e:2x2", "--acceptance=2"], "must be numbers in [0, 1]"),
    (["--topology=v5e:2x2", "--price=v5e=1"], "--price is for --sweep"),
    (["--topology=v5e:2x2", "--profile", "--few_layers"], "--profile is of"),
    (["--topology=v5e:2x2", "--sweep", "--mesh=tensor=4"], "leave out --mesh"),
    (["--topology=v5e:2x2", "--capacity=9999"], "in [16, 8192]"),
    (["--topology=v5e:2x2", "--prompt=4096"], "in [1, 2047]"),
    (["--topology=v5e:2x2,v5e:2x4", "--save=x", "--model=llama3-8b"],
     "--save is for one"),
    (["--topology=v5e:2x2", "--model=llama3-8b", "--sweep", "--price=v6e=1"],
     "does not say what v5e costs")])
def test_a_wrong_call_is_one_line_and_exit_code_2(made, flags, words, capsys):
  assert run(*flags) == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1


def test_a_refusal_is_in_the_compilers_words():
  setup = planning.Setup(planning.read_config("llama3-8b"), "v5e:1x1",
                         (("tensor", 1),))
  refused = planning._refusal(RuntimeError(
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
      "for HLO temporaries (22.05G) exceeds available HBM (15.75G)."))
  plan = planning.Plan(
      setup, "TPU v5 lite", 15.75 * GIB, 22.0 * GIB, 0, 0, 0, 0, 1, 0,
      {"decode": planning.Program("decode", refused=refused)})
  assert not plan.fits
  assert app.verdict(plan) == (
      "does not fit the 15.75 GiB of a device: weights, cache and text alone "
      "are 6.25 GiB more; the compiler: Ran out of memory on HBM, the total "
      "memory required for HLO temporaries (22.05G) exceeds available HBM "
      "(15.75G)")
