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
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.errors import InputError
from jaxspec.generator import Generator, Options
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

PROMPTS = batches.prompts(4)
LAYERS = {2: (2, 3), 4: (2, 1, 1, 1), 8: (2, 1, 1, 1, 1, 1, 1, 1)}


@functools.cache
def model(depth: int = 5) -> Transformer:
  """Its upper layers add little, so that an exit below them often knows."""
  random = random_source(0, scale=1.5)

  def source(path, shape, axes, wanted=None):
    weight = random(path, shape, axes, wanted)
    upper = path.startswith("layers.") and int(path.split(".")[1]) >= 2
    added = path.endswith((".out", ".down"))
    return weight * 0.3 if upper and added else weight
  return Transformer(tiny_config(depth=depth), source)


def options(end: int):
  """One row of each kind; the second may end with a token it says early."""
  return [dataclasses.replace(GREEDY, max_new_tokens=24),
          dataclasses.replace(SAMPLED, seed=11, stop_token_ids=(end,)),
          dataclasses.replace(SAMPLED, seed=12, max_new_tokens=19,
                              temperature=1.3, logprobs=True),
          dataclasses.replace(GREEDY, repetition_penalty=1.3,
                              max_new_tokens=2)]


@functools.cache
def plain(depth: int = 5):
  """What plain decoding says, and with which end token."""
  free = batches.run(model(depth), Autoregressive(), PROMPTS, options(63))
  end = batches.answers(free)[1][9]
  state = batches.run(model(depth), Autoregressive(), PROMPTS, options(end))
  answers = batches.answers(state)
  assert 1 < len(answers[1]) < 24 and answers[1][-1] == end
  return answers, end, np.asarray(state.logprobs)


@dataclasses.dataclass(frozen=True)
class Stages:
  """A model on stages, and what guesses there."""

  whole: Transformer
  pipeline: Pipeline
  stream: LayerStream
  mesh: jax.sharding.Mesh

  def begin(self, texts, asked, capacity=64):
    rows = len(texts)
    with jax.set_mesh(self.mesh):
      state = jax.jit(lambda model, stream: loop.init(
          model, stream,
          model.init_cache(ContiguousCache, rows, capacity, jnp.float32),
          capacity=capacity, stops=4, biases=4))(self.pipeline, self.stream)
    return self.refill(state, range(rows), texts, asked)

  def refill(self, state, rows, texts, asked):
    tokens, lengths = batches.padded(texts)
    with jax.set_mesh(self.mesh):
      prefix = loop.prefill(self.whole, self.stream.taps, tokens, lengths,
                            chunk=512, dtype=jnp.dtype("float32"))
      return loop.insert(
          self.pipeline, self.stream, exact, state, np.array(rows, np.int32),
          prefix, batches.requests(self.whole, texts, asked))

  def go(self, state, ticks=2**30, wait=True):
    with jax.set_mesh(self.mesh):
      return layer_stream.decode(self.pipeline, self.stream, exact, state,
                                 np.int32(ticks), np.bool_(wait))

  def run(self, texts, asked):
    return self.go(self.begin(texts, asked))


def make(whole, layers, head=None):
  mesh = sharding.make_mesh({"stage": len(layers)})
  head = head or ExitHead.init(whole, layer=layers[0])
  return Stages(whole, Pipeline.of(whole, layers, mesh),
                LayerStream.on(mesh, head), mesh)


@functools.cache
def made(count):
  return make(model(sum(LAYERS[count])), LAYERS[count])


def counted(state):
  """Guesses that were right and wrong, settled tokens, and ticks, by row."""
  right = np.asarray(state.counters.accepted)[:, 0]
  return (right, np.asarray(state.counters.nodes) - right,
          np.asarray(state.counters.passes), np.asarray(state.draft.ticks))


def check_account(stages, state):
  """A right guess costs a tick, all else as many as there are stages."""
  count = len(stages.pipeline.layers)
  right, _, settled, ticks = counted(state)
  np.testing.assert_array_equal(ticks, right + count * (settled - right))
  np.testing.assert_array_equal(
      state.draft.worked, count * settled + state.draft.wasted)
  assert np.all(np.asarray(state.draft.worked) <= ticks * count)


