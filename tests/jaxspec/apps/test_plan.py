# SPDX-License-Identifier: Apache-2.0
"""The flags of plan, and what a person reads of it."""

import json
import math
import pathlib
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


def test_what_does_not_fit_comes_with_changes_that_do(made, capsys):
  assert run("--model=llama3-8b", "--topology=v5e:1x1", "--rows=2") == 1
  out = capsys.readouterr().out
  assert re.search(r"does not fit: 0\.\d\d GiB more than there are", out)
  assert "it fits, compiled, with\n    --dtype=int8: 6." in out
  assert "\n    --topology=v5e:2x2" in out


def test_a_sweep_ranks_by_price(made, capsys, tmp_path):
  file = tmp_path / "plans.json"
  assert run("--model=llama3-8b", "--topology=v5e:2x4,v5e:2x2,v5e:1x1",
             "--sweep", "--rows=4", "--price=v5e=3.6", f"--json={file}") == 0
  lines = capsys.readouterr().out.splitlines()[2:]
  (left,) = [line for line in lines if "left out" in line]
  assert left.startswith("  left out, weights and cache alone are 15.96 GiB of "
                         "15.75: v5e:1x1, mesh tensor=1")
  lines = [line for line in lines if "does not fit" not in line
           and line != left]
  costs = [float(line.split()[0]) for line in lines]
  assert costs == sorted(costs) and len(costs) >= 4
  # All take as long here, so that fewer chips are cheaper.
  assert "v5e:2x2" in lines[0] and "v5e:2x4" in lines[-1]
  stored = json.loads(file.read_text())
  assert stored[0]["setup"]["topology"] == "v5e:2x2"
  assert stored[0]["programs"].keys() >= {"decode", "prefill"}


@pytest.mark.parametrize("more", [["--sweep"], []])
def test_an_error_loses_no_plan(made, monkeypatch, tmp_path, more):
  file, make = tmp_path / "plans.json", planning.make

  def breaks(setup, *args, **settings):
    if made and (setup.topology, setup.mesh) != (
        made[0].topology, made[0].mesh):
      raise RuntimeError("a compiler's bug")
    return make(setup, *args, **settings)
  monkeypatch.setattr(planning, "make", breaks)
  with pytest.raises(RuntimeError, match="bug"):
    run("--model=llama3-8b", "--topology=v5e:2x4,v5e:2x2", f"--json={file}",
        "--rows=4", "--workers=1", *more)
  (stored,) = json.loads(file.read_text())
  assert stored["setup"]["topology"] == "v5e:2x4"


def test_a_gpus_share_is_said(made, monkeypatch, capsys):
  monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  assert run("--model=llama3-8b", "--topology=h100:8") == 0
  assert "of a GPU's memory jax takes 75%" in capsys.readouterr().out


LINE = dict(drafter="prompt_lookup", passes=10, accepted_by_position=[5, 2])


@pytest.mark.parametrize("lines, shares", [
    # As decode --output writes them, a line a prompt.
    ([dict(text="a", stats=LINE), dict(text="b", stats=LINE | dict(
        passes=30, accepted_by_position=[11, 2, 1]))], "0.400 0.100 0.025"),
    # As experiments do, passes of rows, and other drafters beside it.
    ([dict(runs=[dict(runs=[
        LINE | dict(passes=[4, 6]),
        LINE | dict(drafter="adaptive", passes=[1])])])], "0.500 0.200"),
    # Of one depth: not a rate that goes on.
    ([LINE | dict(accepted_by_position=[5])], "0.500 0.000")])
def test_stored_acceptance_is_read(made, tmp_path, capsys, lines, shares):
  file = tmp_path / "stored"
  file.write_text("\n".join(map(json.dumps, lines)) + "\n")
  assert run("--model=llama3-8b", "--topology=v5e:2x2",
             "--drafter=prompt_lookup", f"--acceptance={file}") == 0
  out = capsys.readouterr().out
  found = [float(x) for x in shares.split()]
  assert f"at each depth: {shares.removesuffix(' 0.000')}\n" in out
  assert f"at {1 + sum(found):.2f} tokens a pass" in out


@pytest.mark.parametrize("text, words", [
    ("words", "is no JSON"), ("{}", "holds no statistics of drafts"),
    (json.dumps(LINE | dict(drafter="medusa")),
     "statistics of medusa, and --drafter=prompt_lookup is none of them")])
def test_another_file_is_no_stored_acceptance(
    made, tmp_path, capsys, text, words):
  (tmp_path / "stored").write_text(text)
  assert run("--topology=v5e:2x2", "--drafter=prompt_lookup",
             f"--acceptance={tmp_path / 'stored'}") == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1


