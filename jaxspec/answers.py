# SPDX-License-Identifier: Apache-2.0
"""One request on the host: from token ids to text, statistics and an end."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxspec.metrics import Stats
from jaxspec.options import Options


@dataclasses.dataclass
class Completion:
  """An answer.

  Attributes:
    prompt: the prompt as text, rendered by the chat template where there is
      one.
    text: the answer without what ended it.
    token_ids: the answer's tokens, an end token included.
    finish_reason: "stop" (an end token or stop string), "length" (as many
      tokens as were asked for) or "capacity" (no more room in the cache).
    logprobs: log-probability of each token under the model, before any warp;
      None unless asked for.
    stats: counts and times.
  """

  prompt: str
  text: str
  token_ids: list[int]
  finish_reason: str
  logprobs: list[float] | None
  stats: Stats


@dataclasses.dataclass
class TextEvent:
  """New text of a stream.

  Attributes:
    text: what follows the settled text so far.
    settled: whether it stands for good. Text that is not is replaced by the
      next event.
    replaces: characters of provisional text this event takes the place of.
    completion: on the last event.
  """

  text: str
  settled: bool = True
  replaces: int = 0
  completion: Completion | None = None


class Answer:
  """What the host knows of one request."""

  def __init__(self, index: int, prompt: str, prompt_ids: list[int],
               options: Options, tokenizer: Any, eos_ids: Sequence[int], *,
               draft_length: int, verifier: str, drafter: str,
               adapter: str = ""):
    self.index, self.prompt, self.prompt_ids = index, prompt, prompt_ids
    self.options, self._tokenizer = options, tokenizer
    self.completion: Completion | None = None
    self._stops = {*(() if options.ignore_eos else eos_ids),
                   *options.stop_token_ids}
    self._stats = Stats(prompt_tokens=len(prompt_ids), seed=options.seed,
                        verifier=verifier, draft_length=draft_length,
                        drafter=drafter, task=options.task, adapter=adapter)
    self._stream = tokenizer.stream() if tokenizer else None
    self._taken = 0            # tokens already seen
    self._text = ""            # their text, as far as it is whole characters
    self._shown = 0            # characters of it already handed out
    self._guessed = 0          # provisional characters on display
    # The tokens they are, and since when each is there.
    self._displayed: list[tuple[int, float]] = []
    self._asked = time.perf_counter()
    self._first: float | None = None

  def begun(self, seconds: float) -> None:
    """Notes that the prompt was read, in `seconds`, with its first token."""
    self._first = time.perf_counter()
    self._stats.prompt_seconds = seconds
    self._stats.first_token_seconds = self._first - self._asked

  def take(self, view: Any, row: int) -> Iterator[TextEvent]:
    """Reads what `row` of a batch holds beyond what was seen before.

    Yields:
      At most one event. After the last, `completion` is there.
    """
    start, end = view.prompt_length[row], view.length[row]
    ids = view.tokens[row, start:end].tolist()
    new, self._taken = ids[self._taken:], len(ids)
    self._display(new, settled=True)
    ended = bool(view.done[row])
    cut = self._read(ids, new, ended)
    if cut is not None or ended:
      self._complete(view, row, ids, cut)
    whole = len(self._text) if self.completion else self._safe()
    text, self._shown = self._text[self._shown:whole], whole
    if text or self._guessed or self.completion:
      yield TextEvent(text, True, self._guessed, self.completion)
      self._guessed = 0

  def guess(self, ids: Sequence[int]) -> Iterator[TextEvent]:
    """Yields the text that drafted `ids` would add."""
    ids = [int(i) for i in ids]
    if self._tokenizer is None or not ids:
      return
    text = self._tokenizer.decode(
        ids[:-1] if ids[-1] in self._stops else ids)
    if text:
      self._display(ids)
      replaced, self._guessed = self._guessed, len(text)
      yield TextEvent(text, False, replaced)

  def _display(self, ids: Sequence[int], settled: bool = False) -> None:
    """Counts what is put on display, and what is taken back from it."""
    now, old = time.perf_counter(), self._displayed
    same = 0
    while same < min(len(ids), len(old)) and ids[same] == old[same][0]:
      same += 1
    self._stats.retracted += len(old) - same
    self._stats.retracted_seconds += sum(now - since
                                         for _, since in old[same:])
    if settled:
      self._displayed = []
      return
    self._stats.shown += len(ids) - same
    self._displayed = [*old[:same], *((i, now) for i in ids[same:])]

  def _read(self, ids: list[int], new: list[int], ended: bool) -> int | None:
    """Adds new tokens to the text.

    Returns:
      How many tokens the answer keeps if a stop string ends it, else None.
    """
    if self._stream is None:
      return None
    for number, token in enumerate(new, len(ids) - len(new) + 1):
      last = ended and number == len(ids)
      if not (last and token in self._stops):
        self._text += self._stream.push(token)
      if last:
        self._text += self._stream.finish()
      found = [at for at in map(self._text.find, self.options.stop) if at >= 0]
      if found:
        self._text = self._text[:min(found)]
        return number
    return None

  def _safe(self) -> int:
    """Characters that cannot turn out to begin a stop string."""
    held = 0
    for stop in self.options.stop:
      for size in range(1, len(stop)):
        if self._text.endswith(stop[:size]):
          held = max(held, size)
    return max(self._shown, len(self._text) - held)

  def _complete(self, view, row, ids, cut):
    now = time.perf_counter()
    counters, stats = view.counters, self._stats
    kept = len(ids) if cut is None else cut
    stats.new_tokens, stats.dropped = kept, len(ids) - kept
    stats.passes = int(counters.passes[row])
    stats.drafted_by_position = counters.drafted[row].tolist()
    stats.accepted_by_position = counters.accepted[row].tolist()
    stats.drafted = int(counters.nodes[row])
    stats.accepted = int(np.sum(counters.accepted[row]))
    stats.accepted_by_node = counters.used[row, 1:].tolist()
    stats.scored = int(counters.scored[row])
    stats.decode_seconds = now - (self._first or now)
    stats.wall_seconds = now - self._asked
    start = view.prompt_length[row]
    logprobs = view.logprobs[row, start:start + kept].tolist()
    if cut is not None or ids[-1] in self._stops:
      reason = "stop"
    else:
      full = kept < self.options.max_new_tokens
      reason = "capacity" if full else "length"
    self.completion = Completion(
        self.prompt, self._text, ids[:kept], reason,
        logprobs if self.options.logprobs else None, stats)
