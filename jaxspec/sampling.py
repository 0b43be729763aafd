# SPDX-License-Identifier: Apache-2.0
"""From logits to a token: the one order of warps, and the one draw.

Plain sampling, drafting and verification all call `warp` and `draw`; there is
no second copy of the order anywhere. The order is that of Hugging Face
transformers: bias, penalties, temperature, top-k, top-p, min-p. (Penalties
come first because they are made for raw logits, and because a greedy row must
feel them.)

Noise is a function of (request key, position) alone, so that neither the
step, nor the row, nor the drafter can change a sample.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxspec import sharding
from pallas_kernels import accept_nodes

_COLDEST, _LEAST_MASS = 1e-30, 1e-30
_BLOCK = 128                     # of logits, of which the maximum is taken
# Folded into a key before the position, for noise that must have nothing to
# do with that of `gumbel`. No position is so large.
_COINS, _APART = 2**32 - 1, 2**32 - 2


@struct.dataclass
class Sampling:
  """How each row wants to be sampled; data, so that requests can be mixed.

  Attributes:
    key: the request's own key, made from its seed.
    temperature: 0 is greedy.
    top_k: 0 is off.
    bias_ids: token ids whose logits are shifted; -1 where there is none.
  """

  key: Key[Array, "B"]
  temperature: Float[Array, "B"]
  top_k: Int[Array, "B"]
  top_p: Float[Array, "B"]
  min_p: Float[Array, "B"]
  repetition: Float[Array, "B"]
  presence: Float[Array, "B"]
  frequency: Float[Array, "B"]
  bias_ids: Int[Array, "B M"]
  bias: Float[Array, "B M"]


@struct.dataclass
class History:
  """What penalties look at: the text so far, and the nodes in flight.

  A node's history is the committed text and the nodes on its own path, the
  root left out because it is committed already.
  """

  tokens: Int[Array, "B C"]
  prompt_length: Int[Array, "B"]
  length: Int[Array, "B"]
  nodes: Int[Array, "B N"]
  mask: Bool[Array, "B N N"]


@struct.dataclass
class Laws:
  """What a pass says of the token behind each node, warped where it is asked.

  Warps and noise cost more than all else a verifier does, and a walk down one
  path meets few of the nodes.

  Attributes:
    logits: the model's own.
    positions: where the token behind each node will stand.
  """

  logits: Float[Array, "B N V"]
  sampling: Sampling
  history: History
  positions: Int[Array, "B N"]

  def at(self, node: Int[Array, "B"]) -> Float[Array, "B V"]:
    """Log-probabilities behind one node of each row, as `warp` leaves them."""
    logits = jnp.take_along_axis(self.logits, node[:, None, None], axis=1)
    return warp(logits[:, 0], self.sampling, self.history, node)

  def draw(self, node: Int[Array, "B"]) -> Int[Array, "B"]:
    """The sample behind one node of each row."""
    position = jnp.take_along_axis(self.positions, node[:, None], axis=1)
    return draw(self.at(node), self.sampling, position[:, 0])

  def plain(self) -> Bool[Array, ""]:
    """Whether no row asks for a warp but temperature."""
    return bare(self.sampling, self.logits.shape[-1])

  def draw_all(self) -> Int[Array, "B N"]:
    """The sample behind every node of plain laws, in one pass over logits.

    It is that of `draw`, noise and all.
    """
    noise = words(self.sampling.key, self.positions)               # [B N 2]
    args = (self.logits, self.sampling.temperature, noise)
    mesh = sharding.current()
    if mesh is None:
      return accept_nodes(args[0], temperature=args[1], noise=noise).token
    axes = (("rows", None, "vocab"), ("rows",), ("rows", None, None))
    specs = [sharding.spec(names, x.shape, mesh)
             for names, x in zip(axes, args)]
    split = specs[0][2]

    def part(logits, temperature, noise):
      """Of the words a shard holds, then of all."""
      first = (lax.axis_index(split) * logits.shape[-1] if split else None)
      judged = accept_nodes(logits, temperature=temperature, noise=noise,
                            first=first)
      if first is None:
        return judged.token
      best = lax.pmax(judged.score, split) == judged.score
      return lax.pmin(jnp.where(best, first + judged.token,
                                jnp.iinfo(jnp.int32).max), split)

    return jax.shard_map(part, in_specs=tuple(specs),
                         out_specs=jax.P(specs[0][0], None),
                         check_vma=False)(*args)


def defaults(rows: int, biases: int) -> Sampling:
  """Greedy rows with nothing else switched on."""
  def full(value):
    return jnp.full(rows, value, jnp.float32)
  return Sampling(
      key=jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32)),
      temperature=full(0), top_k=jnp.zeros(rows, jnp.int32), top_p=full(1),
      min_p=full(0), repetition=full(1), presence=full(0), frequency=full(0),
      bias_ids=jnp.full((rows, biases), -1, jnp.int32),
      bias=jnp.zeros((rows, biases), jnp.float32))


def warp(logits: Float[Array, "B V"], sampling: Sampling, history: History,
         node: Int[Array, "B"]) -> Float[Array, "B V"]:
  """Applies bias, penalties, temperature, top-k, top-p and min-p.

  Args:
    node: which of the nodes in flight the logits are of.

  Returns:
    Unnormalised log-probabilities, -inf for what is ruled out. Each kind of
    warp costs nothing in a step where no row asks for it.
  """
  logits = logits.astype(jnp.float32)
  sampled = sampling.temperature > 0
  # Below the floor good tokens would all become infinite, and alike.
  temperature = jnp.where(
      sampled, jnp.maximum(sampling.temperature, _COLDEST), 1)
  biased, penalised, cut = asked(sampling, logits.shape[-1])

  def warped(x):
    x = lax.cond(biased, _add_bias, lambda x, _: x, x, sampling)
    x = lax.cond(penalised, _penalise, lambda x, *_: x, x, sampling, history,
                 node)
    return lax.cond(cut, _cut, lambda x, _: x, x / temperature[:, None],
                    sampling)

  return lax.cond(biased | penalised | jnp.any(sampled), warped,
                  lambda logits: logits, logits)


def bare(sampling: Sampling, vocab: int) -> Bool[Array, ""]:
  """Whether no row asks for any warp but a temperature."""
  biased, penalised, cut = asked(sampling, vocab)
  return ~(biased | penalised | cut)


def asked(sampling: Sampling, vocab: int
          ) -> tuple[Bool[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
  """Whether any row asks for a bias, for penalties, and for a cut."""
  return (
      jnp.any(sampling.bias_ids >= 0),
      jnp.any((sampling.repetition != 1) | (sampling.presence != 0)
              | (sampling.frequency != 0)),
      jnp.any((sampling.temperature > 0) & (
          (sampling.top_k > 0) & (sampling.top_k < vocab)
          | (sampling.top_p < 1) | (sampling.min_p > 0))))


def draw(logits: Float[Array, "B V"], sampling: Sampling,
         positions: Int[Array, "B"]) -> Int[Array, "B"]:
  """One sample a row, of warped `logits`, by the Gumbel-max trick.

  Args:
    positions: where the sampled token will stand. Whoever draws there for the
      same request has the same noise.
  """
  return draws(logits, sampling, positions, 1)[:, 0]


def draws(logits: Float[Array, "B V"], sampling: Sampling,
          positions: Int[Array, "B"], count: int) -> Int[Array, "B count"]:
  """Samples without replacement, in the order of how likely each is to be
  what `draw` gives to someone whose logits are a little different."""
  def noisy(logits):
    noise = gumbel(sampling.key, positions, logits.shape[-1])
    return logits + jnp.where(sampling.temperature[:, None] > 0, noise, 0.0)

  scores = lax.cond(jnp.any(sampling.temperature > 0), noisy, lambda x: x,
                    logits)
  return top(scores[:, None], count)[:, 0]


def gumbel(key: Key[Array, "B"], positions: Int[Array, "B"],
           vocab: int) -> Float[Array, "B V"]:
  """The noise of each row at its position."""
  def at(key, position):
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,))
  return sharding.constrain(jax.vmap(at)(key, positions), "rows", "vocab")


def words(key: Key[Array, "B"], positions: Int[Array, "B N"]
          ) -> UInt32[Array, "B N _"]:
  """Of the keys under which `gumbel` draws at some positions of each row, for
  kernels that draw themselves (`pallas_kernels.noise`)."""
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  return jax.random.key_data(fold(key, positions))


def coins(key: Key[Array, "B"], positions: Int[Array, "B"],
          number: Int[Array, "B"]) -> Float[Array, "B"]:
  """Uniform in [0, 1): each row's coin of that number at that position."""
  def toss(key, position, number):
    key = jax.random.fold_in(key, jnp.uint32(_COINS))
    key = jax.random.fold_in(key, position)
    return jax.random.uniform(jax.random.fold_in(key, number))
  return jax.vmap(toss)(key, positions, number)


