# SPDX-License-Identifier: Apache-2.0
"""Compiled programs in a folder, for a start that compiles nothing.

A folder holds what `jaxspec.planning.keep` compiled: the programs of one
`Generator`, for one kind and number of devices, one version of jax, of the
compiler and of this package. What does not match is not loaded; the generator
then compiles as it always does, and the logger `jaxspec.executables` says so,
once.

Loading a program is running it: take folders from no one but yourself.
"""

import functools
import hashlib
import json
import logging
import os
import pathlib
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

from jaxspec import loop
from jaxspec.base import DecodeState, Prefix

_INDEX = "programs.json"
_LOG = logging.getLogger(__name__)
# Flags of compilers that change no program: how many CPU devices there are,
# what is dumped, and what jax itself adds where there are TPUs.
_IDLE = ("--xla_force_host_platform_device_count", "--xla_dump",
         "--xla_tpu_use_enhanced_launch_barrier")
# Packages that hold the compiler of a platform; the first that is there.
_COMPILERS = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda13-pjrt", "jax-cuda12-pjrt", "jax-rocm7-pjrt"),
}


def identity(config: Any, mesh: jax.sharding.Mesh, **settings: Any
             ) -> dict[str, str]:
  """All that programs depend on, by name, so that what differs can be named.

  Args:
    settings: of the generator, as they were written.
  """
  device = mesh.devices.flat[0]
  kind = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
  known = dict(
      jax=jax.__version__, jaxlib=metadata.version("jaxlib"), jaxspec=_source(),
      compiler=_compiler(kind),
      XLA_FLAGS=_flags("XLA_FLAGS"),
      LIBTPU_INIT_ARGS=_flags("LIBTPU_INIT_ARGS") if kind == "tpu" else "",
      matmul_precision=jax.config.jax_default_matmul_precision,
      device_kind=device.device_kind, devices=mesh.devices.size,
      mesh=dict(mesh.shape), model=hashlib.sha256(
          repr(config).encode()).hexdigest()[:16], **settings)
  return {name: str(value) for name, value in known.items()}


def _compiler(kind: str) -> str:
  """What compiles for a platform.

  The client's own `platform_version` is not it: that of a topology without
  devices is worded otherwise than that of the machine itself, and both come
  from the same package. A CPU's compiler is jaxlib, and takes whatever
  instructions the machine has.
  """
  if kind == "cpu":
    return f"for a {_processor()}"
  for package in _COMPILERS.get(kind, ()):
    try:
      return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
      pass
  return "unknown"


@functools.cache
def _processor() -> str:
  """The architecture of this machine, and a digest of its features."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
  except OSError:
    return f"{platform.machine()} {platform.processor()}".strip()
  found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
  features = sorted(found[1].split()) if found else []
  digest = hashlib.sha256(" ".join(features).encode()).hexdigest()[:8]
  return f"{platform.machine()} with features {digest}"


def _flags(name: str) -> str:
  """A variable of flags, in order, without those that change no program."""
  return " ".join(sorted(
      flag for flag in os.environ.get(name, "").split()
      if not flag.startswith(_IDLE)))


@functools.cache
def _source() -> str:
  """Tells one state of the packages from another."""
  found = hashlib.sha256()
  here = pathlib.Path(__file__).parent
  for package in (here, here.parent / "pallas_kernels"):
    for file in sorted(package.rglob("*.py")):
      found.update(file.read_bytes())
  return found.hexdigest()[:16]


def outline(drafter: Any) -> str:
  """Tells drafters apart whose arrays are alike."""
  text = re.sub(r"0x[0-9a-f]+", "", str(jax.tree.structure(drafter)))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def key(program: str, arguments: Any) -> str:
  """The name of a program for arguments of these shapes."""
  shapes = [(tuple(x.shape), str(x.dtype)) if hasattr(x, "shape") else repr(x)
            for x in jax.tree.leaves(arguments)]
  digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
  return f"{program}-{digest}"


def save(folder: str | pathlib.Path, known: Mapping[str, str],
         programs: Mapping[str, jax.stages.Compiled]) -> int:
  """Writes programs, by their keys; returns their bytes in all."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  total, digests = 0, {}
  for name, compiled in sorted(programs.items()):
    # Its trees are those of the arguments and results, known when it is used.
    payload, _, _ = serialize_executable.serialize(compiled)
    (folder / f"{name}.xla").write_bytes(payload)
    total += len(payload)
    digests[name] = hashlib.sha256(payload).hexdigest()
  # Last: a folder without it is none.
  (folder / _INDEX).write_text(json.dumps(
      dict(identity=dict(known), programs=digests), indent=2) + "\n")
  return total


