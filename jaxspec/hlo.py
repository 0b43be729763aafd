# SPDX-License-Identifier: Apache-2.0
"""What a compiled program costs, counted in the program itself.

XLA's own analysis counts the body of a loop once, and says nothing of what
devices send to each other. Here the text of a compiled program is read: each
computation is counted as often as its loop runs, memory traffic is what the
operands and results of its operations have in a device's main memory, and
every collective is listed with its bytes. What a `jax.named_scope` encloses
is counted apart.

All figures are those of one device.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any

_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128,
         "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all",
          "collective-permute", "ragged-all-to-all", "collective-broadcast")
# Names for what is elsewhere, and ends of what began before.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast",
         "after-all", "opt-barrier", "partition-id", "replica-id", "domain",
         "add-dependency")


@dataclasses.dataclass(frozen=True)
class Collective:
  """Devices that exchange something.

  Attributes:
    kind: e.g. "all-reduce".
    bytes: of what a device has of the larger side: the sum, what was
      gathered, or what is sent.
    devices: that take part in one exchange.
    times: how often.
    scope: the named scope it is in.
    name: the operation it came from, as jax names it.
  """

  kind: str
  bytes: int
  devices: int
  times: float
  scope: str
  name: str

  @property
  def sent(self) -> float:
    """Bytes that a device sends each time, on a ring."""
    share = (self.devices - 1) / self.devices
    if self.kind == "all-reduce":
      return 2 * share * self.bytes
    if self.kind in ("collective-permute", "collective-broadcast"):
      return self.bytes
    return share * self.bytes


@dataclasses.dataclass
class Cost:
  """What a part of a program costs a device.

  Attributes:
    bytes: read from and written to its main memory.
    flops: of matrix products, by the type of what is multiplied, a
      multiplication and an addition being two.
    collectives: what it exchanges with others.
    uncounted: kernels that say nothing of their arithmetic.
  """

  bytes: float = 0.0
  flops: dict[str, float] = dataclasses.field(default_factory=dict)
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  uncounted: list[str] = dataclasses.field(default_factory=list)

  @property
  def all_flops(self) -> float:
    return sum(self.flops.values())

  def add(self, other: "Cost", times: float = 1.0) -> None:
    self.bytes += times * other.bytes
    for kind, count in other.flops.items():
      self.flops[kind] = self.flops.get(kind, 0.0) + times * count
    self.collectives += [dataclasses.replace(c, times=c.times * times)
                         for c in other.collectives]
    self.uncounted += other.uncounted

  def exchanged(self) -> dict[str, tuple[float, float]]:
    """How often each kind of collective happens, and its bytes in all."""
    found: dict[str, tuple[float, float]] = {}
    for c in self.collectives:
      times, size = found.get(c.kind, (0.0, 0.0))
      found[c.kind] = times + c.times, size + c.times * c.bytes
    return found


def total(costs: Mapping[str, Cost]) -> Cost:
  """All scopes together."""
  whole = Cost()
  for cost in costs.values():
    whole.add(cost)
  return whole


@dataclasses.dataclass
class Operation:
  """One operation of a program.

  Attributes:
    scope: the named scope it is in, "" for none.
    name: the operation it came from, as jax names it.
    times: how often it runs.
    cost: of one time.
  """

  scope: str
  opcode: str
  name: str
  times: float
  cost: Cost


def operations(text: str, *, scopes: Collection[str] = (),
               step: str | None = None,
               trips: Callable[[str], float] = lambda name: 1.0,
               dearest: Callable[[str], bool] = lambda name: True
               ) -> list[Operation]:
  """All that a program runs and that costs something.

  Args:
    text: `compiled.as_text()`.
    scopes: the named scopes to tell apart.
    step: counts one round of the loop of this name alone, e.g.
      `jit(decode)/while`, in place of the whole program.
    trips: how often a loop of this name runs, where the program does not say.
    dearest: whether, of the branches that a choice of this name has, the
      dearest is counted, or the cheapest.
  """
  reader = _Reader(_parse(text), tuple(scopes), trips, dearest)
  if step is None:
    return list(reader.walk(reader.entry, ""))
  for op in reader.computations[reader.entry].values():
    if op.opcode == "while" and op.name == step:
      return list(reader.walk(op.calls["body"], ""))
  raise ValueError(f"the program has no loop {step!r}")


def by_scope(found: Iterable[Operation]) -> dict[str, Cost]:
  """What operations cost, by named scope; "" is what lies in none."""
  costs: dict[str, Cost] = {}
  for one in found:
    costs.setdefault(one.scope, Cost()).add(one.cost, one.times)
  return costs


def count(text: str, **how: Any) -> dict[str, Cost]:
  """What a program costs, by named scope; `how` is that of `operations`."""
  return by_scope(operations(text, **how))


# Reading the text.


@dataclasses.dataclass
class _Shape:
  kind: str
  dims: tuple[int, ...]
  memory: int            # 0 is the main memory

  @property
  def bytes(self) -> int:
    bits = _BITS.get(self.kind)
    if bits is None:
      found = re.search(r"\d+", self.kind)
      bits = int(found[0]) if found else 0
    return math.prod(self.dims) * bits // 8

  @property
  def main(self) -> int:
    """Bytes in the main memory."""
    return 0 if self.memory else self.bytes


@dataclasses.dataclass
class _Op:
  id: str
  opcode: str
  shapes: list[_Shape]
  nested: bool           # whether the shapes are those of a tuple
  operands: list[str]
  rest: str
  name: str
  calls: dict[str, str]
  root: bool

  def attribute(self, key: str) -> str:
    found = re.search(rf"\b{key}=(\{{[^{{}}]*\}}|[\w.%-]+)", self.rest)
    return found[1] if found else ""

  def numbers(self, key: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", self.attribute(key))))


_KERNEL = re.compile(r"custom_call_target=\"(tpu_custom_call|mosaic_gpu)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALLS = re.compile(r"\b(calls|to_apply|body|condition|true_computation|"
                    r"false_computation)=%?([\w.-]+)")
_Computations = dict[str, dict[str, _Op]]


def _parse(text: str) -> tuple[_Computations, str]:
  """The operations of each computation, in order, and the entry's name."""
  computations: _Computations = {}
  entry, ops = "", {}
  for line in text.splitlines():
    head = _HEADER.match(line)
    if head:
      ops = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
      continue
    found = _LINE.match(line)
    if not found:
      continue
    try:
      op = _operation(found[2], line[found.end():], bool(found[1]))
    except ValueError as e:
      raise ValueError(f"cannot read {line.strip()[:200]!r}") from e
    ops[op.id] = op
  return computations, entry