@pytest.mark.medium
@pytest.mark.parametrize("count", [
    pytest.param(2, marks=pytest.mark.slow), 4,
    pytest.param(8, marks=pytest.mark.slow)])
def test_text_is_that_of_plain_decoding(count):
  stages = made(count)
  answers, end, logprobs = plain(stages.whole.depth)
  state = stages.run(PROMPTS, options(end))
  assert batches.answers(state) == answers
  right, wrong, settled, _ = counted(state)
  assert settled.tolist() == [len(a) - 1 for a in answers]
  assert right.sum() > 3 and wrong.sum() > 3
  check_account(stages, state)
  np.testing.assert_allclose(state.logprobs, logprobs, atol=1e-4)
  assert np.any(logprobs)
  batches.check_cache(stages.whole, state)


@pytest.mark.medium
def test_rows_are_independent():
  answers, end, _ = plain()
  stages, order = made(4), [2, 0, 3, 1]
  state = stages.run(PROMPTS, options(end))
  other = stages.run([PROMPTS[i] for i in order],
                     [options(end)[i] for i in order])
  assert batches.answers(other) == [answers[i] for i in order]
  for one, two in zip(counted(state), counted(other)):
    np.testing.assert_array_equal(one[np.array(order)], two)


def test_without_guesses_each_token_waits():
  """The same program; nothing is guessed, drained or wasted."""
  answers, end, _ = plain()
  stages = made(4)
  stages.run(PROMPTS, options(end))
  waits = dataclasses.replace(
      stages, stream=LayerStream.on(stages.mesh, stages.stream.head,
                                    guess=False))
  state = waits.begin(PROMPTS, options(end))
  with count_compiles() as compiles:
    state = waits.go(state)
  assert compiles.count == 0
  assert batches.answers(state) == answers
  right, wrong, settled, ticks = counted(state)
  assert not right.any() and not wrong.any()
  np.testing.assert_array_equal(ticks, 4 * settled)
  assert not np.asarray(state.draft.wasted).any()
  check_account(waits, state)


def test_caches_after_every_drain_and_one_trace():
  """Tick by tick; and a row begins anew while others are under way."""
  _, end, _ = plain()
  stages = made(4)
  state = stages.begin(PROMPTS, options(end))
  # What lies beyond a text is never seen, be it ever so large.
  state = state.replace(seq=state.seq.replace(cache=jax.tree.map(
      lambda x: jnp.where(x == 0, 1e4, x) if x.ndim == 5 else x,
      state.seq.cache)))
  state = stages.go(state, ticks=1)
  drained = 0
  with count_compiles() as compiles:
    for _ in range(9):
      before, state = counted(state)[1].sum(), stages.go(state, ticks=2)
      drained += counted(state)[1].sum() > before
  assert drained > 3 and compiles.count == 0
  batches.check_cache(model(), state)
  assert np.any(np.asarray(state.draft.at[1:]) >= 0)
  fresh = batches.answers(batches.run(
      model(), Autoregressive(), [PROMPTS[2]] * 4, options(end)[1]))[0]
  state = stages.refill(state, [3, 4, 4, 4], [PROMPTS[2]] * 4,
                 options(end)[1])
  with count_compiles() as compiles:
    state = stages.go(state)
  assert compiles.count == 0
  assert batches.answers(state)[:3] == plain()[0][:3]
  assert batches.answers(state)[3] == fresh
  batches.check_cache(model(), state)


def test_the_host_hears_of_a_finished_row():
  _, end, _ = plain()
  stages = made(4)
  state = stages.go(stages.begin(PROMPTS, options(end)), wait=False)
  assert state.done.tolist() == [False, False, False, True]
  with jax.set_mesh(stages.mesh):
    state = loop.release(state, np.array([True, False, False, True]))
  state = stages.go(state)
  assert batches.answers(state)[1:3] == plain()[0][1:3]


@pytest.mark.medium
@pytest.mark.parametrize("attention", [
    pytest.param(False, marks=pytest.mark.slow), True])
