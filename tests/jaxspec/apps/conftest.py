# SPDX-License-Identifier: Apache-2.0
"""A generator without a model, for tests in milliseconds."""

import sys
import types
from typing import Any

import pytest

from jaxspec.answers import Completion, TextEvent
from jaxspec.drift import DriftMonitor
from jaxspec.metrics import Stats
from jaxspec.options import Options


class FakeGenerator:
  """Answers a prompt with itself in capitals, the last prompt first."""

  loaded: dict[str, Any] = {}
  options: Options = Options()
  chat: bool = False
  prompts: list = []
  defaults: dict[str, Any] = {}
  # Raised when this many prompts are done.
  fails_after: int | None = None
  failure: type[BaseException] = KeyboardInterrupt

  @classmethod
  def load(cls, model, **settings):
    on_progress = settings.pop("on_progress")
    if on_progress is not None:
      on_progress("weights", 1, 1)
    FakeGenerator.loaded = dict(settings, model=model)
    return cls()

  def __init__(self):
    self.drift = DriftMonitor()

  def default_options(self, **given):
    return Options(**(self.defaults | given))

  def _complete(self, prompt, options):
    FakeGenerator.options = options
    text = prompt if isinstance(prompt, str) else repr(prompt)
    stats = Stats(
      prompt_tokens=len(text),
      prompt_seconds=0.01,
      new_tokens=4,
      passes=2,
      drafted=4,
      accepted=1,
      drafted_by_position=[2, 2],
      accepted_by_position=[1, 0],
      accepted_by_node=[1, 0],
      scored=6,
      draft_length=2,
      seed=options.seed,
      drafter="fake",
      task=options.task,
    )
    logprobs = [-0.5] * 4 if options.logprobs else None
    return Completion(
      text, text.upper(), [1, 2, 3, 4], "length", logprobs, stats
    )

  def generate(self, prompts, options, *, chat=False, on_completion=None):
    FakeGenerator.chat = chat
    FakeGenerator.prompts = list(prompts)
    if isinstance(options, Options):
      options = [options] * len(prompts)
    done = {}
    for at in reversed(range(len(prompts))):
      if len(done) == self.fails_after:
        raise self.failure("as asked")
      done[at] = self._complete(prompts[at], options[at])
      self.drift.add(done[at].stats)
      if on_completion is not None:
        on_completion(at, done[at])
    return [done[at] for at in range(len(prompts))]

  def stream(self, prompt, options, *, chat=False, hold_until_settled=False):
    FakeGenerator.chat = chat
    completion = self._complete(prompt, options)
    if not hold_until_settled:
      yield TextEvent("a guess", settled=False)
    for at, word in enumerate(completion.text.split(" ")):
      if self.fails_after == 0:
        raise self.failure("as asked")
      yield TextEvent(word + ".", settled=True,
                      replaces=0 if at or hold_until_settled else 7)
    yield TextEvent("", settled=True, completion=completion)


@pytest.fixture
def fake(monkeypatch):
  """Puts the fake in place of the real generator, and returns its class."""
  module = types.ModuleType("jaxspec.generator")
  monkeypatch.setitem(module.__dict__, "Generator", FakeGenerator)
  for name in ("defaults", "fails_after", "failure"):
    monkeypatch.setattr(FakeGenerator, name, getattr(FakeGenerator, name))
  monkeypatch.setitem(sys.modules, "jaxspec.generator", module)
  return FakeGenerator
