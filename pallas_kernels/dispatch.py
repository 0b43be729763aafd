# SPDX-License-Identifier: Apache-2.0
"""`implementation=`: resolve, fall back, explain. The one copy of that loop.

An op is a dictionary from implementation names to functions of one signature.
`None` tries every one in order of preference and always works, because "xla"
comes last and takes everything; a name works or explains itself; a sequence
falls through from one to the next.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Implementation = str | Sequence[str] | None


def dispatch(op: str, implementations: Mapping[str, Callable[..., Any]],
             implementation: Implementation, *args, **kwargs) -> Any:
  """Calls the first of the wanted implementations that takes the arguments.

  Raises:
    ValueError: the name is none of the op's implementations.
    NotImplementedError: none of those asked for takes these arguments; the
      reason each one gave is in the message.
  """
  if implementation is None:
    wanted = list(implementations)
  elif isinstance(implementation, str):
    wanted = [implementation]
  else:
    wanted = list(implementation)
  reasons = []
  for name in wanted:
    if name not in implementations:
      raise ValueError(f"{op} has no implementation {name!r}; "
                       f"it has {', '.join(implementations)}")
    try:
      return implementations[name](*args, **kwargs)
    except NotImplementedError as reason:
      reasons.append(f"{name}: {reason}")
  raise NotImplementedError(f"{op}: " + "; ".join(reasons))
