# SPDX-License-Identifier: Apache-2.0
"""Programs that were compiled before are loaded, where they fit."""

import dataclasses
import hashlib
import json
import logging
import os

import pytest

from jaxspec import __main__ as front_door
from jaxspec import executables, loop, planning, sharding
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.options import Options
from jaxspec.planning import Setup
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = tiny_config(depth=1)
DRAFTER = "prompt_lookup:length=2"
MESH = (("tensor", 2),)


def generator(folder=None, **changes) -> Generator:
  mesh = sharding.make_mesh(dict(MESH))
  model = Transformer(CONFIG, random_source(
      0, scale=1.5, put=lambda x, axes: sharding.place(x, axes, mesh)))
  settings = dict(drafter=DRAFTER, rows=1, capacity=64, mesh=mesh) | changes
  return Generator(model, executables=folder and str(folder), **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("programs")
  seconds = planning.keep(Setup(
      CONFIG, "cpu:2", MESH, DRAFTER, rows=1, capacity=64, prompt=16,
      dtype="float32"), folder)
  assert list(seconds) == ["prefill of 1", "decode", "release", "insert of 1"]
  return folder


@pytest.mark.medium
def test_loaded_programs_give_the_same_tokens(folder, monkeypatch):
  def tokens(made):
    (found,) = made.generate(
        [[5, 9, 5, 9, 5]], Options(max_new_tokens=20, ignore_eos=True))
    assert found.stats.accepted > 0
    return found.token_ids

  def fail(*unused):
    raise AssertionError("compiled again")

  with monkeypatch.context() as patch:
    for name in ("decode", "insert", "release"):
      patch.setattr(loop, name, fail)
    made = generator(folder)
    assert not made.executables_problem
    found = tokens(made)
  assert made._programs.used == 4 and not made._programs.missed
  assert found == tokens(generator())


@pytest.mark.parametrize("changes, words", [
    (dict(capacity=80), "capacity '64' is not '80'"),
    (dict(rows=3), "rows '1' is not '3'"),
    (dict(drafter="prompt_lookup:length=4"), "drafter"),
    (dict(mesh=sharding.make_mesh), "devices '2' is not '1'")])
def test_another_setup_is_named(folder, changes, words, caplog):
  if "mesh" in changes:
    changes = dict(mesh=changes["mesh"]())
  assert words in generator(folder, **changes).executables_problem
  (said,) = caplog.messages
  assert said.startswith("programs are compiled: ") and words in said


def test_another_version_or_model_or_folder_is_named(folder, tmp_path):
  mesh = sharding.make_mesh(dict(MESH))
  known = executables.identity(CONFIG, mesh)
  other = executables.identity(
      dataclasses.replace(CONFIG, norm_eps=1e-6), mesh)
  assert known["model"] != other["model"]
  for name in ("jax", "jaxspec", "device_kind", "compiler", "XLA_FLAGS",
               "LIBTPU_INIT_ARGS"):
    problem = executables.Programs(
        folder, known | {name: "another"}, mesh).problem
    assert f"{name} " in problem and "is not 'another'" in problem
  assert "No such file" in executables.Programs(
      tmp_path / "none", known, mesh).problem
  (tmp_path / "programs.json").write_text(json.dumps([]))
  assert "not as plan --save" in executables.Programs(
      tmp_path, known, mesh).problem


def test_compilers_and_their_flags_are_told_apart(monkeypatch):
  mesh = sharding.make_mesh(dict(MESH))

  def known(**changes):
    with monkeypatch.context() as patch:
      for name, value in changes.items():
        patch.setenv(name, value)
      return executables.identity(CONFIG, mesh)

  plain = known(XLA_FLAGS="--xla_a=1 --xla_b=2")
  # How many devices there are, and what is dumped, changes no program.
  assert plain == known(
      XLA_FLAGS="--xla_b=2  --xla_force_host_platform_device_count=8 --xla_a=1 "
      "--xla_dump_to=/tmp/x", LIBTPU_INIT_ARGS="--xla_c=3")
  assert plain["XLA_FLAGS"] == "--xla_a=1 --xla_b=2"
  assert known(XLA_FLAGS="--xla_a=2")["XLA_FLAGS"] == "--xla_a=2"
  assert plain["compiler"].startswith(f"for a {os.uname().machine}")
  monkeypatch.setattr(executables, "_processor", lambda: "another")
  assert known()["compiler"] == "for a another"


def test_a_tpu_that_is_not_there_has_the_identity_of_one(
    tpu_compiler, monkeypatch):
  """jax adds a flag where there are TPUs, and only there."""
  from importlib import metadata

  mesh = sharding.make_mesh({"tensor": 4}, planning.devices("v5e:2x2"))

  def known(flags):
    with monkeypatch.context() as patch:
      patch.setenv("LIBTPU_INIT_ARGS", flags)
      return executables.identity(CONFIG, mesh)
  here = known("--xla_c=3")
  assert here == known("--xla_c=3 --xla_tpu_use_enhanced_launch_barrier=true")
  assert here["compiler"] == f"libtpu {metadata.version('libtpu')}"
  assert here["LIBTPU_INIT_ARGS"] == "--xla_c=3"
  assert here["device_kind"] == "TPU v5 lite"


@pytest.mark.medium
def test_programs_for_tpus_that_are_not_there_are_kept(tpu_compiler, tmp_path):
  """All of them, though nothing can run, or be read back, here."""
  config = tiny_config(depth=1, width=512, heads=4, kv_heads=4, head_size=128,
                       mlp=512, vocab=512)
  planning.keep(Setup(config, "v5e:2x2", (("tensor", 4),), rows=1,
                      capacity=256, prompt=16), tmp_path)
  index = json.loads((tmp_path / "programs.json").read_text())
  assert index["identity"]["device_kind"] == "TPU v5 lite"
  assert sorted(name.partition("-")[0] for name in index["programs"]) == [
      "decode", "insert", "prefill", "release"]
  for name, digest in index["programs"].items():
    whole = (tmp_path / f"{name}.xla").read_bytes()
    assert len(whole) > 10_000
    assert hashlib.sha256(whole).hexdigest() == digest


def spoil(folder, other, digest):
  """Copies programs, cut short; says so in the index, or not."""
  other.chmod(0o700)
  for file in folder.glob("*.xla"):
    (other / file.name).write_bytes(file.read_bytes()[:100])
  index = json.loads((folder / "programs.json").read_text())
  if digest:
    index["programs"] = {
        name: hashlib.sha256((other / f"{name}.xla").read_bytes()).hexdigest()
        for name in index["programs"]}
  (other / "programs.json").write_text(json.dumps(index))


@pytest.mark.parametrize("digest", [False, True])
def test_a_broken_program_is_compiled_again(folder, tmp_path, digest, caplog):
  """Whether it is not what was saved, or the runtime does not take it."""
  spoil(folder, tmp_path, digest)
  made = generator(tmp_path)
  assert not made.executables_problem and not caplog.messages
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      assert made._take_state().done.all()
  assert "does not load" in made.executables_problem
  assert ("not what was saved" in made.executables_problem) != digest
  (said,) = caplog.messages
  assert said == "programs are compiled: " + made.executables_problem
  assert made._programs.missed == 1 and not made._programs.used


@pytest.mark.medium
def test_what_is_compiled_after_all_is_told_at_the_terminal(
    tiny_model, tmp_path, capsys):
  """A broken file, and a prompt too long for what was saved."""
  common = [f"--model={tiny_model}", "--dtype=float32", "--capacity=64"]
  good, bad = tmp_path / "good", tmp_path / "bad"
  bad.mkdir()
  assert front_door.main(["plan", *common, "--topology=cpu:1", "--prompt=8",
                          f"--save={good}"]) == 0
  spoil(good, bad, True)
  capsys.readouterr()

  def decode(*flags):
    code = front_door.main([
        "decode", *common, "--mesh=tensor=1", "--compilation_cache_dir=",
        "--max_new_tokens=8", "--ignore_eos", "--temperature=0",
        "--hold_until_settled", *flags])
    out, err = capsys.readouterr()
    assert code == 0
    return out, [line for line in err.splitlines()
                 if line.startswith("jaxspec: ") and "compiled" in line]

  for prompt, count in (("hello", 0), ("hello " * 7, 1)):
    plain, said = decode(f"--prompt={prompt}")
    assert not said
    loaded, said = decode(f"--prompt={prompt}", f"--executables={good}")
    assert loaded == plain and len(said) == count
  assert said[0].startswith("jaxspec: some programs are compiled, prefill ")
  again, said = decode("--prompt=hello", f"--executables={bad}")
  assert again == decode("--prompt=hello")[0]
  assert len(said) == 1 and "does not load" in said[0]


def test_a_drafter_without_a_name_has_no_programs(folder):
  from jaxspec import drafters
  with pytest.raises(InputError, match="drafter that is named"):
    generator(folder, drafter=drafters.parse(DRAFTER))
