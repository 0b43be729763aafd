# SPDX-License-Identifier: Apache-2.0
"""What a program is compiled for. Kernels are told; they never look around.

A program for a TPU can be traced and compiled on a laptop, so the devices of
the process that traces say nothing. What it is for is said around the tracing:

  with pallas_kernels.aim(Target("tpu", "TPU v5 lite")):
    compiled = jax.jit(step).lower(...).compile()

jax's caches of traces and programs tell aims apart.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

Implementation = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Target:
  """A kind of device, and how ops are to be computed on it.

  Attributes:
    platform: "tpu", "gpu" or "cpu".
    kind: the device's kind as jax names it, e.g. "TPU v5 lite". It chooses
      sizes of blocks; one that is unknown gets careful ones.
    implementation: what ops use that are not told by their own argument; a
      tuple falls through, None is the best there is for the platform.
    interpret: how kernels are run where the device is not there: as
      `pallas_call` takes it, or `plgpu.kernel`; False compiles them.
  """

  platform: str
  kind: str = ""
  implementation: str | tuple[str, ...] | None = None
  interpret: Any = False

  @property
  def cores(self) -> int:
    """TensorCores that are one device: a kernel's grid can be split over them.
    """
    return 2 if self.kind in ("TPU v4", "TPU v5", "TPU v5p") else 1


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one device.

  Attributes:
    bandwidth: bytes per second between memory and chip.
    bf16: floating-point operations per second in bfloat16, dense.
    int8: operations per second in eight bits, dense.
    memory: bytes.
    fast_memory: bytes that a program may hold on the chip: VMEM of a TPU
      core, shared memory of an SM.
  """

  bandwidth: float
  bf16: float
  int8: float
  memory: int
  fast_memory: int


# Google's and NVIDIA's data sheets. A chip of v5p, v6e and v5e is one device;
# half a chip of tpu7x is. jax calls v5p "TPU v5".
CHIPS: dict[str, Chip] = {
    "TPU v5 lite": Chip(819e9, 197e12, 393e12, 16 << 30, 128 << 20),
    "TPU v5": Chip(2765e9, 459e12, 918e12, 95 << 30, 64 << 20),
    "TPU v6 lite": Chip(1640e9, 918e12, 1836e12, 32 << 30, 128 << 20),
    "TPU7x": Chip(3690e9, 1153e12, 0.0, 96 << 30, 64 << 20),
    "NVIDIA H100 80GB HBM3": Chip(3352e9, 989e12, 1979e12, 80 << 30, 227 << 10),
    "NVIDIA H200": Chip(4800e9, 989e12, 1979e12, 141 << 30, 227 << 10),
}

# Shared memory of a GPU that is not among them: that of Hopper.
_SHARED = 227 << 10


def shared_memory(target: Target) -> int:
  """Bytes of it that a block of threads of a GPU may hold."""
  chip = CHIPS.get(target.kind)
  return chip.fast_memory if chip else _SHARED


# The target of what is traced within `with aim(target):`, None for any device.
aim = jax.make_user_context(default_value=None)


def of(device: Any) -> Target:
  """The target that is a device, of this machine or of a topology."""
  return Target({"cuda": "gpu", "rocm": "gpu"}.get(
      device.platform, device.platform), device.device_kind)
