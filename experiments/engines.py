# SPDX-License-Identifier: Apache-2.0
"""Decoders that are timed against each other, each in a process of its own.

  python -m experiments.engines '{"engine": "jaxspec", "rows": 1, ...}'

reads one JSON request a line and answers with one JSON line, so that a parent
(`experiments.decode_speed`) can let several engines take turns. Every engine
gets the same token ids, decodes greedily, and knows no end token.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

Ids = Sequence[Sequence[int]]


class Engine(Protocol):
  """What is timed.

  Attributes:
    weight_bytes: what one pass reads of weights.
  """

  weight_bytes: int

  def run(self, prompts: Ids, new_tokens: int) -> dict[str, Any]:
    """Decodes `new_tokens` behind each prompt, all of one length.

    Returns:
      `tokens` of each row; `first_seconds` until every row has its first
      token, `seconds` until all is there; `passes` of the model after the
      prompt, a mean over rows; `drafted` and `accepted`, where it speculates.
    """
    ...


class Jaxspec:
  """This project."""

  def __init__(self, model: str, dtype: str, rows: int, capacity: int,
               drafter: str = "autoregressive"):
    """Loads `model`; `drafter` is text for `drafters.parse`."""
    import jax

    from jaxspec.generator import Generator
    self.generator = Generator.load(model, dtype=dtype, drafter=drafter,
                                    rows=rows, capacity=capacity)
    self.weight_bytes = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(self.generator.model))

  def run(self, prompts, new_tokens):
    from jaxspec.generator import Options
    start = time.perf_counter()
    answers = self.generator.generate(
        prompts, Options(max_new_tokens=new_tokens, ignore_eos=True))
    seconds = time.perf_counter() - start
    stats = [answer.stats for answer in answers]
    return {
        "tokens": [answer.token_ids for answer in answers],
        "first_seconds": max(s.first_token_seconds for s in stats),
        "seconds": seconds,
        "passes": sum(s.passes for s in stats) / len(stats),
        "drafted": sum(s.drafted for s in stats),
        "accepted": sum(s.accepted for s in stats),
    }


class Transformers:
  """transformers on torch.

  `mode` is "eager", "static" (a static cache), "compiled" (that and
  torch.compile) or "lookup" (its prompt lookup, one row at a time).
  """

  def __init__(self, model: str, dtype: str, rows: int, capacity: int,
               mode: str = "eager", threads: int = 2):
    """Fills a transformers model with the weights of `model`."""
    import torch

    from experiments import oracles
    from jaxspec import checkpoint
    torch.set_num_threads(threads)
    with checkpoint.open_checkpoint(model) as opened:
      self.model = oracles.as_transformers(opened, dtype)
    self.mode = mode
    self.weight_bytes = sum(p.numel() * p.element_size()
                            for p in self.model.parameters())
    if mode == "compiled":
      self.model.forward = torch.compile(self.model.forward)

  def run(self, prompts, new_tokens):
    import torch
    import transformers

    times = []

    class Watch(transformers.StoppingCriteria):
      """Asked after every pass."""

      def __call__(self, input_ids, scores, **unused):
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    options: dict[str, Any] = {}
    if self.mode in ("static", "compiled"):
      options["cache_implementation"] = "static"
    if self.mode == "compiled":
      options["disable_compile"] = True       # it is compiled already
    if self.mode == "lookup":
      options["prompt_lookup_num_tokens"] = 10
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode():
      tokens = self.model.generate(
          ids, attention_mask=torch.ones_like(ids), do_sample=False,
          max_new_tokens=new_tokens,
          stopping_criteria=transformers.StoppingCriteriaList([Watch()]),
          **options)
    end = time.perf_counter()
    return {"tokens": tokens[:, ids.shape[1]:].tolist(),
            "first_seconds": times[0] - start, "seconds": end - start,
            "passes": len(times) - 1}


class LlamaCpp:
  """llama.cpp, through its batch API: one `llama_decode` a step."""

  def __init__(self, model: str, kind: str, rows: int, capacity: int,
               threads: int = 2):
    """Opens the GGUF file of `model`, in the precision `kind`."""
    import llama_cpp

    from experiments import machine, oracles
    from jaxspec import checkpoint
    with checkpoint.open_checkpoint(model) as opened:
      source = opened.path
      self.vocab = opened.config.vocab
    shipped = f".{kind}.gguf"
    path = (source if str(source).lower().endswith(shipped)
            else oracles.gguf_file(source, kind))
    self.weight_bytes = path.stat().st_size
    self.lib, self.rows = llama_cpp, rows
    oracles.quiet_llama()
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    # Builds with AMX crash in their repacked kernels.
    parameters.use_extra_bufts = (
        "amx_int8" not in machine.describe()["instructions"])
    self.model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), parameters)
    if not self.model:
      raise RuntimeError(f"llama.cpp cannot load {path}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = rows * (capacity + 255) // 256 * 256
    options.n_batch = options.n_ctx
    options.n_seq_max = rows
    options.n_threads = options.n_threads_batch = threads
    self.context = llama_cpp.llama_init_from_model(self.model, options)
    if not self.context:
      raise RuntimeError(f"llama.cpp cannot make a context of {rows} rows")
    self.batch = llama_cpp.llama_batch_init(options.n_batch, 0, rows)

  def run(self, prompts, new_tokens):
    lib = self.lib
    lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
    start = time.perf_counter()
    at = len(prompts[0])
    news = self._decode([(row, i, token, i == at - 1)
                         for row, prompt in enumerate(prompts)
                         for i, token in enumerate(prompt)])
    tokens, first = [[new] for new in news], time.perf_counter() - start
    for step in range(new_tokens - 1):
      news = self._decode([(row, at + step, new, True)
                           for row, new in enumerate(news)])
      for row, new in zip(tokens, news):
        row.append(new)
    return {"tokens": tokens, "first_seconds": first,
            "seconds": time.perf_counter() - start, "passes": new_tokens - 1}

  def _decode(self, entries) -> list[int]:
    """One pass; the likeliest token behind each entry that wants logits."""
    import ctypes

    import numpy as np
    batch, wanted = self.batch, []
    batch.n_tokens = len(entries)
    for i, (row, position, token, logits) in enumerate(entries):
      batch.token[i], batch.pos[i] = token, position
      batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
      batch.logits[i] = logits
      if logits:
        wanted.append(i)
    if failed := self.lib.llama_decode(self.context, batch):
      raise RuntimeError(f"llama_decode failed with code {failed}")
    found = []
    for i in wanted:
      logits = self.lib.llama_get_logits_ith(self.context, i)
      array = np.ctypeslib.as_array(
          ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocab,))
      found.append(int(array.argmax()))
    return found


ENGINES = {"jaxspec": Jaxspec, "transformers": Transformers,
           "llama.cpp": LlamaCpp}


def serve(spec: dict[str, Any], requests: Iterator[str], answers: Any) -> None:
  """Makes the engine, says so, and answers requests until there are none."""
  from experiments import machine

  def say(message):
    answers.write(json.dumps(message) + "\n")
    answers.flush()

  spec = dict(spec)
  kind = spec.pop("engine")
  start = time.perf_counter()
  try:
    engine: Engine = ENGINES[kind](**spec)
    say({"ready": True, "load_seconds": time.perf_counter() - start,
         "weight_bytes": engine.weight_bytes})
    for line in requests:
      request = json.loads(line)
      result = engine.run(request["prompts"], request["new_tokens"])
      say({**result, "peak_mb": machine.peak_memory()})
  except Exception as error:    # whatever it is, the parent reports it
    say({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
  """Serves on stdin and stdout; whatever a library prints goes to stderr."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  serve(json.loads(sys.argv[1]), iter(sys.stdin.readline, ""), answers)


if __name__ == "__main__":
  main()