def test_a_head_that_knows_or_never_does(attention):
  prompts, told = [[5, 9, 2], [7], [1, 1, 4, 30, 8]], 24 - 1
  for shift, ticks in ((0, 3 + told - 1), (1, 3 * told)):
    head = cycles.exit_head(shift=shift, attention=attention)
    stages = make(cycles.model(), (1, 1, 1), head)
    state = stages.run(prompts, GREEDY)
    assert batches.answers(state) == [cycles.recited(p, 24) for p in prompts]
    right, wrong, settled, took = counted(state)
    assert settled.tolist() == [told] * 3 and took.tolist() == [ticks] * 3
    assert (right if shift else wrong).tolist() == [0] * 3
    # The last token needs no keys, so that nothing is guessed behind it.
    assert np.asarray(state.draft.wasted).any() == bool(shift)
    check_account(stages, state)
    end = cycles.recited(prompts[0], 24)[10]
    state = stages.run(
        prompts, dataclasses.replace(GREEDY, stop_token_ids=(end,)))
    assert len(batches.answers(state)[0]) == 11
    check_account(stages, state)        # the guess of an end is none


@pytest.mark.slow
def test_the_attention_of_a_head_and_its_few_tokens():
  """Its cache too is that of a fresh pass, whatever was drained."""
  head = ExitHead(model(), random_source(4), layer=2, mlp=8, attention=True,
                  tokens=np.arange(0, 64, 2))
  stages = make(model(), LAYERS[4], head)
  answers, end, _ = plain()
  state = stages.begin(PROMPTS, options(end))
  done = stages.go(state, ticks=30)
  assert batches.answers(done)[3] == answers[3]
  from tests.jaxspec.drafters.test_early_exit import _check_cache
  heard = done.draft.heard.whole().replace(length=done.seq.cache.length)
  _check_cache(model(), head, done.replace(
      draft=dataclasses.make_dataclass("Draft", ["cache"])(heard)))
  assert batches.answers(stages.go(done)) == answers


@pytest.mark.parametrize("chunk", [
    8, pytest.param(64, marks=pytest.mark.slow)])
def test_prompts_are_read_from_stage_to_stage(chunk):
  """Chunk behind chunk: what `loop.prefill` reads with the whole model."""
  stages = made(4)
  tokens, lengths = batches.padded([PROMPTS[0] * 3, *PROMPTS[1:3]], 64)
  whole = loop.prefill(model(), (2,), tokens, lengths, chunk=512,
                       dtype=jnp.dtype("float32"))
  with jax.set_mesh(stages.mesh):
    found = layer_stream.prefill(stages.pipeline, (2,), tokens, lengths,
                                 chunk=chunk, dtype=jnp.dtype("float32"))
  np.testing.assert_allclose(found.last, whole.last, atol=1e-4)
  for row, n in enumerate(lengths):
    np.testing.assert_allclose(found.features[0][row, :n],
                               whole.features[0][row, :n], atol=1e-4)
  for a, b in zip(batches.readings(model(), found.cache),
                  batches.readings(model(), whole.cache)):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_stream_replayed_is_the_text():
  """And what it guesses on the way is often what comes."""
  answers, end, _ = plain()
  stages = made(4)
  state = stages.begin(PROMPTS, options(end))
  said = [[t] for t in np.asarray(state.seq.tokens)[
      np.arange(4), state.seq.prompt_length].tolist()]
  guessed, came = {}, 0
  with jax.set_mesh(stages.mesh):
    steps = layer_stream.stream(stages.pipeline, stages.stream, exact, state)
    for emission, state in steps:
      start, tokens, count = map(np.asarray, (
          emission.start, emission.tokens, emission.count))
      for row in range(4):
        for nth in range(count[row]):
          at, token = (row, int(start[row]) + nth), int(tokens[row, nth])
          if not emission.settled:
            guessed[at] = token
            continue
          assert at[1] == int(state.seq.prompt_length[row]) + len(said[row])
          said[row].append(token)
          came += guessed.get(at) == token
  assert said == answers and came > 3 and len(guessed) > came


def test_a_pipeline_is_the_model_it_was():
  whole = made(4).pipeline.whole()
  assert cycles.leaves_equal(whole, model())


