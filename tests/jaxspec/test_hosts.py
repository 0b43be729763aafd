# SPDX-License-Identifier: Apache-2.0
"""Several processes on this machine: the same text, and none left waiting."""

import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxspec import __main__ as front_door
from jaxspec import hosts, sharding
from jaxspec.checkpoint import hf
from jaxspec.errors import InputError
from jaxspec.generator import Generator, Options
from jaxspec.models import weights
from jaxspec.models.transformer import random_source
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compiles")

WORKER = pathlib.Path(__file__).with_name("hosts_worker.py")
# Heads, and so the axis `tensor`, for all of eight devices.
CONFIG = tiny_config(depth=2, width=64, heads=8, kv_heads=8, mlp=64)
NEW = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A Hugging Face folder without a tokenizer: prompts are ids."""
  folder = tmp_path_factory.mktemp("model")
  source, shapes = random_source(0, scale=1.5), weights.shapes(CONFIG)
  hf.write(folder, CONFIG, lambda path: source(path, shapes[path], None))
  return folder


def prompts(count):
  draw = np.random.default_rng(0).integers
  return [draw(64, size=draw(3, 16)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def answers(model):
  """What one process and one device say, plainly."""
  def say(ids):
    return [c.token_ids for c in Generator.load(
        str(model), dtype="float32", rows=4, capacity=64).generate(
            ids, Options(max_new_tokens=NEW, ignore_eos=True))]

  return say


class Job:
  """Processes that are meant to meet."""

  def __init__(self, folder, processes, devices, argv):
    with socket.create_server(("127.0.0.1", 0)) as free:
      self.coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
           "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path),
           "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
           + f" --xla_force_host_platform_device_count={devices}"}
    self.logs = [folder / f"log-{i}" for i in range(processes)]
    self.processes = []
    for i in range(processes):
      with self.logs[i].open("w") as log:
        self.processes.append(subprocess.Popen(
            [sys.executable, str(WORKER),
             *argv(self.coordinator, processes, i)],
            env=env, cwd=folder, stderr=log,
            stdout=(folder / f"out-{i}").open("w")))

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    for process in self.processes:
      process.kill()
      process.wait()

  def wait(self, process, timeout=3000):
    return self.processes[process].wait(timeout)

  def said(self, process):
    return self.logs[process].read_text()

  def until(self, done, timeout=3000):
    end = time.monotonic() + timeout
    while not done():
      for at, process in enumerate(self.processes):
        assert process.poll() is None, self.said(at)
      assert time.monotonic() < end
      time.sleep(0.02)


def decoding(tmp_path, model, mesh, count, *flags):
  """Returns what starts a job that decodes so many prompts."""
  given = tmp_path / "in.jsonl"
  given.write_text("".join(
      json.dumps({"prompt": ids}) + "\n" for ids in prompts(count)))

  def argv(coordinator, processes, process):
    # Only the first looks at prompts and results.
    files = ([f"--prompts={given}", f"--output={tmp_path / 'out.jsonl'}"]
             if process == 0 else ["--prompts=elsewhere", "--output=nowhere"])
    return ["decode", f"--model={model}", "--dtype=float32", "--rows=4",
            "--capacity=64", f"--max_new_tokens={NEW}", "--ignore_eos",
            "--temperature=0", "--compilation_cache_dir=", f"--mesh={mesh}",
            *files, f"--coordinator={coordinator}",
            f"--processes={processes}", f"--process={process}", *flags]

  return argv


def results(tmp_path):
  lines = (tmp_path / "out.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.medium
def test_two_processes_share_every_weight(tmp_path, model, answers):
  """And read their own half of it."""
  argv = decoding(tmp_path, model, "tensor=8", 4,
                  "--drafter=prompt_lookup:length=4")
  with Job(tmp_path, 2, 4, argv) as job:
    assert [job.wait(i) for i in (0, 1)] == [0, 0], job.said(0)
  found = results(tmp_path)
  assert [r["token_ids"] for r in found] == answers(prompts(4))
  assert sum(r["stats"]["accepted"] for r in found) > 0
  # The first one tells.
  assert ["4 requests" in job.said(i) for i in (0, 1)] == [True, False]
  size = {path: 4 * math.prod(shape)
          for path, shape in weights.shapes(CONFIG).items()}
  norms = sum(n for path, n in size.items() if path.endswith("norm"))
  for i in (0, 1):
    (read,) = re.findall(r"read (\d+) bytes", job.said(i))
    assert int(read) == norms + (sum(size.values()) - norms) // 2


DRAFTERS = ("autoregressive", "prompt_lookup:length=4",
            "prompt_lookup:length=4,branches=3", "early_exit:layer=1,length=3",
            "adaptive:drafter=[prompt_lookup]",
            "draft_model:model=[self:int8],length=3")


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices, mesh", [
    (2, 4, dict(data=4, tensor=2)), (4, 2, dict(data=2, tensor=4))])
def test_several_processes_say_what_one_says(
    tmp_path, model, answers, processes, devices, mesh):
  """Whatever drafts, and though rows are refilled while others go on."""
  options = [dict(drafter=drafter) for drafter in DRAFTERS]
  options.append(dict(drafter=DRAFTERS[1], cache="paged:page=8"))
  given = tmp_path / "given"
  given.write_text(json.dumps(dict(
      model=str(model), mesh=mesh, prompts=prompts(6), new=NEW,
      options=options)))
  with Job(tmp_path, processes, devices, lambda *where: [
      "several", *map(str, where), str(given), f"said-{where[2]}"]) as job:
    for i in range(processes):
      assert job.wait(i) == 0, job.said(i)
  plain = answers(prompts(6))
  for i in range(processes):
    found = json.loads((tmp_path / f"said-{i}").read_text())
    assert len(found) == len(options)
    for asked, (tokens, accepted) in zip(options, found):
      assert tokens == plain, asked
      assert (accepted > 0) == (asked["drafter"] != "autoregressive"), asked


@pytest.mark.slow
def test_a_stream_of_several_processes_is_that_of_one(tmp_path, tiny_model):
  """What is shown early is the same, however many there are."""
  flags = [f"--model={tiny_model}", "--dtype=float32", "--capacity=64",
           "--max_new_tokens=16", "--ignore_eos", "--prompt=abcabc",
           "--drafter=early_exit:layer=2,stop=0.01,show=0.0", "--emit=jsonl",
           "--compilation_cache_dir=", "--mesh=tensor=2"]

  def argv(coordinator, processes, process):
    if processes == 1:
      return ["decode", *flags]
    return ["decode", *flags, f"--coordinator={coordinator}",
            f"--processes={processes}", f"--process={process}"]

  told = []
  for processes in (1, 2):
    with Job(tmp_path, processes, 2 // processes, argv) as job:
      for i in range(processes):
        assert job.wait(i) == 0, job.said(i)
    lines = (tmp_path / "out-0").read_text().splitlines()
    told.append([(e["text"], e["settled"]) for e in map(json.loads, lines)])
  assert told[0] == told[1]
  assert any(not settled for _, settled in told[0])
  assert (tmp_path / "out-1").read_text() == ""


# One is gone.


def test_who_is_killed_is_named_by_all(tmp_path):
  """Though nothing they do fails."""
  with Job(tmp_path, 3, 1, lambda *where: ["sit", *map(str, where)]) as job:
    job.until(lambda: all((tmp_path / f"heard-{i}").exists()
                          for i in range(3)))
    job.processes[1].kill()
    start = time.monotonic()
    for i in (0, 2):
      assert job.wait(i, 30) == hosts.LOST
      assert f"process 1 ({socket.gethostname()}, pid " \
             f"{job.processes[1].pid}) is gone" in job.said(i)
    assert time.monotonic() - start < 30
  assert {(tmp_path / f"heard-{i}").read_text() for i in range(3)} == {"0"}


@pytest.mark.medium
def test_processes_that_were_told_unlike_things_stop(tmp_path, model):
  argv = decoding(tmp_path, model, "tensor=2", 1)
  with Job(tmp_path, 2, 1, lambda coordinator, processes, process: [
      *argv(coordinator, processes, process), f"--seed={process}"]) as job:
    assert [job.wait(i) for i in (0, 1)] == [hosts.LOST, 2], job.said(0)
    assert "--seed=1 differs from the 0 of process 0" in job.said(1)
    assert f"pid {job.processes[1].pid}) ended with status 2" in job.said(0)


@pytest.mark.slow
@pytest.mark.parametrize("victim, how", [
    (1, signal.SIGKILL), (1, signal.SIGTERM), (0, signal.SIGKILL)])
def test_what_a_killed_job_finished_is_kept(
    tmp_path, model, answers, victim, how):
  """And the rest is decoded by the next, each prompt once."""
  count, partial = 80, tmp_path / "out.jsonl.partial"
  argv = decoding(tmp_path, model, "data=2,tensor=2", count, "--resume")
  with Job(tmp_path, 2, 2, argv) as job:
    job.until(lambda: partial.exists() and len(
        partial.read_bytes().splitlines()) > 3)
    job.processes[victim].send_signal(how)
    start = time.monotonic()
    assert job.wait(1 - victim, 30) != 0
    assert time.monotonic() - start < 30
    assert f"process {victim} (" in job.said(1 - victim)
    assert " is gone" in job.said(1 - victim)
  kept = partial.read_bytes().splitlines()
  assert 3 < len(kept) <= count
  with Job(tmp_path, 2, 2, argv) as job:
    assert [job.wait(i) for i in (0, 1)] == [0, 0], job.said(0)
  assert f"{count - len(kept) + 1} requests" in job.said(0)
  assert [r["token_ids"] for r in results(tmp_path)] == answers(prompts(count))


# Flags.


@pytest.mark.parametrize("flags, words", [
    (["--coordinator=a:1"], "--processes is missing"),
    (["--process=1"], "--coordinator is missing"),
    (["--coordinator=a", "--processes=2", "--process=0"], "must be HOST:PORT"),
    (["--coordinator=a:1", "--processes=2", "--process=2"], "in [0, 1]"),
    (["--distributed=maybe"], "auto"),
])
def test_wrong_flags_are_one_sentence(flags, words, capsys):
  assert front_door.main(["decode", "--prompt=x", *flags]) == 2
  err = capsys.readouterr().err
  assert words in err and err.count("\n") == 1


# One process.


def test_alone_one_agrees_with_oneself():
  assert hosts.count() == 1 and hosts.index() == 0
  assert hosts.agree(lambda: (1, 2)) == (1, 2)
  assert hosts.together(lambda: 7) == 7


def test_what_is_fetched_is_whole():
  mesh = sharding.make_mesh({"data": 4})
  tree = {"a": sharding.place(np.arange(8), ("rows",), mesh), "b": 3}
  found = hosts.fetch(tree)
  np.testing.assert_array_equal(found["a"], np.arange(8))
  assert found["b"] == 3
  np.testing.assert_array_equal(hosts._gathered(mesh)([tree["a"]])[0],
                                np.arange(8))


def test_shards_are_asked_for_once():
  asked = []

  class Disk:
    shape = (8, 4)

    def __getitem__(self, index):
      asked.append(index)
      return np.arange(32.0).reshape(8, 4)[index]

  mesh = sharding.make_mesh({"data": 4, "tensor": 2})
  placed = sharding.place(Disk(), ("mlp", None), mesh)
  assert len(asked) == 2
  np.testing.assert_array_equal(placed, np.arange(32.0).reshape(8, 4))


def test_a_mesh_leaves_no_process_out(monkeypatch):
  class Device:
    def __init__(self, process_index):
      self.process_index = process_index

  devices = [Device(i // 4) for i in range(8)]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  with pytest.raises(InputError, match="all 8 devices, as data=2,tensor=4"):
    sharding.make_mesh({"tensor": 4})
  assert sharding.make_mesh({"data": 4, "tensor": 2}).size == 8
