# SPDX-License-Identifier: Apache-2.0
"""The README's drafter is the file, is short, and is a drafter."""

import pathlib

import numpy as np
import pytest

from experiments import example_drafter
from jaxspec.drafters.autoregressive import Autoregressive
from tests.jaxspec import batches

pytestmark = pytest.mark.usefixtures("quick_compiles")
FILE = pathlib.Path(example_drafter.__file__)
README = FILE.parent.parent / "README.md"


def test_the_readme_shows_the_file():
  licence, code = FILE.read_text(encoding="utf-8").split("\n", 1)
  assert "SPDX" in licence
  assert f"```python\n{code}```" in README.read_text(encoding="utf-8")
  assert sum(bool(line.strip()) for line in code.splitlines()) <= 30


@pytest.mark.slow
@pytest.mark.parametrize("options", [batches.GREEDY, batches.SAMPLED],
                         ids=["greedy", "sampled"])
def test_it_changes_the_speed_not_the_text(small, options):
  prompts = batches.prompts(3)
  plain = batches.answers(batches.run(small, Autoregressive(), prompts,
                                      options))
  state = batches.run(small, example_drafter.Bigram(), prompts, options)
  assert batches.answers(state) == plain
  assert batches.drafted(state) > 0
  assert batches.accepted(state) > 0 or options.temperature
  # And it knows what followed each token the last time.
  for row, (prompt, answer) in enumerate(zip(prompts, plain)):
    said = dict(zip(answer, answer[1:]))
    table = np.asarray(state.draft[row])
    for token in range(small.vocab):
      assert table[token] == said.get(token, -1)
    assert state.seq.prompt_length[row] == len(prompt)
  again = batches.refill(small, example_drafter.Bigram(), state, [1], [[5, 6]],
                         options)
  assert (again.draft[1] == -1).all() and (again.draft[0] >= 0).any()
