# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a file make each weight of a transformer, both ways.

A checkpoint stores query, key and value, gate and up, and every expert apart;
the transformer keeps them fused, so that one matrix product serves them all
and so that every fused weight shards cleanly over key/value heads or over the
MLP's width. `assemble` reads one weight from its pieces, `split` takes one
apart again; `Names` holds the names, which is all in which two families, or
the Hugging Face and GGUF formats, differ.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxspec.errors import InputError
from jaxspec.models.transformer import Config

Shape = tuple[int, ...]
# Of each dimension, from where to where.
Part = tuple[slice, ...]
# Gives a part of the tensor of this name, which must have this shape.
Read = Callable[[str, Shape, Part], np.ndarray]
Has = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class Names:
  """Tensor names of one family in one format; the defaults are Llama's.

  Attributes:
    root: what stands before the names of the body.
    layer: what stands before the names of layer `{i}`, after the root.
    expert_gate, expert_up, expert_down: of expert `{e}`, when each has its own.
    fused_gate_up, fused_down: all experts in one tensor, gate above up.
    stacked_gate, stacked_up, stacked_down: all experts in one tensor each.
    norm_offset: what is added to stored norm weights (Gemma stores w - 1).
  """

  root: str = "model."
  embedding: str = "embed_tokens.weight"
  final_norm: str = "norm.weight"
  lm_head: str = "lm_head.weight"
  layer: str = "layers.{i}."
  attn_norm: str = "input_layernorm.weight"
  q: str = "self_attn.q_proj"
  k: str = "self_attn.k_proj"
  v: str = "self_attn.v_proj"
  out: str = "self_attn.o_proj.weight"
  q_norm: str = "self_attn.q_norm.weight"
  k_norm: str = "self_attn.k_norm.weight"
  post_attn_norm: str = ""
  mlp_norm: str = "post_attention_layernorm.weight"
  post_mlp_norm: str = ""
  gate: str = "mlp.gate_proj.weight"
  up: str = "mlp.up_proj.weight"
  down: str = "mlp.down_proj.weight"
  router: str = "mlp.gate.weight"
  expert_gate: str = "mlp.experts.{e}.gate_proj.weight"
  expert_up: str = "mlp.experts.{e}.up_proj.weight"
  expert_down: str = "mlp.experts.{e}.down_proj.weight"
  fused_gate_up: str = "mlp.experts.gate_up_proj"
  fused_down: str = "mlp.experts.down_proj"
  stacked_gate: str = ""
  stacked_up: str = ""
  stacked_down: str = ""
  norm_offset: float = 0.0

  def full(self, field: str, i: int | None, e: int | None = None) -> str:
    """Returns the whole name of `field` in layer `i`, expert `e`."""
    name = getattr(self, field)
    if field == "lm_head":
      return name  # Stands beside the body, not in it.
    if e is not None:
      name = name.format(e=e)
    if i is None:
      return self.root + name
    return self.root + self.layer.format(i=i) + name


def shapes(config: Config) -> dict[str, Shape]:
  """Returns the shape of every weight of a transformer, by its path."""
  width, kv, size = config.width, config.kv_heads, config.head_size
  rows = config.queries_per_kv + 2
  found: dict[str, Shape] = {"embedding": (config.vocab, width)}
  for i in range(config.depth):
    layer: dict[str, Shape] = {"attn_norm": (width,)}
    layer["qkv"] = (kv, rows, size, width)
    if config.qkv_bias:
      layer["qkv_bias"] = (kv, rows, size)
    if config.qk_norm:
      layer["q_norm"] = layer["k_norm"] = (size,)
    layer["out"] = (width, kv * (rows - 2) * size)
    if config.post_norms:
      layer["post_attn_norm"] = (width,)
    layer["mlp_norm"] = (width,)
    each: Shape = ()
    if config.experts:
      each = (config.experts,)
      layer["router"] = (config.experts, width)
      layer["gate_up"] = (config.experts, 2, config.mlp, width)
    else:
      layer["gate"] = layer["up"] = (config.mlp, width)
    layer["down"] = (*each, width, config.mlp)
    if config.post_norms:
      layer["post_mlp_norm"] = (width,)
    found |= {f"layers.{i}.{part}": shape for part, shape in layer.items()}
  found["final_norm"] = (width,)
  if not config.tied:
    found["lm_head"] = (config.vocab, width)
  return found


