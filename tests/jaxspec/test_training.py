# SPDX-License-Identifier: Apache-2.0
"""A run that is killed ends as one that was not.

Held here: stopped anywhere, even with SIGKILL and while it writes, a run goes
on from its last checkpoint and ends in the very weights, and the very curve,
of an undisturbed run; every text is examined once.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxspec import training
from jaxspec.corpus import Text
from jaxspec.distillation import Recipe
from jaxspec.heads import EagleHead, ExitHead, HydraHeads, MedusaHeads
from jaxspec.models.transformer import Transformer, random_source
from tests.conftest import tiny_config
from tests.jaxspec import cycles

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEPS = 24
RECIPE = Recipe(steps=STEPS, tokens=32, widths=(16,), rate=3e-3, positions=20)


def untrained(model):
  return {"exit": ExitHead.init(model, layer=1, mlp=8, attention=True),
          "medusa": MedusaHeads.init(model, heads=2),
          "hydra": HydraHeads.init(model, heads=2, rank=4),
          "eagle": EagleHead.init(model, mlp=8, tokens=range(1, 64))}


def run(folder, on_step=None):
  model = Transformer(tiny_config(depth=2), random_source(0))
  heads = untrained(model)
  rng = np.random.default_rng(0)
  texts = [Text(rng.integers(0, 64, 14).tolist(), 3) for _ in range(9)]
  return training.fit(model, heads, texts, RECIPE, folder, every=4,
                      on_step=on_step)


def same(heads, others):
  return all(cycles.leaves_equal(heads[n].tensors(), others[n].tensors())
             for n in heads)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp("undisturbed")
  return run(folder), training.read_curve(folder)


@pytest.mark.slow
def test_a_run_that_fails_goes_on(undisturbed, tmp_path):
  """At any step: on a checkpoint, before and behind it."""
  class Stop(Exception):
    pass

  for at in (2, 8, 9, 15):
    def stop(step, marks, at=at):
      if step == at:
        raise Stop
    with pytest.raises(Stop):
      run(tmp_path, stop)
  steps = []
  heads = run(tmp_path, lambda step, marks: steps.append(step))
  assert steps == list(range(13, STEPS + 1))
  assert same(heads, undisturbed[0])
  curve = training.read_curve(tmp_path)
  assert curve == undisturbed[1]
  assert [line["step"] for line in curve] == list(range(1, STEPS + 1))
  # Nothing is left to do.
  assert same(run(tmp_path, lambda *_: pytest.fail("trained again")), heads)


@pytest.mark.medium
def test_weights_moved(undisturbed, tmp_path):
  """Else the same weights would prove nothing."""
  model = Transformer(tiny_config(depth=2), random_source(0))
  for name, head in untrained(model).items():
    assert not same({name: head}, undisturbed[0]), name


_CHILD = """
import sys
from tests.jaxspec import test_training as t
t.run(sys.argv[1], lambda *_: print(flush=True))
"""


@pytest.mark.slow
def test_ten_kills_change_nothing(undisturbed, tmp_path):
  """Between any two steps, or within; before a checkpoint or behind it."""
  rng = random.Random(0)
  root = str(pathlib.Path(__file__).parents[2])

  def start():
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path)], cwd=root,
        env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu",
                          # As this process does, or sums are rounded otherwise.
                          "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

  for _ in range(10):
    child = start()
    for _ in range(rng.randint(1, 5)):
      child.stdout.readline()
    time.sleep(rng.uniform(0, 0.05))
    assert child.poll() is None
    child.kill()
    child.wait()
  assert same(run(tmp_path), undisturbed[0])
  assert training.read_curve(tmp_path) == undisturbed[1]


def test_every_text_is_examined_once():
  """Filled up or not, short or cut."""
  model = cycles.model()
  for count in (1, 3, 4, 7):
    texts = [Text([s, *cycles.recited([s], n)], 1)
             for s, n in zip(range(count), (3, 15, 16, 40, 5, 20, 8))]
    recipe = Recipe(tokens=64, widths=(16, 32))
    marks = training.examine(model, {"h": cycles.exit_head()}, texts, recipe)
    asked = sum(min(len(t.tokens), 32) - 1 for t in texts)
    assert np.sum(marks["h"].asked) == np.sum(marks["h"].agreed) == asked
    json.dumps(training.share(marks["h"]).tolist())
