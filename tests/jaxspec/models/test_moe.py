# SPDX-License-Identifier: Apache-2.0
"""The mixture equals its dense definition, on one device and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import sharding
from jaxspec.models import moe
from jaxspec.models.layers import ACTIVATIONS, linear
from jaxspec.planning import devices
from pallas_kernels.target import Target, aim

WIDTH, HIDDEN = 16, 12
mixture = jax.jit(
    moe.mixture, static_argnames=("per_token", "normalize", "activation"))


@functools.partial(
    jax.jit, static_argnames=("per_token", "normalize", "activation"))
def dense(x, router, gate_up, down, *, per_token, normalize, activation):
  """Every expert for every token: the definition."""
  weights = jax.nn.softmax(linear(x, router), axis=-1)
  chosen, experts = jax.lax.top_k(weights, per_token)
  if normalize:
    chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
  picked = jax.nn.one_hot(experts, router.shape[0])
  weights = jnp.sum(picked * chosen[..., None], axis=-2)
  hidden = linear(x, gate_up)
  hidden = ACTIVATIONS[activation](hidden[..., 0, :]) * hidden[..., 1, :]
  hidden = (hidden * weights[..., None]).astype(x.dtype)
  return jnp.einsum("btef,edf->btd", hidden, down,
                    preferred_element_type=jnp.float32)


def inputs(rows, tokens, experts, dtype=jnp.float32, seed=0):
  shapes = ((rows, tokens, WIDTH), (experts, WIDTH),
            (experts, 2, HIDDEN, WIDTH), (experts, WIDTH, HIDDEN))
  rng = np.random.default_rng(seed)
  scales = (1, 1, WIDTH ** -0.5, HIDDEN ** -0.5)
  return [jnp.asarray(rng.normal(size=shape) * scale, dtype)
          for shape, scale in zip(shapes, scales)]


OPTIONS = dict(normalize=True, activation="silu")


@pytest.mark.medium
@pytest.mark.parametrize("rows, tokens, experts, per_token", [
    (1, 1, 8, 2), (3, 5, 8, 2), (2, 1, 128, 8), (1, 70, 4, 4), (9, 8, 16, 1)])
def test_equals_dense(rows, tokens, experts, per_token):
  args = inputs(rows, tokens, experts)
  options = dict(OPTIONS, per_token=per_token)
  np.testing.assert_allclose(
      mixture(*args, **options),
      dense(*args, **options), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 9])
def test_equals_dense_in_bfloat16(rows):
  args, options = inputs(rows, 1, 8, jnp.bfloat16), dict(OPTIONS, per_token=2)
  np.testing.assert_allclose(
      mixture(*args, **options), dense(*args, **options), atol=3e-2)


def test_not_normalized_and_other_activations():
  args = inputs(2, 3, 8)
  options = dict(per_token=2, normalize=False, activation="gelu_pytorch_tanh")
  np.testing.assert_allclose(
      mixture(*args, **options), dense(*args, **options), atol=1e-5)


def test_all_tokens_to_one_expert():
  x, router, gate_up, down = inputs(4, 33, 8)
  x = jnp.abs(x)
  router = jnp.zeros_like(router).at[5].set(1.0)
  args, options = (x, router, gate_up, down), dict(OPTIONS, per_token=1)
  np.testing.assert_allclose(
      mixture(*args, **options), dense(*args, **options), atol=1e-5)


@functools.cache
def jitted(implementation):
  return jax.jit(implementation, static_argnames="activation")


@pytest.mark.parametrize("implementation", [
    moe._by_block, functools.partial(moe._by_block, largest=512), moe._by_all,
    functools.partial(moe._by_kernel, interpret=True)],
    ids=["block", "large block", "all", "kernel"])
@pytest.mark.parametrize("sizes", [(7, 0, 2, 0), (0, 0, 0, 0), (0, 0, 0, 16),
                                   (1, 1, 1, 1)])
def test_implementations(implementation, sizes):
  """Both on the CPU, with tokens of nobody at the end."""
  _, _, gate_up, down = inputs(1, 1, 4)
  tokens = jax.random.normal(jax.random.key(3), (16, WIDTH))
  y = jitted(implementation)(
      tokens, jnp.array(sizes, jnp.int32), gate_up, down, activation="silu")
  row = 0
  for expert, size in enumerate(sizes):
    part = tokens[None, row:row + size]
    hidden = linear(part, gate_up[expert])
    hidden = jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
    np.testing.assert_allclose(
        y[row:row + size], linear(hidden, down[expert])[0], atol=1e-5)
    row += size


@pytest.mark.medium
@pytest.mark.parametrize("width, mlp", [(512, 1280), (1024, 192)])
@pytest.mark.parametrize("tokens", [16, 64, 1500])
def test_a_tpu_copies_no_expert(tpu_compiler, width, mlp, tokens):
  """Also where their width is not a multiple of the lanes."""
  device = jax.sharding.SingleDeviceSharding(devices("v5e:2x2")[0])
  shapes = ((tokens, width), (8, 2, mlp, width), (8, width, mlp))
  x, gate_up, down = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=device)
                      for s in shapes)
  sizes = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=device)
  compiled = jitted(moe._by_kernel).lower(
      x, sizes, gate_up, down, activation="silu").compile()
  assert compiled.as_text().count("tpu_custom_call") == 2
  # What is between the products, twice: wide, and as it goes in.
  between = tokens * mlp * (2 * 4 + 2 * 2) + tokens * width * 2
  assert compiled.memory_analysis().temp_size_in_bytes < (
      2 * between + 0.02 * (gate_up.size + down.size) * 2 + (1 << 19))


def test_kernels_can_be_forbidden(tpu_compiler):
  device = devices("v5e:2x2")[0]
  args = [jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(device))
      for a in inputs(2, 1, 8, jnp.bfloat16)]
  for target, calls in ((Target("tpu", "TPU v5 lite", implementation="xla"), 0),
                        (Target("tpu", "TPU v5 lite"), 2), (None, 2)):
    with aim(target):
      text = jax.jit(functools.partial(
          moe.mixture, per_token=2, **OPTIONS)).lower(*args).as_text()
    assert text.count("@tpu_custom_call") == calls


@pytest.mark.parametrize("experts, per_token", [(8, 2), (128, 8)])
def test_neighbours_do_not_matter(experts, per_token):
  x, *weights = inputs(6, 3, experts)
  mix = functools.partial(mixture, per_token=per_token, **OPTIONS)
  alone = mix(x, *weights)[2]
  for seed in range(1, 5):
    others = jax.random.normal(jax.random.key(seed), x.shape) * 3
    got = mix(others.at[2].set(x[2]), *weights)[2]
    np.testing.assert_array_equal(got, alone)
  spoilt = jnp.full_like(x, jnp.nan).at[2].set(x[2])
  np.testing.assert_array_equal(mix(spoilt, *weights)[2], alone)


@pytest.mark.parametrize("rows, axes", [
    (4, {"expert": 4}), (4, {"expert": 2, "tensor": 2}), (4, {"data": 4}),
    (4, {"data": 2, "expert": 2, "tensor": 2}),
    (4, {"expert": 2, "tensor": 2, "sequence": 2}),
    (1, {"data": 2, "expert": 2, "tensor": 2})], ids=str)
def test_meshes_equal_one_device(rows, axes):
  args = inputs(rows, 3, 8)
  options = dict(OPTIONS, per_token=2)
  wanted = mixture(*args, **options)
  mesh = sharding.make_mesh(axes)
  names = [("rows", None, None), (None, None),
           ("experts", None, "mlp", None), ("experts", None, "mlp")]
  placed = [sharding.place(a, n, mesh) for a, n in zip(args, names)]
  with jax.set_mesh(mesh):
    compiled = jax.jit(functools.partial(moe.mixture, **options)).lower(
        *placed).compile()
    got = compiled(*placed)
  np.testing.assert_allclose(got, wanted, atol=1e-5)
  # Neither weights nor tokens travel.
  assert "all-gather" not in compiled.as_text()
  assert "all-to-all" not in compiled.as_text()


def test_work_grows_with_the_experts_a_token_has():
  """Neither a product over all experts nor a copy of them."""
  args = inputs(4, 1, 128)
  compiled = jax.jit(functools.partial(
      moe.mixture, per_token=2, **OPTIONS)).lower(*args).compile()
  weights = args[2].nbytes + args[3].nbytes
  assert compiled.memory_analysis().temp_size_in_bytes < weights / 4


def test_gradients_flow():
  args = inputs(2, 3, 8)
  options = dict(OPTIONS, per_token=2)
  def loss(f, args):
    return jnp.sum(f(*args, **options) ** 2)
  got, wanted = (jax.grad(functools.partial(loss, f))(args)
                 for f in (mixture, dense))
  for a, b in zip(got, wanted):
    np.testing.assert_allclose(a, b, atol=1e-4)