@dataclasses.dataclass(frozen=True)
class Piece:
  """One tensor of a file, and where it stands in a fused weight."""

  name: str
  shape: Shape
  at: Any = ()


def pieces(
    path: str, config: Config, names: Names, has: Has | None = None
) -> list[Piece]:
  """Returns the tensors that make the weight called `path`.

  Args:
    path: the transformer's name for it.
    config: sizes.
    names: what the file calls its tensors.
    has: whether the file has a tensor, which decides between the ways to store
      experts; without it, each expert has its own.
  """
  part, i = _parse(path, config)
  width, mlp = config.width, config.mlp
  kv, queries, size = config.kv_heads, config.queries_per_kv, config.head_size

  def whole(*shape: int) -> list[Piece]:
    return [Piece(names.full(part, i), shape)]

  if part.endswith("norm"):
    return whole(size if part in ("q_norm", "k_norm") else width)
  if part in ("qkv", "qkv_bias"):
    kind, tail = (".weight", (width,)) if part == "qkv" else (".bias", ())
    q, k, v = (names.full(field, i) + kind for field in "qkv")
    return [
        Piece(q, (kv * queries * size, *tail), np.s_[:, :queries]),
        Piece(k, (kv * size, *tail), np.s_[:, queries]),
        Piece(v, (kv * size, *tail), np.s_[:, queries + 1]),
    ]
  if part == "out":
    return whole(width, kv * queries * size)
  if part == "router":
    return whole(config.experts, width)
  if part in ("gate_up", "down") and config.experts:
    return _experts(part, i, config, names, has or (lambda name: False))
  if part in ("gate", "up"):
    return whole(mlp, width)
  return whole(*((width, mlp) if part == "down" else (config.vocab, width)))


def assemble(
    path: str,
    config: Config,
    names: Names,
    read: Read,
    has: Has,
    part: Part | None = None,
) -> np.ndarray:
  """Reads the weight called `path` from the tensors that make it.

  Args:
    part: what to read of it; no more of the tensors is read than it takes.
  """
  found = pieces(path, config, names, has)
  shape = shapes(config)[path]
  part = part or (slice(None),) * len(shape)
  spans = [range(size)[span] for size, span in zip(shape, part)]
  fused: np.ndarray | None = None
  for piece in found:
    cut = _cut(piece, shape, spans)
    if cut is None:
      continue
    array = read(piece.name, piece.shape, cut.read).reshape(cut.shape)[cut.keep]
    if len(found) == 1:
      if path.endswith("norm") and names.norm_offset:
        return array.astype(np.float32) + np.float32(names.norm_offset)
      return array
    if fused is None:
      fused = np.empty([len(span) for span in spans], array.dtype)
    if fused.dtype != array.dtype:  # Quantized unlike each other.
      fused = fused.astype(np.float32, copy=False)
    fused[cut.to] = array
  assert fused is not None
  return fused


@dataclasses.dataclass(frozen=True)
class _Cut:
  """What a piece gives to a part of its weight.

  Attributes:
    read: of its tensor.
    shape: of that, in the dimensions of the weight.
    keep: of that; less than all where a part cannot be read alone.
    to: where it stands in the part.
  """

  read: Part
  shape: Shape
  keep: Part
  to: tuple[int | slice, ...]


