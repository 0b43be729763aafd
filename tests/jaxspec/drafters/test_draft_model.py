# SPDX-License-Identifier: Apache-2.0
"""Another model as the drafter: its own text, cache and law.

That the text never changes is the contract's (`test_contract.py`). Held here:
whatever happened before, the draft model has read what it should have read; a
model that drafts for itself is right, sampled too, which is what sharing noise
is for; and what an honest drafter says of its law is true.
"""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from jaxspec import drafters, loop
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.drafters.draft_model import DraftModel, Translated, select
from jaxspec.drafters.prompt_lookup import PromptLookup
from jaxspec.errors import InputError
from jaxspec.models.transformer import Transformer, random_source, source_of
from pallas_kernels import QArray
from tests.jaxspec import batches, warping

pytestmark = pytest.mark.usefixtures("quick_compiles")

TOKENS, LENGTH = 30, 3
LAWS = {"greedy": batches.GREEDY, "sampled": batches.SAMPLED}
PROMPTS = batches.prompts(4)
ITSELF = f"draft_model:model=self,length={LENGTH}"


def options(law: str, **changes):
  """One seed a row."""
  return [dataclasses.replace(LAWS[law], max_new_tokens=TOKENS, seed=row,
                              **changes) for row in range(4)]


def make(model, text: str, **target) -> DraftModel:
  return drafters.parse(text, drafters.Target(model, **target))


def check_draft(drafter, state) -> None:
  """The draft model's cache is a fresh prefill of its text."""
  nested = state.draft
  batches.check_cache(drafter.model, types.SimpleNamespace(
      seq=types.SimpleNamespace(tokens=nested.tokens, cache=nested.cache,
                                length=nested.cache.length + 1)))


