# SPDX-License-Identifier: Apache-2.0
"""Both published layouts against transformers, whose models are told of streams
by a mask and by positions alone.

Everything is written out from the definitions (arXiv:2605.12460): cells one by
one in the order in which they come, whose query sees whose key, and where each
stands. Of this repository nothing but the weights is used.
"""

import dataclasses

import numpy as np
import pytest

from jaxspec.models.transformer import Transformer, random_source
from jaxspec.streams import layout as layouts
from tests.conftest import tiny_config
from tests.jaxspec.streams import tables

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.usefixtures("quick_compiles"), pytest.mark.medium]

PREFIX = [9, 4, 7, 5, 3]


@dataclasses.dataclass(frozen=True)
class Cell:
  """A token; the stream of the prefix is None."""

  token: int
  row: int
  stream: int | None
  position: int


def counted(tokens, live, prefix):
  """Sections 5 and 6: each stream counts for itself, behind the prefix."""
  cells = [Cell(t, -1, None, at) for at, t in enumerate(prefix)]
  said = [0] * tokens.shape[1]
  for row, stream in np.ndindex(tokens.shape):
    if live[row, stream]:
      cells.append(Cell(int(tokens[row, stream]), row, stream,
                        len(prefix) + said[stream]))
      said[stream] += 1
  return cells


def by_row(tokens):
  """Section 7: the row is the position, and every cell holds a token."""
  return [Cell(int(tokens[at]), at[0], at[1], at[0])
          for at in np.ndindex(tokens.shape)]


def sees_by_count(reads):
  def sees(query, key):
    if key.stream is None:
      return query.stream is not None or key.position < query.position
    if query.stream is None:
      return False
    if key.stream != query.stream and key.stream not in reads[query.stream]:
      return False
    # Strictly earlier by count; and what has not come cannot be seen.
    return key.position < query.position and key.row < query.row
  return sees


def sees_by_row(skipped=None):
  return lambda query, key: key.row < query.row and key.token != skipped


def model_of(family, backbone):
  """The same weights in the model of transformers."""
  kind = {"qwen3": transformers.Qwen3ForCausalLM,
          "llama": transformers.LlamaForCausalLM}[family]
  fields = tables.published_config(backbone, family)
  fields.pop("model_type")
  model = kind(kind.config_class(**fields, attn_implementation="eager"))
  tensors = {name: torch.from_numpy(value)
             for name, value in tables.published_tensors(backbone).items()}
  missing, unknown = model.load_state_dict(tensors, strict=False)
  assert missing in ([], ["lm_head.weight"]) and not unknown
  model.tie_weights()
  return model.float().eval()


def logits(model, table, cells, ids, prefix_id, sees):
  """What is said behind each cell, in their order."""
  mask = np.array([[query is key or sees(query, key) for key in cells]
                   for query in cells])
  added = np.array([table[prefix_id if cell.stream is None
                          else ids[cell.stream]] for cell in cells])
  with torch.no_grad():
    embedded = model.get_input_embeddings()(torch.tensor(
        [[cell.token for cell in cells]]))
    found = model(
        inputs_embeds=embedded + torch.from_numpy(added)[None],
        position_ids=torch.tensor([[cell.position for cell in cells]]),
        attention_mask=torch.where(torch.from_numpy(mask), 0.0,
                                   torch.finfo(torch.float32).min)[None, None],
        use_cache=False)
  return found.logits[0].numpy()


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def pair(request):
  family = request.param
  config = tiny_config(family=family, depth=2, qk_norm=family == "qwen3")
  ours = tables.tinted(Transformer(config, random_source(0, scale=1.5)))
  return ours, model_of(family, ours.backbone)


@pytest.mark.parametrize("name", [
    "reading", "auditing", "thoughts", "thoughts, skipping"])
def test_logits_over_64_rows(pair, name):
  ours, theirs = pair
  silence, prefix_id, prefix = None, None, PREFIX
  if name == "reading":
    layout, ids, prefix_id = layouts.reading(), [1, 2], 0
    sees = sees_by_count({0: {1}, 1: {0}})
  elif name == "auditing":
    layout, ids, prefix_id = layouts.auditing(), [1, 2, 3], 0
    sees = sees_by_count({0: {1}, 1: {0}, 2: {0, 1}})
  else:
    silence, ids, prefix = 1, list(range(10)), []
    skips = name != "thoughts"
    layout = layouts.thoughts(silence, keep_silence=not skips)
    sees = sees_by_row(silence if skips else None)
  tokens, live = tables.random_table(layout, 64, holes=0.4)
  cells = counted(tokens, live, prefix) if silence is None else by_row(tokens)
  wanted = logits(theirs, np.asarray(ours.embedding), cells, ids, prefix_id,
                  sees)[len(prefix):]
  found = tables.logits(ours, layout, tokens, live, prefix=prefix,
                        steps=[32, 32])
  np.testing.assert_allclose(found[live], wanted, atol=2e-4)
  assert len(wanted) == live.sum() > 64
