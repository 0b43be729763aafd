# SPDX-License-Identifier: Apache-2.0
"""The compile cache is private or it is not used."""

import os
import stat

import jax
import pytest

from jaxspec.apps import launch


@pytest.fixture
def updates(monkeypatch):
  """Collects what would be set in jax's configuration."""
  collected = {}
  monkeypatch.setattr(jax.config, "update", collected.__setitem__)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  return collected


def test_the_default_is_a_private_folder_in_the_cache_home(
  updates, tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  where = launch.use_compilation_cache(None)
  assert where == str(tmp_path / "cache" / "jaxspec" / "xla")
  assert stat.S_IMODE(os.stat(where).st_mode) == 0o700
  assert updates["jax_compilation_cache_dir"] == where
  assert launch.use_compilation_cache(None) == where


def test_empty_means_none(updates):
  assert launch.use_compilation_cache("") is None
  assert updates == {}


def test_a_folder_named_in_the_environment_is_left_to_jax(updates, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
  assert launch.use_compilation_cache(None) == "/somewhere"
  assert updates == {}
  assert launch.use_compilation_cache("") is None
  assert updates == {"jax_enable_compilation_cache": False}


def test_a_bucket_is_taken_as_named(updates):
  assert launch.use_compilation_cache("gs://mine/xla") == "gs://mine/xla"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_others_can_write_is_not_used(updates, tmp_path, mode, capsys):
  tmp_path.chmod(mode)
  assert launch.use_compilation_cache(str(tmp_path)) is None
  assert updates == {}
  err = capsys.readouterr().err
  assert f"can be written to by others (mode {mode:o})" in err
  assert err.count("\n") == 1


def test_a_folder_of_someone_else_is_not_used(
  updates, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
  assert launch.use_compilation_cache(str(tmp_path)) is None
  assert "belongs to someone else" in capsys.readouterr().err
  assert updates == {}


def test_a_folder_that_cannot_be_is_no_error(updates, tmp_path, capsys):
  (tmp_path / "file").write_text("in the way")
  assert launch.use_compilation_cache(str(tmp_path / "file" / "xla")) is None
  assert "cannot be made" in capsys.readouterr().err


def test_progress_is_for_terminals(monkeypatch, capsys):
  with launch.progress("loading") as on_progress:
    assert on_progress is None
  assert capsys.readouterr().err == ""
  monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
  with launch.progress("loading") as on_progress:
    on_progress("layers.0", 1, 2)