def passes(tokens: int) -> int:
  """How many a drafter needs that is always right."""
  return -(-tokens // (LENGTH + 1))


@pytest.fixture(scope="module")
def plain(small):
  return {law: batches.answers(batches.run(
      small, Autoregressive(), PROMPTS, options(law))) for law in LAWS}


@pytest.mark.medium
@pytest.mark.parametrize("law", LAWS)
def test_a_model_drafts_for_itself(small, plain, law):
  """All is accepted, so that each proposal begins a token late."""
  drafter = make(small, ITSELF)
  state = batches.run(small, drafter, PROMPTS, options(law))
  assert batches.answers(state) == plain[law]
  assert batches.accepted(state) == batches.drafted(state) > 0
  assert state.counters.passes.tolist() == [passes(TOKENS - 1)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_eight_bits_are_nearly_the_model(small, plain, law):
  drafter = make(small, "draft_model")
  state = batches.run(small, drafter, PROMPTS, options(law))
  assert batches.answers(state) == plain[law]
  assert batches.accepted(state) > 0.8 * batches.drafted(state)


@pytest.mark.slow
def test_the_cache_is_a_fresh_prefill_after_every_step(small):
  drafter = make(small, f"draft_model:model=self:layers=0,length={LENGTH}")
  state = batches.begin(small, drafter, PROMPTS, options("sampled"))
  check_draft(drafter, state)
  for _ in range(5):
    state = batches.finish(small, drafter, state, steps=1)
    check_draft(drafter, state)
  assert 0 < batches.accepted(state) < batches.drafted(state)
  # Two rows are given to others; one index is nobody's.
  state = batches.refill(small, drafter, state, [2, 4, 0],
                         batches.prompts(3, seed=1), options("sampled")[:3])
  state = batches.finish(small, drafter, state, steps=2)
  check_draft(drafter, state)


@pytest.mark.medium
@pytest.mark.parametrize("law", LAWS)
def test_it_catches_up(small, plain, law):
  """With steps in which it was never asked, by rows that differ in number."""
  drafter = make(small, ITSELF)
  state = batches.begin(small, drafter, PROMPTS, options(law))
  state = batches.finish(small, drafter, state, steps=1)
  without = batches.finish(small, Autoregressive(), state, steps=9)
  assert batches.drafted(without) == 4 * LENGTH
  state = batches.refill(small, drafter, without, [1], PROMPTS[1:2],
                         options(law)[1:2])
  state = batches.finish(small, drafter, state, steps=1)
  check_draft(drafter, state)
  state = batches.finish(small, drafter, state)
  assert batches.answers(state) == plain[law]
  assert batches.accepted(state) == batches.drafted(state)
  long = 1 + 9 + passes(TOKENS - 1 - (LENGTH + 1) - 9)
  assert state.counters.passes.tolist() == [
      long, passes(TOKENS - 1), long, long]


@pytest.mark.parametrize("law", LAWS)
def test_it_reads_a_prompt_it_was_never_shown(small, plain, law):
  """End tokens in a prompt, as chats have them, end nothing."""
  stops = [[next(t for t in prompt[:-1] if t not in answer)]
           for prompt, answer in zip(PROMPTS, plain[law])]
  asked = [dataclasses.replace(o, stop_token_ids=tuple(s))
           for o, s in zip(options(law), stops)]
  drafter = make(small, ITSELF)
  state = batches.begin(small, drafter, PROMPTS, asked)
  state = state.replace(draft=jax.tree.map(jnp.zeros_like, state.draft))
  state = batches.finish(small, drafter, state)
  assert batches.answers(state) == plain[law]
  assert batches.accepted(state) == batches.drafted(state) > 0


@pytest.mark.parametrize("law", LAWS)
def test_nothing_is_drafted_behind_an_end(small, plain, law):
  end = plain[law][0][12]
  wanted = [a[:a.index(end) + 1] if end in a else a for a in plain[law]]
  drafter = make(small, ITSELF)
  state = batches.run(small, drafter, PROMPTS,
                      options(law, stop_token_ids=(end,)))
  assert batches.answers(state) == wanted
  # An end token that was drafted is its pass's own token, so not "accepted".
  assert 0 <= batches.drafted(state) - batches.accepted(state) <= 4
  assert len(wanted[0]) < TOKENS


def test_released_rows_draft_nothing(small):
  drafter = make(small, ITSELF)
  state = batches.begin(small, drafter, PROMPTS, options("greedy"))
  state = loop.release(state, np.array([True, False, False, True]))
  proposal, _ = propose(drafter, small, state)
  assert proposal.live.tolist() == [1, LENGTH + 1, LENGTH + 1, 1]


@functools.partial(jax.jit, static_argnames=())
def propose(drafter, model, state):
  return drafter.propose(model, state.seq, state.request, state.draft)


@pytest.mark.slow
def test_an_honest_drafter_tells_its_law(small, plain):
  """Each node's law, in NumPy, of the draft model on the text it saw."""
  drafter = make(small, f"draft_model:model=self:layers=1,length={LENGTH}",
                 honest=True)
  asked = options("sampled")
  asked[2] = options("greedy")[2]
  state = batches.begin(small, drafter, PROMPTS, asked)
  for _ in range(2):
    texts = batches.texts_of(state)
    proposal, _ = propose(drafter, small, state)
    assert proposal.live.tolist() == [LENGTH + 1] * 4
    np.testing.assert_allclose(proposal.probs[:, :-1].sum(-1), 1, atol=1e-5)
    tokens = np.asarray(proposal.tokens)
    for node in range(LENGTH):
      seen = [text + drafts[1:node + 1].tolist()
              for text, drafts in zip(texts, tokens)]
      padded, lengths = batches.padded(seen, 64)
      prefix = loop.prefill(drafter.model, (), padded, lengths, chunk=512,
                            dtype=jnp.dtype(jnp.float32))
      logits = drafter.model.unembed(prefix.last[:, None])[:, 0]
      for row, text in enumerate(seen):
        start = len(PROMPTS[row])
        law = warping.probabilities(logits[row], asked[row], text[:start],
                                    text[start:])
        if not asked[row].temperature:
          law = np.eye(small.vocab)[law.argmax()]
        np.testing.assert_allclose(proposal.probs[row, node], law, atol=1e-4)
        assert law[tokens[row, node + 1]] > 0
    state = batches.finish(small, drafter, state, steps=1)
  # The exact verifier is served by it like by any other.
  state = batches.finish(small, drafter, state)
  assert [batches.answers(state)[i] for i in (0, 1, 3)] == [
      plain["sampled"][i] for i in (0, 1, 3)]
  check_draft(drafter, state)


def test_an_honest_drafter_has_noise_of_its_own(small):
  """Else a test of laws would believe it too much."""
  asked = options("sampled", temperature=1.5, top_p=1.0, top_k=0, min_p=0.0)
  state = batches.begin(small, make(small, ITSELF), PROMPTS, asked)
  own, _ = propose(make(small, ITSELF, honest=True), small, state)
  shared, _ = propose(make(small, ITSELF), small, state)
  assert np.mean(own.tokens[:, 1:] == shared.tokens[:, 1:]) < 0.5


def test_a_part_of_the_model_shares_its_weights(small):
  def pointers(model):
    return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(model)}

  part = make(small, "draft_model:model=self:layers=1").model
  assert part.depth == 1 and part.config.windows == small.config.windows[1:]
  assert pointers(part) < pointers(small)
  np.testing.assert_array_equal(part.layers[0].qkv[...],
                                small.layers[1].qkv[...])
  assert pointers(make(small, ITSELF).model) == pointers(small)
  both = make(small, "draft_model:model=[self:layers=1,int8]").model
  assert both.depth == 1 and isinstance(both.layers[0].qkv[...], QArray)
  order = make(small, "draft_model:model=self:layers=0-1+0").model
  assert order.config.windows == (8, None, 8)


def test_a_cascade_is_drafters_in_drafters(small):
  cascade = make(small, "cascade:models=[self:layers=0;self:int8],length=5,"
                 "drafter=[prompt_lookup:length=3]")
  assert cascade.length == cascade.drafter.length == 5
  assert isinstance(cascade.model.layers[1].qkv[...], QArray)
  below = cascade.drafter
  assert below.model.depth == 1 and below.drafter == PromptLookup(length=3)
  assert (below.model.layers[0].qkv[...].values.unsafe_buffer_pointer()
          == cascade.model.layers[0].qkv[...].values.unsafe_buffer_pointer())


@pytest.mark.medium
@pytest.mark.parametrize("law", LAWS)
def test_another_vocabulary_is_translated(small, plain, law, tmp_path):
  """A model whose ids are shuffled, and some of them nobody's."""
  theirs = np.random.default_rng(0).permutation(small.vocab + 5)
  weights = source_of(small)

  def source(path, shape, axes, wanted=None):
    weight = weights(path, shape, axes, wanted)
    if path == "embedding":
      weight = jnp.concatenate([weight, 9 * weight[:5]])
      weight = jnp.zeros_like(weight).at[theirs].set(weight)
    return weight

  shuffled = Transformer(dataclasses.replace(
      small.config, vocab=small.vocab + 5), source)
  ids = np.full(small.vocab + 5, -1)
  ids[theirs[:small.vocab]] = np.arange(small.vocab)
  path = tmp_path / "map.json"
  path.write_text(json.dumps(ids.tolist()))
  drafter = make(small, f"draft_model:model=other,length={LENGTH},"
                 f"vocab_map={path}", load=lambda _: (shuffled, None))
  state = batches.run(small, drafter, PROMPTS, options(law))
  assert batches.answers(state) == plain[law]
  assert batches.accepted(state) == batches.drafted(state) > 0


class Words:
  """A tokenizer, as far as a drafter asks."""

  def __init__(self, vocabulary, source_name):
    self.vocabulary, self.source_name = vocabulary, source_name


def test_tokenizers_must_agree(small):
  ours, theirs = Words("a", "folder/ours"), Words("b", "folder/theirs")

  def load(tokenizer, vocab=64):
    model = Transformer(tiny_config(depth=1, vocab=vocab), random_source(1))
    return lambda _: (model, tokenizer)

  text = "draft_model:model=theirs"
  with pytest.raises(InputError, match="tokenizer of theirs is not that of "
                                       "folder/ours.*vocab_map=FILE"):
    make(small, text, tokenizer=ours, load=load(theirs))
  for mine, other, vocab in ((ours, None, 64), (None, None, 60)):
    with pytest.raises(InputError, match="is not that of"):
      make(small, text, tokenizer=mine, load=load(other, vocab))
  same = make(small, text, tokenizer=ours, load=load(Words("a", "elsewhere")))
  assert isinstance(same.model, Transformer)
  # The same words in a table that was padded to another size.
  for vocab in (60, 70):
    padded = make(small, text, tokenizer=ours, load=load(ours, vocab)).model
    assert isinstance(padded, Translated) and padded.vocab == small.vocab
    logits = padded.unembed(jnp.ones((1, 1, 32)))
    assert int(jnp.isfinite(logits).sum()) == min(vocab, 64)


@pytest.mark.parametrize("text, words", [
    ("length=0", r"length must be an integer in \[1, 64\], got 0"),
    ("length=two", "got 'two'"),
    ("model=self:int4", "'int4' of self:int4 is unknown; write self:int8"),
    ("model=self:layers=0-2", r"layers=0-2 must name some of 0-1"),
    ("model=self:layers=x", "layers=x must name"),
    ("model=self:layers=1-0", "layers=1-0 must name"),
    ("model=elsewhere", "elsewhere cannot be read here"),
    ("model=self,vocab_map=x.json", "self needs no vocab_map"),
    ("drafter=prompt_lokup", "Did you mean 'prompt_lookup'"),
    ("modle=self", "Did you mean 'model'")])
def test_bad_settings_are_named(small, text, words):
  with pytest.raises(InputError, match=words):
    make(small, f"draft_model:{text}")


def test_other_refusals(small, tmp_path):
  with pytest.raises(InputError, match="must be told what it drafts for"):
    drafters.parse("draft_model")
  with pytest.raises(InputError, match="hides; leave it out"):
    make(small, "draft_model:drafter=prompt_lookup", honest=True)
  with pytest.raises(InputError, match="must name one or more"):
    make(small, "cascade:models=[self:int8;]")
  load = lambda _: (select(small, [0]), None)
  for content, words in (("{", "cannot be read"), ("{}", "must be a list"),
                         ("[64]", r"in \[-1, 63\]"), ("[true]", "whole")):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(InputError, match=words):
      make(small, f"draft_model:model=x,vocab_map={tmp_path}/map.json",
           load=load)
