# SPDX-License-Identifier: Apache-2.0
"""Adaptive: as much of another drafter's proposal as pays, nothing included.

At every step the width of the pass is chosen among compiled ones, on the
device: the one with the most expected tokens for its cost. What a pass of each
width costs is measured on the machine (see `jaxspec.pacing`); what is expected
is learned from what was accepted. Where nothing pays, a pass is one token
wide, and costs what plain decoding costs; now and then it tries again.

The text never depends on a width: under the exact verifier it is always that
of plain decoding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxspec.acceptance import Acceptance, along, outcome
from jaxspec.base import Drafter
from jaxspec.drafters import parse
from jaxspec.errors import InputError

# After so many steps in which nothing paid, the smallest draft is tried.
_PROBE = 64
# A costly drafter is not even asked while nothing pays.
_PATIENCE = 4
# A wider pass must promise this much more than plain decoding.
_MARGIN = 1.06


@struct.dataclass
class _State:
  """The drafter's own, and what was learned.

  Attributes:
    running: rows that are in the middle of a request.
    declined: steps since something was tried.
  """

  inner: Any
  acceptance: Acceptance
  running: Bool[Array, "B"]
  declined: Int[Array, ""]


@struct.dataclass
class Adaptive(Drafter):
  """Cuts the proposals of `drafter` to what pays.

  Attributes:
    costs: of a pass of each width, relative to one another.
    forced: which width to take whatever pays, -1 for none; so are costs
      measured.
    sizes: the widths in nodes, ascending; 1 is the first, all the last.
  """

  drafter: Any
  costs: Float[Array, "sizes"]
  forced: Int[Array, ""]
  sizes: tuple[int, ...] = struct.field(pytree_node=False)
  unmeasured: bool = struct.field(pytree_node=False, default=False)

  coupled = True

  @classmethod
  def of(cls, drafter: Any, sizes: tuple[int, ...] | None = None,
         costs: tuple[float, ...] | None = None) -> "Adaptive":
    """Around a drafter that is there.

    Args:
      sizes: by default 1, 2, 4, 8, ... and all its nodes.
      costs: by default a guess, which a `Generator` replaces by what it
        measures.
    """
    if drafter.whole:
      raise InputError(f"adaptive: {type(drafter).__name__.lower()} cannot be "
                       "cut; use it alone")
    if sizes is None:
      sizes = tuple(2**i for i in range(12) if 2**i < drafter.size)
      sizes = (*sizes, drafter.size)
    unmeasured = costs is None
    if costs is None:
      costs = tuple(1 + 0.03 * (size - 1) for size in sizes)
    if (sizes[0] != 1 or sizes[-1] != drafter.size
        or list(sizes) != sorted(set(sizes))):
      raise InputError(f"adaptive: sizes must ascend from 1 to {drafter.size}, "
                       f"the nodes of its drafter, got {sizes}")
    if len(costs) != len(sizes) or min(costs) <= 0:
      raise InputError(f"adaptive: costs must be {len(sizes)} positive numbers,"
                       f" one for each of the sizes {sizes}, got {costs}")
    return cls(drafter, jnp.asarray(costs, jnp.float32),
               jnp.asarray(-1, jnp.int32), sizes, unmeasured)

  @classmethod
  def build(cls, target, drafter="prompt_lookup", sizes="", costs=""):
    """See `drafters.parse`; `sizes` and `costs` as in `[1;2;4;9]`."""
    def numbers(name, text, kind):
      try:
        return tuple(map(kind, str(text).split(";"))) if text else None
      except ValueError as e:
        raise InputError(f"adaptive: {name} must be numbers, as in [1;2;4], "
                         f"got {text!r}") from e
    return cls.of(parse(str(drafter), target), numbers("sizes", sizes, int),
                  numbers("costs", costs, float))

  @property
  def size(self):
    return self.drafter.size

  @property
  def height(self):
    return self.drafter.height

  @property
  def taps(self):
    return self.drafter.taps

  @property
  def ranks(self):
    return self.drafter.ranks

  @property
  def priors(self):
    return self.drafter.priors

  # What is shown of a prompt that only the lower layers have read is the
  # drafter's, and so is its state until the row begins.

  @property
  def opens(self):
    return self.drafter.opens

  @property
  def head(self):
    return self.drafter.head

  def read(self, model, x, length):
    return self.drafter.read(model, x, length)

  def look(self, *args):
    return self.drafter.look(*args)

  def go_on(self, *args):
    return self.drafter.go_on(*args)

  def shown(self, seq, walk):
    return self.drafter.shown(seq, walk)

  def begin(self, state, rows, new, request):
    return self._begun(state, rows, self.drafter.begin(
        state.inner, rows, new, request))

  def init(self, model, rows, capacity):
    return _State(
        self.drafter.init(model, rows, capacity),
        Acceptance.unknown(rows, max(self.height, 1), self.priors,
                           shared=True),
        jnp.zeros(rows, bool), jnp.zeros((), jnp.int32))

  def insert(self, model, state, rows, prefix, request):
    return self._begun(state, rows, self.drafter.insert(
        model, state.inner, rows, prefix, request))

  def _begun(self, state, rows, inner):
    return state.replace(
        inner=inner, acceptance=state.acceptance.begin(rows),
        running=state.running.at[rows].set(True, mode="drop"))

  def propose(self, model, seq, request, state):
    if self.drafter.paced:
      return self._pace(model, seq, request, state)

    def ask():
      made, inner = self.drafter.propose(model, seq, request, state.inner)
      live = jnp.sum(made.alive, axis=1, dtype=jnp.int32)
      return made.replace(live=live), inner

    if self.drafter.costly:
      asleep = self._asleep(state)
      proposal, inner = _ask_if(~asleep, ask, state.inner, seq)
    else:
      asleep = False
      proposal, inner = ask()
    expected = jnp.sum(self._expected(state, proposal),
                       axis=0, where=state.running[:, None])
    width = self._choose(state, expected)
    most = jnp.asarray(self.sizes)[width]
    live = proposal.live
    offered = asleep | jnp.any((live > 1) & state.running)
    declined = jnp.where(width > 0, 0, state.declined + offered)
    # Who measures wants a pass of just this width, whatever was drafted.
    least = jnp.where(self.forced >= 0, most, 1)
    return proposal.replace(
        live=jnp.minimum(live, most), least=least, sizes=self.sizes
    ), state.replace(inner=inner, declined=declined)

  def _pace(self, model, seq, request, state):
    """Tells a drafter how far to go, before it begins."""
    plan = self.drafter.plan(len(seq.length))
    expected = jnp.sum(self._expected(state, plan),
                       axis=0, where=state.running[:, None])
    width = self._choose(state, expected)
    most = jnp.asarray(self.sizes)[width]
    made, inner = self.drafter.propose(model, seq, request, state.inner, most)
    declined = jnp.where(width > 0, 0, state.declined + 1)
    least = jnp.where(self.forced >= 0, most, 1)
    return made.replace(least=least, sizes=self.sizes), state.replace(
        inner=inner, declined=declined)

  def observe(self, model, seq, state, proposal, scores, verdict):
    judged, right = outcome(proposal, verdict)
    return state.replace(
        inner=self.drafter.observe(model, seq, state.inner, proposal, scores,
                                   verdict),
        acceptance=state.acceptance.judge(
            proposal.kind, proposal.depths, judged, right),
        running=verdict.kept > 0)

  def _asleep(self, state):
    """Whether nothing has paid for so long that nothing is asked for."""
    awake = (state.declined < _PATIENCE) | (state.declined % _PROBE == 0)
    return ~awake & (self.forced <= 0)

  def _expected(self, state, proposal):
    """Tokens each row may expect of a pass of each width, `[B sizes]`."""
    chances = proposal.chances
    if chances is None:
      chances = along(proposal, state.acceptance.of(
          proposal.kind, proposal.depths))
    chances = jnp.where(proposal.alive & (proposal.depths > 0), chances, 0.0)
    total = jnp.cumsum(chances, axis=1)
    return 1 + total[:, jnp.asarray(self.sizes) - 1]

  def _choose(self, state, expected):
    """Which width has the most tokens for its cost."""
    worth = expected / self.costs
    worth = worth.at[1:].divide(_MARGIN)
    best = jnp.argmax(worth)
    probe = (best == 0) & (state.declined >= _PROBE)
    best = jnp.where(probe, min(1, len(self.sizes) - 1), best)
    return jnp.where(self.forced >= 0, self.forced, best).astype(jnp.int32)


def _ask_if(awake, ask, inner, seq):
  """What is proposed, or the root alone in the same shape; and the state.

  Of the state only what proposing changes goes through the condition: the
  rest, such as a table, would be copied in every step.
  """
  old, structure = jax.tree.flatten(inner)
  changed: list[int] = []

  def some():
    made, new = ask()
    new = jax.tree.leaves(new)
    changed[:] = [i for i, (n, o) in enumerate(zip(new, old)) if n is not o]
    return made, [new[i] for i in changed]

  def nothing():
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return empty.replace(
        tokens=empty.tokens.at[:, :1].set(seq.tail()),
        live=jnp.ones_like(empty.live)), [old[i] for i in changed]

  like, _ = jax.eval_shape(some)
  made, new = jax.lax.cond(awake, some, nothing)
  for i, value in zip(changed, new):
    old[i] = value
  return made, jax.tree.unflatten(structure, old)
