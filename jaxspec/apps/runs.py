# SPDX-License-Identifier: Apache-2.0
"""A run of training: its data, its folder, its curve.

Not a command itself: it defines no `main`.
"""

import json
import os
import pathlib
import re
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxspec.apps import launch
from jaxspec.errors import InputError

_SETTINGS = "run.json"


def open_folder(settings: types.SimpleNamespace, may_change: Collection[str],
                once: Mapping[str, Any] | None = None) -> pathlib.Path:
  """The folder of this run, or one that can become it.

  Args:
    may_change: settings that may differ between a run and its continuation.
    once: settings that older runs do not mention, and what they were.

  Raises:
    InputError: it holds another run, or something else.
  """
  folder = pathlib.Path(settings.output).expanduser().absolute()
  file, chosen = folder / _SETTINGS, _identity(settings, may_change)
  if file.exists():
    if not settings.resume:
      raise InputError(
        f"--output={settings.output} holds a run; pass --resume to go on with "
        "it, or name another folder"
      )
    try:
      found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
      raise InputError(f"{file} cannot be read; name another folder") from e
    for name in chosen:
      begun = found.get(name, (once or {}).get(name))
      if begun != json.loads(json.dumps(chosen[name])):
        raise InputError(
          f"{settings.output} is a run with --{name}={begun}, and "
          f"{chosen[name]} is asked for; give what it was begun with, or name "
          "another folder"
        )
    return folder
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"--output={settings.output} is not empty; name another")
  return folder


def begin(folder: pathlib.Path, settings: types.SimpleNamespace,
          may_change: Collection[str]) -> None:
  """Makes the folder, and notes what the run is.

  Raises:
    InputError: it cannot be written.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / _SETTINGS, _identity(settings, may_change))
  except OSError as e:
    raise InputError(f"cannot write {folder}: {e.strerror}") from e


def _identity(settings: types.SimpleNamespace, may_change: Collection[str]
              ) -> dict[str, Any]:
  return {k: v for k, v in vars(settings).items() if k not in may_change}


def files(data: str) -> Sequence[str | os.PathLike]:
  """A file, or the JSONL files of a data set on the hub."""
  if os.path.exists(os.path.expanduser(data)) or not re.fullmatch(
    r"[\w.-]+/[\w.-]+", data
  ):
    return [data]
  import huggingface_hub

  try:
    place = huggingface_hub.snapshot_download(
      data, repo_type="dataset", allow_patterns=["*.jsonl"]
    )
  except Exception as e:  # The hub has no one class of errors.
    reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e)
    raise InputError(
      f"--data={data} is no file here, and cannot be had as a data set of the "
      f"hub ({reason:.200})"
    ) from e
  files = sorted(pathlib.Path(place).rglob("*.jsonl"))
  if not files:
    raise InputError(f"--data={data} is a data set without JSONL files; save "
                     "it as one, and pass the file")
  return files


def draw(folder: pathlib.Path, agreement: str) -> None:
  """The curve of learning as a picture, where matplotlib is installed.

  Args:
    agreement: what the shares of the curve are called.
  """
  try:
    import matplotlib
  except ImportError:
    launch.say("no picture of the curve: pip install 'jaxspec[plot]'")
    return
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  from jaxspec import training

  lines = training.read_curve(folder)
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
  size = max(len(lines) // 50, 1)
  for name in dict.fromkeys(n for line in lines for n in line["heads"]):
    for axis, pick in (
      (axes[0], lambda h: h["loss"]),
      (axes[1], lambda h: 100 * h["agreement"][0]),
    ):
      places, means = [], []
      for at in range(0, len(lines), size):
        values = [
          pick(line["heads"][name]) for line in lines[at:at + size]
          if name in line["heads"]
        ]
        if values:
          places.append(at + 0.5 * size)
          means.append(sum(values) / len(values))
      axis.plot(places, means, label=name)
  axes[0].set(xlabel="step", ylabel="loss, nats")
  axes[1].set(xlabel="step", ylabel=agreement)
  axes[1].legend()
  figure.savefig(folder / "curve.png", dpi=120)
  plt.close(figure)


def write(file: pathlib.Path, content: Any) -> None:
  """Writes JSON, whole or not at all."""
  new = file.with_name(file.name + ".new")
  new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
  new.replace(file)


def write_lines(file: pathlib.Path, items: Sequence[Any]) -> None:
  """Writes a line of JSON an item, all or none."""
  new = file.with_name(file.name + ".new")
  with open(new, "w", encoding="utf-8") as out:
    for item in items:
      out.write(json.dumps(item, ensure_ascii=False) + "\n")
  new.replace(file)
