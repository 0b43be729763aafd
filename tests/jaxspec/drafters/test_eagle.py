# SPDX-License-Identifier: Apache-2.0
"""EAGLE's layer reads the right feature beside the right token.

Held here: a head made by hand for a model that recites a cycle, which knows by
the token alone or by the feature alone, is always accepted, and never if it
looks one place away; the layer's cache is that of a fresh pass over the
model's own features, whatever was accepted; and each tree, grown or given, is
the one that plain NumPy finds with one whole pass a node.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxspec import drafters, heads, loop
from jaxspec.base import Drafter, Proposal
from jaxspec.caches import Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.drafters.eagle import Eagle
from jaxspec.errors import InputError
from jaxspec.heads import EagleHead
from jaxspec.tree import in_order
from tests.jaxspec import batches, cycles
from tests.jaxspec.batches import GREEDY

pytestmark = pytest.mark.usefixtures("quick_compiles")

CHAIN = ((0,), (0, 0), (0, 0, 0))
BUSHY = ((0,), (0, 0), (1,), (2,), (1, 1), (0, 1), (1, 1, 0), (0, 0, 2),
         (0, 0, 0))
PROMPTS = [[5, 9, 2], [7], [1, 1, 4, 30, 8]]
ONE = np.eye(cycles.SIZE, dtype=np.float32)


def drafter_of(head, tree, **settings):
  return Eagle(head, head.taps, choices=tree,
               **dict(dict(nodes=8, depth=3, width=2), **settings))


@pytest.mark.parametrize("by, tree", [
    pytest.param("token", CHAIN, marks=pytest.mark.slow),
    pytest.param("feature", BUSHY, marks=pytest.mark.medium),
    ("feature", None)])
def test_a_head_that_knows_is_always_right(by, tree):
  """Behind token i + 1 comes its successor; so does behind feature i the
  successor of its successor."""
  head = (cycles.eagle_head(token=ONE) if by == "token"
          else cycles.eagle_head(feature=cycles.ahead(1)))
  state = batches.run(cycles.model(), drafter_of(head, tree), PROMPTS, GREEDY)
  assert batches.answers(state) == [cycles.recited(p, 24) for p in PROMPTS]
  passes = -(-(24 - 1) // 4)
  assert state.counters.passes.tolist() == [passes] * 3
  assert batches.accepted(state) == 3 * (24 - 1 - passes)


@pytest.mark.medium
@pytest.mark.parametrize("wrong", [
    dict(token=cycles.ahead(1)),
    pytest.param(dict(token=cycles.ahead(-1)), marks=pytest.mark.slow),
    pytest.param(dict(feature=cycles.ahead(2)), marks=pytest.mark.slow),
    dict(feature=ONE)])
def test_a_head_that_looks_elsewhere_is_always_wrong(wrong):
  drafter = drafter_of(cycles.eagle_head(**wrong), CHAIN)
  state = batches.run(cycles.model(), drafter, PROMPTS, GREEDY)
  assert batches.answers(state) == [cycles.recited(p, 24) for p in PROMPTS]
  assert batches.accepted(state) == 0


@pytest.mark.parametrize("value", [
    np.nan, pytest.param(1e38, marks=pytest.mark.slow)])
def test_a_broken_head_changes_no_text(value):
  drafter = drafter_of(cycles.eagle_head(feature=ONE * value), None)
  state = batches.run(cycles.model(), drafter, PROMPTS, GREEDY)
  assert batches.answers(state) == [cycles.recited(p, 24) for p in PROMPTS]
  propose = jax.jit(drafter.propose)
  proposal, _ = propose(cycles.model(), state.seq, state.request, state.draft)
  assert bool(jnp.all(proposal.parents < jnp.arange(drafter.size)[None]))


def knows_some():
  """A head that is wrong about every third token of the cycle."""
  some = cycles.ahead(1)
  some[:, ::3] = ONE[:, ::3]
  return cycles.eagle_head(feature=some)


@pytest.mark.medium
@pytest.mark.parametrize("recites, tree", [
    pytest.param(True, CHAIN, marks=pytest.mark.slow), (False, None)])
def test_cache_is_that_of_a_fresh_pass(small, recites, tree):
  """Over the model's own features, and not over those that were drafted."""
  model = cycles.model() if recites else small
  head = knows_some() if recites else EagleHead.init(small, taps=(0, 2))
  drafter = drafter_of(head, tree)
  prompts = batches.prompts(3, model.vocab)
  state = batches.begin(model, drafter, prompts, GREEDY)
  kept = set()
  for steps in (1, 1, 2, 3):
    before = np.asarray(state.seq.length)
    state = batches.finish(model, drafter, state, steps=steps)
    if steps == 1:
      kept |= set((np.asarray(state.seq.length) - before).tolist())
    _check_cache(model, head, state)
  state = batches.refill(model, drafter, state, [2, 0],
                         [prompts[1], prompts[0]], GREEDY)
  _check_cache(model, head, state)
  state = batches.finish(model, drafter, state, steps=2)
  _check_cache(model, head, state)
  if recites:                          # else it is all accepted or all not
    assert {1, 2, 3, 4} & kept and len(kept) > 1, kept