def _operation(id: str, text: str, root: bool) -> _Op:
  nested = text.startswith("(")
  end = _close(text, 0) if nested else text.index(" ")
  shapes = [_shape(m) for m in _ARRAY.finditer(text[:end])]
  at = text.index("(", end)
  opcode = text[end:at].strip()
  close = _close(text, at)
  operands = re.findall(r"%([\w.-]+)", text[at:close])
  if opcode in ("constant", "parameter"):
    operands = []
  rest = text[close:]
  # Long, and nothing that is looked for but a kernel's own figures.
  cut = rest.find("backend_config=")
  known = rest[cut:] if cut >= 0 else ""
  rest = rest if cut < 0 else rest[:cut]
  figures = re.search(r'"(cost_estimate|known_trip_count)":\{[^{}]*\}', known)
  rest += figures[0] if figures else ""
  if opcode in ("constant", "parameter"):
    rest = text[at + 1:close - 1] + " " + rest
  name = re.search(r'op_name="([^"]*)"', rest)
  calls = {m[1]: m[2] for m in _CALLS.finditer(rest)}
  branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
  if branches:
    calls |= {f"branch {i}": b.strip().lstrip("%")
              for i, b in enumerate(branches[1].split(","))}
  return _Op(id, opcode, shapes, nested, operands, rest,
             name[1] if name else "", calls, root)


