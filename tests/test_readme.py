# SPDX-License-Identifier: Apache-2.0
"""What the README and the configs say is true of the code they speak of."""

import ast
import functools
import importlib
import inspect
import pathlib
import re
import shlex

import pytest
from absl import app, flags

from jaxspec import __main__ as front_door
from jaxspec import drafters, naming
from jaxspec.apps import launch

ROOT = pathlib.Path(front_door.__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def fences(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(text: str) -> list[list[str]]:
  """Returns the words of every `python -m jaxspec` in a piece of text."""
  lines = re.sub(r"\\\n\s*", " ", text).splitlines()
  return [
    shlex.split(line, comments=True)[3:]
    for line in lines
    if line.strip().startswith("python -m jaxspec ")
  ]


def parse(words: list[str]):
  name, *argv = words
  assert name in front_door.commands()
  app = importlib.import_module(f"jaxspec.apps.{name}")
  return launch.parse(app, argv)


@pytest.mark.parametrize(
  "words", commands("\n".join(fences("sh"))), ids=" ".join
)
def test_command_lines_of_the_readme_parse(words, monkeypatch):
  monkeypatch.chdir(ROOT)
  settings = parse(words)
  assert settings is not None
  assert settings.profile_dir if words[0] == "profile" else settings.model


def experiments(text: str) -> list[list[str]]:
  """The words of each `python -m experiments.*`, in fences and in sentences."""
  fenced = re.sub(r"\\\n\s*", " ", "\n".join(fences("sh"))).splitlines()
  spoken = re.findall(r"`(python -m experiments\.[^`]*)`", text)
  lines = [line for line in [*fenced, *spoken]
           if line.strip().startswith("python -m experiments.")]
  return [shlex.split(line, comments=True)[2:] for line in lines]


@pytest.mark.parametrize("words", experiments(README), ids=" ".join)
def test_experiments_of_the_readme_parse(words, monkeypatch):
  """With all flags that are required."""
  name, *argv = words
  if name == "experiments.streams":
    assert "--questions=gsm8k.jsonl" in argv
  assert app             # imported before, for it defines flags of its own
  known = flags.FlagValues()
  for kind in ("string", "integer", "float", "boolean", "bool", "enum", "list",
               "multi_string", "multi_integer", "multi_enum", "multi_float"):
    define = getattr(flags, f"DEFINE_{kind}")
    monkeypatch.setattr(flags, f"DEFINE_{kind}",
                        functools.partial(define, flag_values=known))
  module = importlib.import_module(name)
  if hasattr(module, "define_flags"):
    module.define_flags()
    known([name, *argv])
    return
  # Others define them when they are imported.
  source = inspect.getsource(module)
  for word in argv:
    assert f'"{word[2:].partition("=")[0]}"' in source, word
  for flag in re.findall(r'DEFINE_\w+\(\s*"(\w+)"[^)]*required=True', source):
    assert any(word.startswith(f"--{flag}=") for word in argv), flag


def test_the_readme_has_command_lines():
  assert len(commands("\n".join(fences("sh")))) >= 4
  assert len(experiments(README)) >= 10


def test_links_lead_somewhere():
  links = re.findall(r"\]\(([^)#]+)", README)
  assert links
  for link in links:
    if "://" not in link:
      assert (ROOT / link).exists(), link


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text()
  used = re.findall(r"\bmake ([a-z]+)", README)
  assert {"demo", "test"} <= set(used)
  for target in used:
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_extras_exist():
  import tomllib

  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  for extra in re.findall(r"'\.\[(\w+)\]'", README):
    assert extra in project["optional-dependencies"], extra


def test_library_examples_use_what_there_is():
  for code in fences("python"):
    for node in ast.walk(ast.parse(code)):
      if isinstance(node, ast.ImportFrom):
        module = importlib.import_module(node.module)
        for name in node.names:
          assert hasattr(module, name.name), name.name


@pytest.mark.parametrize(
  "flag, folder", [("cache", "caches"), ("verifier", "verifiers")]
)
def test_named_files_exist(flag, folder):
  (row,) = re.findall(rf"`--{flag}=(.*?) \|", README)
  for name in re.findall(r"\w+", row):
    assert (ROOT / "jaxspec" / folder / f"{name}.py").exists(), name


def test_every_drafter_is_in_the_table():
  """By its name, with options that it has."""
  _, table = README.split("| `--drafter=` | drafts |\n")
  rows = re.findall(r"^\| `(.*?)` \|", table.split("\n\n")[0], re.MULTILINE)
  found = dict(naming.choose("drafter", row, drafters.names()) for row in rows)
  assert sorted(found) == drafters.names()
  for name, options in found.items():
    kind = getattr(importlib.import_module(f"jaxspec.drafters.{name}"),
                   naming.camel_case(name))
    known = (inspect.signature(kind.build).parameters
             if hasattr(kind, "build") else kind.__dataclass_fields__)
    naming.options(name, options, [*known])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_read_by_the_command_they_show(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  docstring = ast.get_docstring(ast.parse(path.read_text()))
  (words,) = commands(docstring)
  (config,) = (w for w in words if w.startswith("--config="))
  # (What stands behind a colon is the config's own argument.)
  assert config.partition(":")[0] == f"--config=configs/{path.name}"
  settings = parse(words)
  if words[0] == "decode":
    assert settings.drafter.startswith("prompt_lookup")
  else:
    assert settings.column and settings.follow
