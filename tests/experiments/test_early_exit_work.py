# SPDX-License-Identifier: Apache-2.0
"""The count of work: closed forms hold, and a layer run twice is seen."""

import pytest

from experiments import early_exit_work
from jaxspec.drafters.early_exit import EarlyExit
from tests.conftest import tiny_config


@pytest.mark.parametrize("layer, drafts", [(1, 1), (3, 4)])
def test_no_layer_runs_twice(layer, drafts):
  found = early_exit_work.examine(tiny_config(), layer, drafts, capacity=32,
                                  compiled=False)
  assert found["once"]
  assert found["node_layers"] == found["node_layers_wanted"] == {
      "below": (drafts + 1) * layer, "above": (drafts + 1) * (4 - layer)}
  assert found["passes"] == found["passes_wanted"] == 1 + drafts * layer / 4
  assert found["relative_to_one_pass_and_head"] == pytest.approx(1, abs=0.08)
  assert early_exit_work.table([found]).count("\n") == 2


def test_a_draft_without_head_start_is_seen_to_run_twice(monkeypatch):
  """Then the lower layers take every node again."""
  go_on = EarlyExit.go_on

  def forgetful(self, *args, **kwargs):
    proposal, state = go_on(self, *args, **kwargs)
    return proposal.replace(head_start=None), state

  monkeypatch.setattr(EarlyExit, "go_on", forgetful)
  found = early_exit_work.examine(tiny_config(), 2, 2, capacity=32,
                                  compiled=False)
  assert not found["once"]
  assert found["node_layers"] == {"below": 12, "above": 6}
  assert found["relative_to_one_pass_and_head"] > 1.15