@pytest.mark.medium
def test_nothing_is_lost_while_nothing_is_asked_for():
  """What was committed in steps without a proposal is read later."""
  model, head = cycles.model(), knows_some()
  drafter = drafter_of(head, CHAIN)
  state = batches.begin(model, drafter, PROMPTS, GREEDY)
  mute = Mute(drafter)
  for asleep in (True, False, True, True, False):
    state = batches.finish(model, mute if asleep else drafter, state, steps=1)
    _check_cache(model, head, state)
  assert state.counters.passes.tolist() == [5] * 3
  assert batches.accepted(state) > 0


@struct.dataclass
class Mute(Drafter):
  """Hears everything for another drafter and never asks it."""

  drafter: Eagle

  @property
  def taps(self):
    return self.drafter.taps

  @property
  def tree(self):
    return in_order(CHAIN)

  def propose(self, model, seq, request, state):
    tokens = jnp.zeros((len(seq.length), self.size), jnp.int32)
    live = jnp.ones_like(seq.length)
    return Proposal(tokens.at[:, :1].set(seq.tail()), self.tree,
                    live=live), state

  def observe(self, *seen):
    return self.drafter.observe(*seen)


def _check_cache(model, head, state):
  draft = state.draft
  for row, text in enumerate(batches.texts_of(state)):
    held = int(draft.cache.length[row])
    assert held + int(draft.count[row]) == len(text) - 1
    features, _, fresh = _pass(model, head, text)
    for cache, new in zip((draft.cache.k, draft.cache.v), fresh):
      np.testing.assert_allclose(
          cache[0][row, :, :held], jnp.swapaxes(new[0], 0, 1)[:, :held],
          atol=1e-4)
    np.testing.assert_allclose(
        draft.features[row, :int(draft.count[row])],
        features[0, held:len(text) - 1], atol=1e-4)


ROOM = 64


def _pass(model, head, text, drafted=(), outputs=()):
  """One pass of the layer over a whole text and what is drafted behind it.

  Args:
    outputs: of the layer, for the last token of the text and each drafted one
      but the last.

  Returns:
    The fused features, and the layer's output, keys and values everywhere.
  """
  features = _fused(model, head, text[:-1])
  at = len(text) - 1
  for i, output in enumerate(outputs):
    features[0, at + i] = output
  after = np.zeros((1, ROOM), np.int32)
  said = [*text[1:], *drafted]
  after[0, :len(said)] = said
  x, fresh = _layer(model, head, features, after)
  return features, np.asarray(x), (fresh.k[0], fresh.v[0])


def _fused(model, head, text):
  tokens, lengths = batches.padded([text], ROOM)
  prefix = loop.prefill(model, head.taps, tokens, lengths, chunk=512,
                        dtype=jnp.dtype("float32"))
  return np.array(_fuse(head, prefix.features))


@jax.jit
def _fuse(head, features):
  return head.fuse(features)


@jax.jit
def _layer(model, head, features, after):
  cache = head.init_cache(ContiguousCache, 1, 0, jnp.float32)
  at = Place.of(jnp.arange(ROOM)[None], jnp.tril(jnp.ones((ROOM, ROOM), bool)))
  return head.extend(head.join(model, features, after), cache,
                     head.init_fresh(cache, ROOM), at, layers=range(1))


@jax.jit
def _law(model, head, x):
  return jax.nn.log_softmax(head.logits(model, x), axis=-1)


