# SPDX-License-Identifier: Apache-2.0
"""Names of parts and their options, as flags spell them."""

import jaxtyping
import pytest

from jaxspec import caches, drafters, naming, verifiers
from jaxspec.errors import InputError


def test_a_name_may_have_options():
  assert naming.choose("cache", "paged:page=4", ["paged"]) == (
      "paged", "page=4")
  assert naming.choose("cache", "paged", ["paged"]) == ("paged", "")
  assert naming.options("x", "a=4,b=0.5,c=word", list("abc")) == {
      "a": 4, "b": 0.5, "c": "word"}


@pytest.fixture
def no_type_checks():
  """As users have it: what is of the wrong type reaches the package."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("call, words", [
    (lambda: drafters.parse("prompt_lokup"), "Did you mean 'prompt_lookup'"),
    (lambda: drafters.parse("prompt_lookup:lenght=4"), "mean 'length'"),
    (lambda: drafters.parse("prompt_lookup:length"), "no option 'length'"),
    (lambda: caches.parse("page"), "Did you mean 'paged'"),
    (lambda: caches.parse("paged:pages=many"), "whole number, got 'many'"),
    (lambda: caches.parse("contiguous:page=4"), "it has none"),
    (lambda: verifiers.parse("exact:x=1"), "no option 'x=1'; it has none"),
    (lambda: verifiers.parse("exat"), "Did you mean 'exact'"),
    (lambda: verifiers.parse("rejection:x=1"), "no option 'x=1'; it has none"),
    (lambda: verifiers.parse("typical:epsilonn=1"), "mean 'epsilon'"),
    (lambda: verifiers.parse("typical:epsilon=much"),
     r"epsilon must be a number in \[0, 1\], got 'much'"),
    (lambda: verifiers.parse("simulated:rate=True"), "got True"),
    (lambda: verifiers.parse("deferral:alpha=-1"), "got -1"),
    (lambda: verifiers.parse("deferral:rule=chow"), "sure or token")])
def test_a_wrong_name_is_one_sentence(call, words):
  with pytest.raises(InputError, match=words):
    call()
