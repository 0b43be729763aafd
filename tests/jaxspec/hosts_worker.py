# SPDX-License-Identifier: Apache-2.0
"""One of several processes: what tests run on what stands for a host."""

import json
import pathlib
import sys
import time


def sit() -> int:
  """Agrees with the others, and then waits to be ended."""
  from jaxspec import hosts

  coordinator, processes, process = sys.argv[2:]
  hosts.join(coordinator, int(processes), int(process))
  # The first one looks; who else does says something else.
  heard = hosts.agree(lambda: {"seen by": int(process)})
  pathlib.Path(f"heard-{process}").write_text(str(heard["seen by"]))
  return hosts.together(lambda: time.sleep(100) or 0)


def several() -> int:
  """Answers the same prompts with one drafter after another."""
  from jaxspec import hosts
  from jaxspec.generator import Generator, Options

  coordinator, processes, process, given, output = sys.argv[2:]
  hosts.join(coordinator, int(processes), int(process))
  given = json.loads(pathlib.Path(given).read_text())

  def answers(options):
    made = Generator.load(given["model"], dtype="float32", rows=4, capacity=64,
                          mesh=given["mesh"], **options).generate(
        given["prompts"], Options(max_new_tokens=given["new"], ignore_eos=True))
    print(options, f"after {time.process_time():.0f} s", file=sys.stderr)
    return [[c.token_ids for c in made], sum(c.stats.accepted for c in made)]

  def main():
    found = []
    for options in given["options"]:
      found.append(answers(options))
      pathlib.Path(output).write_text(json.dumps(found))
    return 0

  return hosts.together(main)


def decode() -> int:
  """Decodes, and counts the bytes of weights that were read from files."""
  from jaxspec import __main__ as front_door
  from jaxspec.checkpoint import hf

  read, total = hf.HuggingFace._read, 0

  def counted(*args):
    nonlocal total
    array = read(*args)
    total += array.nbytes
    return array

  hf.HuggingFace._read = counted
  status = front_door.main(sys.argv[1:])
  print(f"read {total} bytes of weights", file=sys.stderr)
  return status


if __name__ == "__main__":
  sys.exit({"sit": sit, "several": several, "decode": decode}[sys.argv[1]]())