class Searcher:
  """What the head says behind each path of drafted tokens, one at a time."""

  def __init__(self, model, head, text):
    self.model, self.head, self.text = model, head, text
    self.ids = (np.arange(model.vocab) if head.tokens is None
                else np.asarray(head.tokens[...]))

  @functools.cache  # noqa: B019
  def output(self, path):
    before = [self.output(path[:i]) for i in range(len(path))]
    _, x, _ = _pass(self.model, self.head, self.text, path, before)
    return x[0, len(self.text) - 2 + len(path)]

  def children(self, path, count):
    """The likeliest tokens behind a path and their log-probabilities."""
    law = np.asarray(_law(self.model, self.head,
                          jnp.asarray(self.output(path))[None, None]))[0, 0]
    best = np.argsort(-law, kind="stable")[:count]
    return [(int(self.ids[i]), float(law[i])) for i in best]

  def beam(self, nodes, depth, width):
    """The likeliest paths of a beam search, likeliest first."""
    beams, offered = {(): 0.0}, {(): 0.0}
    for _ in range(depth):
      new = {(*path, token): score + chance for path, score in beams.items()
             for token, chance in self.children(path, width)}
      offered |= new
      beams = dict(sorted(new.items(), key=lambda kv: -kv[1])[:width])
    return sorted(offered, key=lambda path: -offered[path])[:nodes]


def _paths(proposal, row):
  """The drafted tokens on the way to each node."""
  parents, tokens = proposal.parents[row].tolist(), proposal.tokens[row]
  found = [()]
  for node in range(1, len(parents)):
    assert parents[node] < node
    found.append((*found[parents[node]], int(tokens[node])))
  return found


@pytest.mark.slow
@pytest.mark.parametrize("tree, tokens", [
    pytest.param(BUSHY, None, marks=pytest.mark.slow),
    (None, range(0, 64, 3))])
def test_tree_is_the_one_that_numpy_finds(small, tree, tokens):
  head = EagleHead.init(small, taps=(1, 2), tokens=tokens)
  drafter = drafter_of(head, tree, nodes=14, depth=3, width=3)
  prompts = batches.prompts(2)
  state = batches.begin(small, drafter, prompts, GREEDY)
  propose = jax.jit(drafter.propose)
  for _ in range(2):
    state = batches.finish(small, drafter, state, steps=2)
    proposal, _ = propose(small, state.seq, state.request, state.draft)
    for row, text in enumerate(batches.texts_of(state)):
      assert proposal.tokens[row, 0] == text[-1]
      search = Searcher(small, head, text)
      found = _paths(proposal, row)
      if tree is None:
        assert found == search.beam(14, 3, 3)
        assert len(set(map(len, found))) > 2         # it is no bush
      else:
        wanted = {(): ()}
        for choice in tree:
          above = wanted[choice[:-1]]
          wanted[choice] = (*above, search.children(above, 3)[choice[-1]][0])
        assert found == list(wanted.values())
      # A node's kind is its rank among its siblings.
      for node, path in enumerate(found[1:], start=1):
        kind = int(proposal.kinds[row, node])
        assert search.children(path[:-1], 3)[kind][0] == path[-1]


def test_long_prompts_are_read_in_parts(small, monkeypatch):
  """The same cache as in one part."""
  from jaxspec.drafters import eagle
  head = EagleHead.init(small)
  drafter = drafter_of(head, CHAIN)
  prompts = [p * 3 for p in batches.prompts(3)]
  monkeypatch.setattr(eagle, "_CHUNK", 16)
  state = batches.begin(small, drafter, prompts, GREEDY)
  assert int(state.draft.cache.length.max()) > 32
  _check_cache(small, head, state)


@pytest.mark.parametrize("options, words", [
    ("tree=dynamo", "Did you mean 'dynamic'"),
    ("depth=0", r"depth must be an integer in \[1, 32\], got 0"),
    ("width=many", "width must be an integer .* got 'many'"),
    ("nodes=1", "nodes must be"),
    ("depth=2,width=3", "make 13 nodes, fewer than nodes=60"),
    ("width=64,nodes=8,tree=dynamic", "knows 32 tokens")])
def test_bad_settings_are_named(small, tmp_path, options, words):
  heads.save(tmp_path, EagleHead.init(small, tokens=range(32)), small)
  with pytest.raises(InputError, match=words):
    drafters.parse(f"eagle:heads=[{tmp_path}],{options}",
                   drafters.Target(small))


def test_settings_reach_the_drafter(small, tmp_path):
  heads.save(tmp_path, EagleHead.init(small), small)

  def parse(options):
    return drafters.parse(f"eagle:heads=[{tmp_path}],{options}",
                          drafters.Target(small))
  grown = parse("nodes=9,depth=2,width=4")
  assert (grown.size, grown.height, len(grown.priors)) == (9, 2, 4)
  assert grown.taps == (0, 1, 2)
  given = parse("tree=static")
  assert (given.size, given.height, len(given.priors)) == (26, 5, 4)
  row = parse("tree=chain,depth=4")
  assert (row.size, row.height, len(row.priors)) == (5, 4, 1)
  with pytest.raises(InputError, match="pass heads=FOLDER"):
    drafters.parse("eagle", drafters.Target(small))
