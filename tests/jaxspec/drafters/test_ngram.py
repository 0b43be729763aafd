# SPDX-License-Identifier: Apache-2.0
"""Learnt n-grams: the device says what plain Python counts.

Held here: the longest context known decides, the commonest successor is said,
no context reaches over the end of a text, a bucket that is full keeps its
commonest contexts, and a file that is no table, or another vocabulary's, is
refused.
"""

import collections
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec import drafters
from jaxspec.drafters import ngram
from jaxspec.errors import InputError

pytestmark = pytest.mark.usefixtures("quick_compiles")

VOCAB, ROWS, CAPACITY = 5, 4, 12
ORDERS, LENGTH = 3, 4
TARGET = drafters.Target(model=SimpleNamespace(vocab=VOCAB))
TEXTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1,
                          max_size=CAPACITY), min_size=ROWS, max_size=ROWS)


@jax.jit
def propose(checks, following, tokens, length):
  drafter = ngram.Ngram(checks, following, ORDERS, LENGTH)
  tail = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
  seq = SimpleNamespace(tokens=tokens, length=length, tail=lambda: tail)
  made, _ = drafter.propose(None, seq, None, ())
  return made.tokens, made.live, made.kinds


def counted(texts, min_count):
  """What mostly follows each context."""
  counts = collections.defaultdict(collections.Counter)
  for text in texts:
    for order in range(1, ORDERS + 1):
      for end in range(order, len(text)):
        counts[tuple(text[end - order:end])][text[end]] += 1
  best = {}
  for context, counter in counts.items():
    token, count = min(counter.items(), key=lambda x: (-x[1], x[0]))
    if count >= min_count:
      best[context] = token
  return best


def padded(texts):
  tokens = np.zeros((ROWS, CAPACITY), np.int32)
  for row, text in zip(tokens, texts):
    row[:len(text)] = text
  return tokens, np.array([len(t) for t in texts], np.int32)


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 2))
def test_against_plain_python(learnt, texts, min_count):
  best = counted(learnt, min_count)
  table = ngram.learn(learnt, orders=ORDERS, min_count=min_count, size=4096)
  assert (table["following"] >= 0).sum() == len(best)
  drafts = jax.device_get(propose(table["checks"], table["following"],
                                  *padded(texts)))
  for text, tokens, live, kinds in zip(texts, *drafts):
    longer, wanted = list(text), [0]
    for _ in range(LENGTH):
      order = next((o for o in range(min(ORDERS, len(longer)), 0, -1)
                    if tuple(longer[-o:]) in best), 0)
      if not order:
        break
      wanted.append(order - 1)
      longer.append(best[tuple(longer[-order:])])
    assert live == len(wanted)
    assert tokens[:live].tolist() == longer[len(text) - 1:]
    assert kinds[:live].tolist() == wanted
    assert (tokens >= 0).all()


def test_a_full_bucket_keeps_the_commonest():
  texts = [[0, 1]] * 9 + [[token, 0] for token in range(1, 9)
                          for _ in range(token)]
  table = ngram.learn(texts, orders=1, size=ngram.WAYS)
  assert table["following"].tolist() == [[1, 0, 0, 0]]
  _, check = ngram.hashes(np.array([[0], [8], [7], [6]], np.int32), 1)
  assert table["checks"].tolist() == [check.tolist()]
  assert (ngram.learn([], size=8)["following"] == -1).all()


def test_files(tmp_path):
  path = str(tmp_path / "table.safetensors")
  table = ngram.learn([[1, 2, 1, 2]], orders=2, min_count=1, size=64)
  ngram.save(path, table, vocab=VOCAB, orders=2)
  drafter = drafters.parse(f"ngram:table={path},length=2", TARGET)
  assert drafter.size == 3 and len(drafter.priors) == drafter.orders == 2
  np.testing.assert_array_equal(drafter.checks, table["checks"])
  np.testing.assert_array_equal(drafter.following, table["following"])


@pytest.mark.parametrize("write, option, words", [
    (lambda path: None, "", "cannot read a table from .*table.safetensors"),
    (lambda path: path.write_bytes(b"text"), "", "cannot read a table"),
    (lambda path: ngram.numpy.save_file({"checks": np.zeros(1)}, path), "",
     "holds no table of n-grams"),
    (lambda path: ngram.save(path, ngram.learn([], size=8), vocab=7, orders=3),
     "", "vocabulary of 7 tokens and the model has 5"),
    (lambda path: None, ",length=0", r"length must be an integer in \[1, 64\]"),
    (lambda path: None, ",order=2", "no option 'order=2'")])
def test_what_is_refused(tmp_path, write, option, words):
  path = tmp_path / "table.safetensors"
  write(path)
  with pytest.raises(InputError, match=words):
    drafters.parse(f"ngram:table={path}{option}", TARGET)


def test_a_table_is_asked_for():
  with pytest.raises(InputError, match="needs table=FILE"):
    drafters.parse("ngram", TARGET)
