# SPDX-License-Identifier: Apache-2.0
"""Token recycling keeps the table, and reads the tree, that plain Python does.

Held here: a prompt fills the first rank, with the latest of two successors; of
nodes that say the same, one is heard, always the same one; where the table has
nothing the tree has no node; and the table stays in its place.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec import drafters, loop
from jaxspec.base import Proposal, Verdict
from jaxspec.drafters.recycling import Recycling, likeliest
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.tree import from_paths
from jaxspec.verifiers.exact import exact
from tests.conftest import tiny_config
from tests.jaxspec import batches

pytestmark = pytest.mark.usefixtures("quick_compiles")

DRAFTER = Recycling(nodes=12, ranks=3, depth=3)
VOCAB, ROWS = 6, 3
TREE = from_paths([(0, 0, 0), (0, 1), (1, 0), (2,)])


class Model:
  vocab = VOCAB


def sequences(roots):
  """Texts that are nothing but their last token."""
  return SimpleNamespace(tail=lambda: jnp.asarray(roots)[:, None])


@jax.jit
def propose(table, roots):
  made, _ = DRAFTER.propose(Model(), sequences(roots), None, table)
  return made.tokens, made.live, made.kinds, made.parents, made.mask


@jax.jit
def observe(table, tokens, live, top, path, kept):
  return DRAFTER.observe(
      Model(), None, table, Proposal(tokens, TREE, live=live),
      SimpleNamespace(top=top), Verdict(path, kept, kept))


def test_the_likeliest_tree():
  tree, ranks = likeliest(12, 3, 3)
  assert tree.size == 12 and tree.height == 3
  assert tree.parents[:3] == (-1, 0, 1)          # the first child of the first
  assert ranks[:3].tolist() == [0, 0, 0]
  family = list(zip(tree.parents, ranks.tolist()))
  assert len(set(family)) == 12
  for parent, rank in family[1:]:                # no rank without the better
    assert not rank or (parent, rank - 1) in family
  assert likeliest(100, 2, 2)[0].size == 7       # there are no more


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_propose_against_plain_python(seed, share):
  rng = np.random.default_rng(seed)
  table = np.array([[rng.permutation(VOCAB)[:3] for _ in range(VOCAB)]
                    for _ in range(ROWS)], np.int32)
  table[rng.random(table.shape) < share] = -1
  roots = rng.integers(0, VOCAB, ROWS).astype(np.int32)
  tokens, live, kinds, parents, mask = jax.device_get(propose(table, roots))
  tree, ranks = likeliest(12, 3, 3)
  for row in range(ROWS):
    paths, wanted = {0: (int(roots[row]),)}, []
    for node in range(1, tree.size):
      above = paths.get(tree.parents[node])
      said = -1 if above is None else int(table[row, above[-1], ranks[node]])
      if said >= 0:
        paths[node] = (*above, said)
        wanted.append((paths[node], int(ranks[node])))
    assert live[row] == 1 + len(wanted)
    depths = mask[row].sum(axis=1)
    for node, (path, rank) in enumerate(wanted, start=1):
      nodes = sorted(np.flatnonzero(mask[row, node]), key=lambda n: depths[n])
      assert tuple(tokens[row][nodes].tolist()) == path
      assert kinds[row, node] == rank
    assert (tokens >= 0).all() and (parents[row, live[row]:] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_observe_against_plain_python(seed):
  rng = np.random.default_rng(seed)
  size = TREE.size
  table = rng.integers(-1, VOCAB, (ROWS, VOCAB, 3)).astype(np.int32)
  tokens = rng.integers(0, VOCAB, (ROWS, size)).astype(np.int32)
  live = rng.integers(1, size + 1, ROWS).astype(np.int32)
  top = rng.integers(0, VOCAB, (ROWS, size, 3)).astype(np.int32)
  ends = [int(rng.integers(0, n)) for n in live]
  path = TREE.paths[ends].astype(np.int32)
  kept = (TREE.depths[ends] + 1).astype(np.int32)
  kept[0] = rng.integers(0, 2) * kept[0]         # a finished row, perhaps
  wanted = table.copy()
  for row in range(ROWS):
    if kept[row]:
      accepted = path[row, :kept[row]].tolist()
      others = [n for n in range(live[row]) if n not in accepted]
      for node in others + accepted:             # the last word stands
        wanted[row, tokens[row, node]] = top[row, node]
  np.testing.assert_array_equal(
      observe(table, tokens, live, top, path, kept), wanted)


def test_insert_forgets_and_reads_the_prompt():
  state = jnp.full((3, VOCAB, 3), 5, jnp.int32)
  tokens = jnp.asarray([[1, 2, 1, 3, 0, 0], [4, 4, 0, 4, 2, 1]])
  prefix = SimpleNamespace(tokens=tokens, length=jnp.asarray([4, 5]))
  state = DRAFTER.insert(Model(), state, jnp.asarray([2, 0]), prefix, None)
  first = state[..., 0].tolist()
  assert first[2] == [-1, 3, 1, -1, -1, -1]      # 1 was followed by 2, then 3
  assert first[0] == [4, -1, -1, -1, 2, -1]      # what is padding is not text
  assert (state[jnp.asarray([0, 2]), :, 1:] == -1).all()
  assert (state[1] == 5).all()
  # There is no fourth row.
  alone = SimpleNamespace(tokens=tokens[1:], length=jnp.asarray([5]))
  dropped = DRAFTER.insert(Model(), state, jnp.asarray([3]), alone, None)
  np.testing.assert_array_equal(dropped, state)


def test_the_table_stays_in_place():
  """No step copies it: temporaries are less than half as large."""
  config = tiny_config(depth=1, vocab=32768, ropes=tiny_config().ropes[:1],
                       windows=(None,))
  model = Transformer(config, random_source(0))
  drafter = Recycling(nodes=2, ranks=64)
  state = batches.empty(model, drafter, 8)
  memory = loop.decode.lower(
      model, drafter, exact, state, np.int32(1), np.bool_(True)
      ).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= state.draft.nbytes
  assert memory.temp_size_in_bytes < state.draft.nbytes / 2


@pytest.mark.parametrize("text, words", [
    ("recycling:nodes=1", r"nodes must be an integer in \[2, 512\], got 1"),
    ("recycling:ranks=0", "ranks must be"),
    ("recycling:depth=65", "got 65"),
    ("recycling:rank=2", "Did you mean 'ranks'")])
def test_bad_settings_are_named(text, words):
  with pytest.raises(InputError, match=words):
    drafters.parse(text)
