# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: same seed, same tokens, and every one of them told.

Held here: 200 mixed requests are answered as plain decoding of one row answers
them, without a compile after warm-up; so they are in any order, in every
cache, with too few pages for all at once, and on every mesh. Stop strings cut
where the text says; pieces joined are the text; what is not settled is
flagged; log-probabilities are those of a plain pass; an answer says why it
ended; what cannot be served is refused in a sentence.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import tiny_config
from tokenizers import decoders, models, pre_tokenizers

from jaxspec import loop, pacing, sharding
from jaxspec.caches.paged import PagedCache
from jaxspec.checkpoint.tokenizer import Tokenizer
from jaxspec.errors import InputError
from jaxspec.generator import Generator, Options
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.profiling import count_compiles

pytestmark = pytest.mark.usefixtures("quick_compiles")
CAPACITY = 64
END = 5
DRAFTER = "prompt_lookup:length=4"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer() -> Tokenizer:
  """Bytes and a few merges, in 64 ids; two characters have several bytes."""
  splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
  encoded = "".join(word for word, _ in splitter.pre_tokenize_str(
      LETTERS + "é→ .,!?-\n"))
  merges = [("t", "h"), ("th", "e"), ("i", "n"), ("in", "g"), ("a", "n"),
            ("an", "d"), ("e", "n"), ("en", "d")]
  merges += [(a, b) for a in "lmnprst" for b in "aeiou"]
  merges = merges[:64 - len(encoded)]
  pieces = [*encoded, *(left + right for left, right in merges)]
  assert len(pieces) == 64
  inner = tokenizers.Tokenizer(models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
  inner.pre_tokenizer = splitter
  inner.decoder = decoders.ByteLevel()
  return Tokenizer(inner, eos_ids=[END])


def requests(count: int, seed: int = 0, longest: int = 30):
  """Prompts in which words recur, and options of every kind."""
  rng = np.random.default_rng(seed)
  prompts, options = [], []
  for i in range(count):
    words = rng.integers(0, 64, (3, 4))
    text = np.concatenate([words[j] for j in rng.integers(0, 3, 8)])
    prompts.append(text[:rng.integers(1, longest + 1)].tolist())
    options.append(Options(
        max_new_tokens=int(rng.integers(1, 31)), seed=i,
        temperature=float(rng.choice([0, 0, 0.2, 1])),
        top_k=int(rng.choice([0, 20])), top_p=float(rng.choice([1, 0.9])),
        min_p=float(rng.choice([0, 0.02])),
        repetition_penalty=float(rng.choice([1, 1, 1, 1.1])),
        presence_penalty=float(rng.choice([0, 0, 0.1])),
        frequency_penalty=float(rng.choice([0, 0, 0.1])),
        logit_bias={3: 1.0} if i % 5 == 0 else {},
        stop=("th", "a.") if i % 7 == 0 else (),
        stop_token_ids=(9, 11) if i % 3 == 0 else (),
        ignore_eos=bool(i % 2), logprobs=bool(i % 4 == 0)))
  return prompts, options


def same(found, wanted):
  """Asserts that completions tell the same."""
  assert len(found) == len(wanted)
  for number, (a, b) in enumerate(zip(found, wanted)):
    assert a.token_ids == b.token_ids, number
    assert (a.text, a.finish_reason) == (b.text, b.finish_reason), number
    assert (a.logprobs is None) == (b.logprobs is None)
    if a.logprobs is not None:
      np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    a.stats.reconcile()


def accepted(completions) -> int:
  return sum(c.stats.accepted for c in completions)


@pytest.fixture(scope="module")
def plain(small):
  """One row, one token a pass: what all others must say."""
  return Generator(small, tokenizer(), rows=1, capacity=CAPACITY,
                   eos_ids=[END])


@pytest.fixture(scope="module")
def drafted(small):
  """Eight rows, and pages for two of full length."""
  return Generator(small, tokenizer(), drafter=DRAFTER, rows=8,
                   capacity=CAPACITY, cache="paged:page=4,pages=33",
                   eos_ids=[END])


@pytest.fixture(scope="module")
def many():
  return requests(200)


@pytest.fixture(scope="module")
def told(plain, many):
  """What plain decoding answers to all of them."""
  return plain.generate(*many)


@pytest.fixture
def waits(monkeypatch):
  """How many prompts had to wait for room, each time that some had to."""
  fits, short = PagedCache.fits, []

  def noted(self, lengths):
    room = fits(self, lengths)
    if room < len(lengths):
      short.append(len(lengths) - room)
    return room

  monkeypatch.setattr(PagedCache, "fits", noted)
  return short


@pytest.mark.medium
def test_mixed_requests_compile_nothing_and_change_no_token(
    drafted, many, told, waits):
  """Whatever is asked, in whatever order rows and pages become free."""
  # A full batch and a single prompt of each length; a few steps; a stream.
  for length in (16, 30):
    for count in (8, 1):
      drafted.generate([[1] * length] * count, Options(max_new_tokens=1))
  drafted.generate([[1]], Options(max_new_tokens=8))
  for _ in drafted.stream([1, 2, 1, 2, 1], Options(max_new_tokens=8)):
    pass
  waits.clear()
  with count_compiles() as compiles:
    found = drafted.generate(*many)
    streamed = [list(drafted.stream(p, o))[-1].completion
                for p, o in zip(many[0][:8], many[1][:8])]
  assert compiles.count == 0
  same(found, told)
  same(streamed, told[:8])
  assert accepted(found) > 100
  assert len(waits) > 40
  assert {c.finish_reason for c in found} == {"stop", "length"}
  assert len({tuple(c.token_ids) for c in found}) > 150


@pytest.mark.slow
def test_widths_are_measured_on_the_work_at_hand(
    small, plain, tmp_path, monkeypatch):
  """An adaptive drafter's first steps are timed, and change no token."""
  kept = pacing.Ledger(tmp_path / "costs.json")
  monkeypatch.setattr(pacing, "ledger", lambda: kept)
  prompts, options = requests(6, seed=3)
  options = [dataclasses.replace(o, max_new_tokens=30, stop=())
             for o in options]
  wanted = plain.generate(prompts, options)
  drafter = f"adaptive:drafter=[{DRAFTER}]"
  generator = Generator(small, tokenizer(), drafter=drafter, rows=2,
                        capacity=CAPACITY, eos_ids=[END])
  guessed = np.asarray(generator.drafter.costs)
  # A stream measures too.
  events = list(generator.stream(prompts[0], options[0]))
  same([events[-1].completion], wanted[:1])
  found = generator.generate(prompts, options)
  same(found, wanted)
  measured = np.asarray(generator.drafter.costs)
  assert np.all(np.diff(measured) >= 0) and measured[0] > 0
  assert np.any(measured != guessed)
  with count_compiles() as compiles:
    again = generator.generate(prompts, options)
  assert compiles.count == 0
  same(again, wanted)
  (report,) = generator.drift.report()
  completions = [events[-1].completion, *found, *again]
  assert report["requests"] == sum(c.stats.drafts > 0 for c in completions)
  assert report["requests"] > 0
  assert report["drafter"] == drafter
  # The next run knows; other work does not.
  def costs(rows):
    made = Generator(small, tokenizer(), drafter=drafter, rows=rows,
                     capacity=CAPACITY, eos_ids=[END])
    return np.asarray(made.drafter.costs)
  np.testing.assert_array_equal(costs(rows=2), measured)
  np.testing.assert_array_equal(costs(rows=3), guessed)


@pytest.mark.medium
def test_order_does_not_matter(drafted, many, told):
  """Each in another row, beside others, and inserted together with them."""
  short = [i for i, prompt in enumerate(many[0]) if len(prompt) <= 16]
  order = np.random.default_rng(1).permutation(short)
  found = drafted.generate([many[0][i] for i in order],
                           [many[1][i] for i in order])
  same(found, [told[i] for i in order])
  assert accepted(found) > 20


def test_who_finds_no_room_is_told(drafted, many, waits, monkeypatch):
  prompts, options = many[0][:16], [
      Options(max_new_tokens=30, ignore_eos=True)] * 16
  wanted = drafted.generate(prompts, options)
  assert {c.finish_reason for c in wanted} == {"length"}
  assert waits
  # Where nobody asks, texts end early, are right as far as they go, and say
  # so.
  with monkeypatch.context() as patch:
    patch.setattr(PagedCache, "fits", lambda self, lengths: len(lengths))
    cut = drafted.generate(prompts, options)
  for completion, whole in zip(cut, wanted):
    completion.stats.reconcile()
    count = len(completion.token_ids)
    assert completion.token_ids == whole.token_ids[:count]
    assert completion.finish_reason == ("capacity" if count < 30 else "length")
  assert len({len(c.token_ids) for c in cut}) > 3
  # And the pages are there again.
  same(drafted.generate(prompts, options), wanted)


SIZES = dict(depth=2, windows=(8, None))          # those of `small`
EXPERTS = dict(depth=1, experts=4, experts_per_token=2)


@pytest.mark.parametrize("mesh, cache, sizes", [
    # (`caches/test_contract.py` has this cache on a mesh.)
    pytest.param({"data": 2}, "window", SIZES, marks=pytest.mark.slow),
    pytest.param({"tensor": 2}, "contiguous", SIZES, marks=pytest.mark.slow),
    pytest.param({"data": 2, "tensor": 2}, "paged:page=4", SIZES,
                 marks=pytest.mark.medium),
    ({"data": 2, "tensor": 2, "sequence": 2}, "contiguous", SIZES),
    pytest.param({"expert": 2}, "contiguous", EXPERTS,
                 marks=pytest.mark.slow)])
def test_mesh_and_cache_do_not_matter(plain, mesh, cache, sizes):
  """Same tokens on all of them, and no second compile for a new layout."""
  def make(mesh=None, **settings):
    mesh = sharding.make_mesh(mesh)
    model = Transformer(tiny_config(**sizes), random_source(
        0, scale=1.5, put=lambda x, axes: sharding.place(x, axes, mesh)))
    return Generator(model, tokenizer(), capacity=CAPACITY, mesh=mesh,
                     eos_ids=[END], **settings)

  one = plain if sizes is SIZES else make()
  prompts, options = requests(8, seed=4, longest=16)
  options = [dataclasses.replace(o, max_new_tokens=24, stop=())
             for o in options]
  wanted = one.generate(prompts, options)
  generator = make(mesh, drafter=DRAFTER, rows=2, cache=cache)
  found = generator.generate(prompts[:2], options[:2])
  with count_compiles() as compiles:
    for i in (2, 4, 6):
      found += generator.generate(prompts[i:i + 2], options[i:i + 2])
  assert compiles.count == 0
  same(found, wanted)
  assert accepted(found) > 0


def test_stop_strings_cut_where_the_text_says(plain, drafted):
  """Also where they are spread over tokens, or over a block's end."""
  prompts, options = requests(12, seed=1)
  options = [Options(max_new_tokens=30, temperature=1, seed=i)
             for i in range(12)]
  wholes = plain.generate(prompts, options)
  rng = np.random.default_rng(0)
  asked, wanted, spread = [], [], 0
  for option, whole in zip(options, wholes):
    texts = [plain.tokenizer.decode(whole.token_ids[:n])
             for n in range(len(whole.token_ids) + 1)]
    text = whole.text
    candidates = [text[at:at + 3] for at in range(2, len(text) - 3)
                  if "\ufffd" not in text[at:at + 3]]
    if not candidates:
      candidates = ["no such text"]
    stop = candidates[rng.integers(len(candidates))]
    asked.append(dataclasses.replace(option, stop=("nowhere", stop)))
    at = text.find(stop)
    if at < 0:
      wanted.append((text, whole.token_ids, whole.finish_reason))
      continue
    count = next(n for n, t in enumerate(texts) if stop in t)
    wanted.append((text[:at], whole.token_ids[:count], "stop"))
    spread += len(texts[count - 1]) > at
  pieces = {}

  def on_text(index, text):
    pieces.setdefault(index, []).append(text)

  ended = []
  found = drafted.generate(prompts, asked, on_text=on_text,
                           on_completion=lambda i, c: ended.append((i, c)))
  assert [(c.text, c.token_ids, c.finish_reason) for c in found] == wanted
  assert spread > 4 and sum(w[2] == "stop" for w in wanted) > 8
  for index, completion in enumerate(found):
    completion.stats.reconcile()
    assert "".join(pieces.get(index, [])) == completion.text
  assert max(map(len, pieces.values())) > 1
  assert sum(c.stats.dropped for c in found) > 0
  # A stream says no part of a stop string either, not even for a while.
  for prompt, option, (text, *_) in zip(prompts, asked, wanted):
    events = drafted.stream(prompt, option)
    assert "".join(e.text for e in events if e.settled) == text
  # Each is reported once, as it is returned.
  assert sorted(i for i, _ in ended) == list(range(12))
  assert all(completion is found[i] for i, completion in ended)


def test_a_stream_settles_into_the_text(plain, drafted):
  prompts, options = requests(10, seed=2)
  options = [Options(max_new_tokens=30, temperature=0.2 * (i % 2), seed=i,
                     stop=("th",) if i % 3 else ()) for i in range(10)]
  right = wrong = 0
  for prompt, option, whole in zip(prompts, options,
                                   plain.generate(prompts, options)):
    settled = shown = ""
    for event in drafted.stream(prompt, option):
      # What is replaced is what was provisional.
      assert event.replaces == len(shown)
      if event.settled:
        right += bool(shown) and event.text.startswith(shown)
        wrong += bool(shown) and not event.text.startswith(shown)
        settled, shown = settled + event.text, ""
        assert whole.text.startswith(settled)
      else:
        shown = event.text
        assert shown and event.completion is None
    assert settled == whole.text
    same([event.completion], [whole])
  assert right and wrong


def test_what_is_provisional_is_counted_and_can_be_held(plain, drafted):
  """Prompt lookup shows its drafts; whoever waits sees settled text alone."""
  prompts, options = requests(6, seed=2)
  options = [Options(max_new_tokens=30, seed=i) for i in range(6)]
  shown = retracted = 0
  for prompt, option, whole in zip(prompts, options,
                                   plain.generate(prompts, options)):
    events = list(drafted.stream(prompt, option))
    stats = events[-1].completion.stats
    stats.reconcile()
    assert (stats.shown > 0) == any(not e.settled for e in events)
    assert (stats.retracted > 0) == (stats.retracted_seconds > 0)
    shown, retracted = shown + stats.shown, retracted + stats.retracted
    held = list(drafted.stream(prompt, option, hold_until_settled=True))
    assert all(e.settled and e.replaces == 0 for e in held)
    assert "".join(e.text for e in held) == whole.text
    same([held[-1].completion], [whole])
    assert held[-1].completion.stats.shown == 0
  assert shown > retracted > 0


def test_logprobs_are_those_of_a_plain_pass(small, drafted):
  prompts, options = requests(8, seed=3)
  options = [dataclasses.replace(o, logprobs=True, stop=()) for o in options]
  for prompt, completion in zip(prompts, drafted.generate(prompts, options)):
    text = prompt + completion.token_ids
    tokens = np.zeros((1, CAPACITY), np.int32)
    tokens[0, :len(text)] = text
    prefix = loop.prefill(
        small, (small.depth,), jnp.asarray(tokens), jnp.array([len(text)]),
        chunk=512, dtype=jnp.dtype(jnp.float32))
    noted = jax.nn.log_softmax(small.unembed(prefix.features[0]))[0]
    wanted = [float(noted[at - 1, text[at]])
              for at in range(len(prompt), len(text))]
    np.testing.assert_allclose(completion.logprobs, wanted, atol=1e-3)


def test_an_answer_says_why_it_ended(drafted):
  """By token, by the model's own end, by text, by its length."""
  open_ended = Options(max_new_tokens=12, ignore_eos=True)

  def ask(**changes):
    (found,) = drafted.generate(
        [[1, 2, 3]], dataclasses.replace(open_ended, **changes))
    return found

  whole = ask()
  assert (whole.finish_reason, len(whole.token_ids)) == ("length", 12)
  assert whole.logprobs is None
  last = whole.token_ids[4]
  kept = whole.token_ids[:whole.token_ids.index(last) + 1]
  stopped = ask(stop_token_ids=(last,))
  assert stopped.finish_reason == "stop"
  # The token that ended it is counted among the ids and left out of the text.
  assert stopped.token_ids == kept
  assert stopped.text == drafted.tokenizer.decode(kept[:-1])
  # An end token at the very limit is a stop, too.
  assert ask(stop_token_ids=(last,),
             max_new_tokens=len(kept)).finish_reason == "stop"
  # The model's own end, asked for by a bias, and ignored when told to.
  own = ask(ignore_eos=False, logit_bias={END: 100.0})
  assert (own.token_ids, own.text) == ([END], "")
  assert own.finish_reason == "stop"
  ignored = ask(logit_bias={END: 100.0})
  assert (ignored.token_ids, ignored.finish_reason) == ([END] * 12, "length")


def test_texts_and_chats_are_read(drafted):
  text = "the end and then"
  ids = drafted.tokenizer.encode(text)
  assert max(ids) < 64 and len(ids) < len(text)
  options = Options(max_new_tokens=6)
  by_text, by_ids = drafted.generate([text, ids], options)
  assert by_text.prompt == by_ids.prompt == text
  same([by_text], [by_ids])


def test_one_call_at_a_time(drafted, plain):
  prompt, options = [1, 2, 3, 1, 2, 3, 1], Options(max_new_tokens=20)
  wanted = plain.generate([prompt], options)
  stream = drafted.stream(prompt, options)
  next(stream)
  with pytest.raises(InputError, match="already decoding"):
    drafted.generate([prompt], options)
  with pytest.raises(InputError, match="already decoding"):
    next(drafted.stream(prompt, options))
  stream.close()
  same(drafted.generate([prompt], options), wanted)

  # A caller's own error leaves nothing behind either.
  def fail(*_):
    raise KeyError

  with pytest.raises(KeyError):
    drafted.generate([prompt] * 6, options, on_completion=fail)
  same(drafted.generate([prompt], options), wanted)


def test_nothing_to_do(drafted):
  assert drafted.generate([]) == []


def test_options_for_each_or_for_all(drafted):
  with pytest.raises(InputError, match="2 prompts but 3 options"):
    drafted.generate([[1], [2]], [Options()] * 3)


@pytest.mark.parametrize("prompt, words", [
    ([], "is empty"), ([64], "token id 64"), ([-1], "token id -1"),
    ([1] * 60, "exceeds the capacity 64; shorten by 12"),
    ("text", "no tokenizer")])
def test_a_bad_prompt_is_one_sentence(small, prompt, words):
  with pytest.raises(InputError, match=words):
    Generator(small, capacity=CAPACITY).generate(
        [[1], prompt], Options(max_new_tokens=16))


def test_stop_strings_need_a_tokenizer(small):
  with pytest.raises(InputError, match="stop strings need a tokenizer"):
    Generator(small, capacity=CAPACITY).generate([[1]], Options(
        max_new_tokens=16, stop=("x",)))


@pytest.mark.parametrize("settings, words", [
    (dict(cache="pagde"), "Did you mean 'paged'"),
    (dict(cache="fresh"), "there are contiguous, paged, window"),
    (dict(cache="paged:pgae=4"), "it has page, pages. Did you mean 'page'"),
    (dict(cache="paged:page"), "no option 'page'"),
    (dict(cache="window:page=4"), "it has none"),
    (dict(cache="paged:page=0"), "page must be at least 1, got 0"),
    (dict(cache="paged:page=x"), "page must be a whole number, got 'x'"),
    (dict(cache="paged:page=8,pages=8"),
     "pages must be at least 9 to hold one row of 64 tokens, got 8"),
    (dict(rows=0), "rows must be at least 1"),
    (dict(capacity=1), "capacity must be in"),
    (dict(capacity=2048), "capacity must be in"),
    (dict(drafter="prompt_lokup"), "Did you mean 'prompt_lookup'"),
    (dict(verifier="exakt"), "Did you mean 'exact'"),
    (dict(verifier="deferral", drafter="prompt_lookup"),
     r"deferral\(lossy\) must know the law .* and prompt_lookup reports none")])
def test_a_bad_setting_is_one_sentence(small, settings, words):
  with pytest.raises(InputError, match=words):
    Generator(small, **{"capacity": CAPACITY, **settings})


def test_default_options_follow_the_checkpoint(small):
  def options(**defaults):
    return Generator(small, capacity=CAPACITY,
                     defaults=defaults).default_options(seed=4)

  settings = dict(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1)
  assert options(do_sample=True, repetition_penalty=1.1, **settings) == Options(
      seed=4, repetition_penalty=1.1, **settings)
  # One that does not sample is greedy, whatever temperature it mentions.
  assert options(repetition_penalty=1.1, **settings) == Options(
      seed=4, repetition_penalty=1.1)
  assert options(do_sample=True, top_k=None, temperature="hot") == Options(
      seed=4)
  assert options() == Options(seed=4)
  generator = Generator(small, capacity=CAPACITY,
                        defaults=dict(do_sample=True, **settings))
  assert generator.default_options(temperature=0.0).temperature == 0
