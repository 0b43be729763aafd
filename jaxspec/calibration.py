# SPDX-License-Identifier: Apache-2.0
"""From which confidence on may a head's tokens be shown before they are
settled, so that no more than a given share of them is taken back?

Learn-then-Test (arXiv:2110.01052, and CALM, arXiv:2207.07061): thresholds are
tested one after another, each lower than the one before, until one fails; the
last that passed is taken. Of the held-out texts a quarter says where to begin,
which may be anywhere as long as the texts by which thresholds are tested have
no part in it; for the measure `learned` it is a half, which also fits it.

What is guaranteed: with probability `confidence` over the texts it was found
on, at most `risk` of what is shown of texts like these is taken back. "Like
these" is the whole of it: prompts of another kind, sampled answers, or another
model have no guarantee. It is given twice, each time by itself:

* For first tokens of answers. There is one a text, texts are independent, and
  the test is the exact one of binomial counts.
* For later tokens. Those of one text are not independent, so a text counts as
  one sample, which is the share of its shown tokens that is taken back, and
  the mean over texts is tested, by betting (arXiv:2010.09686, section 4).
  Tokens are drafted in chains, and one that is taken back takes with it what
  was shown behind it. How sure a head would have been there is not known, for
  the text goes on differently; so all of it is counted as shown and taken back.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from scipy import special

from jaxspec import loop
from jaxspec.confidence import COEFFICIENTS, MEASURES, chance, features, signs
from jaxspec.corpus import Text
from jaxspec.heads import NEVER, Calibration, ExitHead
from jaxspec.heads.base import dtype_of
from jaxspec.models.transformer import Transformer

# Descending: the strictest comes first.
THRESHOLDS = (0.999, 0.995, *(n / 100 for n in range(99, -1, -1)))
_PART = 64                 # positions whose logits are there at once


@dataclasses.dataclass(frozen=True)
class Seen:
  """What a head said of one answer, place by place.

  Attributes:
    signs: what its confidence is made of, see `jaxspec.confidence`.
    right: whether the model says so too, greedily.
  """

  signs: Float[np.ndarray, "T 3"]
  right: Bool[np.ndarray, "T"]

  def confidence(self, measure: str, coefficients: Sequence[float] | None
                 ) -> Float[np.ndarray, "T"]:
    if measure != "learned":
      return self.signs[:, MEASURES.index(measure)]
    return chance(self.signs, np.arange(len(self.right)), coefficients)


@dataclasses.dataclass(frozen=True)
class Row:
  """What becomes of one threshold, on the texts that it was tested by.

  Attributes:
    shown: the share of tokens that are shown early.
    texts: of how many texts something is.
    retracted: the share of it that is taken back, as the mean of these texts.
    low, high: where that share lies, with 95 % confidence (Clopper-Pearson;
      where texts are samples, of as many coins as would spread as they do).
    p: how likely the data is if the risk is higher than it may be.
  """

  threshold: float
  shown: float
  texts: int
  retracted: float
  low: float
  high: float
  p: float


@dataclasses.dataclass(frozen=True)
class Found:
  """A calibration and what it rests on.

  Attributes:
    first: of first tokens.
    later: of later tokens, in chains.
    alone: of later tokens, each behind text that stands; tested for nothing.
    texts: that thresholds were tested by.
  """

  calibration: Calibration
  first: list[Row]
  later: list[Row]
  alone: list[Row]
  texts: int


# What a head says.


def see(model: Transformer, head: ExitHead, texts: Sequence[Text],
        on_text: Callable[[int, int], None] | None = None) -> list[Seen]:
  """What a head says of answers, and whether it is right.

  Args:
    texts: each a prompt and an answer, neither of them empty.
  """
  found = []
  for number, text in enumerate(texts, 1):
    width = count = _PART
    while width < len(text.tokens):
      width *= 2
    said = len(text.tokens) - text.prompt_length
    while count < said:
      count *= 2
    tokens = np.zeros((1, width), np.int32)
    tokens[0, :len(text.tokens)] = text.tokens
    # The token at place n is foretold behind the one before it.
    seen, right = jax.device_get(_see(
        model, head, tokens, np.array([len(text.tokens)], np.int32),
        np.int32(text.prompt_length - 1), count=count))
    found.append(Seen(seen[:said].astype(np.float64), right[:said]))
    if on_text:
      on_text(number, len(texts))
  return found


@functools.partial(jax.jit, static_argnames="count")
def _see(model: Transformer, head: ExitHead, tokens: Int[Array, "1 T"],
         length: Int[Array, "1"], start: Int[Array, ""], *, count: int
         ) -> tuple[Float[Array, "A 3"], Bool[Array, "A"]]:
  """Behind `count` tokens from `start` on; none beyond the end is read."""
  prefix = loop.prefill(
      model, (head.layer, model.depth), tokens, length,
      chunk=tokens.shape[1], dtype=jnp.dtype(dtype_of(model)))
  below, top = prefix.features
  at = jnp.minimum(start + jnp.arange(count), tokens.shape[1] - 1)

  def judge(both):
    low, high = both
    logits = head(model, low)
    said = jnp.argmax(logits, axis=-1)
    if head.tokens is not None:
      said = head.tokens[...][said]
    return signs(logits), said == jnp.argmax(model.unembed(high), axis=-1)

  def parts(x):
    return x[0, at].reshape(-1, 1, _PART, x.shape[-1])
  found, right = lax.map(judge, (parts(head.attended(below)), parts(top)))
  return found.reshape(-1, 3), right.reshape(-1)


# Which thresholds hold.


@dataclasses.dataclass(frozen=True)
class _Shown:
  """Of one text: what is shown from which confidence on, and what of it is
  taken back."""

  confidence: Float[np.ndarray, "n"]
  stands: Float[np.ndarray, "n"]
  falls: Float[np.ndarray, "n"]
  places: int


def calibrate(seen: Sequence[Seen], *, measure: str = "top",
              risk: float = 0.1, confidence: float = 0.95, length: int = 4,
              seed: int = 0) -> Found:
  """Finds the lowest thresholds that hold; `NEVER` where none does.

  Args:
    seen: held-out answers, in any order.
    length: drafts of a chain.
    seed: by which texts are parted, and betted on in turn.
  """
  order = np.random.default_rng(seed).permutation(len(seen))
  part = len(seen) // (2 if measure == "learned" else 4)
  guide, test = ([seen[i] for i in some]
                 for some in (order[:part], order[part:]))
  coefficients = None
  if measure == "learned":
    coefficients = fit(guide)

  known = [[(text.confidence(measure, coefficients), text.right)
            for text in some] for some in (guide, test)]

  def find(view: Callable[..., _Shown], p_value: Callable[..., Any]
           ) -> tuple[float, list[Row]]:
    guided, tested = ([view(*text) for text in some] for some in known)
    begin = int(np.argmin(p_value(_rates(guided), risk)))
    rates = _rates(tested)
    rows = _rows(tested, rates, p_value(rates, risk))
    chosen = NEVER
    for row in rows[begin:]:
      if row.p > 1 - confidence:
        break
      chosen = row.threshold
    return chosen, rows

  first, first_rows = find(_opening, binomial_p)
  later, later_rows = find(functools.partial(_chains, length=length),
                           betting_p)
  _, alone = find(_alone, betting_p)
  return Found(
      Calibration(measure, first, later, risk, confidence, coefficients),
      first_rows, later_rows, alone, len(test))


def _opening(sure, right) -> _Shown:
  """The first token."""
  return _Shown(sure[:1], right[:1] * 1.0, 1.0 - right[:1], 1)


def _alone(sure, right) -> _Shown:
  """Every later token behind text that stands."""
  return _Shown(sure[1:], right[1:] * 1.0, 1.0 - right[1:], len(right) - 1)


def _chains(sure, right, length: int) -> _Shown:
  """Later tokens as passes draft them, `length` at a time.

  A draft is shown if all before it in its pass are; so what counts is the
  least confidence up to it. A pass goes on behind the first that is wrong.
  """
  values, stands, falls = [], [], []
  at = 1
  while at < len(right):
    least = np.inf
    for nth in range(length):
      if at == len(right):
        break
      least = min(least, sure[at])
      values.append(least)
      stands.append(float(right[at]))
      # With it falls whatever would have been shown behind it.
      falls.append(0.0 if right[at] else float(length - nth))
      at += 1
      if not right[at - 1]:
        break
    else:
      at += 1                       # the model's own token, behind all drafts
  return _Shown(np.array(values), np.array(stands), np.array(falls),
                len(right) - 1)


def _total(texts: Sequence[_Shown], values: Sequence[Any]
           ) -> Float[np.ndarray, "texts G"]:
  """Of each text the sum of the values that are shown from each threshold on.

  Args:
    values: of each text, one for each confidence.
  """
  sure = np.concatenate([text.confidence for text in texts])
  whose = np.repeat(np.arange(len(texts)), [len(v) for v in values])
  grid = len(THRESHOLDS)
  since = np.searchsorted(-np.array(THRESHOLDS), -np.maximum(sure, 0.0))
  found = np.bincount(whose * grid + since, np.concatenate(values),
                      minlength=len(texts) * grid)
  # Of no values at all these are integers.
  return np.cumsum(found.reshape(len(texts), grid) * 1.0, axis=1)


def _rates(texts: Sequence[_Shown]) -> Float[np.ndarray, "texts G"]:
  """The share of what is shown that is taken back, for each threshold; NaN
  for texts of which nothing is shown."""
  falls = _total(texts, [text.falls for text in texts])
  shown = falls + _total(texts, [text.stands for text in texts])
  return np.where(shown > 0, falls / np.maximum(shown, 1), np.nan)


def _rows(texts: Sequence[_Shown], rates: Float[np.ndarray, "texts G"],
          p: Float[np.ndarray, "G"]) -> list[Row]:
  places = max(sum(text.places for text in texts), 1)
  counts = np.sum(_total(texts, [np.ones(len(text.falls)) for text in texts]),
                  axis=0)
  rows = []
  for at, threshold in enumerate(THRESHOLDS):
    some = rates[:, at][~np.isnan(rates[:, at])]
    low, high = interval(some)
    rows.append(Row(
        threshold, float(counts[at]) / places, len(some),
        float(np.mean(some)) if len(some) else 0.0, low, high, float(p[at])))
  return rows


def fit(seen: Sequence[Seen]) -> tuple[float, ...]:
  """Coefficients of the measure `learned`, by Newton's method."""
  x = np.concatenate([np.stack(features(text.signs, np.arange(
      len(text.right))), axis=-1) for text in seen])
  y = np.concatenate([text.right for text in seen])
  weights = np.zeros(COEFFICIENTS)
  keep = 1e-2 * np.eye(COEFFICIENTS)       # where all is right or wrong
  for _ in range(50):
    p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
    slope = x.T @ (p - y) + keep @ weights
    change = np.linalg.solve((x.T * (p * (1 - p))) @ x + keep, slope)
    # Far from the end a step may be too long.
    weights = weights - change * min(1.0, 5.0 / max(np.abs(change).max(), 1e-9))
    if np.abs(change).max() < 1e-9:
      break
  return tuple(float(w) for w in weights)


