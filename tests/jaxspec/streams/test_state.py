# SPDX-License-Identifier: Apache-2.0
"""How rows follow: whose noise is whose, and when a session waits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import sampling
from jaxspec.base import Request
from jaxspec.streams import layout as layouts
from jaxspec.streams import state
from jaxspec.streams.layout import Stream, StreamLayout

TALK = StreamLayout((Stream("user", written=False), Stream("out")), silence=1,
                    quiet=3)


def keys(layout, seeds=(7, 8)):
  made = sampling.defaults(len(seeds) * layout.count, 1)
  seeds = np.repeat(np.array(seeds, np.uint32), layout.count)
  made = made.replace(key=jax.vmap(jax.random.key)(seeds))
  data = jax.random.key_data(state.noise_keys(layout, made).key)
  return np.asarray(data).reshape(2, layout.count, -1)


def test_noise_goes_with_the_id_of_a_stream():
  """One stream of id 0 has the noise of ordinary decoding."""
  plain = np.asarray(jax.random.key_data(jax.vmap(jax.random.key)(
      np.array([7, 8], np.uint32))))
  np.testing.assert_array_equal(keys(layouts.single())[:, 0], plain)
  layout = layouts.thoughts()
  found = keys(layout)
  np.testing.assert_array_equal(found[:, 0], plain)
  assert len({tuple(key) for key in found.reshape(20, -1)}) == 20
  order = list(range(10))[::-1]
  np.testing.assert_array_equal(keys(layout.permuted(order)), found[:, order])


def lines(layout, *, row=0, open_=(False, True), waits=0, **changes):
  queue = state.Queue(jnp.full((1, 2, 4), 9, jnp.int32),
                      jnp.zeros((1, 2), jnp.int32),
                      jnp.array([[waits, 0]], jnp.int32))
  zero, none = jnp.zeros(1, jnp.int32), jnp.zeros((1, 2), jnp.int32)
  fields = dict(
      texts=jnp.full((1, 2, 6), 5, jnp.int32),
      filled=jnp.ones((1, 6, 2), bool),
      counts=jnp.full((1, 2), row + 1, jnp.int32),
      given=jnp.ones((1, 2), jnp.int32), row=zero + row,
      open=jnp.array([open_]), spent=none, queue=queue, heard=none > 0,
      silent=none,
      hush=zero, ended=zero > 0, logprobs=jnp.zeros((1, 2, 6)))
  return state.Lines(**(fields | changes))


def request(stop=-1, limit=6):
  return Request(
      sampling.defaults(2, 1), jnp.full(2, limit, jnp.int32),
      jnp.full((2, 1), stop, jnp.int32), jnp.zeros(2, bool))


@pytest.mark.parametrize("changes, goes_on", [
    ({}, True), (dict(open_=(False, False)), False),
    (dict(open_=(False, False), waits=1), True),
    (dict(row=5), False), (dict(ended=jnp.array([True])), False),
    (dict(hush=jnp.array([3], jnp.int32)), False),
    (dict(hush=jnp.array([3], jnp.int32), waits=1), True)])
def test_when_a_session_goes_on(changes, goes_on):
  found = state.going(TALK, lines(TALK, **changes))
  assert found.tolist() == [goes_on]


def step(layout, before, drawn=7, **changes):
  return state.advance(layout, before, request(**changes),
                       jnp.array([[3, drawn]], jnp.int32),
                       jnp.zeros((1, 2)))


def test_a_row_follows():
  after = step(TALK, lines(TALK, waits=1))
  tokens, live = after.pending
  assert tokens.tolist() == [[9, 7]] and live.all()
  assert after.heard.tolist() == [[True, True]]
  assert (after.silent.tolist(), after.hush[0]) == ([[0, 0]], 0)
  after = step(TALK, after, drawn=1)
  tokens, _ = after.pending
  assert tokens.tolist() == [[1, 1]]
  assert after.silent.tolist() == [[1, 1]]
  assert (after.hush[0], after.row[0]) == (1, 2)
  assert after.spent.tolist() == [[0, 1]]           # silence is no word
  # A read stream is never drawn; without silence its cell is empty.
  bare = dataclasses.replace(TALK, silence=None)
  _, live = step(bare, lines(bare)).pending
  assert live.tolist() == [[False, True]]


def test_a_stream_hears_what_can_reach_it():
  """Its penalty for silence grows behind that, and behind nothing else."""
  deaf = TALK.without("out", "user")
  found = [step(layout, step(layout, lines(layout, waits=1)), drawn=1)
           for layout in (TALK, deaf)]
  assert [x.heard.tolist() for x in found] == [[[True, True]], [[True, False]]]
  assert [x.silent.tolist() for x in found] == [[[1, 1]], [[1, 0]]]


@pytest.mark.parametrize("silence, opened", [
    (1, [True, True]), (None, [False, True])])
def test_words_open_what_has_ended(silence, opened):
  """With silence the first of them, without the last; but only as far as the
  stream may still say something."""
  layout = dataclasses.replace(TALK, silence=silence, quiet=0)
  before = lines(layout, waits=2, open_=(False, False))
  one = step(layout, before)
  two = step(layout, one)
  assert [bool(x.open[0, 1]) for x in (one, two)] == opened
  spent = before.replace(spent=jnp.array([[0, 5]], jnp.int32))
  assert not step(layout, step(layout, spent)).open[0, 1]
  deaf = layout.without("out", "user")
  assert not step(deaf, step(deaf, before)).open[0, 1]


@pytest.mark.parametrize("stop, open_, ended", [
    ("stream", False, False), ("session", False, True),
    ("never", True, False)])
def test_end_tokens(stop, open_, ended):
  layout = dataclasses.replace(TALK, streams=(
      TALK.streams[0], dataclasses.replace(TALK.streams[1], stop=stop)))
  after = step(layout, lines(layout), stop=7)
  assert (after.open[0, 1], after.ended[0]) == (open_, ended)
  assert step(layout, lines(layout), drawn=8, stop=7).open[0, 1]
  # The limit ends any.
  assert not step(layout, lines(layout), limit=2).open[0, 1]
