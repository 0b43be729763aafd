# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: the front door of notebooks, programs and apps.

  generator = Generator.load("smollm2-135m", drafter="prompt_lookup", rows=8)
  for completion in generator.generate(["Once upon a time", "def fib(n):"]):
    print(completion.text)
"""

import contextlib
import functools
import hashlib
import itertools
import os
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Generator as Yielding
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import (
  caches,
  drafters,
  hosts,
  layer_stream,
  loop,
  naming,
  opening,
  pacing,
  profiling,
  sharding,
  verifiers,
)
from jaxspec.answers import Answer, Completion, TextEvent
from jaxspec.base import DecodeState, Drafter, Emission, Verifier
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.drift import DriftMonitor
from jaxspec.errors import InputError, nearest
from jaxspec.first_tokens import FirstTokens
from jaxspec.kernels import choose, on
from jaxspec.models.transformer import Source, Transformer, abstract_source
from jaxspec.options import Options, as_request
from jaxspec.pacing import Meter

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

CHUNK = 512
_BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, CHUNK)
_DTYPES = ("bfloat16", "float32")
STOPS, BIASES = 16, 64
PREFILLS = ("chunk_major", "layer_major")


class Generator:
  """A model, its tokenizer, and a batch of fixed rows to decode in.

  Attributes:
    model: the transformer, its weights on the mesh.
    tokenizer: text to ids and back; None for a checkpoint without one, which
      then takes and gives token ids alone.
    rows: prompts decoded side by side.
    capacity: most tokens of a prompt and its answer together.
    drift: acceptance of all that was generated so far, by task.
    adapter: the folder of what was merged into the model, "" for none.
    defaults: the checkpoint's generation config.
    kernels: what was asked for of them, see `jaxspec.kernels.choose`.
  """

  def __init__(self, model: Transformer, tokenizer: Any = None, *,
               drafter: str | Drafter = "autoregressive",
               verifier: str | Verifier = "exact", rows: int = 1,
               capacity: int | None = None, cache: str = "contiguous",
               cache_dtype: str | None = None,
               prefill: str = "chunk_major",
               first_tokens: FirstTokens | None = None,
               mesh: jax.sharding.Mesh | None = None,
               kernels: str | None = None,
               executables: str | None = None,
               eos_ids: Sequence[int] = (),
               defaults: Mapping[str, Any] | None = None,
               adapter: str = ""):
    """Wraps a model that is already in memory; `load` reads one.

    Args:
      drafter: a drafter, or text for `drafters.parse`.
      verifier: a verifier, or text for `verifiers.parse`.
      capacity: None takes 2048, or the model's context where that is shorter.
      cache: text for `caches.parse`, e.g. `paged:page=64,pages=100`. Prompts
        wait where a cache has no room for them yet.
      cache_dtype: of keys and values; None for what `caches.stored_in` says.
      prefill: `chunk_major` takes a prompt chunk by chunk through all layers;
        `layer_major` takes all of it through the lower layers first, so that
        a head there can say at once what may come first (see
        `jaxspec.opening`). For drafters with a head on a lower layer.
      first_tokens: what answers mostly begin with, shown by `stream` while
        the prompt is not read yet.
      mesh: where the model lies.
      kernels: what programs are made of, see `jaxspec.kernels.choose`.
      executables: a folder of compiled programs, see `jaxspec.executables`;
        where they are for another setup, `executables_problem` says so.
      eos_ids: the model's own end tokens.
      defaults: the checkpoint's generation config.
      adapter: the name of what was merged into the model, for statistics.

    Raises:
      InputError: a name that does not exist, or a size that does not fit.
    """
    context = model.config.context
    self.capacity = min(2048, context) if capacity is None else capacity
    self.model, self.tokenizer, self.rows = model, tokenizer, rows
    self.mesh = sharding.make_mesh() if mesh is None else mesh
    self.kernels = kernels
    self._target = choose(kernels, self.mesh)
    self.eos_ids = tuple(eos_ids)
    self.adapter = adapter
    self.defaults = dict(defaults or {})
    if rows < 1:
      raise InputError(f"rows must be at least 1, got {rows}")
    self.cache_dtype = caches.stored_in(
        self.mesh, model.embedding[...].dtype, cache_dtype)
    self.verifier = (verifiers.parse(verifier) if isinstance(verifier, str)
                     else verifier)
    self._drafter_name = (drafter if isinstance(drafter, str)
                          else type(drafter).__name__)
    # An adaptive drafter, for one, has more than every drafter has.
    self.drafter: Any = drafter
    # Prompts are read and rows decoded by this; layer_stream has its own.
    self._loop: Any = loop
    if str(drafter).partition(":")[0] == "layer_stream":
      if hosts.count() > 1:
        raise InputError("layer_stream is for the devices of one process, got "
                         f"{hosts.count()} processes; use mesh data or tensor")
      self._loop = layer_stream
      self.model, self.drafter = self._stages(str(drafter))
    elif (stages := self.mesh.shape.get("stage", 1)) > 1:
      raise InputError(
          f"the mesh axis stage={stages} is for drafter layer_stream, got "
          f"{self._drafter_name}; use that, or mesh tensor={stages}")
    elif isinstance(drafter, str):
      self.drafter = drafters.parse(drafter, drafters.Target(
          model, tokenizer, functools.partial(_load_beside, model, self.mesh),
          getattr(self.verifier, "honest", False), self.cache_dtype.name))
    if prefill not in PREFILLS:
      raise InputError(f"prefill must be {' or '.join(PREFILLS)}, got "
                       f"{prefill!r}.{nearest(prefill, PREFILLS)}")
    if prefill == "layer_major" and not self.drafter.opens:
      raise InputError("prefill=layer_major shows what a head on a lower layer "
                       f"says, and drafter {self._drafter_name} has none; use "
                       "early_exit")
    self.prefill = prefill
    if first_tokens and first_tokens.vocab != model.vocab:
      raise InputError("first_tokens was learnt for a vocabulary of "
                       f"{first_tokens.vocab} tokens and the model has "
                       f"{model.vocab}; learn it from answers of this model")
    if first_tokens and getattr(self.verifier, "final", False):
      raise InputError("first_tokens are guessed and may be taken back, which "
                       f"verifier {_name(self.verifier)} never does; use one "
                       "of them without the other")
    self.first_tokens = first_tokens
    if (getattr(self.verifier, "needs_probs", False) and self.drafter.height
        and not self.drafter.honest):
      raise InputError(
          f"verifier {_name(self.verifier)} must know the law that drafts were "
          f"drawn from, and {self._drafter_name} reports none; use "
          "draft_model, or --verifier=exact")
    least = self.drafter.height + 2
    if not least <= self.capacity <= context:
      raise InputError(f"capacity must be in [{least}, {context}] (the model's "
                       f"context), got {self.capacity}")
    kind, options = caches.parse(cache)
    if kind is ContiguousCache:
      sharding.check(self.mesh, slots=self.capacity)
    new_cache = functools.partial(
        self.model.init_cache, kind, rows, self.capacity, self.cache_dtype,
        **options)
    # Refuses sizes that do not fit, before anything is compiled.
    jax.eval_shape(lambda: jax.tree.leaves(new_cache()))
    self._buckets = buckets(self.capacity)
    # All programs that need no step by step: those of a folder, or jitted.
    self._programs: Any = loop
    if executables is not None:
      self._take_executables(executables, drafter, cache, kernels)
    self._meter: Meter | None = None
    self._work: str | None = None
    if self.drafter.unmeasured:
      if isinstance(drafter, str):       # else its settings are not known
        self._work = self._name_work(cache)
      self._recall_costs()
    self._busy = False
    self._rounds = itertools.count()     # for profiles
    self.drift = DriftMonitor()
    init = jax.jit(lambda model, drafter: loop.init(
        model, drafter, new_cache(), capacity=self.capacity, stops=STOPS,
        biases=BIASES))
    self._init = lambda: init(self.model, self.drafter)
    self._state: DecodeState | None = None

  def _take_executables(self, folder: str, drafter: str | Drafter, cache: str,
                        kernels: str | None) -> None:
    """Takes what programs there are in a folder."""
    if self._loop is not loop or not isinstance(drafter, str):
      raise InputError("executables are for a drafter that is named, other "
                       f"than layer_stream, got {self._drafter_name}; leave "
                       "executables out")
    from jaxspec import executables  # pulls in what loads programs
    self._programs = self._loop = executables.Programs(
        folder, executables.identity(
            self.config, self.mesh, drafter=drafter, cache=cache,
            kernels=kernels, verifier=_name(self.verifier), rows=self.rows,
            capacity=self.capacity, cache_dtype=self.cache_dtype.name,
            dtype=self.model.embedding[...].dtype.name,
            tree=executables.outline(self.drafter)), self.mesh)

  @property
  def executables_problem(self) -> str:
    """Why programs are compiled that should have been loaded, or "".

    A file is read when its program is first needed, so it may come late.
    """
    return getattr(self._programs, "problem", "")

  @classmethod
  def load(cls, model: str, *, dtype: str | None = None,
           mesh: Mapping[str, int] | None = None,
           adapter: str | None = None,
           on_progress: Callable[[str, int, int], None] | None = None,
           **options: Any) -> "Generator":
    """Reads a checkpoint straight onto a mesh.

    Args:
      model: a Hugging Face folder, a GGUF file, an Orbax folder, a hub id, or
        `smollm2-135m`.
      dtype: of the weights, "bfloat16" (default) or "float32".
      mesh: devices along each axis, e.g. `{"data": 1, "tensor": 4}`.
      adapter: a folder that `jaxspec.adapters.save` wrote for this model. It
        is merged, and the text is then the changed model's.
      on_progress: called with each weight's name, its number and their count.
      **options: see `__init__`.

    Raises:
      InputError: names the file, tensor or flag that is wrong.
    """
    from jaxspec import checkpoint  # pulls in file formats
    dtype = dtype or "bfloat16"
    if dtype not in _DTYPES:
      raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, "
                       f"got {dtype!r}.{nearest(dtype, _DTYPES)}")
    devices = sharding.make_mesh(mesh)
    with checkpoint.open_checkpoint(model) as opened:
      config = opened.config
      sharding.check(devices, kv_heads=config.kv_heads, mlp=config.mlp,
                     **({"experts": config.experts} if config.experts else {}))
      transformer = Transformer(
          config, _loader(opened, jnp.dtype(dtype), devices, on_progress))
      if adapter:
        from jaxspec import adapters  # pulls in heads
        transformer = adapters.merged(
            transformer, adapters.load(adapter, transformer), consume=True)
      return cls(transformer, opened.tokenizer, mesh=devices,
                 eos_ids=opened.eos_ids, defaults=opened.generation,
                 adapter=adapter or "", **options)

  @property
  def config(self):
    return self.model.config

  def default_options(self, **overrides: Any) -> Options:
    """The checkpoint's own generation settings, under the caller's.

    A checkpoint that does not ask for sampling is decoded greedily, whatever
    temperature it mentions.
    """
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "temperature")
    found = {name: self.defaults[name] for name in names
             if isinstance(self.defaults.get(name), int | float)}
    if not self.defaults.get("do_sample"):
      found = {k: v for k, v in found.items() if k == "repetition_penalty"}
    return Options(**{**found, **overrides})

  def generate(
      self, prompts: Sequence[Prompt],
      options: Options | Sequence[Options] | None = None, *,
      chat: bool = False,
      on_completion: Callable[[int, Completion], None] | None = None,
      on_text: Callable[[int, str], None] | None = None,
  ) -> list[Completion]:
    """Decodes any number of prompts through the fixed rows.

    Args:
      prompts: texts, token ids, or conversations of `{"role", "content"}`.
      options: one for all, or one a prompt; None for `default_options()`.
      chat: whether a text is the user's message, to be rendered by the
        model's chat template.
      on_completion: called with the index of a prompt and its completion, as
        soon as it is there.
      on_text: called with new settled text of a prompt, as it is made.

    Returns:
      One completion a prompt, in the order of `prompts`.

    Raises:
      InputError: a prompt or option that cannot be served; nothing is decoded.
    """
    waiting = deque(self._answers(prompts, options, chat))
    active: list[Answer | None] = [None] * self.rows
    finished: dict[int, Completion] = {}
    with self._batch(), self._here():
      state = self._take_state()
      while waiting or any(active):
        state = self._fill(state, active, waiting)
        watched = on_text is not None or any(a and a.options.stop
                                             for a in active)
        state = self._decode(state, 16 if watched else 2**30, not waiting)
        state = self._collect(state, active, finished, on_completion, on_text)
      self._state = state
    return [finished[i] for i in range(len(finished))]

  def stream(self, prompt: Prompt, options: Options | None = None, *,
             chat: bool = False, hold_until_settled: bool = False
             ) -> Iterator[TextEvent]:
    """Decodes one prompt, yielding text as it is made.

    What has effects that cannot be taken back, such as a tool that is called
    or a voice that speaks, must see settled text alone.

    Args:
      hold_until_settled: yield no provisional text, nor work for any.

    Yields:
      Provisional text as soon as it is drafted, then the settled text in its
      place. Settled texts joined are the completion's text; the last event
      carries the completion.
    """
    (answer,) = self._answers([prompt], options, chat)
    with self._batch():
      with self._here():
        state = self._take_state()
      held = hold_until_settled
      if self.first_tokens and not held:
        yield from answer.guess(self.first_tokens.guess(answer.prompt_ids))
      if self.prefill == "layer_major" and not held:
        state = yield from self._show(answer, state)
      else:
        with self._here():
          state = self._fill(state, [None] * self.rows, deque([answer]))
      yield from answer.take(_View(state), 0)
      while (self._meter or held) and not answer.completion:
        with self._here():
          state = self._decode(state, 1, True)
        yield from answer.take(_View(state), 0)
      steps = self._loop.stream(self.model, self.drafter, self.verifier, state)
      while not answer.completion:
        # Not while the caller has control.
        with self._here(), profiling.step("decode", next(self._rounds)):
          emission, state = next(steps)
        if emission.settled:
          yield from answer.take(_View(state), 0)
        else:
          yield from answer.guess(_drafted(emission))
      self.drift.add(answer.completion.stats)
      with self._here():
        self._state = self._programs.release(state, np.ones(self.rows, bool))

  def _show(self, answer: Answer, state: DecodeState
            ) -> Yielding[TextEvent, None, DecodeState]:
    """Reads a prompt, yielding what may come first before it is settled."""
    start = time.perf_counter()
    with self._here():
      rows, *prompt = self._prompts([0], [answer], self._bucket(answer))
      seen = self._glimpse(*prompt)
    steps = opening.unfold(self.model, self.drafter, seen)
    shown = 0
    while seen.proposal is None:
      with self._here():       # not while the caller has control
        emission, seen = next(steps)
        drafted = _drafted(emission)
      if len(drafted) > shown:
        shown = len(drafted)
        yield from answer.guess(drafted)
    with self._here():
      state, _ = self._open(state, rows, seen)
      jax.block_until_ready(state)
    answer.begun(time.perf_counter() - start)
    return state

  def _stages(self, drafter: str) -> tuple[Any, Any]:
    """The model on the stages of the mesh, and what guesses there."""
    if self.verifier is not verifiers.parse("exact"):
      raise InputError("layer_stream settles by the verifier exact, got "
                       f"{_name(self.verifier)}; leave --verifier out")
    settings = naming.options("layer_stream", drafter.partition(":")[2],
                              ("heads", "layer", "layers", "guess"))
    return layer_stream.build(self.model, self.mesh, **settings,
                              cache_dtype=self.cache_dtype.name)

  def _here(self) -> contextlib.AbstractContextManager[None]:
    """Within, programs are for the devices of this generator."""
    return on(self.mesh, self._target)

  @contextlib.contextmanager
  def _batch(self) -> Iterator[None]:
    """Holds the rows for one call at a time."""
    if self._busy:
      raise InputError("this Generator is already decoding; finish or close "
                       "that stream first, or make a second Generator")
    self._busy = True
    try:
      yield
    finally:
      self._busy = False

  def _take_state(self) -> DecodeState:
    """All rows free. A call that was interrupted left none; then a new one."""
    state, self._state = self._state, None
    if state is None:
      # Nothing is released yet; but when it is, nobody shall wait for XLA.
      state = self._programs.release(self._init(), np.zeros(self.rows, bool))
    return state

  def _decode(self, state: DecodeState, steps: int, wait: bool) -> DecodeState:
    """Some steps on the device; the first of a run are also measured."""
    def decode(drafter, state, steps):
      with profiling.step("decode", next(self._rounds)):
        return self._loop.decode(self.model, drafter, self.verifier, state,
                                 np.int32(steps), np.bool_(wait))

    if not self._meter:
      return decode(self.drafter, state, steps)

    def at_width(state, steps, width):
      forced = jnp.asarray(width, jnp.int32)
      return decode(self.drafter.replace(forced=forced), state, steps)

    state = self._meter.measure(
        at_width, lambda state: hosts.fetch(state.counters.passes), state)
    if self._meter.known:
      meter, self._meter = self._meter, None
      # Clocks differ, and where widths did hosts would run unlike programs.
      costs = np.array(hosts.agree(meter.costs.tolist), np.float32)
      self.drafter = self.drafter.replace(costs=jnp.asarray(costs))
      ledger = pacing.ledger()
      if ledger and self._work:
        ledger.write(self._work, costs)
    return state

  def _recall_costs(self) -> None:
    """What an earlier run measured; or else this one has to."""
    def noted():
      ledger = pacing.ledger()
      costs = ledger and self._work and ledger.read(
          self._work, len(self.drafter.sizes))
      return None if costs is None else np.asarray(costs).tolist()

    costs = hosts.agree(noted)
    if costs is None:
      self._meter = Meter(len(self.drafter.sizes))
    else:
      self.drafter = self.drafter.replace(costs=jnp.asarray(costs, jnp.float32))

  def _name_work(self, cache: str) -> str:
    """Whatever the cost of a pass depends on."""
    devices = self.mesh.devices.flat
    config = hashlib.sha256(repr(self.config).encode()).hexdigest()[:16]
    return ", ".join(map(str, (
        f"jax {jax.__version__}", f"{len(devices)} x {devices[0].device_kind}",
        f"{os.cpu_count()} cores", self.model.config.family, config,
        self.model.embedding[...].dtype.name, self.cache_dtype.name,
        f"rows {self.rows}", f"capacity {self.capacity}", cache,
        _name(self.verifier), self._drafter_name)))

  def _answers(self, prompts, options, chat) -> list[Answer]:
    """Checks everything before anything is decoded."""
    if options is None:
      options = self.default_options()
    if isinstance(options, Options):
      options = [options] * len(prompts)
    if len(options) != len(prompts):
      raise InputError(f"{len(prompts)} prompts but {len(options)} options; "
                       "pass one for all or one for each")
    answers = []
    for index, (prompt, option) in enumerate(zip(prompts, options)):
      text, ids = self._read(prompt, chat, index)
      over = len(ids) + option.max_new_tokens - self.capacity
      if over > 0:
        raise InputError(
            f"prompt {index} of {len(ids)} tokens + max_new_tokens "
            f"{option.max_new_tokens} exceeds the capacity {self.capacity}; "
            f"shorten by {over}, or raise capacity")
      if option.stop and self.tokenizer is None:
        raise InputError(f"prompt {index}: stop strings need a tokenizer and "
                         "the checkpoint has none; use stop_token_ids")
      as_request([option], [len(ids)], self.eos_ids, vocab=self.config.vocab,
                 stops=STOPS, biases=BIASES)
      answers.append(Answer(index, text, ids, option, self.tokenizer,
                            self.eos_ids, draft_length=self.drafter.height,
                            verifier=_name(self.verifier),
                            drafter=self._drafter_name,
                            adapter=self.adapter))
    return answers

  def _read(self, prompt: Prompt, chat: bool, index: int
            ) -> tuple[str, list[int]]:
    """A prompt as text and as ids."""
    if isinstance(prompt, str) and chat:
      prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str) and len(prompt) and isinstance(
        prompt[0], Mapping):
      text = self._tokenizer(index).render(prompt)
      ids = self._tokenizer(index).encode(text, special=False)
    elif isinstance(prompt, str):
      text, ids = prompt, self._tokenizer(index).encode(prompt)
    else:
      ids = [int(i) for i in prompt]
      text = self.tokenizer.decode(ids) if self.tokenizer else ""
    if not ids:
      raise InputError(f"prompt {index} is empty; pass at least one token")
    for at, i in enumerate(ids):
      if not 0 <= i < self.config.vocab:
        raise InputError(f"prompt {index}: token id {i} at {at} is not in "
                         f"[0, {self.config.vocab - 1}]")
    return text, ids

  def _tokenizer(self, index: int):
    if self.tokenizer is None:
      raise InputError(f"prompt {index} is text but the checkpoint has no "
                       "tokenizer; pass token ids")
    return self.tokenizer

  def _fill(self, state: DecodeState, active: list[Answer | None],
            waiting: deque[Answer]) -> DecodeState:
    """Moves waiting prompts into free rows, those of one bucket together.

    The first for which the cache has no room waits, and all behind it: in an
    empty cache there is room for any.
    """
    free = [row for row, answer in enumerate(active) if answer is None]
    while free and waiting:
      bucket = self._bucket(waiting[0])
      group = []
      while waiting and len(group) < len(free) and (
          self._bucket(waiting[0]) == bucket):
        group.append(waiting.popleft())
      # The last token's keys are never written.
      longest = [len(a.prompt_ids) + a.options.max_new_tokens - 1
                 for a in group]
      room = state.seq.cache.fits(longest)
      if room < len(group):
        state = self._programs.release(
            state, np.isin(np.arange(self.rows), free))
        room = state.seq.cache.fits(longest)
      waiting.extendleft(reversed(group[room:]))
      group = group[:room]
      if not group:
        break
      rows = [free.pop(0) for _ in group]
      # Two programs a bucket: one prompt, or as many as there are rows.
      if len(group) * 2 < self.rows:
        batches = [([r], [a]) for r, a in zip(rows, group)]
      else:
        batches = [(rows, group)]
      for some, answers in batches:
        state = self._insert(state, some, answers, bucket)
      for row, answer in zip(rows, group):
        active[row] = answer
    return state

  def _bucket(self, answer: Answer) -> int:
    return next(b for b in self._buckets if b >= len(answer.prompt_ids))

  def _insert(self, state, rows, answers, bucket):
    start = time.perf_counter()
    rows, tokens, lengths, request = self._prompts(rows, answers, bucket)
    if self.prefill == "layer_major":
      seen = opening.go_on(self.model, self.drafter, self._glimpse(
          tokens, lengths, request))
      state, _ = self._open(state, rows, seen)
    else:
      prefix = self._loop.prefill(
          self.model, self.drafter.taps, tokens, lengths, chunk=CHUNK,
          dtype=self.cache_dtype)
      state = self._programs.insert(
          self.model, self.drafter, self.verifier, state, rows, prefix,
          request)
    jax.block_until_ready(state)
    for answer in answers:
      answer.begun(time.perf_counter() - start)
    return state

  def _prompts(self, rows: Sequence[int], answers: Sequence[Answer],
               bucket: int) -> tuple[Any, Any, Any, Any]:
    """Rows, prompts, their lengths and requests, padded to a size that
    programs are compiled for."""
    size = 1 if len(answers) == 1 else self.rows
    spare = size - len(answers)
    padded = [*answers, *[answers[0]] * spare]
    tokens = np.zeros((size, bucket), np.int32)
    for row, answer in zip(tokens, padded):
      row[:len(answer.prompt_ids)] = answer.prompt_ids
    lengths = [len(a.prompt_ids) for a in padded]
    request = as_request([a.options for a in padded], lengths, self.eos_ids,
                         vocab=self.config.vocab, stops=STOPS, biases=BIASES)
    return (np.array([*rows, *[self.rows] * spare], np.int32),  # dropped
            tokens, np.array(lengths, np.int32), request)

  def _glimpse(self, tokens: Any, lengths: Any, request: Any
               ) -> opening.Glimpse:
    return opening.glimpse(self.model, self.drafter, tokens, lengths, request,
                           chunk=CHUNK, dtype=self.cache_dtype)

  def _open(self, state: DecodeState, rows: Any, seen: opening.Glimpse
            ) -> tuple[DecodeState, Emission]:
    return opening.settle(self.model, self.drafter, self.verifier, state, rows,
                          seen, chunk=CHUNK)

  def _collect(self, state, active, finished, on_completion, on_text):
    """Hands out what was decoded, and frees rows that are through."""
    view = _View(state)
    abandoned = np.zeros(self.rows, bool)
    for row, answer in enumerate(active):
      if answer is None:
        continue
      text = "".join(event.text for event in answer.take(view, row))
      if on_text and text:
        on_text(answer.index, text)
      if answer.completion:
        active[row] = None
        finished[answer.index] = answer.completion
        self.drift.add(answer.completion.stats)
        abandoned[row] = not view.done[row]
        if on_completion:
          on_completion(answer.index, answer.completion)
    free = np.array([answer is None for answer in active])
    if abandoned.any():
      state = self._programs.release(state, free)
    return state


def _load_beside(model: Transformer, mesh: jax.sharding.Mesh, path: str
                 ) -> tuple[Transformer, Any]:
  """Another model in the dtype and on the mesh of `model`; its tokenizer."""
  from jaxspec import checkpoint
  with checkpoint.open_checkpoint(path) as opened:
    dtype = model.embedding[...].dtype
    return (Transformer(opened.config, _loader(opened, dtype, mesh, None)),
            opened.tokenizer)


def _loader(opened: Any, dtype: Any, mesh: jax.sharding.Mesh,
            on_progress: Callable[[str, int, int], None] | None) -> Source:
  """Weight by weight from a checkpoint to the mesh, telling how far it is."""
  abstract = abstract_source(dtype, mesh)
  like: dict[str, jax.ShapeDtypeStruct] = {}

  def note(path, shape, axes, wanted=None):
    like[path] = abstract(path, shape, axes, wanted)
    return like[path]

  Transformer(opened.config, note)
  read = opened.source(
      lambda array, axes: sharding.place(array, axes, mesh), dtype, like=like)
  done = 0

  def source(path, shape, axes, wanted=None):
    nonlocal done
    weight = read(path, shape, axes, wanted)
    done += 1
    if on_progress:
      on_progress(path, done, len(like))
    return weight

  return source


class _View:
  """What the host reads of a state, in one transfer."""

  def __init__(self, state: DecodeState):
    seq = state.seq
    (self.tokens, self.length, self.prompt_length, self.done, self.logprobs,
     counters) = hosts.fetch(
         (seq.tokens, seq.length, seq.prompt_length, state.done,
          state.logprobs, vars(state.counters)))
    self.counters = types.SimpleNamespace(**counters)


def _drafted(emission: Emission) -> list[int]:
  """What may be shown of the first row."""
  tokens, count = hosts.fetch((emission.tokens, emission.count))
  return tokens[0, :count[0]].tolist()


def buckets(capacity: int) -> list[int]:
  """Prompt lengths that programs are compiled for, up to one that is enough.

  Above `CHUNK` they double, so that they stay multiples of it.
  """
  sizes = list(_BUCKETS)
  while sizes[-1] < capacity:
    sizes.append(2 * sizes[-1])
  return [*(s for s in sizes if s < capacity),
          next(s for s in sizes if s >= capacity)]


def _name(verifier: Verifier) -> str:
  name = getattr(verifier, "__name__", type(verifier).__name__)
  return getattr(verifier, "label", name)


__all__ = ["Completion", "Generator", "Options", "TextEvent"]
