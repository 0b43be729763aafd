# SPDX-License-Identifier: Apache-2.0
"""The parity experiment, on a tiny model that transformers holds too."""

import dataclasses
import types

import numpy as np
import pytest

from experiments import parity
from jaxspec.generator import Generator
from jaxspec.models.transformer import Transformer, random_source

VOCAB = 64


def as_checkpoint(config):
  """What the oracle reads of a checkpoint."""
  weight = random_source(0, scale=1.5)
  shapes = {}

  def note(path, shape, axes, wanted=None):
    shapes[path] = shape
    return weight(path, shape, axes, wanted)

  Transformer(config, note)
  return types.SimpleNamespace(
      config=config, shapes=shapes,
      weight=lambda path: np.asarray(weight(path, shapes[path], None)))


@pytest.mark.slow
def test_the_same_tokens_and_logits(tiny, quick_compiles):
  config = dataclasses.replace(
      tiny.config, depth=2, ropes=tiny.config.ropes[:2], windows=(None,) * 2)
  model = Transformer(config, random_source(0, scale=1.5))
  pytest.importorskip("torch", reason="the oracle needs torch")
  pytest.importorskip("transformers", reason="the oracle is transformers")
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, VOCAB, n).tolist() for n in (9, 14)]
  reference = parity.Reference(as_checkpoint(config), eos_ids=(5,))
  runs = parity.measure(Generator(model, capacity=64, eos_ids=(5,)), reference,
                        prompts, new_tokens=8)
  summary = parity.summarise(runs)
  assert summary["same"] == summary["prompts"] == 2
  assert summary["tokens"] == sum(len(run["answer"]) for run in runs) > 2
  for name in ("prompt_logits", "answer_logits", "logprobs"):
    assert max(run[name] for run in runs) < 1e-4, name


def test_where_answers_part():
  logits = np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 1.75], [0.0, 1.0, 5.0]])
  assert parity.compare([1, 0, 2], [1, 0, 2], logits) is None
  assert parity.compare([1, 2, 0], [1, 0, 2], logits) == {
      "position": 1, "ours": 2, "theirs": 0, "gap": 0.25}
  assert parity.compare([1], [1, 0], logits[:2])["ours"] is None
  # Going on behind the reference's end is never rounding.
  assert parity.compare([1, 0], [1], logits[:1])["gap"] == np.inf
