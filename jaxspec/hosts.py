# SPDX-License-Identifier: Apache-2.0
"""Several processes, mostly on several hosts, that run one job together.

Each runs the same program on the same prompts, over one mesh of all their
devices, and XLA does the rest: rows are split along the axis `data`, weights
along `tensor`, whoever's the devices are. The programs of all processes must
follow each other in one order. So whatever decides what runs next has to be
the same everywhere. What comes from the devices is, once all of it was fetched
(`fetch`). What comes from files, clocks or a terminal is not: there the first
process looks, and the others are told (`agree`).

When one process is gone the others would wait for it for ever; a line between
them tells (`join`).
"""

import functools
import ipaddress
import itertools
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

# The store of keys and values is behind no public name.
from jax._src import distributed
from jax.sharding import NamedSharding, PartitionSpec

from jaxspec.errors import InputError

# The exit status of those that one of them left alone: try again later.
LOST = 75
# Seconds after which a machine that says nothing is taken for dead.
_SILENCE = 20
# Seconds in which all must have come.
_PATIENCE = 300
# Seconds in which the line tells why a collective failed, and for which who
# ends lives on, that others end for their own reason.
_GRACE = 3
_BYE = "bye"
_FOREVER = 7 * 24 * 3600 * 1000  # in milliseconds

_asked = itertools.count()
_watch: "_Watch | None" = None


def count() -> int:
  """How many processes there are, without a look at any device."""
  return distributed.global_state.num_processes or 1


def index() -> int:
  """Which of them this is."""
  return distributed.global_state.process_id or 0


def agree(value: Callable[[], Any]) -> Any:
  """What the first process says; the others do not even look.

  All processes call this in the same order.

  Args:
    value: gives what JSON can hold.
  """
  if count() == 1:
    return value()
  client: Any = distributed.global_state.client
  key = f"jaxspec/agreed/{next(_asked)}"
  if index() == 0:
    client.key_value_set(key, json.dumps(value()))
  return json.loads(client.blocking_key_value_get(key, _FOREVER))


def fetch(tree: Any) -> Any:
  """All of a tree as NumPy arrays, wherever its parts lie.

  All processes call this in the same order.
  """
  leaves, structure = jax.tree.flatten(tree)
  far = [at for at, x in enumerate(leaves) if isinstance(x, jax.Array)
         and not (x.is_fully_addressable or x.is_fully_replicated)]
  if far:
    mesh = leaves[far[0]].sharding.mesh
    for at, x in zip(far, _gathered(mesh)([leaves[at] for at in far])):
      leaves[at] = x
  return jax.device_get(structure.unflatten(leaves))


@functools.cache
def _gathered(mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
  return jax.jit(lambda xs: xs,
                 out_shardings=NamedSharding(mesh, PartitionSpec()))


def join(coordinator: str | None = None, processes: int | None = None,
         process: int | None = None) -> None:
  """Meets the other processes, before jax looks at any device.

  From here on this process ends, with status `LOST`, where another one does
  without having said goodbye; and what it prints to stdout is printed by the
  first process alone.

  Args:
    coordinator: HOST:PORT of the first process; None for what the cluster
      says, and so are the others.
    processes: how many there are.
    process: which this is.

  Raises:
    InputError: they did not meet.
  """
  global _watch
  # It would keep the process from ending when it is asked to.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=_PATIENCE,
        shutdown_timeout_seconds=60)
  except (ValueError, TypeError, RuntimeError) as e:
    what = str(e).partition("\n")[0]
    raise InputError(f"the processes of this job did not meet ({what}); start "
                     "as many as --processes says, all with the same "
                     "--coordinator, or none of these on a cluster that jax "
                     "knows") from e
  if count() > 1:
    _own_stdout()
    _watch = _Watch()


def together(main: Callable[[], int]) -> int:
  """Runs the part of a process in a job that was joined.

  Where it fails, the others are told and the process ends at once: jax would
  wait for them.

  Args:
    main: returns an exit status.
  """
  if _watch is None:
    return main()
  try:
    status = main()
  except BaseException:
    time.sleep(_GRACE)    # it may be that another one is gone
    traceback.print_exc()
    status = 1
  _watch.leave(status)
  if status:
    sys.stdout.flush()
    time.sleep(_GRACE)
    os._exit(status)
  return status


