# SPDX-License-Identifier: Apache-2.0
"""Whole decode and verify steps, made of kernels, compiled for TPUs.

  python -m experiments.kernel_programs \
      --json=experiments/results/kernel_programs.json

No TPU is needed. Each program is the loop that decodes: of one node a step
(`autoregressive`), and of eight that are verified together (`prompt_lookup`).
Of each is asserted that it calls kernels, that the memory of the whole state,
caches included, is taken over, that temporaries are below two percent of what
it is given, and that nothing as large as the keys of a layer is copied, be it
into the chip's own memory and back. What was found of the same sources is kept.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

from jaxspec import sharding
from jaxspec.planning import Blueprint, Setup, devices, read_config, size
from pallas_kernels import compiling, records, support
from pallas_kernels.compiling import Outcome

SHARE = 0.02
ROWS, CAPACITY = 8, 2048
STEPS = {"decode": "autoregressive", "verify 8": "prompt_lookup:length=7"}
# The model, and by generation a topology and how many devices share a layer.
PROGRAMS = {
    "smollm2-135m": {name: (shape, 1) for name, shape in
                     compiling.TOPOLOGIES.items()},
    "llama3-8b": {name: (shape, 4) for name, shape in
                  compiling.TOPOLOGIES.items()},
    "llama3-70b": {"v5p": ("v5p:2x2x2", 8), "v6e": ("v6e:2x4", 8)},
}


def main(argv: Sequence[str] | None = None) -> int:
  """Compiles all of them, and says of each what came of it."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--json", help="the file that is added to")
  parser.add_argument("--models", default=",".join(PROGRAMS))
  parser.add_argument("--targets", default=",".join(compiling.TOPOLOGIES))
  parser.add_argument("--depth", type=int, help="layers, instead of all: for "
                      "a trial, which is not written down")
  parser.add_argument("--readme", help="a file in which the table is renewed, "
                      "between its marks")
  settings = parser.parse_args(argv)
  compiling.prepare()
  journal = records.Records(None if settings.depth else settings.json,
                            records.command("experiments.kernel_programs"))
  source = records.sources(("experiments.kernel_programs",),
                           packages=("jaxspec", "pallas_kernels"))
  print(compiling.table([]), flush=True)
  good = True
  for model in settings.models.split(","):
    for target, (topology, parts) in PROGRAMS[model].items():
      for step, drafter in STEPS.items():
        if target not in settings.targets.split(","):
          continue
        case = f"{model} of tp {parts}, {step}"
        before = journal.find(source, op="program", case=case, target=target)
        if before:
          outcome = compiling.read(before)
        else:
          outcome = compile_program(model, drafter, topology, parts,
                                    depth=settings.depth)
          outcome = dataclasses.replace(outcome, case=case, target=target)
          journal.add(dataclasses.asdict(outcome), source)
        print(compiling.row(outcome), flush=True)
        good = good and outcome.good
  if settings.readme:
    file = pathlib.Path(settings.readme)
    shown = compiling.summary(journal.rows)
    file.write_text(support.insert(file.read_text(), shown, "programs"))
  return 0 if good else 1


def compile_program(model: str, drafter: str, topology: str, parts: int, *,
                    depth: int | None = None) -> Outcome:
  """One program, and which of the assertions it fails."""
  config = read_config(model)
  if depth:
    config = dataclasses.replace(
        config, depth=depth, ropes=config.ropes[:depth],
        windows=config.windows[:depth])
  start = time.perf_counter()
  # A topology may have more devices than share a layer.
  mesh = sharding.make_mesh({"tensor": parts}, devices(topology)[:parts])
  plan = Blueprint(Setup(config, topology, (("tensor", parts),),
                         drafter=drafter, rows=ROWS, capacity=CAPACITY), mesh)
  compiled = plan.lower("decode").compile()
  seconds = time.perf_counter() - start
  text, memory = compiled.as_text(), compiled.memory_analysis()
  kernels = compiling.called(text)
  held = size(plan.state)
  keys = plan.state.seq.cache.k[0]
  shape = keys.sharding.shard_shape(keys.shape)
  found = problems(text, memory, held, shape)
  return Outcome(
      "program", "", "", "fails" if found else "compiles", "; ".join(found),
      seconds, kernels, compiling.vmem(text), memory.temp_size_in_bytes)


def problems(text: str, memory, held: int, keys: tuple[int, ...]) -> list[str]:
  """What is not as it has to be.

  Args:
    held: bytes of the state.
    keys: the shape of one layer's keys, on one device.
  """
  found = []
  if not compiling.called(text):
    found.append("no kernel is in the program")
  if memory.alias_size_in_bytes < held:
    found.append(f"of {held} bytes of state {memory.alias_size_in_bytes} are "
                 "taken over")
  share = memory.temp_size_in_bytes / memory.argument_size_in_bytes
  if share >= SHARE:
    found.append(f"temporaries are {100 * share:.1f} % of what is given")
  if copies := compiling.copied(text, keys):
    found.append(f"{len(copies)} copies of a layer's keys")
  return found


if __name__ == "__main__":
  sys.exit(main())
