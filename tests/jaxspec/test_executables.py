# SPDX-License-Identifier: Apache-2.0
"""Programs that were compiled before are loaded, where they fit."""

import dataclasses
import json

import numpy as np
import pytest

from jaxspec import executables, planning, profiling, sharding
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.options import Options
from jaxspec.planning import Setup
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = tiny_config(depth=2)
DRAFTER = "prompt_lookup:length=3"
PROMPTS = [[5, 9, 5, 9, 5], [7, 3, 1]]
MESH = (("tensor", 2),)


def generator(folder=None, **changes) -> Generator:
  mesh = sharding.make_mesh(dict(MESH))
  model = Transformer(CONFIG, random_source(
      0, scale=1.5, put=lambda x, axes: sharding.place(x, axes, mesh)))
  settings = dict(drafter=DRAFTER, rows=2, capacity=64, mesh=mesh) | changes
  return Generator(model, executables=folder and str(folder), **settings)


def tokens(made: Generator) -> list[list[int]]:
  found = made.generate(PROMPTS, Options(max_new_tokens=20, ignore_eos=True))
  assert sum(c.stats.accepted for c in found) > 0
  return [c.token_ids for c in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("programs")
  seconds = planning.keep(Setup(
      CONFIG, "cpu:2", MESH, DRAFTER, rows=2, capacity=64, prompt=16,
      dtype="float32"), folder, workers=2)
  assert len(seconds) == 6                 # two sizes of prefill and insert
  return folder


def test_loaded_programs_give_the_same_tokens_and_compile_nothing(folder):
  made = generator(folder)
  assert not made.executables_problem
  with profiling.count_compiles() as compiles:
    found = tokens(made)
  # A batch of nothing, and requests, are made by programs of their own.
  assert made._programs.used == 4
  loaded = compiles.count
  with profiling.count_compiles() as compiles:
    assert found == tokens(generator())
  assert compiles.count >= loaded + 4 - 1


@pytest.mark.parametrize("changes, words", [
    (dict(capacity=80), "capacity '64' is not '80'"),
    (dict(rows=1), "rows '2' is not '1'"),
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
  state = made._take_state()
  assert np.all(np.asarray(state.done))
  assert "does not load" in made._programs.problem


def test_a_drafter_without_a_name_has_no_programs(folder):
  from jaxspec import drafters
  with pytest.raises(InputError, match="drafter that is named"):
    generator(folder, drafter=drafters.parse(DRAFTER))
