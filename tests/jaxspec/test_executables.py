# SPDX-License-Identifier: Apache-2.0
"""Programs that were compiled before are loaded, where they fit."""

import dataclasses
import json

import pytest

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
  assert made._programs.used == 4
  assert found == tokens(generator())


@pytest.mark.parametrize("changes, words", [
    (dict(capacity=80), "capacity '64' is not '80'"),
    (dict(rows=3), "rows '1' is not '3'"),
    (dict(drafter="prompt_lookup:length=4"), "drafter"),
    (dict(mesh=sharding.make_mesh), "devices '2' is not '1'")])
def test_another_setup_is_named(folder, changes, words):
  if "mesh" in changes:
    changes = dict(mesh=changes["mesh"]())
  assert words in generator(folder, **changes).executables_problem


def test_another_version_or_model_or_folder_is_named(folder, tmp_path):
  mesh = sharding.make_mesh(dict(MESH))
  known = executables.identity(CONFIG, mesh)
  other = executables.identity(
      dataclasses.replace(CONFIG, norm_eps=1e-6), mesh)
  assert known["model"] != other["model"]
  for name in ("jax", "jaxspec", "device_kind"):
    problem = executables.Programs(
        folder, known | {name: "another"}, mesh).problem
    assert f"{name} " in problem and "is not 'another'" in problem
  assert "No such file" in executables.Programs(
      tmp_path / "none", known, mesh).problem
  (tmp_path / "programs.json").write_text(json.dumps([]))
  assert "not as plan --save" in executables.Programs(
      tmp_path, known, mesh).problem


def test_a_broken_program_is_compiled_again(folder, tmp_path):
  for file in folder.iterdir():
    whole = file.read_bytes()
    (tmp_path / file.name).write_bytes(
        whole[:100] if file.suffix == ".xla" else whole)
  made = generator(tmp_path)
  assert made._take_state().done.all()
  assert "does not load" in made._programs.problem


def test_a_drafter_without_a_name_has_no_programs(folder):
  from jaxspec import drafters
  with pytest.raises(InputError, match="drafter that is named"):
    generator(folder, drafter=drafters.parse(DRAFTER))
