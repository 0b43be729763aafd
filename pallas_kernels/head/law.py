# SPDX-License-Identifier: Apache-2.0
"""What `proposal_head` tells of a law, and how it is told of one in parts.

A kernel walks a part of the vocabulary with an online softmax and keeps what
it needs: three sums and a few candidates. Where several walk (the two cores of
a chip, the many of a GPU), the parts are joined here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forecast:
  """What a head says, all in float32.

  Attributes:
    tokens: the likeliest, or those drawn, best first; of equal ones the first.
      -1 where there are no more, because the others are not allowed.
    logits: of `tokens`; -inf where there are no more.
    log_sum_exp: of all logits.
    top: the probability of the likeliest token.
    margin: by how much it exceeds that of the next.
    entropy: of the law, in nats.
  """

  tokens: Int[Array, "B K"]
  logits: Float[Array, "B K"]
  log_sum_exp: Float[Array, "B"]
  top: Float[Array, "B"]
  margin: Float[Array, "B"]
  entropy: Float[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
  """What is known of each of P parts of a vocabulary.

  Attributes:
    best: the largest logit.
    next: the second largest; `best` again if two tokens have it.
    total: sum of exp(logit - best).
    moment: sum of exp(logit - best) * (logit - best).
    scores: of the K best candidates, in any order; -inf where there are fewer.
    logits: of the candidates.
    columns: of the candidates, as rows of the unembedding.
  """

  best: Float[Array, "P B"]
  next: Float[Array, "P B"]
  total: Float[Array, "P B"]
  moment: Float[Array, "P B"]
  scores: Float[Array, "P B K"]
  logits: Float[Array, "P B K"]
  columns: Int[Array, "P B K"]


def join(parts: Parts, tokens: Int[Array, "V"] | None) -> Forecast:
  """One law of its parts.

  Args:
    tokens: the ids of columns; None where they are the same.
  """
  best = jnp.max(parts.best, axis=0)                             # [B]
  # Where nothing is allowed, or not in a part, there is -inf to stay clear of.
  far = jnp.where(parts.best > -jnp.inf, parts.best - best[None], 0.0)
  share = jnp.where(parts.best > -jnp.inf, jnp.exp(far), 0.0)
  total = jnp.sum(parts.total * share, axis=0)
  moment = jnp.sum((parts.moment + parts.total * far) * share, axis=0)
  next_ = jnp.sort(jnp.concatenate([parts.best, parts.next]), axis=0)[-2]
  some = total > 0
  safe = jnp.where(some, total, 1.0)
  top = jnp.where(some, 1 / safe, 0.0)
  margin = jnp.where(some, (1 - jnp.exp(next_ - best)) / safe, 0.0)
  count = parts.scores.shape[-1]
  scores, logits, columns = (
      jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)              # [B PK]
      for x in (parts.scores, parts.logits, parts.columns))
  scores, columns, logits = (x[:, :count] for x in lax.sort(
      (-scores, columns, logits), num_keys=2))
  there = scores < jnp.inf
  return Forecast(
      tokens=jnp.where(there, name(columns, tokens), -1),
      logits=jnp.where(there, logits, -jnp.inf),
      log_sum_exp=jnp.where(some, best + jnp.log(safe), -jnp.inf),
      top=top, margin=margin,
      entropy=jnp.where(some, jnp.log(safe) - moment / safe, 0.0))


def name(columns: Int[Array, "*shape"], tokens: Int[Array, "V"] | None
         ) -> Int[Array, "*shape"]:
  """The ids of columns."""
  if tokens is None:
    return columns.astype(jnp.int32)
  return tokens.at[columns].get(mode="clip").astype(jnp.int32)
