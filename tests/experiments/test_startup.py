# SPDX-License-Identifier: Apache-2.0
"""Starts differ in what is compiled, and in nothing else."""

import pathlib

from experiments import startup


def test_starts_differ_in_where_programs_come_from():
  folder = pathlib.Path("/x")
  made = {kind: startup.command(kind, folder, ["--rows=1"])
          for kind in startup.KINDS}
  where = ("--compilation_cache_dir", "--executables")
  rest = {kind: [a for a in made[kind] if not a.startswith(where)]
          for kind in made}
  assert rest["cold"] == rest["warm cache"] == rest["loaded"]
  assert "--compilation_cache_dir=/x/cold" in made["cold"]
  assert "--compilation_cache_dir=/x/cache" in made["warm cache"]
  assert {"--compilation_cache_dir=", "--executables=/x/programs"} <= set(
      made["loaded"])


def test_a_start_is_timed_and_its_compiles_are_read(tmp_path):
  script = ("import sys; print('Spring'); "
            "print('| compiles 38 (30 cached) |', file=sys.stderr)")
  found = startup.start(["python3", "-c", script])
  assert (found["compiles"], found["cached"]) == (38, 30)
  assert 0 < found["first_seconds"] <= found["seconds"]
  assert found["answer"] == "Spring\n" and not found["fell_back"]


def test_medians_are_tabled():
  runs = [dict(kind=kind, first_seconds=s, seconds=s + 1, compiles=9, cached=4)
          for kind in startup.KINDS for s in (1.0, 2.0, 9.0)]
  found = startup.table(runs, [dict(target="a@v5e:1x1", seconds=3.0)])
  assert found.count("| 2.00 s | 3.00 s | 5 | 4 |") == 3
  assert "| a on v5e:1x1 | 3.0 s |" in found
