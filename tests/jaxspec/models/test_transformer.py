# SPDX-License-Identifier: Apache-2.0
"""The transformer: cut anywhere, read by chunks, and equal to plain NumPy.

Held here: `extend(0:a)` then `extend(a:L)` is `extend(0:L)`, for tokens on a
tree behind prefixes of unlike lengths, in one call or several; chunked prefill
is whole prefill; each option of `Config` does what its definition says. (That
families equal transformers is held in `test_families.py`.)
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from jaxspec import loop, sharding
from jaxspec.caches import Place
from jaxspec.caches.contiguous import ContiguousCache
from jaxspec.models import layers
from jaxspec.models.layers import Rope
from jaxspec.models.transformer import (
  Transformer,
  abstract_source,
  random_source,
)
from jaxspec.tree import branching
from pallas_kernels import Target, aim, pack
from tests.jaxspec import batches

pytestmark = pytest.mark.usefixtures("quick_compiles")

TREE = branching((2, 2, 1))
LENGTHS = [1, 5, 11]
ROWS = len(LENGTHS)


@functools.partial(jax.jit, static_argnames="layers")
def extend(model, x, cache, fresh, at, layers):
  return model.extend(x, cache, fresh, at, layers=layers)


@jax.jit
def forward(model, tokens):
  """Logits of whole texts, without a cache."""
  rows, count = tokens.shape
  cache = model.init_cache(ContiguousCache, rows, 0, model.embedding.dtype)
  at = Place.of(jnp.broadcast_to(jnp.arange(count)[None], (rows, count)),
                jnp.tril(jnp.ones((count, count), bool)))
  x, _ = model.extend(
      model.embed(tokens), cache, model.init_fresh(cache, count), at,
      layers=range(model.depth))
  return model.unembed(x)


def random_tokens(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 64, shape),
                     jnp.int32)


@pytest.fixture(scope="module")
def prefix(tiny):
  """Prompts of unlike lengths."""
  return loop.prefill(tiny, (), random_tokens(ROWS, 16),
                      jnp.array(LENGTHS, jnp.int32), chunk=512,
                      dtype=jnp.dtype(jnp.float32))


@pytest.fixture(scope="module")
def prefix_of_small(small):
  """A cache of prompts, the place of the next token, and what embeds it."""
  state = loop.prefill(small, (), random_tokens(ROWS, 16),
                       jnp.array(LENGTHS, jnp.int32), chunk=512,
                       dtype=jnp.dtype(jnp.float32))
  at = Place.of(state.cache.length[:, None], jnp.ones((1, 1), bool))
  return state.cache, at, small.embed(random_tokens(ROWS, 1, seed=1))


@pytest.fixture(scope="module")
def nodes(tiny, prefix):
  """A tree of tokens behind them: its place, and what goes into layer 0."""
  at = Place.of(prefix.cache.length[:, None] + TREE.depths[None],
                jnp.asarray(TREE.mask))
  return at, tiny.embed(random_tokens(ROWS, TREE.size, seed=1))


@pytest.fixture(scope="module")
def whole(tiny, prefix, nodes):
  """The tree taken through all layers in one call."""
  at, x = nodes
  return extend(tiny, x, prefix.cache, tiny.init_fresh(prefix.cache, TREE.size),
                at, range(tiny.depth))


def assert_close(found, wanted):
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted),
                        strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", range(5))
def test_two_halves_are_the_whole(tiny, prefix, nodes, whole, cut):
  at, x = nodes
  fresh = tiny.init_fresh(prefix.cache, TREE.size)
  x, fresh = extend(tiny, x, prefix.cache, fresh, at, range(0, cut))
  # Layers that were not asked for have written nothing.
  assert [bool(jnp.any(k)) for k in fresh.k] == [
      layer < cut for layer in range(tiny.depth)]
  found = extend(tiny, x, prefix.cache, fresh, at, range(cut, tiny.depth))
  assert_close(found, whole)


@pytest.mark.parametrize("split", [1, 3, 10])
def test_nodes_in_two_calls_are_one_call(tiny, prefix, nodes, whole, split):
  """The second call sees the first one's keys in `fresh`."""
  at, x = nodes
  fresh = tiny.init_fresh(prefix.cache, TREE.size)
  found = []
  for start, stop in ((0, split), (split, TREE.size)):
    y, fresh = extend(
        tiny, x[:, start:stop], prefix.cache, fresh,
        Place(at.positions, at.seen[start:stop], start), range(tiny.depth))
    found.append(y)
  assert_close((jnp.concatenate(found, axis=1), fresh), whole)


