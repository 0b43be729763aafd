# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for devices that are not there.

libtpu holds the whole TPU compiler and needs no TPU: what it refuses, a TPU
would refuse. For a GPU the kernel is lowered, which finds what Pallas itself
does not support; machine code is made where the GPU is.
"""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import export
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import schedules
from pallas_kernels.case import Case
from pallas_kernels.errors import InputError
from pallas_kernels.records import Records, sources
from pallas_kernels.target import Target, aim, of

# The smallest topology of each generation, by the name people know.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2",
              "tpu7x": "tpu7x:2x2x1"}
GPU = Target("gpu", "NVIDIA H100 80GB HBM3")
_GPU_NAME = "h100"
_H100 = AbstractDevice(GPU.kind, 132, "gpu")

_UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")
_CUSTOM_CALL = re.compile(
    r"%([\w.-]+) = .*custom_call_target=\"tpu_custom_call\"")
# Of what is begun and awaited, a tuple comes first, of the source too.
_COPY = re.compile(r"= \(*(\w+\[[\d,]+\])[^=]*? "
                   r"(?:copy|copy-start|slice-start)\(")
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1",'
                   r'"offset":"\d+","size":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a compiler said of one case.

  Attributes:
    target: "v5e", ..., or "h100".
    status: "compiles", "lowers", "refuses" (the kernel itself, with
      NotImplementedError) or "fails".
    reason: why it refuses or fails.
    seconds: what tracing and compiling took.
    kernels: the names of the kernels in the program.
    vmem: bytes of VMEM the largest of them takes.
    temporaries: bytes of memory besides arguments and results.
    schedule: of the kernel with the most bundles, where there is a dump.
  """

  op: str
  case: str
  target: str
  status: str
  reason: str = ""
  seconds: float = 0.0
  kernels: tuple[str, ...] = ()
  vmem: int = 0
  temporaries: int = 0
  schedule: schedules.Schedule | None = None

  @property
  def good(self) -> bool:
    """A kernel for a GPU may refuse a shape; one for a TPU takes its cases."""
    return (self.status in ("compiles", "lowers")
            or self.status == "refuses" and self.target == _GPU_NAME)


def prepare(dump: pathlib.Path | None = None) -> None:
  """Sets what libtpu reads when it is loaded; call it before.

  Args:
    dump: where schedules go, which slows the compiler by about a half.
  """
  os.environ.update(
      # Do not ask the network which TPU this is, nor lock others out.
      TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
      TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
      TPU_LOG_DIR="disabled", TPU_MIN_LOG_LEVEL="3", TPU_STDERR_LOG_LEVEL="3")
  if dump is not None:
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(
        [os.environ.get("LIBTPU_INIT_ARGS", ""),
         schedules.FLAGS.format(folder=dump)]).strip()
  jax.config.update("jax_platforms", "cpu")
  # A program for a device that is not there cannot be read back.
  jax.config.update("jax_enable_compilation_cache", False)


def device(topology: str) -> Any:
  """A device of a topology that need not be here.

  Raises:
    InputError: there is no such topology, or no compiler for it.
  """
  if topology not in TOPOLOGIES:
    raise InputError(f"unknown topology {topology!r}; there are "
                     f"{', '.join(TOPOLOGIES)}")
  try:
    return topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[topology]).devices[0]
  except RuntimeError as e:
    raise InputError("there is no TPU compiler here; get it with pip install "
                     f"'jax[tpu]' ({_first_line(e)})") from e


def compile_all(cases: Sequence[Case], names: Sequence[str],
                dump: pathlib.Path | None = None,
                journal: Records | None = None, *, gpu: bool = False
                ) -> Iterator[Outcome]:
  """Compiles every case's TPU kernel for every topology, one after another.

  Args:
    dump: the folder given to `prepare`, for schedules.
    journal: what was found before, and is not looked for again, and where
      what is found goes.
    gpu: lower them for an H100 too.
  """
  devices = {name: device(name) for name in names}
  # All at once: a file may change while this is at work.
  source = {(case.op, name): source_of(case, name)
            for case in cases for name in (*names, _GPU_NAME)}
  for name in [*names, *[_GPU_NAME] * gpu]:
    for case in cases:
      before = journal and journal.find(source[case.op, name], op=case.op,
                                        case=case.name, target=name)
      if before and (before["schedule"] or dump is None or name == _GPU_NAME):
        yield read(before)
        continue
      outcome = (lower_gpu(case) if name == _GPU_NAME else
                 compile_tpu(case, name, devices[name], dump))
      if journal is not None:
        journal.add(dataclasses.asdict(outcome), source[case.op, name])
      yield outcome


