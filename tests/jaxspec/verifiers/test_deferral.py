# SPDX-License-Identifier: Apache-2.0
"""The cascade: its mixture from the definition, and the walk against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import verifiers
from jaxspec.base import Proposal
from jaxspec.errors import InputError
from jaxspec.tree import branching, chain, root
from jaxspec.verifiers.deferral import Deferral
from tests.jaxspec.verifiers import walks

pytestmark = pytest.mark.usefixtures("quick_compiles")


def mixture(rule, alpha):
  """In plain Python."""
  def of(p, q, drafted):
    if not drafted:
      return p
    if rule == "sure":
      distance = sum(abs(x - y) for x, y in zip(p, q)) / 2
      return q if max(q) >= max(p) - alpha * distance else p
    law, lost = np.zeros(len(p)), 0.0
    for v in range(len(p)):
      if p[v] >= (1 - alpha) * max(p):
        law[v] = q[v]
      else:
        lost += q[v]
    return law + p * lost
  return of


SETTINGS = pytest.mark.parametrize("rule, alpha", [
    ("sure", 0.0), ("sure", 0.2), ("sure", 0.7), ("token", 0.4)])


@pytest.mark.medium
@SETTINGS
@pytest.mark.parametrize("tree", [chain(3), branching((2, 2))], ids=[
    "chain", "tree"])
def test_it_walks_against_the_mixture(tree, rule, alpha):
  live = jnp.asarray(np.arange(300) % tree.size + 1, jnp.int32)
  lengths = walks.check(
      Deferral(alpha, rule), *walks.case(tree, "without", live=live),
      wanted=mixture(rule, alpha))
  assert {0, 1, 2} <= set(lengths)


@SETTINGS
def test_a_drafted_token_has_the_law_of_the_mixture(rule, alpha):
  """Summed over all drafts and outcomes; and it is neither p nor q alone."""
  rng = np.random.default_rng(1)
  seen = set()
  for _ in range(20):
    p, q = walks.law(rng, 2, 5)
    pi = mixture(rule, alpha)(p, q, True)
    total = np.zeros(5)
    for x in np.flatnonzero(q):
      for chance, path, last in walks.outcomes(
          lambda n: [1] if n == 0 else [], [0, x], [pi, pi].__getitem__,
          [q, q].__getitem__, False):
        total += q[x] * chance * (walks.certain(x, 5) if path else last)
    np.testing.assert_allclose(total, pi, atol=1e-12)
    assert pi.sum() == pytest.approx(1)
    ours = Deferral(alpha, rule).mixture(
        jnp.asarray([p], jnp.float32), jnp.asarray([q], jnp.float32))
    np.testing.assert_allclose(ours[0], pi, atol=1e-6)
    seen |= {"p"} if np.array_equal(pi, p) else {"q"} if np.array_equal(
        pi, q) else {"mixed"}
  assert seen >= ({"p", "q"} if rule == "sure" else {"mixed"})


def test_the_surer_the_drafter_must_be_the_more_is_the_models():
  rng = np.random.default_rng(2)
  p, q = (jnp.asarray(walks.law(rng, 500, 5), jnp.float32) for _ in "pq")
  shares = [float(np.mean(np.all(Deferral(alpha).mixture(p, q) == q, axis=1)))
            for alpha in (0.0, 0.2, 0.5, 0.9)]
  assert 0.2 < shares[0] and shares == sorted(set(shares))


def test_a_greedy_row_is_the_models_own():
  proposal, p, _, row = walks.case(branching((2, 2)), "without", temperature=0)
  logits = jnp.log(jnp.asarray(p, jnp.float32))
  at = walks.positions(proposal)
  lossy, exact = (jax.jit(v)(proposal, walks.laws(logits, row, at))
                  for v in (Deferral(1.0), verifiers.parse("exact")))
  np.testing.assert_array_equal(lossy.kept, exact.kept)
  np.testing.assert_array_equal(lossy.next_token, exact.next_token)


def test_drafts_of_no_known_law_are_refused():
  row, logits = walks.rows(1.0, [0]), jnp.zeros((1, 3, 4))
  drafted = Proposal(jnp.zeros((1, 3), jnp.int32), chain(2))
  with pytest.raises(InputError, match="must know the law"):
    Deferral()(drafted, walks.laws(logits, row, walks.positions(drafted)))
  # Where nothing is drafted, as for the first token, there is none to know.
  plain = Proposal(jnp.zeros((1, 1), jnp.int32), root())
  verdict = Deferral()(plain, walks.laws(logits[:, :1], row,
                                         walks.positions(plain)))
  assert verdict.kept.tolist() == [1]


def test_found_by_name():
  assert verifiers.parse("deferral:alpha=1") == Deferral(1.0)
  assert verifiers.parse("deferral:rule=token").rule == "token"
  assert hash(Deferral()) == hash(Deferral())
