# SPDX-License-Identifier: Apache-2.0
"""A whole Hugging Face folder, new for each test."""

import pathlib

import pytest

from tests.jaxspec.checkpoint.small_checkpoints import write_folder


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  return write_folder(tmp_path / "model")
