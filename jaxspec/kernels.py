# SPDX-License-Identifier: Apache-2.0
"""Which kernels the programs on a mesh are made of, and what each shard calls.

The compiler splits what XLA computes over a mesh by itself, but a kernel it
cannot: each device has to call it, for the rows and heads that it holds.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import pallas_kernels
from jaxspec import sharding
from jaxspec.errors import InputError, nearest
from pallas_kernels import errors, target
from pallas_kernels.target import Target, aim

CHOICES = ("xla", "tpu", "gpu", "interpret")
_PLATFORMS = ("tpu", "gpu")
# What is interpreted is a kernel for this.
_INTERPRETED = Target("tpu", "TPU v5 lite", interpret=True)


def choose(text: str | None, mesh: Mesh) -> Target | None:
  """What programs on `mesh` are made of.

  Args:
    text: None for the best there is: the kernels of its devices, and XLA where
      a kernel does not take a shape. `xla` for no kernels; `tpu` or `gpu` for
      these kernels alone, and an error where one does not take a shape; on a
      CPU, `interpret` for what the kernels of a TPU would do, very slowly.

  Raises:
    InputError: there is no such choice, or it is for other devices.
  """
  device = target.of(mesh.devices.flat[0])
  if text is None:
    return device if device.platform in _PLATFORMS else None
  if text not in CHOICES:
    raise InputError(f"kernels must be one of {', '.join(CHOICES)}, got "
                     f"{text!r}.{nearest(text, CHOICES)}")
  if text == "xla":
    return Target(device.platform, device.kind, implementation="xla")
  if text == "interpret" and device.platform == "cpu":
    return _INTERPRETED
  if text != device.platform:
    raise InputError(f"kernels={text} is not for the devices of this mesh, "
                     f"which are {device.kind}; leave it out, or use xla")
  return Target(device.platform, device.kind, implementation=text)


@contextlib.contextmanager
def on(mesh: Mesh, goal: Target | None) -> Iterator[None]:
  """Within, programs are for `mesh`, and made of what `choose` gave.

  Raises:
    InputError: kernels were asked for by name, and do not take a shape; or
      their table of blocks cannot be used.
  """
  try:
    with jax.set_mesh(mesh), aim(goal):
      yield
  except errors.InputError as e:
    raise InputError(str(e)) from e
  except NotImplementedError as e:
    if goal is None or goal.implementation in (None, "xla"):
      raise
    raise InputError(f"kernels={goal.implementation}: {e}; leave it out, and "
                     "XLA computes what they do not take") from e


def allowed() -> bool:
  """Whether nobody asked that what is traced here has no kernels."""
  return aim.value is None or aim.value.implementation != "xla"


def wanted() -> bool:
  """Whether what is traced here may be made of kernels."""
  goal = aim.value
  return (goal is not None and goal.platform in _PLATFORMS
          and goal.implementation != "xla")


def tree_attention(query: Any, key: Any, value: Any, fresh_key: Any,
                   fresh_value: Any, *, slot_positions: Any, positions: Any,
                   fresh_positions: Any, seen: Any, table: Any = None,
                   slot_streams: Any = None, readable: Any = None,
                   split: bool = False, **settings: Any) -> Any:
  """`pallas_kernels.tree_attention`, each shard for its rows and heads.

  Args:
    split: whether slots are split too, where the mesh has an axis for them.
  """
  arrays = dict(slot_positions=slot_positions, positions=positions,
                fresh_positions=fresh_positions, seen=seen)
  if table is not None:
    arrays["table"] = table
  if slot_streams is not None:
    arrays |= dict(slot_streams=slot_streams, readable=readable)

  def attend(query, key, value, fresh_key, fresh_value, arrays):
    return pallas_kernels.tree_attention(
        query, key, value, fresh_key, fresh_value, **arrays, **settings)

  args = (query, key, value, fresh_key, fresh_value, arrays)
  mesh = sharding.current()
  if mesh is None:
    return attend(*args)
  # Heads are split as the cache's are, or not at all.
  rows, groups, slots = sharding.spec(
      ("rows", "kv_heads", "slots" if split else None),
      (query.shape[0], *key.shape[1:3]), mesh)
  if slots:
    settings["across"] = slots
  elif not wanted():
    return attend(*args)
  tokens = P(rows, None, groups, None)
  # Pages belong to no row.
  cache = P(rows if table is None else None, groups, slots, None)
  of_rows = {name: P(rows, *[None] * (x.ndim - 1))
             for name, x in arrays.items()}
  for name in {"slot_positions", "slot_streams"} & set(arrays):
    of_rows[name] = P(rows, slots)
  if seen.ndim == 2:             # one mask for all
    of_rows["seen"] = P(None, None)
  if readable is not None:       # and these are the same for all
    of_rows["readable"] = P(None)
  return jax.shard_map(
      attend, in_specs=(tokens, cache, cache, tokens, tokens, of_rows),
      out_specs=tokens, check_vma=False)(*args)
