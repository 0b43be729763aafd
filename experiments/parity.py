# SPDX-License-Identifier: Apache-2.0
"""The same model in jaxspec and in transformers: the same logits and tokens?

  python -m experiments.parity --prompts=question.jsonl

Both read the same weights (from the GGUF file, by default) in float32 and
answer the same chats greedily; both stop at the model's end tokens. Where two
answers part, the gap between the reference's two best logits says whether
rounding can have done it: a difference is explained only by a gap below the
largest difference of logits that was measured. Exit status 1 if one is not.
"""

import os
import sys
import time
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments import machine

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Only when run: flags are one name space, and tests import many files."""
  flags.DEFINE_string("model", "smollm2-135m", "a model of the Llama family")
  flags.DEFINE_string(
      "prompts", None, "JSON lines with `turns`, `prompt` or `messages`",
      required=True)
  flags.DEFINE_integer("count", 24, "prompts, evenly from the file")
  flags.DEFINE_integer("new_tokens", 64, "decoded at most")
  flags.DEFINE_integer("threads", 2, "of torch")
  flags.DEFINE_string("output", "experiments/results/parity.json",
                      "where the result goes")


def chats(tokenizer: Any, path: str, count: int) -> list[list[int]]:
  """Token ids of `count` conversations, taken evenly from a file."""
  from jaxspec.apps.decode import read_prompts
  found = read_prompts(types.SimpleNamespace(prompt=None, prompts=path,
                                             resume=False))
  count = min(count, len(found))
  ids = []
  for prompt in (found[i * len(found) // count] for i in range(count)):
    if isinstance(prompt, str):
      prompt = [{"role": "user", "content": prompt}]
    ids.append(tokenizer.encode(tokenizer.render(prompt), special=False))
  return ids


class Reference:
  """transformers, one prompt at a time."""

  def __init__(self, checkpoint: Any, eos_ids: Sequence[int]):
    """Fills a transformers model with the weights of an open checkpoint."""
    from experiments import oracles
    self._model = oracles.as_transformers(checkpoint)
    self._eos_ids = list(eos_ids)

  def answer(self, ids: Sequence[int], new_tokens: int
             ) -> tuple[list[int], np.ndarray]:
    """The greedy answer, and the logits [n V] each token was taken from."""
    import torch
    prompt = torch.tensor([list(ids)])
    with torch.inference_mode():
      out = self._model.generate(
          prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
          max_new_tokens=new_tokens, eos_token_id=self._eos_ids,
          output_logits=True, return_dict_in_generate=True)
    tokens = out.sequences[0, prompt.shape[1]:].tolist()
    return tokens, torch.cat(out.logits).float().numpy()

  def logits(self, ids: Sequence[int]) -> np.ndarray:
    """Logits [n V] at every position, in one pass."""
    import torch
    with torch.inference_mode():
      return self._model(torch.tensor([list(ids)])).logits[0].float().numpy()


def logits(model: Any, ids: Sequence[int]) -> np.ndarray:
  """Our logits [n V] at every position, in one pass."""
  size = 128                                  # few sizes, few compilations
  while size < len(ids):
    size *= 2
  tokens = np.zeros((1, size), np.int32)
  tokens[0, :len(ids)] = ids
  return np.asarray(_pass()(model, tokens))[0, :len(ids)]


def _pass():
  import jax
  import jax.numpy as jnp

  from jaxspec.caches import Place
  from jaxspec.caches.contiguous import ContiguousCache

  global _compiled
  if _compiled is None:
    @jax.jit
    def whole(model, tokens):
      count = tokens.shape[1]
      cache = model.init_cache(ContiguousCache, 1, 0, jnp.float32)
      at = Place.of(jnp.arange(count)[None],
                    jnp.tril(jnp.ones((count, count), bool)))
      x, _ = model.extend(
          model.embed(tokens), cache, model.init_fresh(cache, count), at,
          layers=range(model.depth))
      return model.unembed(x)
    _compiled = whole
  return _compiled


_compiled: Any = None


def compare(ours: Sequence[int], theirs: Sequence[int],
            their_logits: np.ndarray) -> dict[str, Any] | None:
  """Where two answers part, or None.

  Args:
    their_logits: what each of `theirs` was taken from [n V].

  Returns:
    `position` in the answer, both tokens there (None behind the end), and
    the `gap` of the reference's two best logits.
  """
  for at in range(max(len(ours), len(theirs))):
    a, b = (x[at] if at < len(x) else None for x in (ours, theirs))
    if a == b:
      continue
    best = (np.partition(their_logits[at], -2)[-2:]
            if at < len(theirs) else np.array([0.0, np.inf]))
    return {"position": at, "ours": a, "theirs": b,
            "gap": float(best[1] - best[0])}
  return None


def measure(generator: Any, reference: Any, prompts: Sequence[Sequence[int]],
            new_tokens: int) -> list[dict[str, Any]]:
  """Compares the answers and logits of every prompt."""
  from jaxspec.options import Options
  answers = generator.generate(
      prompts, Options(max_new_tokens=new_tokens, logprobs=True))
  runs = []
  for number, (ids, answer) in enumerate(zip(prompts, answers)):
    theirs, steps = reference.answer(ids, new_tokens)
    ours = answer.token_ids
    # Their text in one pass of each, so that a difference of tokens does not
    # hide what comes behind it.
    text = [*ids, *theirs[:-1]]
    off = np.abs(logits(generator.model, text) - reference.logits(text))
    off = off.max(axis=-1)
    parted = compare(ours, theirs, steps)
    same = len(ours) if parted is None else parted["position"]
    # What the loop recorded while it decoded, for as long as they agree.
    top = steps.max(axis=-1, keepdims=True)
    norm = np.log(np.exp(steps - top).sum(axis=-1, keepdims=True)) + top
    logprobs = np.take_along_axis(steps - norm, np.array(theirs)[:, None], 1)
    recorded = np.array(answer.logprobs[:same]) - logprobs[:same, 0]
    runs.append({
        "prompt": number, "prompt_tokens": len(ids), "tokens": len(theirs),
        "finish_reason": answer.finish_reason, "parted": parted,
        "prompt_logits": float(off[:len(ids)].max()),
        "answer_logits": float(off[len(ids) - 1:].max()),
        "logprobs": float(np.abs(recorded).max(initial=0.0)),
        "answer": theirs,
    })
    print(f"  {number + 1}/{len(prompts)}  {len(ids):5} + {len(theirs):3} "
          f"tokens, logits within {off.max():.1e}"
          + (f", part at {parted['position']}, gap {parted['gap']:.1e}"
             if parted else ""), flush=True)
  return runs


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """All prompts together."""
  parted = [run["parted"] for run in runs if run["parted"]]
  most = max(max(run["prompt_logits"], run["answer_logits"]) for run in runs)
  return {
      "prompts": len(runs),
      "same": len(runs) - len(parted),
      "ended": sum(run["finish_reason"] == "stop" for run in runs),
      "tokens": sum(run["tokens"] for run in runs),
      "positions": sum(run["prompt_tokens"] + run["tokens"] - 1
                       for run in runs),
      "max_prompt_logits_difference": max(r["prompt_logits"] for r in runs),
      "max_answer_logits_difference": max(r["answer_logits"] for r in runs),
      "max_logprobs_difference": max(run["logprobs"] for run in runs),
      "unexplained": sum(one["gap"] >= most for one in parted),
  }


def main(argv: Sequence[str]) -> None:
  """Measures and reports."""
  del argv
  import torch

  from jaxspec import checkpoint
  from jaxspec.apps import launch
  from jaxspec.generator import Generator
  torch.set_num_threads(FLAGS.threads)
  launch.use_compilation_cache(None)
  begun = time.perf_counter()
  generator = Generator.load(FLAGS.model, dtype="float32")
  prompts = chats(generator.tokenizer, FLAGS.prompts, FLAGS.count)
  with checkpoint.open_checkpoint(FLAGS.model) as opened:
    reference = Reference(opened, generator.eos_ids)
  runs = measure(generator, reference, prompts, FLAGS.new_tokens)
  summary = summarise(runs)
  machine.write(FLAGS.output, runs, model=FLAGS.model, dtype="float32",
                new_tokens=FLAGS.new_tokens, summary=summary,
                seconds=round(time.perf_counter() - begun))
  print(f"{summary['same']} of {summary['prompts']} answers are the same "
        f"({summary['tokens']} tokens, {summary['ended']} ended by "
        f"themselves), {summary['unexplained']} unexplained; logits within "
        f"{summary['max_prompt_logits_difference']:.1e} on the prompts and "
        f"{summary['max_answer_logits_difference']:.1e} on the answers, "
        f"{summary['positions']} positions")
  print(FLAGS.output)
  sys.exit(1 if summary["unexplained"] else 0)


if __name__ == "__main__":
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  define_flags()
  app.run(main)
