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


def warp(logits: Float[Array, "B N V"], sampling: Sampling,
         history: History) -> Float[Array, "B N V"]:
  """Applies bias, penalties, temperature, top-k, top-p and min-p.

  Returns:
    Unnormalised log-probabilities, -inf for what is ruled out. Each kind of
    warp costs nothing in a step where no row asks for it.
  """
  logits = logits.astype(jnp.float32)
  sampled = sampling.temperature > 0
  # Below the floor good tokens would all become infinite, and alike.
  temperature = jnp.where(
      sampled, jnp.maximum(sampling.temperature, _COLDEST), 1)
  biased = jnp.any(sampling.bias_ids >= 0)
  penalised = jnp.any((sampling.repetition != 1) | (sampling.presence != 0)
                      | (sampling.frequency != 0))
  cut = jnp.any(sampled & (
      (sampling.top_k > 0) & (sampling.top_k < logits.shape[-1])
      | (sampling.top_p < 1) | (sampling.min_p > 0)))

  def warped(logits):
    said = _counts(history, penalised, logits.shape[-1])

    def node(n, all_nodes):
      x = lax.dynamic_slice_in_dim(all_nodes, n, 1, axis=1)
      x = lax.cond(biased, _add_bias, lambda x, _: x, x, sampling)
      x = lax.cond(penalised, _penalise, lambda x, *_: x, x, n, sampling,
                   history, said)
      x = x / temperature[:, None, None]
      x = lax.cond(cut, _cut, lambda x, _: x, x, sampling)
      return lax.dynamic_update_slice_in_dim(all_nodes, x, n, axis=1)

    # One node after another: a threshold needs many temporaries as large as
    # its logits, and N of each would be more than a step needs otherwise.
    return lax.fori_loop(0, logits.shape[1], node, logits)

  return lax.cond(biased | penalised | jnp.any(sampled), warped,
                  lambda logits: logits, logits)


def draw(logits: Float[Array, "B N V"], sampling: Sampling,
         positions: Int[Array, "B N"]) -> Int[Array, "B N"]:
  """One sample a node, of warped `logits`, by the Gumbel-max trick.

  Args:
    positions: where the sampled token will stand. Nodes of a row that share a
      position share their noise.
  """
  def greedy(logits, sampling, positions):
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def noisy(logits, sampling, positions):
    # One node after another; noise is as large as the logits.
    def node(n, samples):
      x, at = (lax.dynamic_slice_in_dim(a, n, 1, axis=1)
               for a in (logits, positions))
      noise = jnp.where(sampling.temperature[:, None, None] > 0,
                        gumbel(sampling.key, at, x.shape[-1]), 0.0)
      sample = jnp.argmax(x + noise, axis=-1).astype(jnp.int32)
      return lax.dynamic_update_slice_in_dim(samples, sample, n, axis=1)
    return lax.fori_loop(0, logits.shape[1], node,
                         jnp.zeros(positions.shape, jnp.int32))

  return lax.cond(jnp.any(sampling.temperature > 0), noisy, greedy,
                  logits, sampling, positions)


def gumbel(key: Key[Array, "B"], positions: Int[Array, "B N"],
           vocab: int) -> Float[Array, "B N V"]:
  """The noise of each row at each position."""
  def at(key, position):
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,))
  noise = jax.vmap(jax.vmap(at, (None, 0)))(key, positions)
  return sharding.constrain(noise, "rows", None, "vocab")


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

  return logits + jax.vmap(row)(sampling.bias_ids, sampling.bias)[:, None]


def _counts(history, wanted, vocab):
  """How often each token stands in the prompt and in the answer, `[B V]`."""
  slot = jnp.arange(history.tokens.shape[1])[None]
  in_prompt = slot < history.prompt_length[:, None]
  in_answer = (slot < history.length[:, None]) & ~in_prompt
  none = jnp.zeros((len(history.tokens), vocab), jnp.int32)
  return lax.cond(
      wanted, lambda: (_count(history.tokens, in_prompt, vocab),
                       _count(history.tokens, in_answer, vocab)),
      lambda: (none, none))


def _count(tokens, which, vocab):
  return jax.vmap(lambda t, w: jnp.zeros(vocab, jnp.int32).at[t].add(w))(
      tokens, which.astype(jnp.int32))


def _penalise(logits, node, sampling, history, counts):
  """Repetition (CTRL, arXiv:1909.05858) over prompt and answer; presence and
  frequency (OpenAI's definition) over the answer alone."""
  def per_row(values):
    return values[:, None, None]

  prompt, answer = counts
  on_path = history.mask.at[..., 0].set(False)[:, node]            # [B N]
  said = answer + _count(history.nodes, on_path, logits.shape[-1])
  prompt, said = prompt[:, None], said[:, None]
  factor = jnp.where(logits > 0, 1 / per_row(sampling.repetition),
                     per_row(sampling.repetition))
  logits = jnp.where(prompt + said > 0, logits * factor, logits)
  return (logits - per_row(sampling.frequency) * said
          - per_row(sampling.presence) * (said > 0))


def _cut(logits, sampling):
  """Top-k, top-p and min-p by threshold: no sort, and ties stay together."""
  def off(flag, value):
    return jnp.where(flag, value, 0)[:, None]

  greedy = sampling.temperature <= 0
  rank = _sortable(logits)
  # Top-k: the k-th largest value is the largest threshold that k values reach.
  wanted = off((sampling.top_k > 0) & ~greedy, sampling.top_k)
  threshold = _bisect(
      lambda t: jnp.sum(rank >= t[..., None], axis=-1) >= wanted,
      rank.shape[:-1])
  threshold = jnp.where(wanted > 0, threshold, 0)
  logits = jnp.where(rank >= threshold[..., None], logits, -jnp.inf)
  # Top-p, of what top-k left: the largest threshold whose mass reaches p.
  probs = jax.nn.softmax(logits, axis=-1)
  # (A share too small for a float32 still means the likeliest token.)
  mass = off((sampling.top_p < 1) & ~greedy,
             jnp.maximum(sampling.top_p, _LEAST_MASS))
  threshold = _bisect(
      lambda t: jnp.sum(jnp.where(rank >= t[..., None], probs, 0.0), axis=-1)
      >= mass,
      rank.shape[:-1])
  threshold = jnp.where(mass > 0, threshold, 0)
  logits = jnp.where(rank >= threshold[..., None], logits, -jnp.inf)
  # Min-p (arXiv:2407.01082): relative to the likeliest token.
  least = jnp.max(logits, axis=-1) + jnp.log(off(~greedy, sampling.min_p))
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
