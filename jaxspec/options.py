# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, checked once, and as the arrays a row carries."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Request
from jaxspec.errors import InputError
from jaxspec.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Options:
  """How one request is decoded.

  Attributes:
    max_new_tokens: most tokens the answer may have.
    temperature: 0 takes the likeliest token.
    top_k: sample from the k likeliest tokens; 0 for all.
    top_p: sample from the likeliest tokens of this total probability.
    min_p: rule out tokens below this share of the likeliest one's probability.
    repetition_penalty: divides (if positive, else multiplies) the logits of
      tokens in the prompt or the answer (arXiv:1909.05858).
    presence_penalty: subtracted from the logits of tokens in the answer.
    frequency_penalty: subtracted once for each time they occur there.
    logit_bias: added to the logits of these token ids.
    seed: of the request's noise. Same seed, same tokens.
    stop: strings that end the answer and are left out of it.
    stop_token_ids: tokens that end the answer beside the model's own.
    ignore_eos: whether the model's own end tokens are ordinary tokens.
    logprobs: whether to return each token's log-probability under the model.
    task: your word for what is asked; statistics are told apart by it.

  Raises:
    InputError: a value out of range.
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  seed: int = 0
  stop: tuple[str, ...] = ()
  stop_token_ids: tuple[int, ...] = ()
  ignore_eos: bool = False
  logprobs: bool = False
  task: str = ""

  def __post_init__(self):
    _whole("max_new_tokens", self.max_new_tokens, 1, 2**30)
    _whole("top_k", self.top_k, 0, 2**30)
    _whole("seed", self.seed, 0, 2**32 - 1)
    _real("temperature", self.temperature, 0, 100)
    _real("top_p", self.top_p, 0, 1, above=True)
    _real("min_p", self.min_p, 0, 1)
    _real("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
    _real("presence_penalty", self.presence_penalty, -100, 100)
    _real("frequency_penalty", self.frequency_penalty, -100, 100)
    if not isinstance(self.logit_bias, Mapping):
      raise InputError("logit_bias must map token ids to numbers, "
                       f"got {self.logit_bias!r}")
    for bias in self.logit_bias.values():
      _real("logit_bias", bias, -1e9, 1e9)
    if not isinstance(self.stop, list | tuple) or not all(
        isinstance(s, str) and s for s in self.stop):
      raise InputError("stop must be a sequence of non-empty strings, "
                       f"got {self.stop!r}")
    if not isinstance(self.stop_token_ids, list | tuple):
      raise InputError("stop_token_ids must be a sequence of token ids, "
                       f"got {self.stop_token_ids!r}")


def as_request(options: Sequence[Options], lengths: Sequence[int],
               eos_ids: Sequence[int], *, vocab: int, stops: int,
               biases: int) -> Request:
  """The rows' requests as arrays.

  Args:
    lengths: tokens in each prompt.
    eos_ids: the model's own end tokens.
    stops: room for end tokens, per row.
    biases: room for logit biases, per row.

  Raises:
    InputError: more end tokens or biases than there is room for, or a token
      id that the model does not have.
  """
  def pad(ids: Sequence, room: int, name: str, fill) -> list:
    if len(ids) > room:
      raise InputError(f"{name} has {len(ids)} entries, room for {room}; "
                       "pass fewer, or make the Generator with more room")
    return [*ids, *[fill] * (room - len(ids))]

  def token_ids(name, ids):
    for i in ids:
      _whole(f"{name} token id", i, 0, vocab - 1)
    return ids

  ends = [
      dict.fromkeys((*(() if o.ignore_eos else eos_ids),
                     *token_ids("stop_token_ids", o.stop_token_ids)))
      for o in options]

  def column(name, dtype=np.float32):
    return jnp.array([getattr(o, name) for o in options], dtype)

  return Request(
      Sampling(
          key=jax.vmap(jax.random.key)(column("seed", np.uint32)),
          temperature=column("temperature"),
          top_k=column("top_k", np.int32),
          top_p=column("top_p"),
          min_p=column("min_p"),
          repetition=column("repetition_penalty"),
          presence=column("presence_penalty"),
          frequency=column("frequency_penalty"),
          bias_ids=jnp.array([
              pad(token_ids("logit_bias", list(o.logit_bias)), biases,
                  "logit_bias", -1) for o in options], np.int32),
          bias=jnp.array([
              pad(list(o.logit_bias.values()), biases, "logit_bias", 0.0)
              for o in options], np.float32)),
      limit=jnp.array([n + o.max_new_tokens for n, o in zip(lengths, options)],
                     jnp.int32),
      stops=jnp.array([pad(list(e), stops, "stop_token_ids", -1)
                      for e in ends], np.int32),
      wants_logprobs=column("logprobs", bool))


def _whole(name: str, value: int, low: int, high: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    raise InputError(f"{name} must be a whole number, got {value!r}")
  if not low <= value <= high:
    raise InputError(f"{name} must be in [{low}, {high}], got {value}")


def _real(name: str, value: float, low: float, high: float,
          above: bool = False) -> None:
  number = (isinstance(value, int | float | np.integer | np.floating)
            and not isinstance(value, bool))
  if not number or not low <= value <= high or (above and value == low):
    bracket = "(" if above else "["
    raise InputError(
        f"{name} must be in {bracket}{low:g}, {high:g}], got {value!r}")