def test_a_mask_of_each_row(tiny, prefix, nodes, whole):
  at, x = nodes
  fresh = tiny.init_fresh(prefix.cache, TREE.size)
  mask = jnp.broadcast_to(jnp.asarray(TREE.mask)[None],
                          (ROWS, TREE.size, TREE.size))
  same = extend(tiny, x, prefix.cache, fresh, at.replace(seen=pack(mask)),
                range(tiny.depth))
  assert_close(same, whole)
  blind = mask.at[1].set(jnp.eye(TREE.size, dtype=bool))
  found, _ = extend(tiny, x, prefix.cache, fresh, at.replace(seen=pack(blind)),
                    range(tiny.depth))
  assert_close((found[0], found[2], found[1, 0]),
               (whole[0][0], whole[0][2], whole[0][1, 0]))
  assert np.abs(found[1, 1:] - whole[0][1, 1:]).max() > 0.01


def test_a_path_of_the_tree_is_the_text(tiny, prefix, whole):
  """Every node says what it says behind its own path alone."""
  tokens = random_tokens(ROWS, TREE.size, seed=1)
  logits = tiny.unembed(whole[0])
  for node in range(TREE.size):
    path = TREE.paths[node, :TREE.depths[node] + 1]
    texts = np.zeros((ROWS, 16), np.int32)
    ends = np.array(LENGTHS) + len(path) - 1
    for row, length in enumerate(LENGTHS):
      texts[row, :length] = prefix.tokens[row, :length]
      texts[row, length:length + len(path)] = tokens[row, path]
    wanted = forward(tiny, jnp.asarray(texts))[np.arange(ROWS), ends]
    np.testing.assert_allclose(logits[:, node], wanted, atol=1e-4)


@pytest.mark.parametrize("lengths", [[1, 4, 5, 16], [3, 8, 9, 12]])
@pytest.mark.parametrize("chunk", [4, 8, 16])
def test_chunked_prefill_is_whole_prefill(small, chunk, lengths):
  """One layer of it sees eight positions: windows cross chunks."""
  tokens, length = random_tokens(4, 16), jnp.array(lengths, jnp.int32)

  def read(chunk):
    return loop.prefill(small, (0, 1), tokens, length, chunk=chunk,
                        dtype=jnp.dtype(jnp.float32))

  found, wanted = read(chunk), read(512)
  np.testing.assert_array_equal(found.cache.length, length)
  np.testing.assert_array_equal(found.tokens, tokens)
  assert len(found.features) == 2
  assert_close(found.last, wanted.last)
  for row, count in enumerate(lengths):
    assert_close([x[row, :count] for x in found.features],
                 [x[row, :count] for x in wanted.features])
    for one, other in ((found.cache.k, wanted.cache.k),
                       (found.cache.v, wanted.cache.v)):
      assert_close([x[row, :, :count] for x in one],
                   [x[row, :, :count] for x in other])
  assert_close(batches.readings(small, found.cache),
               batches.readings(small, wanted.cache))


def test_prefill_keeps_the_residual_stream(small):
  """Below the tapped layers, and at the top of each prompt's last token."""
  tokens, length = random_tokens(2, 16), jnp.array([6, 16], jnp.int32)
  prefix = loop.prefill(small, (0, 1), tokens, length, chunk=512,
                        dtype=jnp.dtype(jnp.float32))
  assert_close(prefix.features[0], small.embed(tokens))
  top = forward(small, tokens)[jnp.arange(2), length - 1]
  assert_close(small.unembed(prefix.last[:, None])[:, 0], top)
  assert np.abs(prefix.features[1] - prefix.features[0]).max() > 0.01


