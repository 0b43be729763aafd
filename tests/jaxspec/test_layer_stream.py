# SPDX-License-Identifier: Apache-2.0
"""Guesses run ahead through the stages; the text is that of plain decoding.

Held here, on 2, 3, 4 and 8 stages: mixed rows, greedy and sampled, with
penalties, end tokens and limits, say what plain decoding says; guesses were
right and wrong both; every tick is accounted for; caches below the text's
length are those of a fresh prefill, whatever was drained; one trace serves all.
(`test_memory.py` compiles the program for a TPU slice.)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import layer_stream, loop, sharding
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.errors import InputError
from jaxspec.heads import ExitHead
from jaxspec.layer_stream import LayerStream
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.pipeline import Pipeline, divide
from jaxspec.profiling import count_compiles
from jaxspec.quantization import quantize
from jaxspec.verifiers.exact import exact
from tests.conftest import tiny_config
from tests.jaxspec import batches, cycles
from tests.jaxspec.batches import GREEDY, SAMPLED

pytestmark = pytest.mark.usefixtures("quick_compiles")

DEPTH = 9
PROMPTS = batches.prompts(4)
LAYERS = {2: (4, 5), 4: (3, 2, 2, 2), 8: (2, 1, 1, 1, 1, 1, 1, 1)}


@functools.cache
def model() -> Transformer:
  """Its upper layers add little, so that an exit below them often knows."""
  random = random_source(0, scale=1.5)

  def source(path, shape, axes, wanted=None):
    weight = random(path, shape, axes, wanted)
    upper = path.startswith("layers.") and int(path.split(".")[1]) >= 2
    added = path.endswith((".out", ".down"))
    return weight * 0.3 if upper and added else weight
  return Transformer(tiny_config(depth=DEPTH), source)


def options(end: int):
  """One row of each kind; the second may end with a token it says early."""
  return [dataclasses.replace(GREEDY, max_new_tokens=24),
          dataclasses.replace(SAMPLED, seed=11, stop_token_ids=(end,)),
          dataclasses.replace(SAMPLED, seed=12, max_new_tokens=19,
                              temperature=1.3, logprobs=True),
          dataclasses.replace(GREEDY, repetition_penalty=1.3,
                              max_new_tokens=2)]


@functools.cache
def plain():
  """What plain decoding says, and with which end token."""
  free = batches.run(model(), Autoregressive(), PROMPTS, options(63))
  end = batches.answers(free)[1][9]
  state = batches.run(model(), Autoregressive(), PROMPTS, options(end))
  answers = batches.answers(state)
  assert 1 < len(answers[1]) < 24 and answers[1][-1] == end
  return answers, end, np.asarray(state.logprobs)


def mesh_of(stream):
  return sharding.make_mesh({"stage": len(stream.pipeline.layers)})


def make(whole, layers, head=None, guess=True):
  mesh = sharding.make_mesh({"stage": len(layers)})
  head = head or ExitHead.init(whole, layer=layers[0])
  return LayerStream(Pipeline.of(whole, layers, mesh), head,
                     jnp.asarray(guess))


@functools.cache
def made(stages):
  return make(model(), LAYERS[stages])


def begin(whole, stream, texts, asked, capacity=64):
  rows = len(texts)
  with jax.set_mesh(mesh_of(stream)):
    state = jax.jit(lambda stream: loop.init(
        whole, stream, stream.init_cache(rows, capacity, jnp.float32),
        capacity=capacity, stops=4, biases=4))(stream)
  return refill(whole, stream, state, range(rows), texts, asked)


def refill(whole, stream, state, rows, texts, asked):
  with jax.set_mesh(mesh_of(stream)):
    tokens, lengths = batches.padded(texts)
    prefix = loop.prefill(whole, stream.taps, tokens, lengths, chunk=512,
                          dtype=jnp.dtype("float32"))
    return loop.insert(whole, stream, exact, state, np.array(rows, np.int32),
                       prefix, batches.requests(whole, texts, asked))


def go(stream, state, ticks=2**30, wait=True):
  with jax.set_mesh(mesh_of(stream)):
    return layer_stream.decode(stream, exact, state, np.int32(ticks),
                               np.bool_(wait))


def counted(state):
  """Guesses that were right and wrong, settled tokens, and ticks, by row."""
  right = np.asarray(state.counters.accepted)[:, 0]
  return (right, np.asarray(state.counters.nodes) - right,
          np.asarray(state.counters.passes), np.asarray(state.draft.ticks))


def check_account(stream, state):
  """A right guess costs a tick, all else as many as there are stages."""
  stages = len(stream.pipeline.layers)
  right, _, settled, ticks = counted(state)
  np.testing.assert_array_equal(ticks, right + stages * (settled - right))
  np.testing.assert_array_equal(
      state.draft.worked, stages * settled + state.draft.wasted)
  assert np.all(np.asarray(state.draft.worked) <= ticks * stages)


@pytest.mark.parametrize("stages", [
    pytest.param(2, marks=pytest.mark.slow), 4,
    pytest.param(8, marks=pytest.mark.slow)])
def test_text_is_that_of_plain_decoding(stages):
  answers, end, logprobs = plain()
  stream = made(stages)
  state = go(stream, begin(model(), stream, PROMPTS, options(end)))
  assert batches.answers(state) == answers
  right, wrong, settled, _ = counted(state)
  assert settled.tolist() == [len(a) - 1 for a in answers]
  assert right.sum() > 3 and wrong.sum() > 3
  check_account(stream, state)
  np.testing.assert_allclose(state.logprobs, logprobs, atol=1e-4)
  assert np.any(logprobs)
  batches.check_cache(model(), state)


def test_rows_are_independent():
  answers, end, _ = plain()
  stream, order = made(4), [2, 0, 3, 1]
  state = go(stream, begin(model(), stream, PROMPTS, options(end)))
  other = go(stream, begin(
      model(), stream, [PROMPTS[i] for i in order],
      [options(end)[i] for i in order]))
  assert batches.answers(other) == [answers[i] for i in order]
  for one, two in zip(counted(state), counted(other)):
    np.testing.assert_array_equal(one[np.array(order)], two)


def test_without_guesses_each_token_waits():
  """The same program; nothing is guessed, drained or wasted."""
  answers, end, _ = plain()
  stream = made(4)
  go(stream, begin(model(), stream, PROMPTS, options(end)))
  traces = layer_stream.decode._cache_size()
  waits = stream.replace(guess=jnp.asarray(False))
  state = go(waits, begin(model(), waits, PROMPTS, options(end)))
  assert layer_stream.decode._cache_size() == traces
  assert batches.answers(state) == answers
  right, wrong, settled, ticks = counted(state)
  assert not right.any() and not wrong.any()
  np.testing.assert_array_equal(ticks, 4 * settled)
  assert not np.asarray(state.draft.wasted).any()
  check_account(waits, state)


def test_caches_after_every_drain_and_one_trace():
  """Tick by tick; and a row begins anew while others are under way."""
  _, end, _ = plain()
  stream = made(4)
  state = begin(model(), stream, PROMPTS, options(end))
  # What lies beyond a text is never seen, be it ever so large.
  state = state.replace(seq=state.seq.replace(cache=jax.tree.map(
      lambda x: jnp.where(x == 0, 1e4, x) if x.ndim == 5 else x,
      state.seq.cache)))
  state = go(stream, state, ticks=1)
  traces = layer_stream.decode._cache_size()
  drained = 0
  with count_compiles() as compiles:
    for _ in range(9):
      before, state = counted(state)[1].sum(), go(stream, state, ticks=2)
      drained += counted(state)[1].sum() > before
  assert drained > 3 and compiles.count == 0
  batches.check_cache(model(), state)
  assert np.any(np.asarray(state.draft.at[1:]) >= 0)
  fresh = batches.answers(batches.run(
      model(), Autoregressive(), [PROMPTS[2]] * 4, options(end)[1]))[0]
  state = refill(model(), stream, state, [3, 4, 4, 4], [PROMPTS[2]] * 4,
                 options(end)[1])
  state = go(stream, state)
  assert layer_stream.decode._cache_size() == traces
  assert batches.answers(state)[:3] == plain()[0][:3]
  assert batches.answers(state)[3] == fresh
  batches.check_cache(model(), state)


def test_the_host_hears_of_a_finished_row():
  _, end, _ = plain()
  stream = made(4)
  state = go(stream, begin(model(), stream, PROMPTS, options(end)), wait=False)
  assert state.done.tolist() == [False, False, False, True]
  with jax.set_mesh(mesh_of(stream)):
    state = loop.release(state, np.array([True, False, False, True]))
  state = go(stream, state)
  assert batches.answers(state)[1:3] == plain()[0][1:3]


@pytest.mark.parametrize("attention", [
    pytest.param(False, marks=pytest.mark.slow), True])
def test_a_head_that_knows_or_never_does(attention):
  prompts, told = [[5, 9, 2], [7], [1, 1, 4, 30, 8]], 24 - 1
  for shift, ticks in ((0, 3 + told - 1), (1, 3 * told)):
    head = cycles.exit_head(shift=shift, attention=attention)
    stream = make(cycles.model(), (1, 1, 1), head)
    state = go(stream, begin(cycles.model(), stream, prompts, GREEDY))
    assert batches.answers(state) == [cycles.recited(p, 24) for p in prompts]
    right, wrong, settled, took = counted(state)
    assert settled.tolist() == [told] * 3 and took.tolist() == [ticks] * 3
    assert (right if shift else wrong).tolist() == [0] * 3
    # The last token needs no keys, so that nothing is guessed behind it.
    assert np.asarray(state.draft.wasted).any() == bool(shift)
    check_account(stream, state)


@pytest.mark.slow
def test_the_attention_of_a_head_and_its_few_tokens():
  """Its cache too is that of a fresh pass, whatever was drained."""
  head = ExitHead(model(), random_source(4), layer=3, mlp=8, attention=True,
                  tokens=np.arange(0, 64, 2))
  stream = make(model(), LAYERS[4], head)
  answers, end, _ = plain()
  state = begin(model(), stream, PROMPTS, options(end))
  done = go(stream, state, ticks=30)
  assert batches.answers(done)[3] == answers[3]
  from tests.jaxspec.drafters.test_early_exit import _check_cache
  heard = done.draft.heard.whole().replace(length=done.seq.cache.length)
  _check_cache(model(), head, done.replace(
      draft=dataclasses.make_dataclass("Draft", ["cache"])(heard)))
  assert batches.answers(go(stream, done)) == answers


@pytest.mark.slow
def test_eight_bit_weights_lie_on_stages_too():
  whole = quantize(model())
  stream = make(whole, LAYERS[2])
  state = go(stream, begin(whole, stream, PROMPTS, GREEDY))
  right, wrong, *_ = counted(state)
  assert right.sum() and wrong.sum()
  assert batches.answers(state) == batches.answers(
      batches.run(whole, Autoregressive(), PROMPTS, GREEDY))


def test_layers_are_shared_out():
  assert divide(30, 4) == (8, 8, 7, 7)
  assert divide(30, 8, first=5) == (5, 4, 4, 4, 4, 3, 3, 3)


@pytest.mark.parametrize("sizes, layers, words", [
    ({"stage": 1}, (9,), "mesh axis stage alone, of at least 2"),
    ({"stage": 2, "tensor": 2}, (4, 5), "mesh axis stage alone"),
    ({"stage": 2}, (4, 4), "the model's 9 layers together, got 4, 4"),
    ({"stage": 2}, (9, 0), "at least one layer"),
    ({"stage": 3}, (4, 5), "3 stages of at least one layer")])
def test_stages_that_do_not_fit(sizes, layers, words):
  with pytest.raises(InputError, match=words):
    Pipeline.of(model(), layers, sharding.make_mesh(sizes))


def test_layers_of_two_kinds_must_line_up():
  config = tiny_config(depth=4, windows=(8, None, 8, None))
  read = functools.partial(Pipeline.read, config, random_source(0))
  mesh = sharding.make_mesh({"stage": 2})
  assert read((2, 2), mesh).model.config.windows == (8, None)
  with pytest.raises(InputError, match="differ in the windows of their layer"):
    read((3, 1), mesh)
