# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for: every refusal, and the arrays of the rest."""

import math
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxspec.errors import InputError
from jaxspec.options import Options, as_request

VOCAB = 50


@pytest.fixture(autouse=True)
def no_type_checks():
  """As callers have it: what is of the wrong type reaches the package."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


def request(*options, eos=(), stops=3, biases=3):
  return as_request(options, [5] * len(options), eos, vocab=VOCAB,
                    stops=stops, biases=biases)


REFUSED = [
    ("max_new_tokens", 0, "must be in [1, 1073741824], got 0"),
    ("max_new_tokens", 2**31, "must be in [1, 1073741824], got 2147483648"),
    ("max_new_tokens", 8.0, "must be a whole number, got 8.0"),
    ("max_new_tokens", True, "must be a whole number, got True"),
    ("top_k", -1, "must be in [0, 1073741824], got -1"),
    ("top_k", 2.5, "must be a whole number, got 2.5"),
    ("top_k", False, "must be a whole number, got False"),
    ("seed", -1, "must be in [0, 4294967295], got -1"),
    ("seed", 2**32, "must be in [0, 4294967295], got 4294967296"),
    ("seed", "7", "must be a whole number, got '7'"),
    ("temperature", math.nan, "must be in [0, 100], got nan"),
    ("temperature", math.inf, "must be in [0, 100], got inf"),
    ("temperature", -0.1, "must be in [0, 100], got -0.1"),
    ("temperature", 101, "must be in [0, 100], got 101"),
    ("temperature", "hot", "must be in [0, 100], got 'hot'"),
    ("temperature", True, "must be in [0, 100], got True"),
    ("temperature", None, "must be in [0, 100], got None"),
    ("top_p", 1.5, "must be in (0, 1], got 1.5"),
    ("top_p", 0, "must be in (0, 1], got 0"),
    ("top_p", 0.0, "must be in (0, 1], got 0.0"),
    ("top_p", math.nan, "must be in (0, 1], got nan"),
    ("min_p", 1.01, "must be in [0, 1], got 1.01"),
    ("min_p", -1e-9, "must be in [0, 1], got -1e-09"),
    ("repetition_penalty", 0.0, "must be in (0, 100], got 0.0"),
    ("repetition_penalty", -1.2, "must be in (0, 100], got -1.2"),
    ("presence_penalty", 200, "must be in [-100, 100], got 200"),
    ("frequency_penalty", -101.0, "must be in [-100, 100], got -101.0"),
    ("logit_bias", {3: math.nan}, "must be in [-1e+09, 1e+09], got nan"),
    ("logit_bias", {3: -math.inf}, "must be in [-1e+09, 1e+09], got -inf"),
    ("logit_bias", [(3, 1.0)],
     "must map token ids to numbers, got [(3, 1.0)]"),
    ("stop", "END", "must be a sequence of non-empty strings, got 'END'"),
    ("stop", ("a", ""), "must be a sequence of non-empty strings, "
     "got ('a', '')"),
    ("stop", (b"a",), "must be a sequence of non-empty strings, got (b'a',)"),
    ("stop", None, "must be a sequence of non-empty strings, got None"),
    ("stop_token_ids", 2, "must be a sequence of token ids, got 2"),
]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_what_is_refused(name, value, message):
  with pytest.raises(InputError, match=re.escape(f"{name} {message}") + "$"):
    Options(**{name: value})


@pytest.mark.parametrize("name, value", [
    ("max_new_tokens", 1), ("max_new_tokens", np.int64(7)), ("top_k", 2**30),
    ("seed", 2**32 - 1), ("temperature", 0), ("temperature", 100),
    ("temperature", np.float32(0.5)), ("top_p", 1), ("top_p", 1e-9),
    ("min_p", 1), ("repetition_penalty", 100), ("presence_penalty", -100),
    ("frequency_penalty", np.int32(2)), ("stop", ["a", "b"]), ("stop", []),
    ("logit_bias", {np.int32(3): np.float32(-1e9)}),
    ("stop_token_ids", [1, np.int64(2)])])
def test_what_is_accepted(name, value):
  assert getattr(Options(**{name: value}), name) == value
  request(Options(**{name: value}))


@pytest.mark.parametrize("options, message", [
    ({"stop_token_ids": (50,)},
     "stop_token_ids token id must be in [0, 49], got 50"),
    ({"stop_token_ids": (-1,)},
     "stop_token_ids token id must be in [0, 49], got -1"),
    ({"stop_token_ids": (True,)},
     "stop_token_ids token id must be a whole number, got True"),
    ({"stop_token_ids": "12"},
     "stop_token_ids must be a sequence of token ids, got '12'"),
    ({"logit_bias": {50: 1.0}},
     "logit_bias token id must be in [0, 49], got 50"),
    ({"logit_bias": {"3": 1.0}},
     "logit_bias token id must be a whole number, got '3'"),
    ({"stop_token_ids": (1, 2, 3, 4)},
     "stop_token_ids has 4 entries, room for 3; pass fewer, or make the "
     "Generator with more room"),
    ({"logit_bias": dict.fromkeys(range(4), 1.0)},
     "logit_bias has 4 entries, room for 3; pass fewer, or make the "
     "Generator with more room")])
def test_what_a_model_or_a_batch_refuses(options, message):
  with pytest.raises(InputError, match=re.escape(message) + "$"):
    request(Options(), Options(**options))


def test_the_models_own_end_tokens_take_room():
  options = Options(stop_token_ids=(1, 2))
  assert request(options, eos=(7,)).stops.tolist() == [[7, 1, 2]]
  with pytest.raises(InputError, match="has 4 entries, room for 3"):
    request(options, eos=(7, 8))
  # Named twice, they take it once; ignored, not at all.
  assert request(options, eos=(1, 8)).stops.tolist() == [[1, 8, 2]]
  ignoring = Options(stop_token_ids=(1, 2), ignore_eos=True)
  assert request(ignoring, eos=(7, 8)).stops.tolist() == [[1, 2, -1]]


def test_defaults_are_greedy():
  made = request(Options())
  s = made.sampling
  assert s.temperature.tolist() == [0]
  assert (s.top_k.tolist(), s.top_p.tolist(), s.min_p.tolist()) == (
      [0], [1], [0])
  assert (s.repetition.tolist(), s.presence.tolist(),
          s.frequency.tolist()) == ([1], [0], [0])
  assert s.bias_ids.tolist() == [[-1] * 3]
  assert s.bias.tolist() == [[0] * 3]
  assert made.limit.tolist() == [5 + 128]
  assert made.stops.tolist() == [[-1] * 3]
  assert made.wants_logprobs.tolist() == [False]


def test_every_option_becomes_its_array():
  asked = [
      Options(max_new_tokens=10 + i, temperature=0.5 + i, top_k=3 + i,
              top_p=0.25 * (1 + i), min_p=0.125 * i, repetition_penalty=2 + i,
              presence_penalty=-1 + i, frequency_penalty=0.5 - i,
              logit_bias={4 * i + 1: 0.5, 7: -1.0 * i}, seed=2**32 - 1 - i,
              stop=("x",), stop_token_ids=(i, 40), logprobs=bool(i))
      for i in range(2)]
  made = as_request(asked, [3, 30], (9,), vocab=VOCAB, stops=4, biases=3)
  s = made.sampling
  rows = {
      "temperature": [0.5, 1.5], "top_k": [3, 4], "top_p": [0.25, 0.5],
      "min_p": [0, 0.125], "repetition": [2, 3], "presence": [-1, 0],
      "frequency": [0.5, -0.5], "bias_ids": [[1, 7, -1], [5, 7, -1]],
      "bias": [[0.5, 0, 0], [0.5, -1, 0]]}
  for name, wanted in rows.items():
    assert getattr(s, name).tolist() == wanted, name
  assert made.limit.tolist() == [13, 41]
  assert made.stops.tolist() == [[9, 0, 40, -1], [9, 1, 40, -1]]
  assert made.wants_logprobs.tolist() == [False, True]
  for row, option in enumerate(asked):
    np.testing.assert_array_equal(
        jax.random.key_data(s.key[row]),
        jax.random.key_data(jax.random.key(np.uint32(option.seed))))


def test_types_do_not_depend_on_the_values():
  """Else one request would compile what another has compiled already."""
  def types(made):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(made)]
  plain = types(request(Options(), Options()))
  busy = types(request(
      Options(temperature=1, top_k=np.int64(3), logit_bias={1: 2}, seed=3),
      Options(top_p=0.5, stop_token_ids=(3,), logprobs=True), eos=(1,)))
  assert plain == busy
  assert {dtype for _, dtype in plain[1:]} == {
      jnp.dtype(t) for t in (jnp.float32, jnp.int32, bool)}
