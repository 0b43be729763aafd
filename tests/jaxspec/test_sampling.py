# SPDX-License-Identifier: Apache-2.0
"""Warps and draws, against plain NumPy and against transformers.

Held here: every warp, in the one order, for batches in which every row asks
for something else; rows do not feel their neighbours; penalties see a node's
own path alone; and a draw is a function of (key, position), on one device or
on a mesh.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxspec import sampling, sharding
from jaxspec.options import Options, as_request
from jaxspec.sampling import History
from jaxspec.tree import branching
from tests.jaxspec import warping

VOCAB, SLOTS, BIASES = 23, 12, 4
TREE = branching((2, 1))             # 1 and 2 are siblings, 3 is behind 1


@jax.jit
def warp(logits, options, history):
  """Of every node."""
  def at(n):
    return sampling.warp(jnp.asarray(logits)[:, n], options, history,
                         jnp.full(len(logits), n))
  return jnp.stack([at(n) for n in range(logits.shape[1])], axis=1)


draw = jax.jit(jax.vmap(sampling.draw, (1, None, 1), 1))
gumbel = jax.vmap(sampling.gumbel, (None, 1, None), 1)


def arrays(options):
  """The rows' sampling arguments."""
  return as_request(options, [0] * len(options), (), vocab=VOCAB, stops=1,
                    biases=BIASES).sampling


def no_history(rows, nodes):
  return History(*(jnp.zeros(shape, jnp.int32) for shape in (
      (rows, SLOTS), rows, rows, (rows, nodes))), jnp.broadcast_to(
              jnp.eye(nodes, dtype=bool), (rows, nodes, nodes)))


def warped(logits, *options, history=None):
  """`logits`, one row's or all rows', as each of `options` warps them."""
  logits = np.asarray(logits, np.float32)
  if logits.ndim == 1:
    logits = np.tile(logits, (len(options), 1))
  if history is None:
    history = no_history(len(options), 1)
  return np.asarray(warp(logits[:, None], arrays(options), history))[:, 0]


def kept(logits, *options):
  """Which tokens each of `options` leaves in."""
  return [np.flatnonzero(np.isfinite(row)).tolist()
          for row in warped(logits, *options)]


def random_options(rng) -> Options:
  """Greedy now and then; every warp switched on half the time."""
  def maybe(value, otherwise):
    return value if rng.random() < 0.5 else otherwise
  ids = rng.permutation(VOCAB)[:rng.integers(0, BIASES + 1)].tolist()
  return Options(
      temperature=0.0 if rng.random() < 0.2 else rng.uniform(0.2, 2),
      top_k=maybe(int(rng.integers(1, VOCAB + 5)), 0),
      top_p=maybe(rng.uniform(0.05, 1), 1.0),
      min_p=maybe(rng.uniform(0, 0.5), 0.0),
      repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
      presence_penalty=maybe(rng.uniform(-1, 1), 0.0),
      frequency_penalty=maybe(rng.uniform(-1, 1), 0.0),
      logit_bias=maybe({i: rng.uniform(-3, 3) for i in ids}, {}))