@pytest.mark.slow
def test_a_generator_on_stages(tiny):
  """More prompts than rows, and one that is streamed."""
  generator = Generator(tiny, mesh=sharding.make_mesh({"stage": 2}), rows=2,
                        drafter="layer_stream:layer=2", capacity=32)
  asked = [dataclasses.replace(o, max_new_tokens=10)
           for o in (GREEDY, SAMPLED, SAMPLED)]
  wanted = batches.answers(batches.run(
      tiny, Autoregressive(), PROMPTS[:3], asked, capacity=32))
  found = generator.generate(PROMPTS[:3], asked)
  assert [c.token_ids for c in found] == wanted
  assert sum(c.stats.accepted for c in found) > 0
  *_, last = generator.stream(PROMPTS[1], asked[1])
  assert last.completion.token_ids == wanted[1]


@pytest.mark.slow
def test_a_generator_of_a_folder(tiny_model):
  """Settled and guessed text."""
  settings = dict(dtype="float32", capacity=64)
  asked = Options(max_new_tokens=12, temperature=0.8, seed=3)
  plain = Generator.load(str(tiny_model), **settings)
  stages = Generator.load(str(tiny_model), mesh={"stage": 2},
                          drafter="layer_stream:layer=2", **settings)
  (wanted,) = plain.generate(["Once upon a time"], asked)
  events = list(stages.stream("Once upon a time", asked))
  assert "".join(e.text for e in events if e.settled) == wanted.text
  assert not all(e.settled for e in events)


@pytest.mark.parametrize("settings, words", [
    (dict(drafter="early_exit:layer=2"), "is for drafter layer_stream"),
    (dict(drafter="layer_stream"), "kind exit are shipped for this model"),
    (dict(drafter="layer_stream:layer=9"), r"integer in \[1, 3\], got 9"),
    (dict(drafter="layer_stream:layer=1,guess=x"), "guess must be True or"),
    (dict(drafter="layer_stream:layer=1,layers=[2;2]"), "has 2 layers; use"),
    (dict(drafter="layer_stream:layer=1,layers=[a]"), "as in"),
    (dict(drafter="layer_stream:layer=1,layer_s=2"), "Did you mean 'layers'"),
    (dict(drafter="layer_stream:layer=1", verifier="typical"),
     "settles by the verifier exact, got typical"),
    (dict(drafter="layer_stream:layer=1", cache="paged"),
     "use cache=contiguous"),
    (dict(drafter="layer_stream:layer=1", mesh={}), r"in \[2, 4\], got 1")])
def test_what_a_generator_refuses(tiny, settings, words):
  mesh = sharding.make_mesh(settings.pop("mesh", {"stage": 2}))
  with pytest.raises(InputError, match=words):
    Generator(tiny, mesh=mesh, capacity=64, **settings)


@pytest.mark.slow
def test_eight_bit_weights_lie_on_stages_too():
  whole = quantize(model())
  stages = make(whole, LAYERS[2])
  state = stages.run(PROMPTS, GREEDY)
  right, wrong, *_ = counted(state)
  assert right.sum() and wrong.sum()
  assert batches.answers(state) == batches.answers(
      batches.run(whole, Autoregressive(), PROMPTS, GREEDY))


def test_layers_are_shared_out():
  assert divide(30, 4) == (8, 8, 7, 7)
  assert divide(30, 8, first=5) == (5, 4, 4, 4, 4, 3, 3, 3)


@pytest.mark.parametrize("sizes, layers, words", [
    ({"stage": 1}, (5,), "mesh axis stage alone, of at least 2"),
    ({"stage": 2, "tensor": 2}, (2, 3), "mesh axis stage alone"),
    ({"stage": 2}, (2, 2), "the model's 5 layers together, got 2, 2"),
    ({"stage": 2}, (5, 0), "at least one layer"),
    ({"stage": 3}, (2, 3), "3 stages of at least one layer")])
def test_stages_that_do_not_fit(sizes, layers, words):
  with pytest.raises(InputError, match=words):
    Pipeline.of(model(), layers, sharding.make_mesh(sizes))


def test_layers_of_two_kinds_must_line_up():
  config = tiny_config(depth=4, windows=(8, None, 8, None))
  read = functools.partial(Pipeline.read, config, random_source(0))
  mesh = sharding.make_mesh({"stage": 2})
  assert read((2, 2), mesh).stage.config.windows == (8, None)
  with pytest.raises(InputError, match="differ in the windows of their layer"):
    read((3, 1), mesh)
