# SPDX-License-Identifier: Apache-2.0
"""How long a start takes: cold, with a warm cache, with loaded executables.

  python -m experiments.startup

Fresh processes, each until the first byte of its answer is on stdout and until
it ends. Cold: nothing was compiled before. Warm: the persistent compilation
cache holds all that an equal run compiled. Loaded: `plan --save` wrote the
programs before, and `decode --executables` reads them, with no cache. They
take turns, so that what disturbs one disturbs all.

And what the compiler needs for TPUs that are not there: the decoding loop with
all its layers, as `plan` compiles it, each in a process of its own.
"""

import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

from experiments import machine
from jaxspec.apps.plan import WITHOUT_DEVICE

FLAGS = flags.FLAGS
KINDS = ("cold", "warm cache", "loaded")


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string("model", "smollm2-135m", "that starts")
  flags.DEFINE_string("dtype", "float32", "of its weights")
  flags.DEFINE_string("drafter", "autoregressive", "as for decode")
  flags.DEFINE_integer("capacity", 256, "as for decode")
  flags.DEFINE_integer("repeats", 5, "of each start", lower_bound=1)
  flags.DEFINE_list(
      "targets", ["smollm2-135m@v5e:1x1", "llama3-8b@v5e:2x2",
                  "llama3-8b@v6e:1x1", "llama3-70b@v6e:2x4"],
      "what is compiled for what; empty for nothing")
  flags.DEFINE_integer("compiles", 1, "of each target", lower_bound=1)
  flags.DEFINE_string("output", "experiments/results/startup.json",
                      "where the result goes")


def command(kind: str, folder: pathlib.Path, settings: list[str]
            ) -> list[str]:
  """A start of that kind. With a folder that is empty, a warm one is cold."""
  cache = folder / ("cold" if kind == "cold" else "cache")
  more = [f"--executables={folder / 'programs'}",
          "--compilation_cache_dir="] if kind == "loaded" else [
              f"--compilation_cache_dir={cache}"]
  # Held until settled, so that all of it is the loop that is saved.
  return [sys.executable, "-u", "-m", "jaxspec", "decode", *settings, *more,
          "--prompt=Name the four seasons.", "--chat", "--max_new_tokens=16",
          "--hold_until_settled"]


def start(arguments: list[str]) -> dict[str, Any]:
  """A fresh process, until its first byte and until its end."""
  with tempfile.TemporaryFile("w+b") as errors, machine.ForeignLoad() as load:
    begin = time.perf_counter()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors,
                          bufsize=0) as process:
      assert process.stdout
      first = process.stdout.read(1)
      took = time.perf_counter() - begin
      text = first + process.stdout.read()
    whole = time.perf_counter() - begin
    errors.seek(0)
    said = errors.read().decode(errors="replace")
  if process.returncode or not first:
    raise RuntimeError(said[-2000:])
  compiles = re.search(r"compiles (\d+)(?: \((\d+) cached\))?", said)
  return dict(first_seconds=took, seconds=whole, foreign=load.cores,
              compiles=int(compiles[1]) if compiles else 0,
              cached=int(compiles[2] or 0) if compiles else 0,
              fell_back="programs are compiled" in said,
              answer=text.decode(errors="replace"))


def starts(model: str, dtype: str, drafter: str, capacity: int, repeats: int
           ) -> tuple[list[dict[str, Any]], float]:
  """All starts, in turns; and the seconds that saving programs took."""
  settings = [f"--model={model}", f"--dtype={dtype}", f"--drafter={drafter}",
              f"--capacity={capacity}", "--rows=1"]
  runs: list[dict[str, Any]] = []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "jaxspec", "plan", *settings,
         "--topology=cpu:1", "--prompt=48", f"--save={folder / 'programs'}"],
        check=True, stdout=subprocess.DEVNULL)
    saved = time.perf_counter() - begin
    start(command("warm cache", folder, settings))     # fills the cache
    for number in range(repeats):
      for kind in KINDS:
        if kind == "cold":
          emptied = folder / f"cold {number}"
          emptied.mkdir()
          made = command(kind, emptied, settings)
        else:
          made = command(kind, folder, settings)
        runs.append(dict(kind=kind) | start(made))
        print(f"  {kind}: first token after {runs[-1]['first_seconds']:.2f} s, "
              f"{runs[-1]['compiles']} compiles, {runs[-1]['cached']} of them "
              "from the cache", flush=True)
  return runs, saved


_COMPILE = """
import json, sys
from jaxspec import planning
name, topology, rows = sys.argv[1:]
config = planning.read_config(name)
setup = planning.Setup(config, topology, planning.default_mesh(
    config, topology, int(rows)), rows=int(rows))
program = planning.make(setup, ["decode"]).programs["decode"]
print(json.dumps(dict(setup=setup.said(), seconds=program.seconds,
                      refused=program.refused)))
"""


def compiles(targets: list[str], repeats: int) -> list[dict[str, Any]]:
  """What the compiler of a target took, in fresh processes."""
  found = []
  for target in targets:
    model, _, topology = target.partition("@")
    for _ in range(repeats):
      with machine.ForeignLoad() as load:
        made = subprocess.run(
            [sys.executable, "-c", _COMPILE, model, topology, "8"],
            check=True, capture_output=True, text=True,
            env=os.environ | WITHOUT_DEVICE)
      found.append(dict(target=target, foreign=load.cores)
                   | json.loads(made.stdout.splitlines()[-1]))
      print(f"  {target}: compiled in {found[-1]['seconds']:.1f} s", flush=True)
  return found


def table(runs: list[dict[str, Any]], compiled: list[dict[str, Any]]) -> str:
  """Markdown: medians."""
  parts = ["| start | first token | whole | programs compiled | read from the "
           "cache |", "|---|---:|---:|---:|---:|"]
  for kind in KINDS:
    own = [run for run in runs if run["kind"] == kind]
    if own:
      first, whole, built, cached = (
          statistics.median(run[name] for run in own)
          for name in ("first_seconds", "seconds", "compiles", "cached"))
      parts.append(f"| {kind} | {first:.2f} s | {whole:.2f} s "
                   f"| {built - cached:.0f} | {cached:.0f} |")
  if compiled:
    parts += ["", "| decoding loop for | compiled in |", "|---|---:|"]
    for target in dict.fromkeys(one["target"] for one in compiled):
      own = [one["seconds"] for one in compiled if one["target"] == target]
      parts.append(f"| {target.replace('@', ' on ')} "
                   f"| {statistics.median(own):.1f} s |")
  return "\n".join(parts)


def main(argv: list[str]) -> None:
  del argv
  runs, saved = starts(FLAGS.model, FLAGS.dtype, FLAGS.drafter, FLAGS.capacity,
                       FLAGS.repeats)
  if len({run["answer"] for run in runs}) > 1:
    raise SystemExit("the answers differ")
  if any(run["fell_back"] for run in runs):
    raise SystemExit("saved programs were not taken")
  compiled = compiles([t for t in FLAGS.targets if t], FLAGS.compiles)
  machine.write(FLAGS.output, runs, saving_seconds=saved, compiled=compiled,
                table=table(runs, compiled))
  print(table(runs, compiled))


if __name__ == "__main__":
  define_flags()
  app.run(main)