def random_case(seed, rows=8):
  """Logits of a tree, options and a text for each row."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(rows, TREE.size, VOCAB)) * 2
  if seed % 2:
    logits = np.round(logits)         # ties
  length = rng.integers(1, SLOTS + 1, rows)
  history = History(*(jnp.asarray(x, jnp.int32) for x in (
      rng.integers(0, VOCAB, (rows, SLOTS)), rng.integers(1, length + 1),
      length, rng.integers(0, VOCAB, (rows, TREE.size)))),
      jnp.broadcast_to(TREE.mask, (rows, TREE.size, TREE.size)))
  options = [random_options(rng) for _ in range(rows)]
  return logits.astype(np.float32), options, history


@pytest.mark.medium
@pytest.mark.parametrize("seeds", [range(0, 150), range(150, 300)])
def test_against_numpy(seeds):
  for seed in seeds:
    logits, options, history = random_case(seed)
    found = np.asarray(warp(logits, arrays(options), history))
    tokens, splits, lengths, nodes = map(np.asarray, (
        history.tokens, history.prompt_length, history.length, history.nodes))
    for row, option in enumerate(options):
      text, split = tokens[row, :lengths[row]].tolist(), splits[row]
      for node in range(TREE.size):
        path = [int(nodes[row, n])
                for n in range(1, TREE.size) if TREE.mask[node, n]]
        wanted = warping.warp(logits[row, node], option, text[:split],
                              text[split:] + path)
        np.testing.assert_allclose(
            found[row, node], wanted, rtol=1e-5, atol=2e-5,
            err_msg=f"seed {seed}, row {row}, node {node}, {option}")


def test_rows_do_not_feel_their_neighbours():
  """Alone, in another place, among others: the same bits."""
  logits, options, history = random_case(0)
  found = np.asarray(warp(logits, arrays(options), history))
  order = np.random.default_rng(1).permutation(8)

  def rows(history, of):
    return history.replace(**{
        name: getattr(history, name)[of] for name in
        ("tokens", "prompt_length", "length", "nodes")})

  moved = warp(logits[order], arrays([options[i] for i in order]),
               rows(history, order))
  np.testing.assert_array_equal(moved, found[order])
  for row in range(8):
    others = [options[row] if i == row else Options() for i in range(8)]
    among = warp(logits, arrays(others), history)
    np.testing.assert_array_equal(among[row], found[row])


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_against_transformers(temperature):
  """Every warp by itself, and all of them in the order of `generate`."""
  torch = pytest.importorskip("torch")
  process = pytest.importorskip("transformers.generation.logits_process")
  rng = np.random.default_rng(int(temperature * 10))
  logits = (rng.normal(size=(16, VOCAB)) * 2).astype(np.float32)
  prompt = rng.integers(0, VOCAB, (16, SLOTS)).astype(np.int32)
  history = no_history(16, 1).replace(
      tokens=jnp.asarray(prompt), length=jnp.full(16, SLOTS, jnp.int32),
      prompt_length=jnp.full(16, 5, jnp.int32))
  wanted = {
      "repetition_penalty": (1.3, process.RepetitionPenaltyLogitsProcessor),
      "temperature": (temperature, process.TemperatureLogitsWarper),
      "top_k": (7, process.TopKLogitsWarper),
      "top_p": (0.8, process.TopPLogitsWarper),
      "min_p": (0.1, process.MinPLogitsWarper)}
  groups = [["temperature", name] for name in wanted] + [list(wanted)]
  for group in groups:
    scores = torch.tensor(logits)
    for name, (value, processor) in wanted.items():
      if name in group:
        scores = processor(value)(torch.tensor(prompt).long(), scores)
    options = Options(**{name: wanted[name][0] for name in group})
    np.testing.assert_allclose(
        warped(logits, *[options] * 16, history=history), scores.numpy(),
        rtol=1e-5, atol=1e-5, err_msg=str(group))
    if set(group) & {"top_k", "top_p", "min_p"}:
      assert np.any(np.isinf(scores.numpy()))


LINE = np.linspace(3, -3, VOCAB)      # the likeliest token is 0
SAMPLED = Options(temperature=1.0)
option = functools.partial(dataclasses.replace, SAMPLED)


def test_top_k():
  everything = list(range(VOCAB))
  assert kept(LINE, *(option(top_k=k) for k in (0, 1, 5, VOCAB, VOCAB + 9,
                                                2**30))) == [
      everything, [0], everything[:5], everything, everything, everything]


def test_top_p():
  probs = warping.softmax(LINE)
  half = int(np.searchsorted(np.cumsum(probs), 0.5)) + 1
  assert kept(LINE, *(option(top_p=p) for p in (
      1.0, 0.5, probs[0] - 1e-4, probs[0] + 1e-4, 1e-9, 1e-60))) == [
          list(range(n)) for n in (VOCAB, half, 1, 2, 1, 1)]


def test_top_p_is_of_what_top_k_left():
  """Half of five tokens, not half of all of them."""
  mass = np.cumsum(warping.softmax(LINE[:5]))
  count = int(np.searchsorted(mass, 0.7)) + 1
  assert count < np.searchsorted(np.cumsum(warping.softmax(LINE)), 0.7) + 1
  assert kept(LINE, option(top_k=5, top_p=0.7)) == [list(range(count))]


def test_min_p():
  step = LINE[0] - LINE[1]
  third = math.exp(-2.5 * step)       # between the third and the fourth
  assert kept(LINE, *(option(min_p=p) for p in (0.0, third, 1.0))) == [
      list(range(VOCAB)), [0, 1, 2], [0]]
  # Of the tempered probabilities.
  assert kept(LINE, option(min_p=third, temperature=0.5)) == [[0, 1]]


def test_ties_stay_together():
  ties = np.full(VOCAB, -4.0)
  ties[[4, 9, 17]], ties[20] = 1.0, 2.0
  everything = [4, 9, 17, 20]
  assert kept(ties, *(option(top_k=k) for k in (1, 2, 3, 4))) == [
      [20], everything, everything, everything]
  first, second = warping.softmax(ties)[[20, 4]]
  assert kept(ties, option(top_p=first / 2), option(top_p=first + second / 2)
              ) == [[20], everything]
  flat = np.zeros(VOCAB)
  for change in ({"top_k": 1}, {"top_p": 1e-3}, {"min_p": 1.0}):
    assert kept(flat, option(**change)) == [list(range(VOCAB))]
  # Zero has two signs.
  flat[::2] = -0.0
  assert kept(flat, option(top_k=1)) == [list(range(VOCAB))]


def test_a_greedy_row_is_not_cut():
  greedy = Options(top_k=2, top_p=0.1, min_p=0.9)
  found = warped(LINE, greedy, option(top_k=2))
  np.testing.assert_array_equal(found[0], LINE.astype(np.float32))
  assert np.isfinite(found[1]).sum() == 2


def test_a_greedy_row_feels_penalties_and_bias():
  history = no_history(2, 1).replace(
      tokens=jnp.zeros((2, SLOTS), jnp.int32),
      length=jnp.full(2, 3, jnp.int32), prompt_length=jnp.ones(2, jnp.int32))
  found = warped(LINE, Options(repetition_penalty=3.0),
                 Options(logit_bias={7: 50.0}), history=history)
  assert found.argmax(axis=1).tolist() == [1, 7]
  assert found[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1e-45])
def test_a_cold_row_takes_the_likeliest(temperature):
  """However cold: never an overflow in which all good tokens look alike."""
  logits = np.tile(LINE[::-1] * 20, (4, 1)).astype(np.float32)[:, None]
  options = arrays([option(temperature=temperature, top_p=p, seed=s)
                    for p in (1.0, 0.9) for s in (0, 1)])
  found = warp(logits, options, no_history(4, 1))
  assert not np.any(np.isnan(found))
  assert draw(found, options, jnp.ones((4, 1), jnp.int32)).tolist() == [
      [VOCAB - 1]] * 4


def test_penalties_see_a_nodes_own_path():
  """Neither a sibling, nor what comes behind it, nor the root twice."""
  nodes = np.array([[5, 6, 7, 8, 9]], np.int32)
  tokens = np.zeros((1, SLOTS), np.int32)
  tokens[0, :4] = 1, 5, 2, 5          # the root, 5, is the last of the text
  tokens[0, 4:] = 11                  # left over from an earlier request
  history = History(
      jnp.asarray(tokens), jnp.array([2], jnp.int32), jnp.array([4], jnp.int32),
      jnp.asarray(nodes), jnp.asarray(TREE.mask)[None])
  paths = [(), (6,), (7,), (6, 8), (7, 9)]
  flat = np.ones((1, TREE.size, VOCAB), np.float32)

  def lowered(**change):
    found = 1 - np.asarray(warp(flat, arrays([Options(**change)]), history))[0]
    return [{int(t): round(float(row[t]), 3) for t in np.flatnonzero(row)}
            for row in found]

  # The answer, so far, is 2 and 5; the prompt 1 and 5.
  assert lowered(frequency_penalty=0.25) == lowered(presence_penalty=0.25) == [
      {2: 0.25, 5: 0.25, **{t: 0.25 for t in path}} for path in paths]
  assert lowered(repetition_penalty=2.0) == [
      {1: 0.5, 2: 0.5, 5: 0.5, **{t: 0.5 for t in path}} for path in paths]


@pytest.mark.parametrize("vocab", [60, 5000, 5100])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_likeliest_tokens(vocab, count):
  """In blocks or at once; with ties, of which the first counts."""
  rng = np.random.default_rng(0)
  for logits in (rng.standard_normal((2, 3, vocab)),
                 rng.integers(0, 40, (2, 3, vocab)),
                 -np.inf * np.ones((2, 3, vocab))):
    logits = logits.astype(np.float32)
    wanted = np.argsort(-logits, axis=-1, kind="stable")[..., :count]
    np.testing.assert_array_equal(sampling.top(jnp.asarray(logits), count),
                                  wanted)


def test_frequency_counts_and_presence_does_not():
  nodes = jnp.array([[3, 3, 4, 3, 4]], jnp.int32)
  tokens = jnp.full((1, SLOTS), 3, jnp.int32)
  history = History(
      tokens, jnp.array([2], jnp.int32), jnp.array([5], jnp.int32), nodes,
      jnp.asarray(TREE.mask)[None])
  flat = jnp.ones((1, TREE.size, VOCAB))

  def lowered(**change):
    found = warp(flat, arrays([Options(**change)]), history)
    return (1 - np.asarray(found)[0, :, 3:5]).tolist()

  # Three times in the answer, then on the paths (), 3, 4, 3 3 and 4 4.
  assert lowered(frequency_penalty=1.0) == [
      [3, 0], [4, 0], [3, 1], [5, 0], [3, 2]]
  assert lowered(presence_penalty=1.0) == [
      [1, 0], [1, 0], [1, 1], [1, 0], [1, 1]]


def test_bias_comes_first():
  """It can change the sign by which a penalty decides."""
  history = no_history(1, 1).replace(length=jnp.ones(1, jnp.int32),
                                     prompt_length=jnp.ones(1, jnp.int32))
  logits = np.full(VOCAB, -1.0)
  found = warped(logits, Options(logit_bias={0: 3.0, 5: -2.0},
                                 repetition_penalty=4.0), history=history)[0]
  assert found[0] == pytest.approx(0.5)          # (-1 + 3) / 4, not -4 + 3
  assert found[5] == pytest.approx(-3.0)
  assert np.all(np.delete(found, [0, 5]) == -1.0)


def test_half_precision_logits_are_warped_in_float32():
  logits = jnp.asarray(np.tile(LINE, (1, 1, 1)), jnp.bfloat16)
  found = warp(logits, arrays([option(temperature=0.7)]), no_history(1, 1))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(
      found, np.asarray(logits, np.float32) / np.float32(0.7), rtol=1e-6)


def noisy(seeds, temperature=1.0):
  return arrays([Options(temperature=temperature, seed=s) for s in seeds])


def test_a_draw_is_a_function_of_key_and_position():
  """Not of the row, the node, the batch, or how many nodes there are."""
  rng = np.random.default_rng(0)
  seeds, positions = [3, 8, 3, 1], np.array([[5, 9, 6, 5]] * 4, np.int32)
  one = rng.normal(size=VOCAB).astype(np.float32)
  logits = np.tile(one, (4, 4, 1))
  found = np.asarray(draw(logits, noisy(seeds), positions))

  def alone(seed, position):
    return int(draw(one[None, None], noisy([seed]),
                    jnp.full((1, 1), position, jnp.int32))[0, 0])

  for row, seed in enumerate(seeds):
    assert found[row].tolist() == [alone(seed, p) for p in positions[row]]
  np.testing.assert_array_equal(found[0], found[2])
  np.testing.assert_array_equal(found[:, 0], found[:, 3])
  # Greedy neighbours and another law elsewhere change nothing either.
  logits[1:] = rng.normal(size=(3, 4, VOCAB))
  options = noisy(seeds).replace(
      temperature=jnp.array([1.0, 0.0, 1.0, 0.0], jnp.float32))
  np.testing.assert_array_equal(draw(logits, options, positions)[0], found[0])


def test_noise_differs_by_key_and_by_position():
  noise = np.asarray(gumbel(
      noisy([0, 1, 2**32 - 1]).key, jnp.arange(12).reshape(3, 4), VOCAB))
  flat = noise.reshape(12, VOCAB)
  for a in range(12):
    for b in range(a):
      assert not np.any(flat[a] == flat[b])


@pytest.mark.parametrize("nodes", [1, 4])
def test_greedy_is_argmax(nodes):
  logits = np.random.default_rng(0).normal(size=(6, nodes, VOCAB)).round()
  positions = jnp.zeros((6, nodes), jnp.int32)
  wanted = logits.argmax(axis=-1)     # the first of the likeliest
  logits = logits.astype(np.float32)
  np.testing.assert_array_equal(
      draw(logits, noisy(range(6), 0.0), positions), wanted)
  # Beside a sampled row, too.
  mixed = noisy(range(6)).replace(temperature=jnp.array([0.0] * 5 + [1.0]))
  found = draw(logits, mixed, positions)
  np.testing.assert_array_equal(found[:5], wanted[:5])
  assert found.dtype == jnp.int32


def test_draws_have_the_law_of_the_logits():
  """Chi-square of one draw, of neighbouring positions, of adjoining seeds."""
  logits = np.array([1.0, 0.2, -0.5, 0.7, -2.0, -np.inf], np.float32)
  rows, nodes = 512, 64
  positions = jnp.broadcast_to(jnp.arange(nodes)[None], (rows, nodes))
  found = np.asarray(draw(np.tile(logits, (rows, nodes, 1)),
                          noisy(range(rows)), positions))
  law = warping.softmax(logits.astype(np.float64))[:5]

  def p_value(counts, probs):
    return stats.chisquare(counts, probs * counts.sum()).pvalue

  counts = np.bincount(found.ravel(), minlength=6)
  assert counts[5] == 0               # what is ruled out is never drawn
  assert p_value(counts[:5], law) > 1e-6
  for first, second in ((found[:, :-1], found[:, 1:]),
                        (found[:-1], found[1:])):
    pairs = np.bincount((first * 5 + second).ravel(), minlength=25)
    assert p_value(pairs, np.outer(law, law).ravel()) > 1e-6
  # A law one part in ten away is seen.
  assert p_value(counts[:5], warping.softmax(logits[:5] * 1.1)) < 1e-6


def test_log_probability():
  """Of tokens behind nodes that are named, in any order and number."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 4, VOCAB)) * 5
  nodes = rng.integers(0, 4, (3, 6))
  tokens = rng.integers(0, VOCAB, (3, 6))
  found = sampling.log_probability(
      jnp.asarray(logits, jnp.float32), jnp.asarray(nodes, jnp.int32),
      jnp.asarray(tokens, jnp.int32))
  assert found.shape == (3, 6)
  for row in range(3):
    for i, (node, token) in enumerate(zip(nodes[row], tokens[row])):
      wanted = np.log(warping.softmax(logits[row, node])[token])
      assert found[row, i] == pytest.approx(wanted, abs=1e-5)