def _own_stdout() -> None:
  """Keeps stdout for results: libraries write there too, below Python."""
  sys.stdout.flush()
  mine = os.dup(1)
  os.dup2(2, 1)
  if index() == 0:
    sys.stdout = open(mine, "w", encoding=sys.stdout.encoding)
  else:
    os.close(mine)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")


class _Watch:
  """A line to the first process, by which all learn that one is gone.

  The kernel hangs up for a process that dies, and asks after a machine that
  says nothing, however busy the process is. One sentence is said on a line,
  when it ends: goodbye, or why the others must stop.
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._lines: list[socket.socket] = []
    self._left = False
    job: Any = distributed.global_state
    client = job.client
    host = job.coordinator_address.rpartition(":")[0].strip("[]")
    self._me = _name(index(), socket.gethostname(), os.getpid())
    key = "jaxspec/line"
    if index() == 0:
      server = _server(host)
      secret = secrets.token_hex(16)     # strangers can reach the port as well
      client.key_value_set(
          key, json.dumps([server.getsockname()[1], secret, self._me]))
      self._answer(server, secret)
    else:
      port, secret, name = json.loads(
          client.blocking_key_value_get(key, _PATIENCE * 1000))
      try:
        line = socket.create_connection((host, port), timeout=_PATIENCE)
        line.sendall(json.dumps([secret, self._me]).encode() + b"\n")
      except OSError as e:
        raise InputError(
            f"process {index()} cannot reach process 0 at {host}:{port} "
            f"({e.strerror or e}); let the processes of a job connect to each "
            "other on all ports") from e
      self._listen(line, name)

  def _answer(self, server: socket.socket, secret: str) -> None:
    """Takes the line of every other process."""
    server.settimeout(_PATIENCE)
    with server:
      while len(self._lines) < count() - 1:
        try:
          line, _ = server.accept()
          line.settimeout(_PATIENCE)
          said, name = json.loads(_sentence(line))
        except TimeoutError as e:
          raise InputError(
              f"{len(self._lines) + 1} of {count()} processes can reach "
              "process 0; let the processes of a job connect to each other on "
              "all ports") from e
        except (OSError, ValueError, TypeError):
          continue
        if secrets.compare_digest(str(said), secret):
          self._listen(line, name)
        else:
          line.close()

  def _listen(self, line: socket.socket, name: str) -> None:
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", _SILENCE // 2), ("TCP_KEEPINTVL", 2),
                          ("TCP_KEEPCNT", _SILENCE // 4)):
      if hasattr(socket, option):
        line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    self._lines.append(line)
    threading.Thread(target=self._hear, args=(line, name), daemon=True).start()

  def _hear(self, line: socket.socket, name: str) -> None:
    try:
      said = _sentence(line)
    except OSError:
      said = ""
    if said == _BYE:
      return
    with self._lock:
      if self._left:
        return
      said = said or f"{name} is gone"
      print(f"jaxspec: {said}; start all processes again, and with --output "
            "and --resume they go on from what is finished", file=sys.stderr,
            flush=True)
      self._say(said)
      if index() == 0:
        time.sleep(_GRACE)
      os._exit(LOST)      # the main thread may wait for a collective for ever

  def leave(self, status: int) -> None:
    """Says goodbye; or that the others must stop."""
    with self._lock:
      self._left = True
      self._say(f"{self._me} ended with status {status}" if status else _BYE)

  def _say(self, sentence: str) -> None:
    for line in self._lines:
      try:
        line.sendall(" ".join(sentence.split()).encode() + b"\n")
      except OSError:
        pass              # that one is the one that is gone


def _name(number: int, host: str, pid: int) -> str:
  return f"process {number} ({host}, pid {pid})"


def _sentence(line: socket.socket) -> str:
  """What is said up to the end of the line, or of a part long enough."""
  with line.makefile("rb") as file:
    return file.readline(1 << 16).decode("utf-8", "replace").strip()


def _server(host: str) -> socket.socket:
  """Listens where the coordinator does, on a port of its own."""
  try:
    loopback = ipaddress.ip_address(host).is_loopback
  except ValueError:
    loopback = host == "localhost"
  if loopback:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)
  if socket.has_dualstack_ipv6():
    return socket.create_server(("", 0), family=socket.AF_INET6,
                                dualstack_ipv6=True)
  return socket.create_server(("", 0))


__all__ = ["LOST", "agree", "count", "fetch", "index", "join", "together"]
