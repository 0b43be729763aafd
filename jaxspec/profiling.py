# SPDX-License-Identifier: Apache-2.0
"""XProf traces, step marks and a count of compiles.

A trace holds the host's marks and the device's operations. The five stages of
a step are `jax.named_scope`s, so XProf's tables group device time under
`propose`, `score`, `verify`, `commit` and `observe`.
"""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Iterator

import jax

from jaxspec.errors import InputError

# The stages of a step, see `jaxspec.stages`.
SCOPES = ("propose", "score", "verify", "commit", "observe")
_COMPILED = "/jax/core/compile/backend_compile_duration"
_FROM_CACHE = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass
class Compiles:
  """Programs made while counting.

  Attributes:
    count: programs built, those read from the persistent cache included: both
      stall the loop, so "none after warm-up" must see both.
    from_cache: how many of them the persistent cache already held.
    seconds: the time they took.
  """

  count: int = 0
  from_cache: int = 0
  seconds: float = 0.0


@contextlib.contextmanager
def trace(directory: str | os.PathLike[str] | None) -> Iterator[None]:
  """Writes an XProf trace of the body; with no directory, just runs it."""
  if not directory:
    yield
    return
  directory = os.path.expanduser(os.fspath(directory))
  try:
    os.makedirs(directory, exist_ok=True)
  except OSError as e:
    raise InputError(
      f"cannot write a trace to {directory}: {e.strerror}; name a folder that "
      "can be written to"
    ) from e
  with jax.profiler.trace(directory):
    yield


def step(name: str, number: int) -> jax.profiler.StepTraceAnnotation:
  """Marks one step in a trace, for XProf's step view; a context manager."""
  return jax.profiler.StepTraceAnnotation(name, step_num=number)


@contextlib.contextmanager
def count_compiles() -> Iterator[Compiles]:
  """Counts what XLA compiles in the body; readable while it runs, too.

  Compiles of all threads count. Counters may nest.
  """
  _listen()
  counter = Compiles()
  with _lock:
    _counters.append(counter)
  try:
    yield counter
  finally:
    with _lock:
      # By identity: nested counters may hold equal counts.
      _counters[:] = [other for other in _counters if other is not counter]


# One pair of listeners for the life of the process: taking a listener away
# again is not possible in every jax version we run on.
_counters: list[Compiles] = []
_lock = threading.Lock()


@functools.cache
def _listen() -> None:
  jax.monitoring.register_event_duration_secs_listener(_on_duration)
  jax.monitoring.register_event_listener(_on_event)


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
  if event == _COMPILED:
    with _lock:
      for counter in _counters:
        counter.count += 1
        counter.seconds += duration_secs


def _on_event(event: str, **_: str | int) -> None:
  if event == _FROM_CACHE:
    with _lock:
      for counter in _counters:
        counter.from_cache += 1
