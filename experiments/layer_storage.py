# SPDX-License-Identifier: Apache-2.0
"""How should a model store its layers? Measured, for three answers.

  python -m experiments.layer_storage

- `list`: each layer owns its arrays, the layer loop is unrolled.
- `index`: one stack, a `fori_loop` takes layer l by a dynamic index.
- `scan`: one stack, `lax.scan` over it (a static slice of it where only half
  of the layers run, as early exit asks for).

Each runs the linear maps of a transformer inside a `lax.while_loop`, as
decoding does, over all layers and over the upper half. On this machine's CPU
it is timed; for a TPU v5e and, where its plugin is installed, an NVIDIA H100,
it is compiled without the device and its temporary memory is read: a copy of
weights is read and written again for every token, which is what decides.
"""

import os
import statistics
import time

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled",
    TPU_MIN_LOG_LEVEL="3", TPU_STDERR_LOG_LEVEL="3")

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import lax
from jax.experimental import topologies

from experiments import machine

_OUTPUT = flags.DEFINE_string(
    "output", "experiments/results/layer_storage.json",
    "where the result goes")
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed runs of each variant")

# width, mlp, depth; SmolLM2-135M for the clock, a quarter of Llama-3-8B for
# the compilers.
CPU_SIZES = (576, 1536, 30)
DEVICE_SIZES = (4096, 14336, 8)
STEPS = 8


def shapes(width, mlp):
  """The weights of a layer: qkv, out, gate and up, down."""
  return {"qkv": (width * 5 // 3 // 64 * 64, width), "out": (width, width),
          "gate_up": (2 * mlp, width), "down": (width, mlp)}


def layer(weights, x):
  """The linear maps of one layer on x [rows, width]."""
  def dot(x, w):
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())),
                           preferred_element_type=jnp.float32).astype(x.dtype)
  x = x + dot(dot(x, weights["qkv"])[:, :x.shape[1]], weights["out"])
  gate, up = jnp.split(dot(x, weights["gate_up"]), 2, axis=1)
  x = x + dot(jax.nn.silu(gate) * up, weights["down"])
  return x * lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-5)


def run_list(weights, x, first):
  for w in weights[first:]:
    x = layer(w, x)
  return x


def run_index(weights, x, first):
  depth = weights["out"].shape[0]
  return lax.fori_loop(first, depth, lambda i, x: layer(
      jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, i, 0, False),
                   weights), x), x)


def run_scan(weights, x, first):
  weights = jax.tree.map(lambda w: w[first:], weights)
  return lax.scan(lambda x, w: (layer(w, x), None), x, weights)[0]


VARIANTS = {"list": run_list, "index": run_index, "scan": run_scan}


def program(run, first):
  """Several steps, as decoding runs them."""
  def steps(weights, x):
    return lax.fori_loop(0, STEPS, lambda _, x: run(weights, x, first), x)
  return steps


def arguments(variant, sizes, rows, dtype, make):
  width, mlp, depth = sizes
  if variant == "list":
    weights = [{k: make(s, dtype) for k, s in shapes(width, mlp).items()}
               for _ in range(depth)]
  else:
    weights = {k: make((depth, *s), dtype)
               for k, s in shapes(width, mlp).items()}
  return weights, make((rows, width), dtype)


def measure_cpu(dtype, rows):
  """Milliseconds a step, paired: one run of each variant in turn."""
  key = jax.random.key(0)

  def make(shape, dtype):
    return (jax.random.normal(key, shape) / shape[-1] ** 0.5).astype(dtype)

  compiled, results = {}, {}
  for variant, run in VARIANTS.items():
    for part, first in (("all", 0), ("upper half", CPU_SIZES[2] // 2)):
      args = arguments(variant, CPU_SIZES, rows, dtype, make)
      start = time.perf_counter()
      c = jax.jit(program(run, first)).lower(*args).compile()
      name = f"{variant}, {part}"
      results[name] = {
          "compile_seconds": time.perf_counter() - start,
          "temporary_bytes": c.memory_analysis().temp_size_in_bytes,
          "milliseconds": []}
      compiled[name] = (c, args)
      jax.block_until_ready(c(*args))
  for _ in range(_REPEATS.value):
    for name, (c, args) in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(c(*args))
      results[name]["milliseconds"].append(
          1e3 * (time.perf_counter() - start) / STEPS)
  for result in results.values():
    result["median_milliseconds"] = statistics.median(result["milliseconds"])
  return results


def measure_device(device):
  """Compile time and temporary memory, without the device."""
  def make(shape, dtype):
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

  results = {}
  for variant, run in VARIANTS.items():
    for part, first in (("all", 0), ("upper half", DEVICE_SIZES[2] // 2)):
      args = arguments(variant, DEVICE_SIZES, 8, jnp.bfloat16, make)
      start = time.perf_counter()
      memory = (jax.jit(program(run, first)).lower(*args).compile()
                .memory_analysis())
      results[f"{variant}, {part}"] = {
          "compile_seconds": time.perf_counter() - start,
          "temporary_bytes": memory.temp_size_in_bytes,
          "weight_bytes": memory.argument_size_in_bytes}
  return results


def main(_):
  results = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    for rows in (2, 8):
      name = f"cpu {jnp.dtype(dtype).name} {rows} rows"
      results[name] = measure_cpu(dtype, rows)
  for name, platform, options in (
      ("tpu v5e", "tpu", {"topology_name": "v5e:2x2"}),
      ("tpu v6e", "tpu", {"topology_name": "v6e:2x2"})):
    try:
      device = topologies.get_topology_desc(
          platform=platform, **options).devices[0]
    except RuntimeError as e:
      results[name] = {"skipped": str(e).splitlines()[0]}
      continue
    results[name] = measure_device(device)
  for name, variants in results.items():
    print(name)
    for variant, r in variants.items():
      if variant == "skipped":
        print("  skipped:", r)
        continue
      time_ = (f"{r['median_milliseconds']:7.1f} ms a step, "
               if "median_milliseconds" in r else "")
      print(f"  {variant:18} {time_}{r['temporary_bytes'] / 1e6:8.1f} MB "
            f"temporary, {r['compile_seconds']:5.1f} s to compile")
  machine.write(_OUTPUT.value, results)


if __name__ == "__main__":
  app.run(main)
