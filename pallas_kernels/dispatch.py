# SPDX-License-Identifier: Apache-2.0
"""`implementation=`: resolve, fall back, explain. The one copy of that loop.

An op is a dictionary from implementation names to functions of one signature.
`None` tries those for the target, and always works, because "xla" comes last
and takes everything; a name works or explains itself; a sequence falls through
from one to the next. Where nobody said what for, "xla" is all that is tried.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels.target import Implementation, Target, aim

# Those that are kernels for one platform, and are told the target.
KERNELS = ("tpu", "gpu")


def dispatch(op: str, implementations: Mapping[str, Callable[..., Any]],
             implementation: Implementation, *args, **kwargs) -> Any:
  """Calls the first of the wanted implementations that takes the arguments.

  Kernels are called with `target=` besides.

  Raises:
    ValueError: the name is none of the op's implementations.
    NotImplementedError: none of those asked for takes these arguments; the
      reason each one gave is in the message.
  """
  target = aim.value
  if implementation is None and target is not None:
    implementation = target.implementation
  if implementation is None:
    platform = "" if target is None else target.platform
    wanted = [name for name in implementations
              if name not in KERNELS or name == platform]
  elif isinstance(implementation, str):
    wanted = [implementation]
  else:
    wanted = list(implementation)
  reasons = []
  for name in wanted:
    if name not in implementations:
      raise ValueError(f"{op} has no implementation {name!r}; "
                       f"it has {', '.join(implementations)}")
    told = {}
    if name in KERNELS:
      told["target"] = (target if target is not None
                        and target.platform == name else Target(name))
    try:
      return implementations[name](*args, **kwargs, **told)
    except NotImplementedError as reason:
      reasons.append(f"{name}: {reason}")
  raise NotImplementedError(f"{op}: " + "; ".join(reasons))
