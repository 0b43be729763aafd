# SPDX-License-Identifier: Apache-2.0
"""Both published layouts against a reference in float64, 64 rows; and whole
sessions, read and written row by row, against the reference's own loop."""

import dataclasses

import numpy as np
import pytest

from jaxspec.models.transformer import Transformer, random_source
from jaxspec.streams import layout as layouts
from jaxspec.streams.layout import Stream, StreamLayout
from tests.conftest import tiny_config
from tests.jaxspec.streams import tables
from tests.jaxspec.streams.reference import table_logits

pytestmark = pytest.mark.usefixtures("quick_compiles")

PREFIX = [9, 4, 7, 5, 3]
TALK = StreamLayout(
    (Stream("user", written=False), Stream("out", silence_penalty=3.0),
     Stream("think")), silence=1)


@pytest.fixture(scope="module")
def model():
  """Two layers of a Qwen3, the backbone of the published models."""
  config = tiny_config(family="qwen3", depth=2, qk_norm=True)
  return tables.tinted(Transformer(config, random_source(0, scale=1.5)))


@pytest.mark.parametrize("name", ["reading", "thoughts", "thoughts, skipping"])
def test_logits_over_64_rows(model, name):
  if name == "reading":
    layout, prefix = layouts.reading(), PREFIX
    rule = dict(rule="counters", ids=[1, 2], prefix_id=0)
  else:
    layout, prefix = layouts.thoughts(1, keep_silence=name == "thoughts"), []
    rule = dict(rule="rows", ids=range(10), silence=1,
                skip_silence=name != "thoughts")
  tokens, live = tables.random_table(layout, 64, holes=0.4)
  wanted = table_logits(model, tokens, live, prefix=prefix, **rule)
  found = tables.logits(model, layout, tokens, live, prefix=prefix,
                        steps=[32, 32])
  np.testing.assert_allclose(found[live], wanted[live], atol=2e-4)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["reading", "table"])
def test_a_session_is_the_reference_loop(model, name):
  layout = layouts.reading() if name == "reading" else TALK
  rule = (dict(rule="counters", ids=[1, 2], prefix_id=0) if name == "reading"
          else dict(rule="rows", ids=range(3), silence=1))
  tokens, live = tables.random_table(layout, 3)
  words = [31, 32, 33, 34]
  batch = tables.begin(
      model, layout, [(tokens, live)], prefix=PREFIX,
      options=dataclasses.replace(tables.GREEDY, max_new_tokens=14))
  batch = tables.push(layout, batch, 0, 0, words)
  found = tables.table(tables.finish(model, layout, batch))

  quiet = heard = 0
  for _ in range(14):
    said = table_logits(model, tokens, live, prefix=PREFIX, **rule)[-1]
    row, there = np.zeros(layout.count, np.int32), np.ones(layout.count, bool)
    for at, stream in enumerate(layout.streams):
      if not stream.written:
        continue
      if layout.silence is not None:
        said[at, layout.silence] -= stream.silence_penalty * min(
            1, quiet / layout.ramp)
      row[at] = said[at].argmax()
    if words:
      row[0], heard, quiet = words.pop(0), 1, 0
    else:
      quiet += heard
      row[0], there[0] = (0, False) if layout.silence is None else (1, True)
    tokens, live = np.vstack([tokens, row]), np.vstack([live, there])
  np.testing.assert_array_equal(found, np.where(live, tokens, -1))
