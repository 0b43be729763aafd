# SPDX-License-Identifier: Apache-2.0
"""Names of parts and their options, as flags spell them."""

import pytest

from jaxspec import caches, drafters, naming, verifiers
from jaxspec.errors import InputError


def test_a_name_may_have_options():
  assert naming.choose("cache", "paged:page=4", ["paged"]) == (
      "paged", "page=4")
  assert naming.choose("cache", "paged", ["paged"]) == ("paged", "")
  assert naming.options("x", "a=4,b=0.5,c=word", list("abc")) == {
      "a": 4, "b": 0.5, "c": "word"}


@pytest.mark.parametrize("call, words", [
    (lambda: drafters.parse("prompt_lokup"), "Did you mean 'prompt_lookup'"),
    (lambda: drafters.parse("prompt_lookup:lenght=4"), "mean 'length'"),
    (lambda: drafters.parse("prompt_lookup:length"), "no option 'length'"),
    (lambda: caches.parse("page"), "Did you mean 'paged'"),
    (lambda: caches.parse("paged:pages=many"), "whole number, got 'many'"),
    (lambda: caches.parse("contiguous:page=4"), "it has none"),
    (lambda: verifiers.parse("exact:x=1"), "no option 'x=1'; it has none"),
    (lambda: verifiers.parse("exat"), "Did you mean 'exact'")])
def test_a_wrong_name_is_one_sentence(call, words):
  with pytest.raises(InputError, match=words):
    call()
