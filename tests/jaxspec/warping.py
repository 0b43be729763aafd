# SPDX-License-Identifier: Apache-2.0
"""What sampling means, once more, in plain NumPy with sorts and loops.

Written from the definitions, not from `jaxspec.sampling`, in the order of
transformers: bias, penalties, temperature, top-k, top-p, min-p.
"""

from collections.abc import Sequence

import numpy as np

from jaxspec.options import Options


def warp(logits: np.ndarray, options: Options, prompt: Sequence[int],
         answer: Sequence[int]) -> np.ndarray:
  """The logits of one token behind `prompt` and `answer`, warped."""
  x = np.array(logits, np.float64)
  for token, bias in options.logit_bias.items():
    x[token] += bias
  for token in {*map(int, prompt), *map(int, answer)}:
    x[token] = (x[token] / options.repetition_penalty if x[token] > 0
                else x[token] * options.repetition_penalty)
  for token in map(int, answer):
    x[token] -= options.frequency_penalty
  for token in set(map(int, answer)):
    x[token] -= options.presence_penalty
  if options.temperature == 0:
    return x
  x = x / options.temperature
  if 0 < options.top_k < len(x):
    x[x < np.sort(x)[-options.top_k]] = -np.inf
  if options.top_p < 1:
    probs, mass, kept = softmax(x), 0.0, -np.inf
    for token in np.argsort(-x, kind="stable"):
      mass, kept = mass + probs[token], x[token]
      if mass >= options.top_p:
        break
    x[x < kept] = -np.inf             # what ties with the last one stays
  if options.min_p:
    probs = softmax(x)
    x[probs < options.min_p * probs.max()] = -np.inf
  return x


def probabilities(logits: np.ndarray, options: Options, prompt: Sequence[int],
                  answer: Sequence[int]) -> np.ndarray:
  """The law of the token behind `prompt` and `answer`."""
  return softmax(warp(logits, options, prompt, answer))


def softmax(x: np.ndarray) -> np.ndarray:
  weights = np.exp(x - x.max())
  return weights / weights.sum()
