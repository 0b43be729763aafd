# SPDX-License-Identifier: Apache-2.0
"""Lookahead keeps the window and the pool that plain Python keeps.

Held here, over texts that grow by any number of tokens a step: the window
moves as far as the text, what its columns say is pooled, newest first and
once, end tokens do not enter the window, a finished row rests, and a new
request begins with its own prompt alone.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec import drafters
from jaxspec.base import Proposal, Verdict
from jaxspec.drafters.lookahead import Lookahead, State, window_and_guesses
from jaxspec.errors import InputError

pytestmark = pytest.mark.usefixtures("quick_compiles")

DRAFTER = Lookahead(window=3, levels=2, guesses=2, buckets=3)
COLUMNS, LEVELS, GUESSES, BUCKETS = 3, 2, 2, 3
AHEAD = LEVELS * COLUMNS
VOCAB, ROWS, CAPACITY, STEPS, STOP = 5, 2, 40, 4, 4


@jax.jit
def insert(state, rows, tokens, length):
  prefix = SimpleNamespace(tokens=tokens, length=length)
  return DRAFTER.insert(None, state, rows, prefix, None)


@jax.jit
def propose(state, tokens, length):
  tail = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
  seq = SimpleNamespace(tokens=tokens, length=length, tail=lambda: tail)
  request = SimpleNamespace(stops=jnp.full((ROWS, 2), -1).at[:, 1].set(STOP))
  made, state = DRAFTER.propose(None, seq, request, state)
  return made.tokens, made.live, state


@jax.jit
def observe(state, tokens, length, drafted, live, top, kept):
  seq = SimpleNamespace(tokens=tokens, length=length)
  path = jnp.zeros((ROWS, DRAFTER.height + 1), jnp.int32)
  return DRAFTER.observe(
      None, seq, state, Proposal(drafted, DRAFTER.tree, live=live),
      SimpleNamespace(top=top), Verdict(path, kept, kept))


class Plain:
  """One row in plain Python."""

  def __init__(self, prompt):
    self.pool = [[] for _ in range(BUCKETS)]
    for start in range(len(prompt) - LEVELS):
      self.remember(prompt[start:start + LEVELS + 1])
    self.window = [self.stray(prompt, c) for c in range(COLUMNS)]

  def stray(self, text, column):
    start = ((len(text) + column) * 0x9E3779B1 % 2**32) >> 8
    return [text[(start + level) % len(text)] for level in range(LEVELS)]

  def remember(self, ngram):
    held = self.pool[ngram[0] % BUCKETS]
    if ngram in held:
      held.remove(ngram)
    held.insert(0, ngram)
    del held[GUESSES:]

  def propose(self, root):
    self.shown = [[root if t == STOP else t for t in column]
                  for column in self.window]
    levels = [t for level in zip(*self.shown) for t in level]
    held = [n for n in self.pool[root % BUCKETS] if n[0] == root]
    return [root, *levels, *(t for ngram in held for t in ngram[1:])]

  def observe(self, text, said, kept):
    columns = [[*column, t] for column, t in zip(self.shown, said)]
    for ngram in columns:
      self.remember(ngram)
    self.window = [
        columns[c + kept - 1][1:] if c + kept <= COLUMNS
        else self.stray(text, c + kept - 1) for c in range(COLUMNS)]

  def check(self, state, row):
    assert state.window[row].T.tolist() == self.window
    for held, pool in zip(state.pool[row], self.pool):
      flat = [t for ngram in pool for t in ngram]
      assert held.tolist() == flat + [-1] * (len(held) - len(flat))


def padded(texts, width=CAPACITY):
  tokens = np.full((len(texts), width), 2, np.int32)
  for row, text in zip(tokens, texts):
    row[:len(text)] = text
  return tokens, np.array([len(t) for t in texts], np.int32)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_against_plain_python(seed):
  rng = np.random.default_rng(seed)

  def some(count):
    return rng.integers(0, VOCAB, count).tolist()

  texts = [some(rng.integers(1, 9)) for _ in range(ROWS)]
  # What was there before is forgotten.
  state = State(jnp.full((ROWS, LEVELS, COLUMNS), 1, jnp.int32),
                jnp.full((ROWS, BUCKETS, GUESSES * 3), 1, jnp.int32))
  state = insert(state, np.array([1, 0]), *padded(texts[::-1], 8))
  plain = [Plain(text) for text in texts]
  for _ in range(STEPS):
    drafted, live, state = propose(state, *padded(texts))
    for row, text in enumerate(texts):
      wanted = plain[row].propose(text[-1])
      assert live[row] == len(wanted)
      assert drafted[row, :len(wanted)].tolist() == wanted
    top = rng.integers(0, VOCAB, (ROWS, DRAFTER.size, 1)).astype(np.int32)
    kept = rng.integers(0, DRAFTER.height + 2, ROWS).astype(np.int32)
    for row, count in enumerate(kept):
      texts[row] = texts[row] + some(count)
      if count:
        said = top[row, 1 + AHEAD - COLUMNS:1 + AHEAD, 0].tolist()
        plain[row].observe(texts[row], said, int(count))
    state = observe(state, *padded(texts), drafted, live, top, kept)
    for row in range(ROWS):
      plain[row].check(state, row)


def test_a_node_sees_its_levels():
  """The first level up to its column, and its own column from there on."""
  tree = window_and_guesses(3, 3, 2)
  for level in range(3):
    for column in range(3):
      seen = set(np.flatnonzero(tree.mask[1 + 3 * level + column]).tolist())
      assert seen == {0, *range(1, 2 + column),
                      *(1 + 3 * above + column for above in range(level + 1))}
  assert tree.size == 1 + 9 + 6
  assert tree.parents[10:] == (0, 10, 11, 0, 13, 14)


def test_a_row_that_is_not_there():
  state = State(jnp.ones((1, LEVELS, COLUMNS), jnp.int32),
                jnp.ones((1, BUCKETS, GUESSES * 3), jnp.int32))
  after = insert(state, np.array([1]), *padded([[1, 2, 3, 4]], 8))
  assert (after.window == 1).all() and (after.pool == 1).all()


@pytest.mark.parametrize("text, words", [
    ("lookahead:window=0", r"window must be an integer in \[1, 64\], got 0"),
    ("lookahead:levels=17", "levels must be"),
    ("lookahead:guesses=0", "guesses must be"),
    ("lookahead:buckets=0", "buckets must be"),
    ("lookahead:guess=2", "Did you mean 'guesses'")])
def test_bad_settings_are_named(text, words):
  with pytest.raises(InputError, match=words):
    drafters.parse(text)
