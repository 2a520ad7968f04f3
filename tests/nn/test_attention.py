"""Attention of the three layer kinds against the specification in loops, and what the loops can't show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden import weights
from tests.nn import reference
from v4jax.models.transformer import full_batch
from v4jax.nn.kv_cache_interface import NoCache, WindowKV

pytestmark = pytest.mark.slow

MODEL = weights.config(sliding_window=8)


def attend(attn, x):
    y, _, loss = attn(x, full_batch(jnp.zeros(x.shape[:2], jnp.int32)), NoCache())
    return y, loss


run = jax.jit(attend)


def _layer(kind, model=MODEL):
    layer = model.layer_types.index(kind)
    flat = weights.random_flat(model, 0)
    return weights.build(model, flat).stacks[layer][0].attn, reference.part(flat, f"layers.{layer}.attn.")


def _rows(length, seed=1):
    return np.random.RandomState(seed).standard_normal((2, length, MODEL.hidden_size)).astype(np.float32)


@pytest.mark.parametrize("kind", ["swa", "csa", "hca"])
@pytest.mark.parametrize("length", [8, 29])
def test_attention_is_the_specification(kind, length):
    """Lengths of one block of queries, and of several blocks with a remainder: the blocks leave no trace."""
    attn, w = _layer(kind)
    x = _rows(length)
    y, loss = run(attn, x)
    want = [reference.attention(MODEL, kind, w, row.astype(np.float64)) for row in x]
    np.testing.assert_allclose(y, [a for a, _ in want], rtol=0, atol=2e-5)
    np.testing.assert_allclose(loss, [b for _, b in want], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("topk, length", [(1, 61), (4, 61)])
def test_gathering_and_masking_read_the_same_entries(topk, length):
    """Many entries a pick are gathered, few are masked; the specification knows no difference."""
    model = weights.config(
        layer_types=("csa",), indexer=weights.Indexer(index_n_heads=16, index_head_dim=16, index_topk=topk)
    )
    attn, w = _layer("csa", model)
    x = _rows(length)[:1]
    want = reference.attention(model, "csa", w, x[0].astype(np.float64))[0]
    np.testing.assert_allclose(run(attn, x)[0][0], want, rtol=0, atol=2e-5)


def test_block_gradients_equal_those_of_one_block():
    """What one block of queries sends back is the same with more blocks behind it, which send nothing."""
    attn, _ = _layer("csa")
    x = _rows(MODEL.sliding_window)
    longer = np.concatenate([x, _rows(13, seed=5)], 1)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(attend(attn, x)[0][:, : MODEL.sliding_window]))))
    one, several = gradient(x), gradient(longer)
    np.testing.assert_allclose(several[:, : MODEL.sliding_window], one, rtol=0, atol=1e-5 * np.abs(one).max())
    assert not several[:, MODEL.sliding_window :].any()


def test_sink_takes_weight_unscaled_and_gives_no_value():
    """One token with zero queries: its logit is 0, so the output is the value over 1 + exp(sink), head by head."""
    attn, _ = _layer("swa")
    attn.q_up = nnx.Param(jnp.zeros_like(attn.q_up[...]))
    x = _rows(1)
    attn.sink = nnx.Param(jnp.full(MODEL.num_attention_heads, -1e4))
    whole = np.asarray(run(attn, x)[0])
    for sink in (0.0, 2.0, -1.5):
        attn.sink = nnx.Param(jnp.full(MODEL.num_attention_heads, sink))
        np.testing.assert_allclose(run(attn, x)[0], whole / (1 + np.exp(sink)), atol=1e-6)


def test_large_logits_and_sinks_stay_finite():
    attn, _ = _layer("csa")
    attn.sink = nnx.Param(jnp.asarray([300.0, -300.0, 0.0, 80.0]))
    x = _rows(29)
    attn.q_norm.scale = nnx.Param(1e4 * attn.q_norm.scale[...])
    attn.kv_norm.scale = nnx.Param(1e3 * attn.kv_norm.scale[...])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: sum(jnp.sum(a) for a in attend(attn, x))))(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_query_that_sees_nothing_gets_zeros():
    attn, _ = _layer("swa")
    rng = np.random.RandomState(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    nothing = WindowKV(normal(1, 6, MODEL.head_dim), jnp.full((1, 6), -(2**30)))
    chunk = full_batch(jnp.zeros((1, 3), jnp.int32))
    attend = jax.jit(lambda q: attn._attend(q, (), nothing, chunk, NoCache()))
    out, *_ = attend(normal(1, 3, MODEL.num_attention_heads, MODEL.head_dim))
    np.testing.assert_array_equal(out, 0)


def test_bfloat16_is_near_float32():
    """Window layers alone: with picks, a flip moves more than rounding does (spec 11.4)."""
    attn, w = _layer("swa")
    low = weights.build(weights.config(dtype="bfloat16"), weights.random_flat(MODEL, 0)).stacks[0][0].attn
    x = _rows(29)
    y = run(low, jnp.asarray(x, jnp.bfloat16))[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), run(attn, x)[0], atol=0.05)