def _cut(piece: Piece, shape: Shape, spans: Sequence[range]) -> _Cut | None:
  """Returns what `spans` of the weight take from a piece; None for nothing."""
  at = piece.at if isinstance(piece.at, tuple) else (piece.at,)
  at += (slice(None),) * (len(shape) - len(at))
  to: list[int | slice] = []
  sizes, wanted = [], []  # Of the dimensions in which the piece extends.
  for size, span, where in zip(shape, spans, at):
    own = range(size)[where if isinstance(where, slice) else slice(None)]
    both = range(max(own.start, span.start), min(own.stop, span.stop))
    if isinstance(where, int):
      if where not in span:
        return None
      to.append(where - span.start)
      continue
    if not both:
      return None
    to.append(slice(both.start - span.start, both.stop - span.start))
    sizes.append(len(own))
    wanted.append(slice(both.start - own.start, both.stop - own.start))
  # A dimension of the tensor is one or several of the weight's, of which the
  # first can be cut where all of the others is wanted.
  read, kept, seen = [], [], 0
  for size in piece.shape:
    end = seen + 1
    while math.prod(sizes[seen:end]) != size:
      end += 1
    inner = math.prod(sizes[seen + 1 : end])
    first, rest = wanted[seen], range(seen + 1, end)
    if all(wanted[i] == slice(0, sizes[i]) for i in rest):
      read.append(slice(first.start * inner, first.stop * inner))
      sizes[seen] = first.stop - first.start
      kept.append(slice(None))
    else:
      read.append(slice(0, size))
      kept.append(first)
    kept += [wanted[i] for i in rest]
    seen = end
  return _Cut(tuple(read), tuple(sizes), tuple(kept), tuple(to))


def split(
    path: str, weight: np.ndarray, config: Config, names: Names
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the tensors that make one weight: the inverse of `assemble`."""
  if path.endswith("norm") and names.norm_offset:
    weight = weight.astype(np.float32) - np.float32(names.norm_offset)
  for piece in pieces(path, config, names):
    yield piece.name, weight[piece.at].reshape(piece.shape)


def check(
    config: Config,
    names: Names,
    shape_of: Callable[[str], Shape | None],
) -> set[str]:
  """Checks that a file has every tensor, in its shape; returns their names.

  Args:
    config: sizes.
    names: what the file calls its tensors.
    shape_of: the shape of a tensor, or None where the file has none.
  """
  used = set()
  for path in shapes(config):
    for piece in pieces(path, config, names, lambda n: shape_of(n) is not None):
      found = shape_of(piece.name)
      if found is None:
        raise InputError(
            f"tensor {piece.name!r} is missing; fetch the checkpoint again, or"
            " use the config that belongs to it."
        )
      if tuple(found) != piece.shape:
        raise InputError(
            f"tensor {piece.name!r} has shape {tuple(found)} where the config"
            f" asks for {piece.shape}; use the config that belongs to it."
        )
      used.add(piece.name)
  return used


def _parse(path: str, config: Config) -> tuple[str, int | None]:
  if path in ("embedding", "final_norm", "lm_head"):
    return path, None
  head, _, rest = path.partition(".")
  index, _, part = rest.partition(".")
  if head != "layers" or not index.isdigit() or int(index) >= config.depth:
    raise KeyError(path)
  return part, int(index)


def _experts(
    part: str, i: int | None, config: Config, names: Names, has: Has
) -> list[Piece]:
  """Returns the tensors of all experts, however the file stores them."""
  count, mlp, width = config.experts, config.mlp, config.width
  fields = ("gate", "up") if part == "gate_up" else ("down",)
  one = (mlp, width) if part == "gate_up" else (width, mlp)
  fused = names.full(f"fused_{part}", i)
  if getattr(names, f"fused_{part}") and has(fused):
    return [Piece(fused, (count, len(fields) * one[0], one[1]))]
  stacked = [names.full(f"stacked_{field}", i) for field in fields]
  if names.stacked_gate and has(stacked[0]):
    whole = (count, *one)
    if part == "down":
      return [Piece(stacked[0], whole)]
    return [Piece(name, whole, np.s_[:, j]) for j, name in enumerate(stacked)]
  return [
      Piece(
          names.full(f"expert_{field}", i, e),
          one,
          (e, j) if part == "gate_up" else e,
      )
      for e in range(count)
      for j, field in enumerate(fields)
  ]
