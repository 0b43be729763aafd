# SPDX-License-Identifier: Apache-2.0
"""What stands between the two halves of an MLP."""

import math

import jax
from jax import lax

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

# Mosaic has erf and no erfc. Where x is far below zero the two forms differ,
# by less than 1e-6 all told.
IN_KERNELS = ACTIVATIONS | {
    "gelu": lambda x: 0.5 * x * (1 + lax.erf(x / math.sqrt(2))),
}