def source_of(case: Case, name: str) -> str:
  """A digest of all that what is found of a case on a target depends on."""
  # Shapes stand where samples are drawn, which need not be where the op is.
  modules = (_module(case.call), _module(case.sample))
  return sources(modules, "tpu" if name == _GPU_NAME else "gpu")


def _module(call: Any) -> str:
  """Where a function is defined, whatever of it is settled before."""
  while isinstance(call, functools.partial):
    call = call.func
  return call.__module__


def read(row: Mapping[str, Any]) -> Outcome:
  """What a row of a result file says."""
  names = {field.name for field in dataclasses.fields(Outcome)}
  found = {name: value for name, value in row.items() if name in names}
  if found["schedule"] is not None:
    found["schedule"] = schedules.Schedule(**found["schedule"])
  return Outcome(**found | {"kernels": tuple(found["kernels"])})


def compile_tpu(case: Case, name: str, device: Any,
                dump: pathlib.Path | None = None) -> Outcome:
  """Compiles one case's TPU kernel for one device.

  Fails too if the program has no kernel, or if a donated argument's memory is
  not taken over.

  Args:
    dump: the folder given to `prepare`. It is emptied.
  """
  mesh = Mesh([device], ("x",))
  place = NamedSharding(mesh, P())
  arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=place), case.arguments)
  if dump is not None:
    _clear(dump)

  def body():
    with jax.set_mesh(mesh), aim(of(device)):
      return jax.jit(lambda *args: case.call(*args, implementation="tpu"),
                     donate_argnums=case.donated).lower(*arguments).compile()

  compiled, found = _attempt(case, name, body)
  if compiled is None:
    return dataclasses.replace(found, schedule=None)
  text, memory = compiled.as_text(), compiled.memory_analysis()
  kernels = called(text)
  donated = sum(x.size * x.dtype.itemsize
                for at in case.donated
                for x in jax.tree.leaves(case.arguments[at]))
  problem = ""
  if not kernels:
    problem = "no kernel is in the program"
  elif memory.alias_size_in_bytes < donated:
    problem = (f"{donated} bytes are donated, but "
               f"{memory.alias_size_in_bytes} are taken over")
  found_schedules = [] if dump is None else [
      s for s in (schedules.read(dump, kernel) for kernel in kernels) if s]
  if dump is not None:
    _clear(dump)
  return dataclasses.replace(
      found, status="fails" if problem else "compiles", reason=problem,
      kernels=kernels, vmem=vmem(text),
      temporaries=memory.temp_size_in_bytes,
      schedule=max(found_schedules, key=lambda s: s.bundles, default=None))


def called(text: str) -> tuple[str, ...]:
  """The names of the kernels in a compiled program."""
  return tuple(_CUSTOM_CALL.findall(text))


def vmem(text: str) -> int:
  """Bytes of VMEM that the largest of them takes."""
  return max(map(int, _VMEM.findall(text)), default=0)


def copied(text: str, shape: Sequence[int]) -> list[str]:
  """Copies in a compiled program of what has these sizes, in any order.

  Those of one do not count: a cache is handed to a kernel as one of one.
  """
  wanted = sorted(n for n in shape if n != 1)
  return [found for found in _COPY.findall(text) if wanted == sorted(
      n for n in map(int, found.partition("[")[2][:-1].split(",")) if n != 1)]


def lower_gpu(case: Case) -> Outcome:
  """Lowers one case's GPU kernel for an H100."""
  # Leaf by leaf: export makes containers of what is no array.
  leaves, tree = jax.tree.flatten(case.arguments)

  def call(*leaves):
    return case.call(*jax.tree.unflatten(tree, leaves), implementation="gpu")

  def body():
    with (jax.sharding.use_abstract_mesh(
        AbstractMesh((), (), abstract_device=_H100)), aim(GPU)):
      return export.export(
          jax.jit(call),
          platforms=["cuda"], disabled_checks=[
              export.DisabledSafetyCheck.custom_call(target)
              for target in ("mosaic_gpu", "mosaic_gpu_v2")])(*leaves)

  lowered, found = _attempt(case, _GPU_NAME, body)
  if lowered is None:
    return found
  kernels = tuple(re.findall(r"@(mosaic_gpu\w*)\(", lowered.mlir_module()))
  problem = "" if kernels else "no kernel is in the program"
  return dataclasses.replace(
      found, status="fails" if problem else "lowers", reason=problem,
      kernels=kernels)