# Statistics.


def binomial_p(rates: Float[np.ndarray, "n G"], risk: float
               ) -> Float[np.ndarray, "G"]:
  """How likely so few ones are, of samples that are 0 or 1, if more than
  `risk` of all are 1; NaN is no sample."""
  ones, counts = np.nansum(rates, axis=0), np.sum(~np.isnan(rates), axis=0)
  return special.bdtr(ones, counts, risk)


def betting_p(rates: Float[np.ndarray, "n G"], risk: float
              ) -> Float[np.ndarray, "G"]:
  """The same of samples in [0, 1] and their mean.

  A gambler who bets on less than `risk` in every sample, having seen those
  before it, gets so rich with no more than this probability if that is wrong
  (arXiv:2010.09686; Ville's inequality).
  """
  wealth = np.zeros(rates.shape[1])        # its logarithm
  best, count = wealth, np.ones_like(wealth)
  # What is guessed at first.
  mean, spread = np.full_like(wealth, risk / 2), np.full_like(wealth, risk / 4)
  for sample in rates:
    here = ~np.isnan(sample)
    rate = np.where(here, sample, 0.0)
    # No stake that a sample of 1 would ruin.
    edge = np.maximum(risk - mean, 0.0)
    stake = np.minimum(edge / (spread + edge**2 + 1e-12), 0.9 / (1 - risk))
    wealth = wealth + np.where(here, np.log1p(stake * (risk - rate)), 0.0)
    best = np.maximum(best, wealth)
    count = count + here
    mean = mean + np.where(here, (rate - mean) / count, 0.0)
    spread = spread + np.where(here, ((rate - mean)**2 - spread) / count, 0.0)
  return np.exp(-best)