def test_rows_do_not_feel_their_neighbours(tiny, prefix, nodes, whole):
  at, x = nodes
  order = jnp.array([2, 0, 1])

  def moved(tree):
    return jax.tree.map(lambda leaf: leaf[order], tree)

  found = extend(tiny, x[order], moved(prefix.cache),
                 tiny.init_fresh(prefix.cache, TREE.size),
                 at.replace(positions=at.positions[order]), range(tiny.depth))
  assert_close(found, moved(whole))
  # Garbage in the others, NaN included.
  found = extend(tiny, x.at[1:].set(jnp.nan), prefix.cache,
                 tiny.init_fresh(prefix.cache, TREE.size), at,
                 range(tiny.depth))
  assert_close(found[0][0], whole[0][0])


# What each option means, in NumPy and float64, whole texts at a time.


def rms(x, weight, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def turned(x, rope, size):
  """Rotates `[B T ... K]`, each dimension with the one half a head away."""
  frequency = rope.theta ** -(np.arange(size // 2) * 2 / size)
  if rope.kind == "linear":
    frequency = frequency / rope.factor
  angle = np.arange(x.shape[1])[:, None] * frequency
  cos, sin = (f(angle).reshape(1, x.shape[1], *[1] * (x.ndim - 3), size // 2)
              for f in (np.cos, np.sin))
  a, b = x[..., :size // 2], x[..., size // 2:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def activation(name, x):
  if name == "silu":
    return x / (1 + np.exp(-x))
  if name == "gelu":
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  return x * 0.5 * (1 + np.tanh(
      math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_forward(model, tokens):
  """What `forward` should be."""
  c, count = model.config, tokens.shape[1]
  eps, size = c.norm_eps, c.head_size
  weights = jax.tree.map(lambda x: np.asarray(x, np.float64), dict(
      embedding=model.embedding[...], final_norm=model.final_norm[...],
      head=(model.embedding if c.tied else model.lm_head)[...]))
  x = weights["embedding"][np.asarray(tokens)]
  if c.embed_scale is not None:
    x = x * c.embed_scale
  ago = np.arange(count)[:, None] - np.arange(count)[None]
  for layer, block in enumerate(model.layers):
    def w(name, block=block):
      return np.asarray(getattr(block, name)[...], np.float64)
    y = rms(x, w("attn_norm"), eps)
    qkv = np.einsum("btd,grkd->btgrk", y, w("qkv"))
    if c.qkv_bias:
      qkv = qkv + w("qkv_bias")
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    if c.qk_norm:
      q, k = rms(q, w("q_norm"), eps), rms(k, w("k_norm"), eps)
    q, k = (turned(a, c.ropes[layer], size) for a in (q, k))
    scale = c.query_scale or size ** -0.5
    scores = np.einsum("btgrk,bsgk->bgrts", q, k) * scale
    if c.attention_cap is not None:
      scores = c.attention_cap * np.tanh(scores / c.attention_cap)
    seen = (ago >= 0) & (ago < (c.windows[layer] or count))
    scores = np.where(seen, scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    y = np.einsum("bgrts,bsgk->btgrk", probs, v)
    y = y.reshape(*y.shape[:2], -1) @ w("out").T
    x = x + (rms(y, w("post_attn_norm"), eps) if c.post_norms else y)
    y = rms(x, w("mlp_norm"), eps)
    y = (activation(c.activation, y @ w("gate").T) * (y @ w("up").T)
         ) @ w("down").T
    x = x + (rms(y, w("post_mlp_norm"), eps) if c.post_norms else y)
  logits = rms(x, weights["final_norm"], eps) @ weights["head"].T
  if c.logits_cap is not None:
    logits = c.logits_cap * np.tanh(logits / c.logits_cap)
  return logits


BASE = tiny_config(depth=2)
CHANGES = {
    "base": {},
    "embed_scale": dict(embed_scale=math.sqrt(32)),
    "query_scale": dict(query_scale=0.9),
    "qk_norm": dict(qk_norm=True),
    "qkv_bias": dict(qkv_bias=True),
    "post_norms": dict(post_norms=True),
    "attention_cap": dict(attention_cap=0.5),
    "logits_cap": dict(logits_cap=1.5),
    "windows": dict(windows=(3, None)),
    "ropes": dict(ropes=(Rope(100.0), Rope(1e4, kind="linear", factor=4.0))),
    "activation": dict(activation="gelu_pytorch_tanh"),
    "gelu": dict(activation="gelu"),
    "norm_eps": dict(norm_eps=0.1),
    "untied": dict(tied=False),
    "one_kv_head": dict(kv_heads=1),
    "all_at_once": dict(
        embed_scale=math.sqrt(32), query_scale=0.5, qk_norm=True,
        qkv_bias=True, post_norms=True, attention_cap=2.0, logits_cap=3.0,
        windows=(4, None), activation="gelu_tanh", tied=False,
        ropes=(Rope(100.0), Rope(1e4)), heads=6, head_size=6, mlp=20),
}


@functools.cache
def made(name):
  """A model, and its logits for the texts of `TEXTS`."""
  model = Transformer(dataclasses.replace(BASE, **CHANGES[name]),
                      random_source(0, scale=1.5))
  return model, np.asarray(forward(model, TEXTS))


TEXTS = random_tokens(2, 9, seed=5)


@pytest.mark.medium
@pytest.mark.parametrize("name", CHANGES)
def test_against_numpy(name):
  model, found = made(name)
  np.testing.assert_allclose(found, plain_forward(model, TEXTS), atol=2e-4,
                             rtol=2e-4)
  if name != "base":
    assert np.abs(found - made("base")[1]).max() > 0.01


def test_the_logits_cap_caps():
  assert np.abs(made("base")[1]).max() > 1.5
  assert np.abs(made("logits_cap")[1]).max() <= 1.5


def test_a_window_hides_what_is_older():
  """Two layers of three positions each: five tokens reach the sixth."""
  model = Transformer(dataclasses.replace(BASE, windows=(3, 3)),
                      random_source(0, scale=1.5))
  far = TEXTS.at[:, 3].set((TEXTS[:, 3] + 1) % 64)
  changed = np.abs(forward(model, far) - forward(model, TEXTS)).max(
      axis=(0, 2)) > 1e-4
  assert np.flatnonzero(changed).tolist() == [3, 4, 5, 6, 7]


def test_half_precision():
  """The stream is bfloat16, norms and logits are float32."""
  config = dataclasses.replace(BASE, **CHANGES["embed_scale"])
  model = Transformer(config, random_source(0, jnp.bfloat16))
  assert model.layers[0].attn_norm.dtype == jnp.float32
  assert model.layers[0].qkv.dtype == jnp.bfloat16
  x = model.embed(TEXTS)
  assert (x.shape, x.dtype) == ((2, 9, 32), jnp.bfloat16)
  # The scale is rounded as well, as Gemma's own code does.
  np.testing.assert_array_equal(
      x, model.embedding[...][TEXTS] * jnp.bfloat16(math.sqrt(32)))
  logits = model.unembed(x)
  assert (logits.shape, logits.dtype) == ((2, 9, 64), jnp.float32)
  cache = model.init_cache(ContiguousCache, 2, 16, jnp.bfloat16)
  fresh = model.init_fresh(cache, 9)
  assert {k.dtype for k in (*fresh.k, *fresh.v)} == {jnp.dtype(jnp.bfloat16)}
  at = Place.of(jnp.broadcast_to(jnp.arange(9)[None], (2, 9)),
                jnp.tril(jnp.ones((9, 9), bool)))
  y, after = extend(model, x, cache, fresh, at, range(2))
  assert (y.shape, y.dtype) == (x.shape, jnp.bfloat16)
  for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(fresh)):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
  # Near the same weights in float32, and not equal.
  wanted = plain_forward(model, TEXTS)
  off = np.abs(forward(model, TEXTS) - wanted)
  assert 1e-4 < off.max() < 0.15
  assert off.mean() < 0.03


def test_one_row_of_half_precision():
  """It is computed as two rows on a CPU, and is what it is among others."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(5, 1, 32)), jnp.bfloat16)
  weight = jnp.asarray(rng.normal(size=(3, 7, 32)), jnp.bfloat16)
  together = layers.linear(x, weight)
  assert (together.shape, together.dtype) == ((5, 1, 3, 7), jnp.float32)
  for row in range(5):
    alone = layers.linear(x[row:row + 1], weight)
    assert alone.shape == (1, 1, 3, 7)
    np.testing.assert_allclose(alone[0], together[row], atol=1e-5)
  wanted = np.asarray(x, np.float64)[:, 0] @ np.asarray(
      weight, np.float64).reshape(21, 32).T
  np.testing.assert_allclose(together.reshape(5, 21), wanted, atol=1e-4)


def test_unembed_is_float32_even_of_one_row():
  model = Transformer(BASE, random_source(0, jnp.bfloat16))
  x = model.embed(TEXTS)
  every = model.unembed(x)
  alone = model.unembed(x[:1, 3:4])
  assert alone.dtype == jnp.float32
  np.testing.assert_allclose(alone[0, 0], every[0, 3], atol=1e-4)


def test_weights_are_a_function_of_seed_and_name():
  def leaves(*args, **kwargs):
    return jax.tree.leaves(Transformer(BASE, random_source(*args, **kwargs)))
  first, again, other, wide = leaves(0), leaves(0), leaves(1), leaves(
      0, scale=2.0)
  for one, same, different, scaled in zip(first, again, other, wide):
    np.testing.assert_array_equal(one, same)
    assert np.any(one != different)
    if one.ndim > 1:
      np.testing.assert_allclose(scaled, one * 2, rtol=1e-6)
  # No two layers alike.
  a, b = Transformer(BASE, random_source(0)).layers
  assert np.any(a.qkv[...] != b.qkv[...])


def test_abstract_weights_have_the_same_shapes():
  config = dataclasses.replace(BASE, **CHANGES["all_at_once"])
  real = Transformer(config, random_source(0, jnp.bfloat16))
  mesh = sharding.make_mesh({"tensor": 2})
  abstract = Transformer(config, abstract_source(jnp.bfloat16, mesh))
  for one, other in zip(jax.tree.leaves(real), jax.tree.leaves(abstract),
                        strict=True):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert isinstance(other, jax.ShapeDtypeStruct)
  specs = {x.shape: tuple(x.sharding.spec) for x in jax.tree.leaves(abstract)}
  assert specs[2, 5, 6, 32] == ("tensor", None, None, None)      # qkv
  assert specs[32, 36] == (None, "tensor")                       # out


@pytest.mark.medium
@pytest.mark.parametrize("tensor", [1, 2])
def test_decode_with_kernels_is_decode_without(small, prefix_of_small, tensor):
  """Aimed at a TPU, the MLPs of a decode pass are kernels; it means the same.

  Over a mesh each device has its part of the hidden values.
  """
  cache, at, x = prefix_of_small
  fresh = small.init_fresh(cache, 1)
  layers_ = range(small.depth)
  expected, _ = extend(small, x, cache, fresh, at, layers_)
  with aim(Target("tpu", "TPU v5 lite", interpret=True)):
    with jax.set_mesh(sharding.make_mesh({"tensor": tensor})):
      jaxpr = jax.make_jaxpr(extend, static_argnums=5)(
          small, x, cache, fresh, at, layers_)
      y, _ = extend(small, x, cache, fresh, at, layers_)
  assert str(jaxpr).count("name=fused_mlp") >= 1
  np.testing.assert_allclose(y, expected, atol=1e-5)
