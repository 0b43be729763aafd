# SPDX-License-Identifier: Apache-2.0
"""How should a CPU multiply tokens with their experts? Three answers, timed.

  python -m experiments.expert_products

- `blocks`: a few tokens of one expert at a time (what `jaxspec.models.moe`
  does on a CPU).
- `ragged`: `lax.ragged_dot_general`, as XLA computes it.
- `dense`: every token with every expert.
"""

import functools
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import lax

from experiments import machine
from jaxspec.models import moe
from jaxspec.models.layers import linear

_OUTPUT = flags.DEFINE_string(
    "output", "experiments/results/expert_products.json",
    "where the result goes")
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed runs of each answer")

WIDTH, MLP = 512, 256
EXPERTS = ((8, 2), (128, 8))          # experts, and how many a token takes
TOKENS = (1, 8, 64)


def _dense(tokens, sizes, gate_up, down, *, activation):
  """Every run of tokens with every expert, the right ones kept."""
  hidden = jnp.moveaxis(linear(tokens, gate_up), 1, 0)          # [E A 2 F]
  hidden = moe._gate(hidden, activation).astype(tokens.dtype)
  every = jnp.einsum("eaf,edf->ead", hidden, down,
                     preferred_element_type=jnp.float32)
  owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(tokens)),
                           side="right")
  owner = jnp.minimum(owner, len(sizes) - 1)
  return every[owner, jnp.arange(len(tokens))]


def _ragged(tokens, sizes, gate_up, down, *, activation):
  """Each run of tokens with its expert, in one operation."""
  groups, _, width, _ = gate_up.shape
  dims = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
  precision = lax.Precision.HIGHEST if tokens.dtype == jnp.float32 else None

  def dot(x, weight):
    return lax.ragged_dot_general(x, weight, sizes, dims, precision=precision,
                                  preferred_element_type=jnp.float32)

  hidden = dot(tokens, gate_up.reshape(groups, 2 * width, -1))
  hidden = moe._gate(hidden.reshape(-1, 2, width), activation)
  return dot(hidden.astype(tokens.dtype), down)


ANSWERS = {"blocks": moe._by_block, "ragged": _ragged,
           "dense": _dense}


def measure(experts: int, per_token: int, tokens: int, dtype) -> dict:
  """Milliseconds of each answer, in turns, and how far they are apart."""
  keys = jax.random.split(jax.random.key(0), 4)

  def normal(key, *shape):
    return (jax.random.normal(key, shape) / shape[-1] ** 0.5).astype(dtype)

  count = tokens * per_token
  args = (normal(keys[0], count, WIDTH) * WIDTH ** 0.5,
          jnp.bincount(jax.random.randint(keys[1], (count,), 0, experts),
                       length=experts).astype(jnp.int32),
          normal(keys[2], experts, 2, MLP, WIDTH),
          normal(keys[3], experts, WIDTH, MLP))
  run = {name: jax.jit(functools.partial(answer, activation="silu"))
         for name, answer in ANSWERS.items()}
  found = {name: jax.block_until_ready(f(*args)) for name, f in run.items()}
  times: dict[str, list[float]] = {name: [] for name in run}
  for _ in range(_REPEATS.value):
    for name, f in run.items():
      start = time.perf_counter()
      jax.block_until_ready(f(*args))
      times[name].append(1e3 * (time.perf_counter() - start))
  return {
      "experts": experts, "per_token": per_token, "tokens": tokens,
      "dtype": jnp.dtype(dtype).name, "milliseconds": times,
      "median_milliseconds": {name: statistics.median(some)
                              for name, some in times.items()},
      "largest_difference": max(
          float(jnp.max(jnp.abs(y - found["dense"]))) for y in found.values())}


def main(argv: Sequence[str]) -> None:
  """Measures and reports."""
  del argv
  runs = []
  for dtype in (jnp.float32, jnp.bfloat16):
    for experts, per_token in EXPERTS:
      for tokens in TOKENS:
        run = measure(experts, per_token, tokens, dtype)
        runs.append(run)
        print(f"{run['dtype']:8} {experts:4} experts, {per_token} a token, "
              f"{tokens:3} tokens: " + ", ".join(
                  f"{name} {ms:.2f} ms"
                  for name, ms in run["median_milliseconds"].items()))
  machine.write(_OUTPUT.value, runs, width=WIDTH, mlp=MLP)


if __name__ == "__main__":
  app.run(main)