def interval(rates: Float[np.ndarray, "n"], level: float = 0.95
             ) -> tuple[float, float]:
  """Where the mean of samples in [0, 1] lies (Clopper-Pearson).

  Of samples between, as if so many were 0 or 1 that their mean would vary as
  much (Korn and Graubard, 1998); of none it is all of [0, 1].
  """
  count = float(len(rates))
  if not count:
    return 0.0, 1.0
  mean = float(np.mean(rates))
  if count > 1 and 0 < mean < 1:
    varies = float(np.var(rates, ddof=1)) / count
    if not np.all((rates == 0) | (rates == 1)):
      # (Where all are alike there is no end to it.)
      count = mean * (1 - mean) / max(varies, mean * (1 - mean) / count / 100)
  hits, tail = mean * count, (1 - level) / 2
  low = special.betaincinv(hits, count - hits + 1, tail) if hits else 0.0
  high = (special.betaincinv(hits + 1, count - hits, 1 - tail)
          if hits < count else 1.0)
  return float(low), float(high)


def as_dict(found: Found) -> dict[str, Any]:
  """What JSON can hold."""
  return dataclasses.asdict(found)


__all__ = ["THRESHOLDS", "Found", "Row", "Seen", "as_dict", "betting_p",
           "binomial_p", "calibrate", "fit", "interval", "see"]