def test_defaults_are_greedy_and_change_nothing():
  options = sampling.defaults(2, BIASES)
  asked = arrays([Options()] * 2)
  for one, other in zip(jax.tree.leaves(options), jax.tree.leaves(asked)):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
  logits = np.tile(LINE, (2, 1, 1)).astype(np.float32)
  np.testing.assert_array_equal(
      warp(logits, options, no_history(2, 1)), logits)
  assert draw(logits, options, jnp.zeros((2, 1), jnp.int32)).tolist() == [
      [0], [0]]


@pytest.mark.slow
def test_on_a_mesh():
  """Rows over data and the vocabulary over tensor: the same noise and draws."""
  mesh = sharding.make_mesh({"data": 2, "tensor": 2})
  rows, nodes, vocab = 4, 5, 24
  options = [random_options(np.random.default_rng(s)) for s in range(rows - 1)]
  options = arrays([dataclasses.replace(o, seed=s) for s, o in
                    enumerate([*options, option(top_p=0.9, top_k=12)])])
  logits = np.random.default_rng(0).normal(size=(rows, nodes, vocab)) * 2
  logits = logits.astype(np.float32)
  positions = np.arange(rows * nodes).reshape(rows, nodes).astype(np.int32)
  node = np.array([4, 0, 2, 3], np.int32)

  @jax.jit
  def run(logits, options, history, positions, node):
    logits = sharding.constrain(logits, "rows", None, "vocab")
    laws = sampling.Laws(logits, options, history, positions)
    return (sampling.gumbel(options.key, positions[:, 0], vocab),
            laws.at(node), laws.draw(node))

  rest = options, no_history(rows, nodes), positions, node
  wanted = run(logits, *rest)
  with jax.set_mesh(mesh):
    found = run(sharding.place(logits, ("rows", None, "vocab"), mesh), *rest)
  assert found[0].sharding.spec == sharding.spec(
      ("rows", "vocab"), found[0].shape, mesh)
  assert len(found[0].sharding.device_set) == 4
  np.testing.assert_array_equal(found[0], wanted[0])
  np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6)
  np.testing.assert_array_equal(found[2], wanted[2])
  # Each is that of the node that was asked for, and of no other.
  every = warp(logits, *rest[:2])
  np.testing.assert_allclose(wanted[1], every[np.arange(rows), node],
                             rtol=1e-6)
  np.testing.assert_array_equal(
      wanted[2], draw(every, options, positions)[np.arange(rows), node])
