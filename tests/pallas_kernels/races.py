# SPDX-License-Identifier: Apache-2.0
"""Whether an interpreter saw a race.

Since jax 0.12 it raises. Before, it only says so, and what it says is kept in a
module that is not public: where that cannot be found the test fails, for it
would hold nothing.
"""

import jax


def none_seen(platform: str) -> None:
  """Fails if there was a race in the last kernel that was interpreted."""
  if jax.__version_info__ >= (0, 12):
    return
  if platform == "gpu":
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    races = interpret_pallas_call.get_races()
  else:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    races = interpret_pallas_call.races
  assert not races.races_found
