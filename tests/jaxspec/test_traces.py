# SPDX-License-Identifier: Apache-2.0
"""The time of a trace goes to the scopes that it was spent in."""

import jax
import pytest

from jaxspec import profiling, traces
from jaxspec.errors import InputError
from jaxspec.generator import Generator
from jaxspec.models.transformer import Transformer, random_source
from jaxspec.options import Options
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A trace of a decoding that was compiled before."""
  folder = tmp_path_factory.mktemp("trace")
  model = Transformer(tiny_config(depth=1), random_source(0, scale=1.5))
  made = Generator(model, rows=1, capacity=64, drafter="recycling:nodes=6")
  options = Options(max_new_tokens=32, ignore_eos=True)
  for body in (profiling.trace(None), profiling.trace(folder)):
    with body:
      (found,) = made.generate([[5, 9, 5, 9, 5]], options)
  assert found.stats.accepted > 0
  return folder


@pytest.mark.slow
def test_stages_of_a_real_run_are_found(folder):
  taken = traces.read(traces.files(folder), profiling.SCOPES)
  decode = [one for one in taken if one.program == "jit_decode"]
  seconds = traces.by_scope(decode)
  assert set(profiling.SCOPES) <= set(seconds)
  assert all(seconds[scope] > 0 for scope in profiling.SCOPES)
  assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
  # What is in a loop's body is not counted once more with the loop.
  assert sum(one.seconds for one in decode) < 5
  products = [one for one in decode if "dot_general" in one.name]
  assert products and all(one.scope == "score" for one in products)
  assert {one.scope for one in taken if one.program != "jit_decode"} <= {
      "", *profiling.SCOPES}


@pytest.mark.medium
def test_rounds_are_marked(folder):
  (file,) = traces.files(folder)
  steps = [event for plane in jax.profiler.ProfileData.from_file(
      str(file)).planes for line in plane.lines for event in line.events
           if event.name == "decode"]
  numbers = sorted(dict(event.stats)["step_num"] for event in steps)
  assert numbers and len(set(numbers)) == len(numbers)


# A trace as a TPU writes it: operations on a line of their own, each kind of
# them with the name that jax gave it.


def number(value: int) -> bytes:
  found = b""
  while value >= 128:
    found, value = found + bytes([value & 127 | 128]), value >> 7
  return found + bytes([value])


def field(at: int, value) -> bytes:
  if isinstance(value, int):
    return number(at << 3) + number(value)
  data = value.encode() if isinstance(value, str) else value
  return number(at << 3 | 2) + number(len(data)) + data


def message(*fields) -> bytes:
  return b"".join(field(at, value) for at, value in fields)


def entry(key: int, value: bytes) -> bytes:
  return message((1, key), (2, value))


def event(kind: int, start: int, duration: int) -> bytes:
  return message((1, kind), (2, start), (3, duration))


def kind(key: int, name: str, path: str) -> bytes:
  return entry(key, message((1, key), (2, f"%{name} = f32[8]"), (4, name),
                            (5, message((1, 1), (5, path))),
                            (5, message((1, 2), (3, 77)))))


def tpu_trace() -> bytes:
  names = [(5, entry(1, message((1, 1), (2, "tf_op")))),
           (5, entry(2, message((1, 2), (2, "program_id")))),
           (5, entry(3, message((1, 3), (2, "Hlo Proto"))))]
  kinds = [(4, kind(1, "while.1", "jit(decode)/while")),
           (4, kind(2, "fusion.2", "jit(decode)/while/body/score/dot:")),
           (4, kind(3, "commit_kv", "jit(decode)/while/body/commit/x:")),
           (4, kind(4, "copy.4", ""))]
  line = message((2, "XLA Ops"), (4, event(1, 100, 1000)),
                 (4, event(2, 100, 600)), (4, event(3, 700, 300)),
                 (4, event(4, 1000, 60)), (4, event(2, 2000, 400)))
  # The same time again, as a whole: not to be counted.
  modules = message((2, "XLA Modules"), (4, event(1, 0, 5000)))
  copy = message((1, "copy.4"), (2, "copy"), (35, 9))
  user = message((1, "fusion.2"), (2, "fusion"), (35, 10), (36, number(9)),
                 (7, message((2, "jit(decode)/while/body/score/dot"))))
  body = message((5, 1), (2, copy), (2, user))
  module = message((1, "jit_decode"), (3, body))
  program = entry(77, message(
      (1, 77), (2, "jit_decode(77)"),
      (5, message((1, 3), (6, message((1, module)))))))
  return message(
      (1, message((2, "/device:TPU:0"), (3, modules), (3, line), *kinds,
                  *names)),
      (1, message((2, "/host:metadata"), (4, program), *names)))


def test_operations_of_a_tpu(tmp_path):
  file = tmp_path / "host.xplane.pb"
  file.write_bytes(tpu_trace())
  taken = traces.read([file], profiling.SCOPES)
  assert {one.program for one in taken} == {"jit_decode"}
  assert {one.operation: (one.scope, round(one.seconds * 1e12), one.times)
          for one in taken} == {
              "fusion.2": ("score", 1000, 2), "commit_kv": ("commit", 300, 1),
              "while.1": ("", 40, 1), "copy.4": ("score", 60, 1)}
  assert traces.by_scope(taken)["score"] == pytest.approx(1060e-12)


def test_a_folder_without_a_trace_is_named(tmp_path):
  with pytest.raises(InputError, match="holds no trace"):
    traces.files(tmp_path)
  for name, data in (("cut", tpu_trace()[:-5]), ("text", b"once upon a time")):
    file = tmp_path / f"{name}.xplane.pb"
    file.write_bytes(data)
    with pytest.raises(InputError, match=f"{name}.*is no trace"):
      traces.read([file], profiling.SCOPES)


def test_the_newest_trace_is_read(tmp_path):
  import os
  for day in (1, 2):
    run = tmp_path / "plugins" / "profile" / str(day)
    run.mkdir(parents=True)
    for host in "ab":
      (run / f"{host}.xplane.pb").write_bytes(b"")
      os.utime(run / f"{host}.xplane.pb", (day, day))
  assert [(f.parent.name, f.name[0]) for f in traces.files(tmp_path)] == [
      ("2", "a"), ("2", "b")]
