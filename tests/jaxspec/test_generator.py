# SPDX-License-Identifier: Apache-2.0
"""Same seed, same tokens: whatever the drafter, the rows and the order."""

import numpy as np
import pytest

from jaxspec.errors import InputError
from jaxspec.generator import Generator, Options


def _requests(count):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 64, rng.integers(1, 40)).tolist()
             for _ in range(count)]
  options = [Options(max_new_tokens=int(rng.integers(1, 40)),
                     temperature=0.8 * (i % 2), top_p=0.9, seed=i,
                     stop_token_ids=(5,)) for i in range(count)]
  return prompts, options


def test_speculation_changes_no_token(tiny):
  """Refilled rows and a permuted order included; drafts are accepted."""
  prompts, options = _requests(16)
  plain = Generator(tiny, rows=1, capacity=96).generate(prompts, options)
  order = np.random.default_rng(1).permutation(len(prompts))
  drafted = Generator(tiny, drafter="prompt_lookup", rows=4, capacity=96)
  found = drafted.generate([prompts[i] for i in order],
                           [options[i] for i in order])
  for i, completion in zip(order, found):
    assert completion.token_ids == plain[i].token_ids
    assert completion.finish_reason == plain[i].finish_reason
    completion.stats.reconcile()
  assert sum(c.stats.accepted for c in found) > 0
  last = list(drafted.stream(prompts[3], options[3]))[-1]
  assert last.completion.token_ids == plain[3].token_ids


@pytest.mark.parametrize("prompt, words", [
    ([], "is empty"), ([64], "token id 64"), ([-1], "token id -1"),
    ([1] * 90, "exceeds the capacity 96"), ("text", "no tokenizer")])
def test_a_bad_prompt_is_one_sentence(tiny, prompt, words):
  with pytest.raises(InputError, match=words):
    Generator(tiny, capacity=96).generate([prompt], Options(max_new_tokens=16))