class Programs:
  """The programs of `jaxspec.loop`, those of a folder where they are there.

  Attributes:
    problem: why nothing more of the folder is used, or "".
    used: how many of its programs were.
    missed: how many programs were compiled in place of being loaded.
  """

  def __init__(self, folder: str | pathlib.Path, known: Mapping[str, str],
               mesh: jax.sharding.Mesh):
    self._folder = pathlib.Path(folder).expanduser()
    self._devices = list(mesh.devices.flat)
    self._loaded: dict[str, Callable[..., Any] | None] = {}
    self.used = self.missed = 0
    self._digests: dict[str, str] = {}
    self._said: set[str] = set()
    self.problem = self._check(known)
    if self.problem:
      self._tell("all", f"programs are compiled: {self.problem}")

  def _check(self, known: Mapping[str, str]) -> str:
    try:
      said = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))
      stored, digests = said["identity"], dict(said["programs"])
      differ = [f"{name} {stored.get(name)!r} is not {value!r}"
                for name, value in known.items() if stored.get(name) != value]
    except OSError as e:
      return f"{self._folder / _INDEX}: {e.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
      return f"{self._folder / _INDEX} is not as plan --save writes it"
    if differ:
      return (f"{self._folder} was made for another setup: "
              + "; ".join(differ[:3])
              + (f"; and {len(differ) - 3} more" if differ[3:] else ""))
    self._digests = digests
    return ""

  def _find(self, program: str, arguments: Sequence[Any],
            result: Callable[[], Any]) -> Callable[..., Any] | None:
    """A program for such arguments, or None.

    Args:
      result: gives the tree of what it returns.
    """
    name = key(program, arguments)
    if name not in self._loaded:
      found = None if self.problem else self._load(name, arguments, result)
      self._loaded[name] = found
      self.missed += found is None
    return self._loaded[name]

  def _tell(self, what: str, message: str) -> None:
    """Says it, once."""
    if what not in self._said:
      self._said.add(what)
      _LOG.warning("%s", message)

  def _load(self, name: str, arguments: Sequence[Any],
            result: Callable[[], Any]) -> Callable[..., Any] | None:
    if name not in self._digests:
      program = name.partition("-")[0]
      self._tell("some", (
          f"some programs are compiled, {program} first: {self._folder} holds "
          "none for arguments of these sizes; plan --save provides for "
          "prompts of --prompt tokens, one or as many as --rows"))
      return None
    try:
      payload = (self._folder / f"{name}.xla").read_bytes()
      # A runtime may crash over what is not whole.
      if hashlib.sha256(payload).hexdigest() != self._digests[name]:
        raise ValueError("it is not what was saved; run plan --save again")
      loaded = serialize_executable.deserialize_and_load(
          payload, jax.tree.structure((tuple(arguments), {})), result(),
          backend=self._devices[0].client, execution_devices=self._devices)
    except Exception as e:  # Whatever a runtime finds wrong with a file.
      first = (str(e).strip().splitlines() or [type(e).__name__])[0]
      self.problem = f"{self._folder / name}.xla does not load: {first}"
      self._tell("all", f"programs are compiled: {self.problem}")
      return None
    self.used += 1
    return loaded

  # As in `jaxspec.loop`.

  def decode(self, model: Any, drafter: Any, verifier: Any,
             state: DecodeState, steps: Any, wait: Any) -> DecodeState:
    arguments = model, drafter, state, steps, wait
    found = self._find("decode", arguments, lambda: jax.tree.structure(state))
    if found is None:
      return loop.decode(model, drafter, verifier, state, steps, wait)
    return found(*arguments)

  def prefill(self, model: Any, taps: tuple[int, ...], tokens: Any,
              length: Any, *, chunk: int, dtype: Any) -> Prefix:
    arguments = model, tokens, length

    def result():
      return jax.tree.structure(loop.prefill.eval_shape(
          model, taps, tokens, length, chunk=chunk, dtype=dtype))
    found = self._find("prefill", arguments, result)
    if found is None:
      return loop.prefill(model, taps, tokens, length, chunk=chunk, dtype=dtype)
    return found(*arguments)

  def insert(self, model: Any, drafter: Any, verifier: Any,
             state: DecodeState, rows: Any, prefix: Prefix, request: Any
             ) -> DecodeState:
    arguments = model, drafter, state, rows, prefix, request
    found = self._find("insert", arguments, lambda: jax.tree.structure(state))
    if found is None:
      return loop.insert(model, drafter, verifier, state, rows, prefix, request)
    return found(*arguments)

  def release(self, state: DecodeState, rows: Any) -> DecodeState:
    arguments = state, np.asarray(rows)
    found = self._find("release", arguments, lambda: jax.tree.structure(state))
    return loop.release(state, rows) if found is None else found(*arguments)

  def __getattr__(self, name: str) -> Any:
    return getattr(loop, name)


__all__ = ["Programs", "identity", "key", "outline", "save"]