def apart(key: Key[Array, "B"]) -> Key[Array, "B"]:
  """Keys for samples that share no noise with any drafter's.

  Drafters may draw with the noise of `gumbel(key, ...)` itself.
  """
  return jax.vmap(lambda k: jax.random.fold_in(k, jnp.uint32(_APART)))(key)


def top(logits: Float[Array, "B N V"], count: int) -> Int[Array, "B N count"]:
  """The likeliest tokens, best first; of equal ones the first."""
  if count == 1:
    return jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)
  if not count:
    return jnp.zeros((*logits.shape[:2], 0), jnp.int32)
  vocab = logits.shape[-1]
  if vocab < 4 * count * _BLOCK:
    return lax.top_k(logits, count)[1].astype(jnp.int32)
  # They stand in the blocks of the largest maxima. A maximum is cheap, and
  # what is left to select from is small.
  blocks = jnp.pad(logits, ((0, 0), (0, 0), (0, -vocab % _BLOCK)),
                   constant_values=-jnp.inf)
  blocks = blocks.reshape(*logits.shape[:2], -1, _BLOCK)
  which = jnp.sort(lax.top_k(jnp.max(blocks, axis=-1), count)[1], axis=-1)
  few = jnp.take_along_axis(blocks, which[..., None], axis=2)
  at = lax.top_k(few.reshape(*logits.shape[:2], -1), count)[1]
  block = jnp.take_along_axis(which, at // _BLOCK, axis=-1)
  return (block * _BLOCK + at % _BLOCK).astype(jnp.int32)


def log_probability(logits: Float[Array, "B N V"], nodes: Int[Array, "B P"],
                    tokens: Int[Array, "B P"]) -> Float[Array, "B P"]:
  """Log-probability of a token behind each node, under the model itself."""
  rows = jnp.arange(len(logits))[:, None]
  total = jax.nn.logsumexp(logits, axis=-1)                        # [B N]
  return logits[rows, nodes, tokens] - total[rows, nodes]


def _add_bias(logits, sampling):
  vocab = logits.shape[-1]

  def row(ids, bias):
    ids = jnp.where(ids < 0, vocab, ids)
    return jnp.zeros(vocab, jnp.float32).at[ids].add(bias, mode="drop")

  return logits + jax.vmap(row)(sampling.bias_ids, sampling.bias)


def _count(tokens, which, vocab):
  return jax.vmap(lambda t, w: jnp.zeros(vocab, jnp.int32).at[t].add(w))(
      tokens, which.astype(jnp.int32))


def _penalise(logits, sampling, history, node):
  """Repetition (CTRL, arXiv:1909.05858) over prompt and answer; presence and
  frequency (OpenAI's definition) over the answer alone."""
  vocab = logits.shape[-1]
  slot = jnp.arange(history.tokens.shape[1])[None]
  in_prompt = slot < history.prompt_length[:, None]
  in_answer = (slot < history.length[:, None]) & ~in_prompt
  on_path = jnp.take_along_axis(history.mask, node[:, None, None], axis=1)
  on_path = on_path[:, 0].at[:, 0].set(False)                      # [B N]
  prompt = _count(history.tokens, in_prompt, vocab)
  said = (_count(history.tokens, in_answer, vocab)
          + _count(history.nodes, on_path, vocab))
  repetition = sampling.repetition[:, None]
  factor = jnp.where(logits > 0, 1 / repetition, repetition)
  logits = jnp.where(prompt + said > 0, logits * factor, logits)
  return (logits - sampling.frequency[:, None] * said
          - sampling.presence[:, None] * (said > 0))


def _cut(logits, sampling):
  """Top-k, top-p and min-p by threshold: no sort, and ties stay together."""
  greedy = sampling.temperature <= 0
  rank = _sortable(logits)
  # Top-k: the k-th largest value is the largest threshold that k values reach.
  wanted = jnp.where((sampling.top_k > 0) & ~greedy, sampling.top_k, 0)
  threshold = _bisect(
      lambda t: jnp.sum(rank >= t[..., None], axis=-1) >= wanted,
      rank.shape[:-1])
  threshold = jnp.where(wanted > 0, threshold, 0)
  logits = jnp.where(rank >= threshold[..., None], logits, -jnp.inf)
  # Top-p, of what top-k left: the largest threshold whose mass reaches p.
  probs = jax.nn.softmax(logits, axis=-1)
  # (A share too small for a float32 still means the likeliest token.)
  mass = jnp.where((sampling.top_p < 1) & ~greedy,
                   jnp.maximum(sampling.top_p, _LEAST_MASS), 0)
  threshold = _bisect(
      lambda t: jnp.sum(jnp.where(rank >= t[..., None], probs, 0.0), axis=-1)
      >= mass,
      rank.shape[:-1])
  threshold = jnp.where(mass > 0, threshold, 0)
  logits = jnp.where(rank >= threshold[..., None], logits, -jnp.inf)
  # Min-p (arXiv:2407.01082): relative to the likeliest token.
  least = jnp.max(logits, axis=-1) + jnp.log(
      jnp.where(greedy, 0, sampling.min_p))
  return jnp.where(logits >= least[..., None], logits, -jnp.inf)


def _sortable(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
  """Maps float32 to integers of the same order."""
  x = jnp.where(x == 0, 0.0, x)       # zero has two signs
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _bisect(reached, shape) -> UInt32[Array, "..."]:
  """The largest threshold for which the monotone test `reached` holds."""
  def body(i, threshold):
    higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    return jnp.where(reached(higher), higher, threshold)
  return lax.fori_loop(0, 32, body, jnp.zeros(shape, jnp.uint32))