def test_figures_of_an_experiment_are_stored_acceptance(made, capsys):
  """Those that come with the project."""
  file = pathlib.Path(__file__).parents[3] / (
      "experiments/results/speculation.json")
  if not file.exists():
    pytest.skip("no results beside the tests")
  assert run("--model=llama3-8b", "--topology=v5e:2x2",
             "--drafter=prompt_lookup", f"--acceptance={file}") == 0
  assert re.search(r"of \d{3,} passes in .*depth: 0\.\d+ 0\.\d+",
                   capsys.readouterr().out)


def test_what_decode_cannot_be_told_is_not_saved(made, monkeypatch, capsys):
  kept = []
  monkeypatch.setattr(planning, "keep", lambda setup, folder, workers: (
      kept.append(setup) or {"decode": 1.0}))
  monkeypatch.setattr(planning, "stored_in", lambda setup: (
      setup.cache_dtype or "bfloat16"))
  flags = ["--model=llama3-8b", "--topology=v5e:2x2", "--save=a b"]
  assert run(*flags, "--cache_dtype=float32") == 2
  assert "decode has no such flag and keeps keys and values as bfloat16" in (
      capsys.readouterr().err)
  assert not kept
  assert run(*flags, "--cache_dtype=bfloat16") == 0
  out = capsys.readouterr().out
  assert "1 programs are in a b, for\n  python -m jaxspec decode " in out
  assert "--mesh=tensor=4" in out and "'--executables=a b'" in out


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


def test_a_picture_is_drawn(made, tmp_path, capsys):
  pytest.importorskip("matplotlib")
  file = tmp_path / "plan.png"
  flags = "--model=llama3-8b", "--topology=v5e:2x4", "--rows=1,8"
  assert run(*flags, f"--plot={file}") == 0
  assert file.read_bytes()[:4] == b"\x89PNG"
  assert run(*flags, f"--plot={tmp_path / 'plan.xyz'}") == 2
  assert "cannot be written" in capsys.readouterr().err


def test_a_roofline_has_a_point_a_program_below_the_chips_figures():
  pytest.importorskip("matplotlib")
  setup = planning.Setup(planning.read_config("llama3-8b"), "v5e:2x2",
                         (("tensor", 4),))
  exchange = Collective("all-reduce", 131072, 4, 64.0, "score", "")
  costs = {"decode": Cost(819e6, {"bf16": 1e9}, [exchange]),
           "prefill": Cost(819e6, {"bf16": 394e12})}
  plan = planning.Plan(
      setup, "TPU v5 lite", 16e9, 1, 0, 0, 0, 0, 1, 0,
      {name: planning.Program(name, costs={"score": cost})
       for name, cost in costs.items()})
  memory, time, roof = app.draw("llama3-8b", [plan], [0.6]).axes
  assert memory.get_xlabel().startswith("GiB")
  assert time.get_xlabel().startswith("milliseconds")
  assert roof.get_xscale() == roof.get_yscale() == "log"
  assert "FLOP a byte" in roof.get_xlabel() and "FLOP/s" in roof.get_ylabel()
  lines = {line.get_label(): line.get_xydata() for line in roof.get_lines()}
  assert lines.keys() == {"TPU v5 lite, bfloat16", "decode", "prefill"}
  slope, ridge, peak = lines["TPU v5 lite, bfloat16"]
  assert ridge == pytest.approx([197e12 / 819e9, 197e12])
  assert peak[1] == pytest.approx(197e12)
  assert slope[1] / slope[0] == pytest.approx(819e9)
  ((x, y),) = lines["decode"]
  assert x == pytest.approx(1e9 / 819e6)
  # A millisecond of memory, and what is waited for.
  waits = 64 * (1.5 * 131072 / 100e9 + 4e-6)
  assert y == pytest.approx(1e9 / (1e-3 + waits))
  ((x, y),) = lines["prefill"]
  assert x == pytest.approx(394e12 / 819e6) and y == pytest.approx(197e12)


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
    (["--topology=v5e:2x2", "--save=x", "--json=y"], "of which --json is"),
    (["--topology=v5e:2x2", "--save=x", "--plot=y"], "of which --plot is"),
    (["--topology=v5e:2x2", "--save=x", "--acceptance=0.6"],
     "of which --acceptance is"),
    (["--topology=v5e:2x2", "--save=x", "--noremedies"],
     "of which --remedies is"),
    (["--topology=v5e:2x2", "--save=x", "--dtype=int8"], "decode loads none"),
    (["--topology=v5e:2x2", "--sweep", "--remedies"], "--remedies is of one"),
    (["--topology=v5e:2x2", "--acceptance=none.json"], "which is neither"),
    (["--topology=v5e:2x2", "--model=llama3-8b", "--sweep", "--price=v6e=1"],
     "does not say what v5e costs")])
def test_a_wrong_call_is_one_line_and_exit_code_2(made, flags, words, capsys):
  assert run(*flags) == 2
  assert not made                       # nothing was compiled
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
