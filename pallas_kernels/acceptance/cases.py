# SPDX-License-Identifier: Apache-2.0
"""Shapes at which `accept_nodes` is compiled, counted and timed."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.acceptance import tpu
from pallas_kernels.acceptance.op import accept_nodes
from pallas_kernels.case import Case
from pallas_kernels.target import Target

# rows, nodes, vocabulary, whether drafts have laws
_SHAPES = {
    "smollm2-135m, 8 nodes": (1, 8, 49152, False),
    "smollm2-135m, 5 nodes of 8 rows": (8, 5, 49152, False),
    "llama3-8b, 1 node": (1, 1, 128256, False),
    "llama3-8b, 8 nodes of 8 rows": (8, 8, 128256, False),
    "llama3-8b, 8 nodes, ratio test": (1, 8, 128256, True),
    "llama3-70b of 8, 8 nodes of 8 rows": (8, 8, 16032, False),
}


def cases() -> Iterator[Case]:
  """Those of the models people run."""
  for name, shape in _SHAPES.items():
    yield _case(name, *shape)


def _case(name, rows, nodes, vocab, judged):
  count = rows * nodes

  def call(logits, temperature, noise, first, draft, drafted,
           implementation=None):
    return accept_nodes(logits, temperature=temperature, noise=noise,
                        first=first, draft=draft, drafted=drafted,
                        implementation=implementation)

  def shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)

  arguments = (
      shape(jnp.float32, rows, nodes, vocab), shape(jnp.float32, rows),
      shape(jnp.uint32, rows, nodes, 2),
      None if judged else shape(jnp.int32),
      shape(jnp.float32, rows, nodes, vocab) if judged else None,
      shape(jnp.int32, rows, nodes) if judged else None)

  def sample(seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((2, rows, nodes, vocab), np.float32) * 3
    temperature = np.where(np.arange(rows) % 2, 0, 0.8).astype(np.float32)
    noise = rng.integers(0, 2**32, (rows, nodes, 2), np.uint32)
    drafted = rng.integers(0, vocab, (rows, nodes)).astype(np.int32)
    return (jnp.asarray(logits[0]), jnp.asarray(temperature),
            jnp.asarray(noise), None if judged else jnp.int32(0),
            jax.nn.softmax(jnp.asarray(logits[1])) if judged else None,
            jnp.asarray(drafted) if judged else None)

  draft = 4 if judged else 0
  results = 24 if judged else 16
  return Case(
      op="accept_nodes", name=name, call=call, arguments=arguments,
      least_bytes=count * (vocab * (4 + draft) + 8 + results) + 4 * rows,
      # Threefry-2x32: 20 rounds of five operations, and the keys between.
      operations=count * vocab * 130,
      moved_bytes=tpu.moved_bytes(count, vocab, 4, draft,
                                  target=Target("tpu")),
      sample=sample)
