# SPDX-License-Identifier: Apache-2.0
"""What the compiler and runtime of TPUs has to be told.

libtpu reads its flags when it is loaded, which is when jax first asks for a
TPU or for a topology of TPUs; they are set before that or not at all.
"""

import os

# On tpu7x XLA wants two-byte weights in tiles of 16 x 128. What a program is
# given lies in tiles of 8 x 128, whatever layout is asked for, so that each
# call would begin with laying weights out anew: a fifth of the weights of
# Llama-3-8B, in memory and in time. Without a second kind of tile they are
# read as they lie.
FLAGS = {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"}
_VARIABLE = "LIBTPU_INIT_ARGS"


def set_flags() -> None:
  """Adds to LIBTPU_INIT_ARGS what it does not say already."""
  told = os.environ.get(_VARIABLE, "")
  missing = [f"--{name}={value}" for name, value in FLAGS.items()
             if name not in told]
  if missing:
    os.environ[_VARIABLE] = " ".join([told, *missing]).strip()


__all__ = ["FLAGS", "set_flags"]