def _close(text: str, at: int) -> int:
  """The index behind the parenthesis that closes the one at `at`."""
  depth = 0
  for i in range(at, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i + 1
  raise ValueError("parentheses do not match")


def _shape(found: re.Match[str]) -> _Shape:
  dims = tuple(int(d.lstrip("<=")) for d in found[2].split(",") if d)
  memory = re.search(r"S\((\d+)\)", found[3] or "")
  return _Shape(found[1], dims, int(memory[1]) if memory else 0)


# Counting.


class _Reader:
  """Follows a program, and counts what it runs."""

  def __init__(self, parsed: tuple[_Computations, str],
               scopes: Sequence[str], trips: Callable[[str], float],
               dearest: Callable[[str], bool]):
    self.computations, self.entry = parsed
    self._scopes, self._trips, self._dearest = scopes, trips, dearest
    # Of conditionals that lie in each other, each is weighed once.
    self._chosen: dict[str, str] = {}

  def walk(self, computation: str, scope: str, times: float = 1.0
           ) -> Iterator[Operation]:
    """What it runs, in order; what names no scope is in `scope`."""
    ops = self.computations[computation]
    inherited = self._inherited(ops, scope)
    for op in ops.values():
      kind, where = op.opcode, inherited[op.id]
      if kind in _FREE or kind.endswith(("-done", "-update")):
        continue
      if kind == "while":
        rounds = times * self._times(op, ops)
        for part in ("body", "condition"):
          yield from self.walk(op.calls[part], where, rounds)
      elif kind == "conditional":
        yield from self.walk(self._choice(op, where), where, times)
      elif kind in ("call", "async-start"):
        name = op.calls.get("calls") or op.calls["to_apply"]
        yield from self.walk(name, where, times)
      else:
        yield Operation(where, kind, op.name or op.id, times,
                        self._simple(op, ops, where))

  def _inherited(self, ops: dict[str, _Op], outer: str) -> dict[str, str]:
    """The scope of each operation; one without is of who uses it first."""
    found: dict[str, str] = {}
    for op in reversed(ops.values()):
      own = self._scope(op.name)
      if not own and op.opcode == "fusion":
        inside = map(self._scope, (
            o.name for o in self.computations[op.calls["calls"]].values()))
        own = next(filter(None, inside), "")
      mine = own or found.get(op.id, "") or outer
      found[op.id] = mine
      for operand in op.operands:
        if operand in ops and mine:
          # Walking up, the last to be seen is the first to use it.
          found[operand] = mine
    for op in ops.values():            # used by none: of who made it
      if not found[op.id]:
        found[op.id] = next(
            (found[o] for o in op.operands if found.get(o)), "")
    return found

  def _scope(self, name: str) -> str:
    parts = name.split("/")
    return next((part for part in parts if part in self._scopes), "")

  def _choice(self, op: _Op, scope: str) -> str:
    """The branch that is counted."""
    def cost(name: str) -> tuple[float, float]:
      found = total(by_scope(self.walk(name, scope)))
      return found.bytes, found.all_flops
    if op.id not in self._chosen:
      branches = [name for key, name in op.calls.items()
                  if key.startswith(("branch", "true", "false"))]
      pick = max if self._dearest(op.name) else min
      self._chosen[op.id] = pick(branches, key=cost)
    return self._chosen[op.id]

  def _times(self, op: _Op, ops: dict[str, _Op]) -> float:
    known = re.search(r'known_trip_count":?=?\{"n":"(\d+)"', op.rest)
    if known:
      return float(known[1])
    limit = self._limit(op.calls["condition"])
    if limit is None:
      return self._trips(op.name)
    index, stop = limit
    # Where it starts: a constant in the tuple it is given, or else 0.
    start = 0
    given = ops.get(op.operands[0]) if op.operands else None
    if given is not None and given.opcode == "tuple":
      start = _constant(ops.get(given.operands[index])) or 0
    return float(max(stop - start, 0))

  def _limit(self, condition: str) -> tuple[int, int] | None:
    """The counter of a loop and its end, where it is a constant."""
    ops = self.computations[condition]
    root = next(op for op in ops.values() if op.root)
    if root.opcode == "fusion":
      inner = self.computations[root.calls["calls"]]
      outer = [ops[o] for o in root.operands]
      compare = next(op for op in inner.values() if op.root)
      sides = []
      for side in compare.operands:
        op = inner[side]
        if op.opcode == "parameter":
          op = outer[_number(op)]
        sides.append(op)
    else:
      compare, sides = root, [ops[o] for o in root.operands if o in ops]
    if compare.opcode != "compare" or "direction=LT" not in compare.rest:
      return None
    if len(sides) != 2 or sides[0].opcode != "get-tuple-element":
      return None
    stop = _constant(sides[1])
    index = sides[0].numbers("index")
    return None if stop is None or not index else (index[0], stop)

  def _simple(self, op: _Op, ops: dict[str, _Op], scope: str) -> Cost:
    """One operation, or one fusion."""
    cost = Cost()
    figures = re.search(r'"cost_estimate":(\{[^{}]*\})', op.rest)
    if figures:
      told = json.loads(figures[1])
      # What was brought into fast memory before was counted there.
      near = sum(s.bytes - s.main for o in op.operands if o in ops
                 for s in ops[o].shapes)
      cost.bytes = max(float(told["bytes_accessed"]) - near, 0.0)
      if float(told["flops"]):
        cost.flops[_in_kernel(op, ops)] = float(told["flops"])
      return cost
    kind = op.opcode.removesuffix("-start")
    if kind in _KINDS:
      cost.collectives.append(self._collective(kind, op, ops, scope))
    if op.opcode == "custom-call" and _KERNEL.search(op.rest):
      cost.uncounted.append(op.name or op.id)
    if op.opcode == "fusion":
      name = op.calls["calls"]
      for where, inner in self._inner(name, scope).items():
        cost.flops[where] = cost.flops.get(where, 0.0) + inner
      cost.collectives += self._inner_collectives(name, scope)
      cost.bytes = sum(
          self._read(name, i, ops[o].shapes[0].bytes)
          for i, o in enumerate(op.operands)
          if o in ops and len(ops[o].shapes) == 1
          and not ops[o].shapes[0].memory)
      cost.bytes += self._written(name, op)
      return cost
    if op.opcode in ("dot", "convolution"):
      cost.flops[_multiplied(op, ops)] = _products(op, ops)
    cost.bytes = _traffic(op, ops)
    return cost

  @functools.cache  # noqa: B019 - a reader lives for one count
  def _inner(self, name: str, scope: str) -> dict[str, float]:
    """Arithmetic of what a fusion computes."""
    found: dict[str, float] = {}
    ops = self.computations[name]
    for op in ops.values():
      if op.opcode in ("dot", "convolution"):
        kind = _multiplied(op, ops)
        found[kind] = found.get(kind, 0.0) + _products(op, ops)
      elif op.opcode == "fusion":
        for kind, flops in self._inner(op.calls["calls"], scope).items():
          found[kind] = found.get(kind, 0.0) + flops
    return found

  def _inner_collectives(self, name: str, scope: str) -> list[Collective]:
    ops, found = self.computations[name], []
    for op in ops.values():
      kind = op.opcode.removesuffix("-start")
      if kind in _KINDS:
        found.append(self._collective(kind, op, ops, scope))
      elif op.opcode == "fusion":
        found += self._inner_collectives(op.calls["calls"], scope)
    return found

  def _collective(self, kind: str, op: _Op, ops: dict[str, _Op], scope: str
                  ) -> Collective:
    given = sum(s.bytes for o in op.operands if o in ops
                for s in ops[o].shapes)
    gives = sum(s.bytes for s in op.shapes)
    if op.opcode.endswith("-start") and op.nested:
      gives -= given         # those of a start hold its operands too
    size = given if kind in ("reduce-scatter",) else max(gives, 0) or given
    if kind == "all-reduce":
      size = given
    return Collective(kind, size, _group(op.rest), 1.0, scope, op.name)

  def _read(self, name: str, index: int, size: int) -> int:
    """Bytes of a fusion's operand that are read."""
    return min(size, self._used(name, index, size))

  @functools.cache  # noqa: B019 - a reader lives for one count
  def _used(self, name: str, index: int, size: int) -> int:
    ops = self.computations[name]
    found = [op for op in ops.values() if op.opcode == "parameter"
             and _number(op) == index]
    if not found:
      return size
    return self._users(ops, found[0].id, size)

  def _users(self, ops: dict[str, _Op], id: str, size: int) -> int:
    read = size if ops[id].root else 0
    for op in ops.values():
      places = [i for i, o in enumerate(op.operands) if o == id]
      if not places:
        continue
      if op.opcode in ("bitcast", "reshape"):
        read += self._users(ops, op.id, size)
      elif op.opcode in ("dynamic-slice", "slice") and places == [0]:
        read += op.shapes[0].bytes
      elif op.opcode == "gather" and places == [0]:
        read += op.shapes[0].bytes
      elif op.opcode in ("dynamic-update-slice", "scatter") and places == [0]:
        continue                              # in place
      elif op.opcode == "fusion":
        read += sum(self._used(op.calls["calls"], i, size) for i in places)
      else:
        return size
    return read

  def _written(self, name: str, op: _Op) -> int:
    """Bytes that a fusion leaves in the main memory."""
    ops = self.computations[name]
    root = next(o for o in ops.values() if o.root)
    parts = ([ops[o] for o in root.operands] if root.opcode == "tuple"
             else [root])
    if len(parts) != len(op.shapes):
      return sum(s.main for s in op.shapes)
    written = 0
    for part, shape in zip(parts, op.shapes):
      while part.opcode in ("bitcast", "reshape") and part.operands:
        part = ops[part.operands[0]]
      if part.opcode == "fusion" and len(part.shapes) == 1:
        inner = self._written(part.calls["calls"], part)
        written += min(inner, shape.main)
      elif part.opcode in ("dynamic-update-slice", "scatter"):
        written += min(shape.main, _update(part, ops))
      else:
        written += shape.main
    return written


def _number(op: _Op) -> int:
  """Which parameter it is."""
  return int(op.rest.partition(" ")[0])


def _constant(op: _Op | None) -> int | None:
  if op is None or op.opcode != "constant":
    return None
  found = re.match(r"-?\d+", op.rest)
  return int(found[0]) if found else None


def _traffic(op: _Op, ops: dict[str, _Op]) -> int:
  """Bytes that an operation outside of a fusion moves."""
  given = [ops[o].shapes[0] for o in op.operands
           if o in ops and len(ops[o].shapes) == 1]
  first = given[0].main if given else 0
  kind = op.opcode
  if kind == "copy-start":             # destination, source, context
    return first + op.shapes[0].main
  if kind in ("slice-start", "dynamic-slice-start"):
    part = op.shapes[len(op.operands)]
    return min(first, part.bytes) + part.main
  if kind in ("dynamic-slice", "slice", "gather"):
    return min(first, op.shapes[0].bytes) + op.shapes[0].main
  if kind in ("dynamic-update-slice", "scatter"):
    return 2 * min(op.shapes[0].main, _update(op, ops))
  if kind == "custom-call" and "ConcatBitcast" in op.rest:
    return 0
  written = sum(s.main for s in op.shapes)
  if kind.endswith("-start") and op.nested:
    written = max(written - sum(s.main for s in given), 0)
  return sum(s.main for s in given) + written


def _update(op: _Op, ops: dict[str, _Op]) -> int:
  """Bytes of what an operation writes into its first operand."""
  at = 1 if op.opcode == "dynamic-update-slice" else 2
  part = ops.get(op.operands[at]) if len(op.operands) > at else None
  return part.shapes[0].bytes if part else op.shapes[0].bytes


def _multiplied(op: _Op, ops: dict[str, _Op]) -> str:
  """The type in which a product is computed: of its widest operand."""
  kinds = [ops[o].shapes[0] for o in op.operands
           if o in ops and ops[o].shapes and len(ops[o].shapes[0].dims) > 1]
  if not kinds:
    return "f32"
  widest = max(kinds, key=lambda s: s.bytes / max(math.prod(s.dims), 1)).kind
  if widest == "f32" and op.opcode in ("dot", "convolution"):
    # A float32 that is not asked to be exact is rounded on the way.
    return "f32" if "highest" in op.rest else "bf16"
  return widest


def _in_kernel(op: _Op, ops: dict[str, _Op]) -> str:
  """The type in which a kernel computes: of what it reads most of.

  Kernels widen integers before they multiply.
  """
  given = [s for o in op.operands if o in ops for s in ops[o].shapes]
  most = max(given, key=lambda s: s.bytes, default=None)
  return most.kind if most and most.kind in ("f32", "bf16") else "bf16"


def _products(op: _Op, ops: dict[str, _Op]) -> float:
  out = math.prod(op.shapes[0].dims)
  left, right = (ops[o].shapes[0].dims for o in op.operands[:2])
  if op.opcode == "dot":
    return 2.0 * out * math.prod(
        left[d] for d in op.numbers("lhs_contracting_dims"))
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
  if not labels:
    return 0.0
  window = _window(op.rest)
  pairs = 1
  spatial = sorted(c for c in labels[3] if c.isdigit())
  for i, label in enumerate(spatial):
    pairs *= _overlaps(
        left[labels[1].index(label)], right[labels[2].index(label)],
        op.shapes[0].dims[labels[3].index(label)], i, window)
  features = right[labels[2].index("i")]
  outer = (op.shapes[0].dims[labels[3].index("b")]
           * op.shapes[0].dims[labels[3].index("f")])
  return 2.0 * outer * features * pairs


def _window(rest: str) -> dict[str, list[tuple[int, ...]]]:
  found = re.search(r"window=\{([^}]*)\}", rest)
  window: dict[str, list[tuple[int, ...]]] = {}
  for item in (found[1].split() if found else ()):
    key, _, value = item.partition("=")
    window[key] = [tuple(int(n) for n in part.split("_"))
                   for part in value.split("x")]
  return window


def _overlaps(size: int, kernel: int, out: int, dim: int,
              window: Mapping[str, list[tuple[int, ...]]]) -> int:
  """Pairs of an output and a kernel element that meet an element that is
  neither padding nor a hole."""
  def value(key, default):
    return window[key][dim] if key in window else default
  (stride,), (dilate,) = value("stride", (1,)), value("lhs_dilate", (1,))
  (spread,), pad = value("rhs_dilate", (1,)), value("pad", (0, 0))
  end = (size - 1) * dilate + 1
  found = 0
  for k in range(kernel):
    if stride == 1 and dilate == 1:
      low = max(0, pad[0] - k * spread)
      high = min(out, end + pad[0] - k * spread)
      found += max(high - low, 0)
      continue
    for o in range(out):
      at = o * stride + k * spread - pad[0]
      found += 0 <= at < end and at % dilate == 0
  return found


def _group(rest: str) -> int:
  """How many devices exchange with each other."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
  if mesh:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis])
                     for axis in re.findall(r"'(\w+)'", mesh[2]))
  tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
  if tiled:
    return int(tiled[2])
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
  if listed and listed[1]:
    return len(listed[1].split(","))
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
  return 2 if pairs else 1