def table(outcomes: Sequence[Outcome]) -> str:
  """In Markdown, one row a case and target."""
  rows = ["| op | case | target | | s | VMEM, MiB | temporaries, KiB | "
          "bundles | in the loop | of its slots used | spills |",
          "|---|---|---|---|--:|--:|--:|--:|--:|---|--:|"]
  return "\n".join([*rows, *map(row, outcomes)])


def row(o: Outcome) -> str:
  """One row of `table`."""
  said = f"{o.status}: {_escape(o.reason)}" if o.reason else o.status
  cells = [o.op, _escape(o.case), o.target, said, f"{o.seconds:.1f}"]
  if o.status == "compiles":
    cells += [f"{o.vmem / 2**20:.2f}", f"{o.temporaries / 2**10:.0f}"]
  else:
    cells += ["", ""]
  if (s := o.schedule) is None:
    cells += [""] * 4
  else:
    used = ", ".join(f"{unit} {share:.0%}"
                     for unit, share in s.utilization.items()
                     if unit in _UNITS and share >= 0.005)
    cells += [str(s.bundles), str(s.loop), used, str(s.spills)]
  return "| " + " | ".join(cells) + " |"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
  """In Markdown, one row an op: what all its cases came to.

  Args:
    rows: of a result file, of any versions of jax.
  """
  found = [(row["jax"], read(row)) for row in rows]
  targets = list(dict.fromkeys(
      [*TOPOLOGIES, _GPU_NAME, *(o.target for _, o in found)]))
  said = list(dict.fromkeys((o.op, version) for version, o in found))
  lines = ["| op | jax | " + " | ".join(targets) + " | VMEM, MiB | "
           "temporaries, KiB | of the busiest unit's slots | spills |",
           "|---|---|" + "--:|" * (len(targets) + 4)]
  for op, version in sorted(said):
    mine = [o for v, o in found if (o.op, v) == (op, version)]
    cells = []
    for target in targets:
      here = [o for o in mine if o.target == target]
      good = sum(o.status in ("compiles", "lowers") for o in here)
      cells.append(f"{good} of {len(here)}" if here else "")
    made = [o for o in mine if o.status == "compiles"]
    timed = [o.schedule for o in made if o.schedule]
    busy = [max(s.utilization[unit] for unit in _UNITS if unit in s.utilization)
            for s in timed]
    cells += [_span([o.vmem / 2**20 for o in made], "{:.1f}"),
              _span([o.temporaries / 2**10 for o in made], "{:.0f}"),
              _span(busy, "{:.0%}"),
              _span([s.spills for s in timed], "{}")]
    lines.append(f"| {op} | {version} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _span(values: Sequence[float], form: str) -> str:
  """From the least to the most."""
  ends = [form.format(end(values)) for end in (min, max)] if values else []
  return " to ".join(dict.fromkeys(ends))


def _attempt(case: Case, name: str, body: Callable[[], Any]
             ) -> tuple[Any, Outcome]:
  """Runs `body`; gives what it gives, or None, and what is to be said."""
  start = time.perf_counter()
  result, status, reason = None, "", ""
  try:
    result = body()
  except NotImplementedError as e:
    status, reason = "refuses", _first_line(e)
  except Exception as e:             # a compiler may raise anything
    status, reason = "fails", f"{type(e).__name__}: {_first_line(e)}"
  return result, Outcome(case.op, case.name, name, status, reason,
                         seconds=time.perf_counter() - start)


def _first_line(e: Exception, most: int = 300) -> str:
  lines = [line.strip() for line in str(e).splitlines() if line.strip()]
  text = lines[0] if lines else type(e).__name__
  return text if len(text) <= most else text[:most - 3] + "..."


def _escape(text: str) -> str:
  return text.replace("|", "\\|")


def _clear(folder: pathlib.Path) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
