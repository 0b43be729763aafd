# SPDX-License-Identifier: Apache-2.0
"""Whole texts through a transformer, as training needs it: without a cache."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspec.caches import Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.models.transformer import Transformer


def read(model: Transformer, tokens: Int[Array, "B T"],
         taps: Sequence[int] = (), *,
         runs: Bool[Array, "L B"] | None = None, learns: bool = False
         ) -> dict[int, Float[Array, "B T D"]]:
  """The residual stream below some layers, and on top of all.

  Args:
    taps: how many layers lie below each stream that is asked for.
    runs: which layers each text goes through; it passes by the others
      unchanged. None for all.
    learns: whether there will be a gradient. Then products with weights are
      kept for it, and what is between them is computed again.
  """
  rows, count = tokens.shape
  at = Place.of(jnp.broadcast_to(jnp.arange(count)[None], (rows, count)),
                jnp.tril(jnp.ones((count, count), bool)))
  return climb(model, model.embed(tokens), at, taps, runs=runs, learns=learns)


def climb(model: Transformer, x: Float[Array, "B T D"], at: Place,
          taps: Sequence[int] = (), *, runs: Bool[Array, "L B"] | None = None,
          learns: bool = False) -> dict[int, Float[Array, "B T D"]]:
  """As `read`, from the stream below the first layer, for any mask."""
  rows, count, _ = x.shape
  cache = model.init_cache(ContiguousCache, rows, 0,
                           model.embedding[...].dtype)

  def through(x, layers):
    return model.extend(x, cache, model.init_fresh(cache, count), at,
                        layers=layers)[0]

  # A stream at a time where layers are told apart, else as far as it goes.
  cuts = sorted({*taps, model.depth})
  if learns or runs is not None:
    ends = range(1, model.depth + 1)
  else:
    ends = [cut for cut in cuts if cut]
  below = 0
  seen = {0: x} if 0 in cuts else {}
  for end in ends:
    def step(x, layers=range(below, end)):
      return through(x, layers)

    if learns:
      step = jax.checkpoint(
          step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    y = step(x)
    x = y if runs is None else jnp.where(runs[below][:, None, None], y, x)
    if end in cuts:
      seen[end] = x
    below = end
  return seen
