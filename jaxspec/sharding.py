# SPDX-License-Identifier: Apache-2.0
"""Logical axis names to mesh axes.

Weights, caches, fresh buffers and activations name their dimensions by what
they hold; `RULES` says which mesh axes each name is split over. A name whose
mesh axes are absent is replicated, so that the same model runs on one device
and on a pod slice. Caches and fresh keys share `kv_heads` with the queries, so
attention communicates only where the slots of a row are split too, over
`sequence`: then the parts of each softmax are merged. Devices along `sequence`
share the MLP and the vocabulary as well, which split further than heads.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxspec.errors import InputError, nearest

# A name is split over the first of these, and over the next as well where they
# divide it.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ("data",),
    "kv_heads": ("tensor",),
    "slots": ("sequence",),
    "mlp": ("tensor", "sequence"),
    "vocab": ("tensor", "sequence"),
    "experts": ("expert",),
    "stages": ("stage",),
}
MESH_AXES = ("data", "expert", "tensor", "sequence", "stage")


def make_mesh(sizes: Mapping[str, int] | None = None, devices=None) -> Mesh:
  """A mesh over `devices` (default: the first ones that are needed).

  Args:
    sizes: devices along each axis, e.g. `{"data": 2, "tensor": 4}`.

  Raises:
    InputError: an unknown axis, a size below one, or too few devices.
  """
  sizes = dict(sizes or {})
  for name, size in sizes.items():
    if name not in MESH_AXES:
      raise InputError(
          f"mesh axis {name!r} is unknown; axes are {', '.join(MESH_AXES)}."
          + nearest(name, MESH_AXES))
    if size < 1:
      raise InputError(f"mesh axis {name} must be at least 1, got {size}")
  shape = [sizes.get(name, 1) for name in MESH_AXES]
  mine = devices is None         # those of a plan are nobody's yet
  devices = list(jax.devices() if devices is None else devices)
  wanted = math.prod(shape)
  if wanted > len(devices):
    raise InputError(
        f"mesh {sizes} needs {wanted} devices, found {len(devices)}; "
        "use a smaller mesh")
  whole = {d.process_index for d in devices}
  if mine and {d.process_index for d in devices[:wanted]} != whole:
    raise InputError(
        f"mesh {sizes} has no device of some of the {len(whole)} processes; "
        f"spread it over all {len(devices)} devices, as data={len(whole)},"
        f"tensor={len(devices) // len(whole)}")
  return Mesh(np.array(devices[:wanted]).reshape(shape), MESH_AXES,
              axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...],
         mesh: Any) -> PartitionSpec:
  """The partition of an array of `shape`, whose dimensions are named `axes`.

  A dimension that its mesh axis does not divide is replicated: a vocabulary
  or a batch of one. What must divide is refused earlier, by `check`.
  """
  def over(axis: str | None, size: int) -> str | tuple[str, ...] | None:
    names: list[str] = []
    for name in RULES.get(axis or "", ()):
      split = mesh.shape.get(name, 1)
      if size % split:
        break
      size //= split
      names += [name] * (split > 1)
    return tuple(names) if len(names) > 1 else names[0] if names else None

  return PartitionSpec(*(
      over(axis, size) for axis, size in zip(axes, shape, strict=True)))


def place(array: Any, axes: tuple[str | None, ...], mesh: Mesh) -> jax.Array:
  """Puts an array straight into its shards.

  Args:
    array: on the host, or on disk: it has a shape, and its parts are asked
      for, each once. A process asks for those of its own devices alone.
  """
  where = NamedSharding(mesh, spec(axes, array.shape, mesh))
  if isinstance(array, jax.Array):
    return jax.device_put(array, where)
  parts: dict[Any, np.ndarray] = {}

  def part(index):
    key = tuple(s.indices(n) for s, n in zip(index, array.shape))
    if key not in parts:
      parts[key] = np.asarray(array[index])
    return parts[key]

  return jax.make_array_from_callback(array.shape, where, part)


def current() -> Any:
  """The mesh that arrays are split over here, or None.

  Inside a `shard_map` each shard is whole for itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  whole = all(kind == AxisType.Manual for kind in mesh.axis_types)
  return None if mesh.empty or mesh.size == 1 or whole else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Annotates an activation inside jit; nothing outside a mesh context."""
  mesh = current()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def check(mesh: Mesh, **sizes: int) -> None:
  """Refuses a mesh that does not divide what it splits.

  Args:
    sizes: logical axis name to its size, e.g. `kv_heads=8, mlp=14336`.

  Raises:
    InputError: names the axis and the sizes that would do.
  """
  for axis, size in sizes.items():
    name = RULES[axis][0]
    split = mesh.shape.get(name, 1)
    if size % split:
      fits = [n for n in range(1, min(size, 256) + 1) if size % n == 0]
      raise InputError(
          f"{size} {axis} are not divisible by mesh axis {name}={split}; "
          f"use {', '.join(map(str, fits[:8]))}")
