# SPDX-License-Identifier: Apache-2.0
"""One of several processes: what tests run on what stands for a host."""

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
  sys.exit(sit() if sys.argv[1] == "sit" else decode())
