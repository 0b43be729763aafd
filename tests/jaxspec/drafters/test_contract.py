# SPDX-License-Identifier: Apache-2.0
"""One contract for all drafters: they change the speed, never the text.

Held here, in float32, for every file of `jaxspec/drafters`: greedy and sampled
output is that of plain decoding, in every cache; rows are independent of each
other and of how many there are; all steps run one trace. And since a test in
which nothing is accepted proves nothing, each asserts how much was accepted.

Drafters that exist only here probe the edges: an oracle that hides the truth
in a late branch, one that is always wrong, one that proposes nothing but the
end token, one whose nodes are mostly dead.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import drafters, heads
from jaxspec.drafters import ngram
from jaxspec.drafters.autoregressive import Autoregressive
from jaxspec.heads import EagleHead, ExitHead, HydraHeads, MedusaHeads
from jaxspec.profiling import count_compiles
from jaxspec.tree import branching, chain, from_paths
from jaxspec.verifiers.rejection import Rejection
from tests.jaxspec import batches
from tests.jaxspec.batches import GREEDY, SAMPLED, Scripted

pytestmark = pytest.mark.usefixtures("quick_compiles")

# What to write behind a drafter's name here; nothing unless it is listed.
SETTINGS = {
    "adaptive": "drafter=[prompt_lookup:length=4],costs=[1;1;1;1]",
    "cascade": "models=[self:layers=0;self:int8],length=3",
    "draft_model": "model=[self:layers=0],length=3",
    "early_exit": "heads=[{file}],widths=[2;1;1]",
    "eagle": "heads=[{file}],nodes=8,depth=2,width=4",
    "hydra": "heads=[{file}],nodes=16",
    "lookahead": "window=3,levels=2,guesses=3,buckets=16",
    "medusa": "heads=[{file}],nodes=16",
    "ngram": "table={file},length=3",
    "prompt_lookup": "length=4",
    "recycling": "nodes=12,ranks=4",
    "union": "drafters=[prompt_lookup:length=4;recycling:nodes=8,ranks=4],"
             "nodes=8"}
TOKENS = 40
LONG = {
    "greedy": dataclasses.replace(GREEDY, max_new_tokens=TOKENS),
    "sampled": dataclasses.replace(SAMPLED, max_new_tokens=TOKENS)}
PROMPTS = batches.prompts(4)
EVERY = pytest.mark.parametrize("name", drafters.names())
# Judged by the ratio test in every run; the others in slow ones.
DRAWN = ("prompt_lookup",)
# Decoded in every run with one row alone; and with other caches. Those keep
# keys of their own, or their passes differ in kind: a chain, a tree, one of
# varying width. The others draft such passes too, and in slow runs.
ALONE = ("prompt_lookup", "early_exit")
# Decoded in the quickest run: none, a chain, a head of the model, a tree.
QUICK = ("autoregressive", "prompt_lookup", "early_exit", "union")
CACHED = {
    "paged": ("prompt_lookup", "draft_model"),
    "window": ("autoregressive",)}


def options(law: str, rows: int = 4):
  """One seed a row."""
  return [dataclasses.replace(LONG[law], seed=10 + row)
          for row in range(rows)]


@pytest.fixture(scope="module")
def plain(small):
  return {law: batches.answers(batches.run(
      small, Autoregressive(), PROMPTS, options(law), capacity=80))
      for law in LONG}


def learn(path, small, plain):
  """Learns n-grams from half of the answers."""
  table = ngram.learn([answer for law in LONG for answer in plain[law][::2]],
                      min_count=1, size=4096)
  ngram.save(path, table, vocab=64, orders=3)


# What writes the file or folder that a drafter reads.
FILES = {
    "ngram": learn,
    "medusa": lambda path, small, _: heads.save(
        path, MedusaHeads.init(small), small),
    "hydra": lambda path, small, _: heads.save(
        path, HydraHeads.init(small, rank=8), small),
    "eagle": lambda path, small, _: heads.save(
        path, EagleHead.init(small), small),
    "early_exit": lambda path, small, _: heads.save(
        path, ExitHead.init(small, layer=1, attention=True), small)}


@pytest.fixture(scope="module")
def make(small, plain, tmp_path_factory):
  """Makes the drafter of a name, once: tests share what is compiled for it."""
  @functools.cache
  def made(name):
    path = tmp_path_factory.mktemp(name) / "file"
    if name in FILES:
      FILES[name](path, small, plain)
    text = f"{name}:{SETTINGS.get(name, '')}".format(file=path)
    return drafters.parse(text, drafters.Target(model=small))
  return made


def test_plain_decoding_samples(plain):
  """Else "sampled" would be a second "greedy"."""
  assert plain["sampled"] != plain["greedy"]
  assert all(len(a) == TOKENS for law in LONG for a in plain[law])


@pytest.mark.parametrize("name, kind", [
    pytest.param(name, kind, marks=pytest.mark.slow if name not in CACHED.get(
        kind, [name]) else () if name in QUICK else pytest.mark.medium)
    for name in drafters.names() for kind in batches.cache_kinds()])
def test_text_is_that_of_plain_decoding(small, plain, make, name, kind):
  drafter = make(name)
  for law in LONG:
    state = batches.run(small, drafter, PROMPTS, options(law), kind=kind,
                        capacity=80)
    assert batches.answers(state) == plain[law], law
    assert (batches.accepted(state) > 0) == (drafter.height > 0), law
    assert batches.accepted(state) <= batches.drafted(state)
  batches.check_cache(small, state)


@pytest.mark.medium
@EVERY
def test_rows_are_independent(small, plain, make, name):
  """Of their place, and of their neighbours."""
  drafter, order = make(name), [2, 0, 3, 1]
  state = batches.run(small, drafter, [PROMPTS[i] for i in order],
                      [options("sampled")[i] for i in order], capacity=80)
  assert batches.answers(state) == [plain["sampled"][i] for i in order]
  together = np.asarray(state.counters.accepted)
  for row in (0, 3):
    # All others stay free: the last index is no row.
    alone = batches.refill(
        small, drafter, batches.empty(small, drafter, 4, capacity=80),
        [row, 4, 4, 4], [PROMPTS[row], *PROMPTS[1:]],
        [options("sampled")[row]] * 4)
    alone = batches.finish(small, drafter, alone)
    assert batches.answers(alone)[row] == plain["sampled"][row]
    # The drafts too are the same, not only what became of them.
    if drafter.coupled:
      continue
    np.testing.assert_array_equal(alone.counters.accepted[row],
                                  together[order.index(row)])


@pytest.mark.medium
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ALONE else pytest.mark.slow)
    for name in drafters.names()])
def test_a_row_may_be_the_only_one(small, plain, make, name):
  for row in (0, 3):
    state = batches.run(small, make(name), [PROMPTS[row]],
                        [options("sampled")[row]], capacity=80)
    assert batches.answers(state) == [plain["sampled"][row]]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in DRAWN else pytest.mark.slow)
    for name in drafters.names()])
def test_rejection_takes_drafts_too(small, plain, make, name):
  """A greedy row has one text, whatever the rule; others have their law.

  (`test_distribution.py` holds the law.)
  """
  drafter = make(name)
  for law, temperature in (("greedy", 0.0), ("sampled", 0.3)):
    asked = [dataclasses.replace(o, temperature=temperature)
             for o in options(law)]
    state = batches.run(small, drafter, PROMPTS, asked, capacity=80,
                        verifier=Rejection())
    assert (batches.accepted(state) > 0) == (drafter.height > 0), law
    assert (batches.answers(state) == plain[law]) == (law == "greedy")
  batches.check_cache(small, state)


@EVERY
def test_one_trace_for_all_steps(small, make, name):
  drafter = make(name)
  state = batches.begin(small, drafter, PROMPTS, options("greedy"),
                        capacity=80)
  state = batches.finish(small, drafter, state, steps=1)
  with count_compiles() as compiles:
    for _ in range(3):
      state = batches.finish(small, drafter, state, steps=2)
    state = batches.refill(small, drafter, state, [3, 2, 1, 0], PROMPTS,
                           options("sampled"))
    state = batches.finish(small, drafter, state)
  assert compiles.count == 0


LATE = branching((2, 2, 2))
LATE_PATH = (2, 6, 14)
SPARSE = from_paths([(0,), (1,), (2,), (0, 0), (2, 1), (2, 1, 0), (2, 1, 0, 0)])
SPARSE_PATH = tuple(SPARSE.paths[SPARSE.size - 1][1:].tolist())


@pytest.mark.medium
@pytest.mark.parametrize("law", LONG)
@pytest.mark.parametrize("tree, path", [(LATE, LATE_PATH),
                                        (SPARSE, SPARSE_PATH)])
def test_oracle_in_a_late_branch(small, plain, tree, path, law):
  """It is right in the last branch alone, and must be believed there."""
  drafter = Scripted(script(plain[law]), tree, path)
  state = batches.run(small, drafter, PROMPTS, options(law), capacity=80)
  assert batches.answers(state) == plain[law]
  # Every pass takes the whole path and a token more; the limit cuts the last.
  block = tree.height + 1
  passes = -(-(TOKENS - 1) // block)
  assert state.counters.passes.tolist() == [passes] * 4
  assert batches.accepted(state) == 4 * (TOKENS - 1 - passes)
  batches.check_cache(small, state)


@pytest.mark.parametrize("law", LONG)
def test_always_wrong(small, plain, law):
  lies = (script(plain[law]) + 1) % small.vocab
  drafter = Scripted(lies, LATE, LATE_PATH)
  state = batches.run(small, drafter, PROMPTS, options(law), capacity=80)
  assert batches.answers(state) == plain[law]
  assert batches.accepted(state) == 0
  assert state.counters.passes.tolist() == [TOKENS - 1] * 4
  assert batches.drafted(state) == 4 * (TOKENS - 1) * (LATE.size - 1)


@pytest.mark.medium
@pytest.mark.parametrize("law", LONG)
def test_end_token_is_proposed_everywhere(small, plain, law):
  """A drafter that wants to stop does not stop anyone too early."""
  end = plain[law][0][12]
  wanted = [a[:a.index(end) + 1] if end in a else a for a in plain[law]]
  assert len(wanted[0]) > 6 and wanted[0][-1] == end
  stopping = [dataclasses.replace(o, stop_token_ids=(end,))
              for o in options(law)]
  # End tokens alone; then end tokens beside and behind the truth.
  for tree, path in ((chain(3), ()), (branching((2, 2, 1)), (2, 6))):
    drafter = Scripted(script(plain[law]), tree, path, garbage=end)
    state = batches.run(small, drafter, PROMPTS, stopping, capacity=80)
    assert batches.answers(state) == wanted
    # An end token is its pass's own token: what is accepted stands before.
    accepted = np.asarray(state.counters.accepted).sum(axis=1)
    assert (accepted > 0).tolist() == [bool(path) and len(a) > 2
                                       for a in wanted]


@pytest.mark.medium
def test_dead_nodes_are_never_accepted(small, plain):
  """However right they are; and they are not counted as drafted."""
  drafter = Scripted(script(plain["greedy"]), chain(3), (1, 2, 3), live=2)
  state = batches.run(small, drafter, PROMPTS, options("greedy"), capacity=80)
  assert batches.answers(state) == plain["greedy"]
  passes = -(-(TOKENS - 1) // 2)                    # one accepted, one bonus
  assert state.counters.passes.tolist() == [passes] * 4
  assert batches.drafted(state) == 4 * passes
  assert batches.accepted(state) == 4 * (TOKENS - 1 - passes)


def script(answers):
  """Answers as the script of a `Scripted`."""
  return jnp.asarray(np.array(answers, np.int32))
