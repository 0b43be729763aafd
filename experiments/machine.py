# SPDX-License-Identifier: Apache-2.0
"""The machine under an experiment: what it is, how fast, how busy.

  python -m experiments.machine

A figure without its machine means nothing, so `write` puts both into every
result file. `bandwidth` measures the ceiling of decoding, which reads every
weight once a pass, and `ForeignLoad` tells a quiet sample from a disturbed
one.
"""

import json
import os
import pathlib
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import numpy as np

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers",
            "llama_cpp_python", "gguf")


def describe() -> dict[str, Any]:
  """The processor, its cores and caches, the memory, and the system."""
  cpu = _proc("/proc/cpuinfo")
  flags = set(cpu.get("flags", "").split())
  wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16",
            "amx_int8")
  memory = _proc("/proc/meminfo").get("MemTotal", "0 kB").split()[0]
  return {
      "cpu": cpu.get("model name", platform.processor() or "unknown"),
      "family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
      "cores": os.cpu_count(),
      "cache": cpu.get("cache size"),
      "instructions": [flag for flag in wanted if flag in flags],
      "memory_gib": round(int(memory) / 2**20, 1),
      "system": f"{platform.system()} {platform.release()}",
  }


def versions() -> dict[str, str | None]:
  """Python and the packages that are compared; None where one is missing."""
  found: dict[str, str | None] = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = None
  return found


def commit() -> str | None:
  """The commit of this checkout, with "+" where files differ from it."""
  here = pathlib.Path(__file__).resolve().parent
  def git(*args: str) -> str:
    return subprocess.run(["git", "-C", str(here), *args], check=True,
                          capture_output=True, text=True).stdout.strip()
  try:
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return None


def bandwidth(threads: int, mebibytes: int = 1024, repeats: int = 5) -> float:
  """Bytes a second that `threads` threads read of memory, at best.

  Each thread takes the maximum of its share, which is nothing but vector
  loads; the best run counts, because only a disturbance makes one slower.
  """
  data = np.ones(mebibytes * 2**18, np.float32)     # written, so it is there
  shares = np.array_split(data, threads)
  best = float("inf")
  for _ in range(repeats):
    workers = [threading.Thread(target=np.maximum.reduce, args=(share,))
               for share in shares]
    start = time.perf_counter()
    for worker in workers:
      worker.start()
    for worker in workers:
      worker.join()
    best = min(best, time.perf_counter() - start)
  return data.nbytes / best


class ForeignLoad:
  """Cores that others kept busy while a block ran.

    with ForeignLoad([worker.pid]) as load:
      ...
    load.cores

  Attributes:
    cores: busy processor time of the whole machine, time the hypervisor took
      away included, less that of this process and of `pids`, a second.
      None where /proc does not tell.
    own: the same of this process and of `pids`.
  """

  cores: float | None = None
  own: float | None = None

  def __init__(self, pids: Iterable[int] = ()):
    self._pids = [os.getpid(), *pids]

  def __enter__(self) -> "ForeignLoad":
    self._start = self._now()
    return self

  def __exit__(self, *unused: object) -> None:
    if self._start is None or (now := self._now()) is None:
      return
    seconds, busy, own = (b - a for a, b in zip(self._start, now))
    self.own = own / seconds
    self.cores = max(0.0, busy / seconds - self.own)

  def _now(self) -> tuple[float, float, float] | None:
    tick = os.sysconf("SC_CLK_TCK")
    try:
      total = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0]
      # user nice system idle iowait irq softirq steal
      ticks = [int(value) for value in total.split()[1:9]]
      own = sum(map(_ticks, self._pids))
    except (OSError, ValueError):
      return None
    busy = sum(ticks) - ticks[3] - ticks[4]
    return time.perf_counter(), busy / tick, own / tick


def peak_memory(pid: int | None = None) -> float:
  """The most memory a process has held at once, in MB."""
  status = _proc(f"/proc/{pid or os.getpid()}/status")
  return int(status.get("VmHWM", "0 kB").split()[0]) * 1024 / 1e6


def write(path: str, runs: Any, **more: Any) -> None:
  """Writes `runs` as JSON, with all that is needed to repeat them."""
  content = {
      "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
      "commit": commit(),
      "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
      "machine": describe(),
      "versions": versions(),
      **more,
      "runs": runs,
  }
  file = pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  partial = file.with_name(file.name + ".partial")
  partial.write_text(json.dumps(content, indent=1) + "\n")
  partial.replace(file)


def _module() -> str:
  spec = getattr(sys.modules.get("__main__"), "__spec__", None)
  return spec.name if spec else sys.argv[0]


def _ticks(pid: int) -> int:
  """Processor time of a process and of the children it has waited for."""
  text = pathlib.Path(f"/proc/{pid}/stat").read_text()
  fields = text.rpartition(")")[2].split()      # the name may hold anything
  return sum(int(value) for value in fields[11:15])


def _proc(path: str) -> dict[str, str]:
  """The first `name: value` of each name in a file of /proc."""
  found: dict[str, str] = {}
  try:
    lines = pathlib.Path(path).read_text().splitlines()
  except OSError:
    return found
  for line in lines:
    name, _, value = line.partition(":")
    found.setdefault(name.strip(), value.strip())
  return found


def main() -> None:
  """Prints what is known of this machine."""
  with ForeignLoad() as load:
    rates = {n: bandwidth(n) / 1e9 for n in (1, 2)}
  print(json.dumps({
      **describe(), **versions(), "commit": commit(),
      "bandwidth_gb_s": {n: round(rate, 1) for n, rate in rates.items()},
      "foreign_cores": load.cores}, indent=1))


if __name__ == "__main__":
  main()
