# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup drafts what plain Python finds.

Held here: the latest of the longest matches is continued, a match that runs
into the end of the text is continued as a loop, and where nothing matches
nothing is drafted. With branches, the same of the best matches that are
continued differently, as one tree.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec import drafters
from jaxspec.drafters.prompt_lookup import PromptLookup
from jaxspec.errors import InputError

pytestmark = pytest.mark.usefixtures("quick_compiles")

CAPACITY = 20
SIZES = [PromptLookup(length=4, max_ngram=3, min_ngram=1),
         PromptLookup(length=6, max_ngram=2, min_ngram=2),
         PromptLookup(length=1, max_ngram=1, min_ngram=1)]


TREES = [PromptLookup(length=3, branches=3),
         PromptLookup(length=2, max_ngram=2, min_ngram=2, branches=2),
         PromptLookup(length=3, branches=3, nodes=5)]


@jax.jit
def look_up(tokens, length):
  found = [jax.vmap(drafter.look_up)(tokens, length) for drafter in SIZES]
  return [(drafts, runs >= drafter.min_ngram, runs)
          for drafter, (drafts, runs) in zip(SIZES, found)]


@jax.jit
def trees(tokens, length):
  tail = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
  seq = SimpleNamespace(tokens=tokens, length=length, tail=lambda: tail)
  made = [drafter.propose(None, seq, None, ())[0] for drafter in TREES]
  return [(p.tokens, p.live, p.kinds, p.mask) for p in made]


def matches(text, length, max_ngram, min_ngram):
  """Every draft behind `text` with the length of its match, best first."""
  for size in range(min(max_ngram, len(text) - 1), min_ngram - 1, -1):
    for end in range(len(text) - 1, size - 1, -1):           # latest first
      if text[end - size:end] == text[len(text) - size:]:
        longer = list(text)
        for step in range(length):
          longer.append(longer[end + step])
        yield longer[len(text):], size


def reference(text, length, max_ngram, min_ngram):
  """The best draft behind `text` with the length of its match, or None."""
  return next(matches(text, length, max_ngram, min_ngram), None)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=CAPACITY),
                min_size=4, max_size=4))
def test_against_plain_python(texts):
  tokens = np.full((4, CAPACITY), 1, np.int32)      # what lies behind the end
  for row, text in zip(tokens, texts):
    row[:len(text)] = text
  found = look_up(tokens, np.array([len(t) for t in texts], np.int32))
  for drafter, results in zip(SIZES, found):
    for text, draft, hit, run in zip(texts, *results):
      wanted = reference(text, drafter.length, drafter.max_ngram,
                         drafter.min_ngram)
      assert bool(hit) == (wanted is not None)
      if wanted is not None:
        assert (draft.tolist(), int(run)) == wanted


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=CAPACITY),
                min_size=4, max_size=4))
def test_trees_against_plain_python(texts):
  padded = np.full((4, CAPACITY), 1, np.int32)
  for row, text in zip(padded, texts):
    row[:len(text)] = text
  made = jax.device_get(trees(padded, np.array([len(t) for t in texts],
                                               np.int32)))
  for drafter, results in zip(TREES, made):
    for text, tokens, live, kinds, mask in zip(texts, *results):
      best = {}                                # each continuation once
      for draft, size in matches(text, drafter.length, drafter.max_ngram,
                                 drafter.min_ngram):
        best.setdefault(tuple(draft), size)
      wanted = {}                              # each of their beginnings once
      for draft, size in list(best.items())[:drafter.branches]:
        for end in range(1, len(draft) + 1):
          wanted.setdefault(draft[:end], size - 1)
      found = {}
      for node in range(1, live):
        path = np.flatnonzero(mask[node])[1:]    # parents come first
        found[tuple(tokens[path].tolist())] = int(kinds[node])
      assert tokens[0] == text[-1] and len(found) == live - 1
      assert found.items() <= wanted.items()
      assert len(found) == min(len(wanted), drafter.size - 1)


@pytest.mark.parametrize("text, wanted", [
    ([5, 6, 7, 5, 6], [7, 5, 6, 7]),          # "5 6" came before
    ([5, 6, 9, 5, 6, 8, 5, 6], [8, 5, 6, 8]),  # the later one of two
    ([4, 4, 4], [4, 4, 4, 4]),                # a loop of one
    ([1, 2, 1, 2, 1], [2, 1, 2, 1]),          # a loop of two
    ([9, 6, 7, 8, 6, 7, 5, 8, 6, 7], [5, 8, 6, 7])])   # longest, not first
def test_by_hand(text, wanted):
  tokens = np.zeros((4, CAPACITY), np.int32)
  tokens[:, :len(text)] = text
  drafts, hits, _ = look_up(tokens, np.full(4, len(text), np.int32))[0]
  assert hits.all()
  assert drafts[0].tolist() == wanted


def test_nothing_found_is_nothing_alive(small):
  drafter = PromptLookup(length=4)

  class Sequences:
    tokens = jnp.asarray([[1, 2, 3, 0, 0, 0], [1, 2, 1, 0, 0, 0]])
    length = jnp.asarray([3, 3])

    def tail(self):
      return jnp.asarray([[3], [1]])

  proposal, _ = drafter.propose(small, Sequences(), None, ())
  assert proposal.live.tolist() == [1, 5]
  assert proposal.alive.sum(axis=1).tolist() == [1, 5]
  assert proposal.tokens[:, 0].tolist() == [3, 1]
  assert proposal.tokens[1].tolist() == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("text, words", [
    ("prompt_lookup:length=0", r"length must be an integer in \[1, 64\]"),
    ("prompt_lookup:length=65", "got 65"),
    ("prompt_lookup:max_ngram=2,min_ngram=3", "max_ngram .* got 2"),
    ("prompt_lookup:branches=17", r"branches must be .* \[1, 16\]"),
    ("prompt_lookup:branches=2,nodes=18", r"nodes must be .* \[2, 15\]"),
    ("prompt_lookup:nodes=4", "more branches than one"),
    ("prompt_lookup:lenght=3", "Did you mean 'length'"),
    ("prompt_lookup:length", "no option 'length'"),
    ("prompt_lokup", "Did you mean 'prompt_lookup'")])
def test_bad_settings_are_named(text, words):
  with pytest.raises(InputError, match=words):
    drafters.parse(text)
