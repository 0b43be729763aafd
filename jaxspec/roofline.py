# SPDX-License-Identifier: Apache-2.0
"""How long a device takes at least, by the published figures of its kind.

A device moves bytes, multiplies, and exchanges with others. Memory and
arithmetic go on side by side, and the slower of them counts; what is exchanged
in a decoding step is waited for. Nothing real is faster, and much is slower:
the figures are for comparing and for choosing, not for promising.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from jaxspec.hlo import Collective, Cost
from pallas_kernels.target import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Link:
  """How a device is connected to its peers.

  Attributes:
    send: bytes per second that it sends, over all of its links together.
    links: so many, of which an exchange along one axis of a mesh uses two.
    hop: seconds from one device to the next.
  """

  send: float
  links: int
  hop: float = 1e-6


# Of the kinds in `CHIPS`. Google's and NVIDIA's data sheets: what they call
# bidirectional is halved. A device of tpu7x is half a chip, and has half of its
# links.
LINKS: dict[str, Link] = {
    "TPU v5 lite": Link(400e9 / 2, 4),
    "TPU v5": Link(1200e9 / 2, 6),
    "TPU v6 lite": Link(800e9 / 2, 4),
    "TPU7x": Link(1200e9 / 4, 6),
    "NVIDIA H100 80GB HBM3": Link(900e9 / 2, 2),
    "NVIDIA H200": Link(900e9 / 2, 2),
}
# A float32 product takes so many times a bfloat16 one: six passes of the
# matrix unit of a TPU; on a GPU, units apart (67 of 989 teraflops).
_FLOAT32 = {"TPU": 6.0, "NVIDIA": 14.8}
# What is multiplied as eight bits are, by the names of HLO.
EIGHT_BITS = frozenset({"s8", "u8", "s4", "u4"})


@dataclasses.dataclass(frozen=True)
class Time:
  """Seconds, by what takes them."""

  memory: float = 0.0
  arithmetic: float = 0.0
  interconnect: float = 0.0

  @property
  def seconds(self) -> float:
    return max(self.memory, self.arithmetic) + self.interconnect

  @property
  def limit(self) -> str:
    """What takes most of it."""
    return max(("bandwidth", self.memory), ("arithmetic", self.arithmetic),
               ("interconnect", self.interconnect), key=lambda x: x[1])[0]

  def __add__(self, other: "Time") -> "Time":
    return Time(self.memory + other.memory, self.arithmetic + other.arithmetic,
                self.interconnect + other.interconnect)


def chip(kind: str) -> Chip | None:
  """The published figures of a device, if they are known."""
  return CHIPS.get(kind)


def link(kind: str) -> Link | None:
  return LINKS.get(kind)


def least(cost: Cost, kind: str) -> Time:
  """What a device of this kind takes at least for what a program costs."""
  known, wire = chip(kind), link(kind)
  if known is None:
    raise KeyError(f"no published figures of {kind!r} are known")
  arithmetic = 0.0
  for dtype, flops in cost.flops.items():
    arithmetic += flops / _peak(known, kind, dtype)
  exchanged = 0.0
  if wire is not None:
    exchanged = sum(c.times * _exchange(c, wire) for c in cost.collectives)
  return Time(cost.bytes / known.bandwidth, arithmetic, exchanged)


def together(costs: Mapping[str, Cost], scopes: Iterable[str], kind: str
             ) -> Time:
  """The time of some scopes, one after another."""
  time = Time()
  for scope in scopes:
    if scope in costs:
      time += least(costs[scope], kind)
  return time


def _peak(chip: Chip, kind: str, dtype: str) -> float:
  if dtype in EIGHT_BITS:
    return chip.int8 or chip.bf16
  if dtype in ("f32", "f64"):
    return chip.bf16 / _FLOAT32[kind.split()[0].rstrip("7x")]
  return chip.bf16


def _exchange(c: Collective, wire: Link) -> float:
  """Both ways around a ring: half of the bytes and half of the hops each."""
  if c.devices < 2:
    return 0.0
  hops = 1 if c.kind == "collective-permute" else c.devices / 2
  phases = 2 if c.kind == "all-reduce" else 1
  speed = wire.send * min(1.0, 2 / wire.links)
  return c.sent / speed + phases * hops * wire.hop
