"""Expert products: the implementations equal the reference, forward and backward, however tokens fall."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.core.errors import UserError
from v4jax.kernels.grouped_mlp import experts, swiglu
from v4jax.kernels.grouped_mlp.xla_blocked import block_rows

pytestmark = pytest.mark.slow

FAST = ["xla_blocked", "xla_ragged_dot"]
LIMIT = 0.7  # within reach of the random values, so that both clamps act


def test_swiglu_clamps_before_the_product():
    """silu(min(gate, 1)) * clip(up, -1, 1): the gate has no lower clamp, and the product none at all."""
    gate, up = np.array([3.0, -3.0, 0.5, 3.0]), np.array([0.5, 9.0, -9.0, 3.0])
    silu = lambda a: a / (1 + np.exp(-a))
    want = [silu(1) * 0.5, silu(-3) * 1, silu(0.5) * -1, silu(1) * 1]
    np.testing.assert_allclose(swiglu(jnp.stack([gate, up]), 1.0), want, rtol=1e-6)
    assert swiglu(jnp.ones((2, 3), jnp.bfloat16), 1.0).dtype == jnp.float32


def test_reference_is_a_loop_over_tokens_and_picks():
    x, picks, weights, gate_up, down = _case(5, 4, 2, 3, 6, "random", 0)
    want = np.zeros((5, 6))
    for b in range(5):
        for e, w in zip(picks[b], weights[b], strict=True):
            want[b] += w * np.asarray(swiglu(np.einsum("d,udf->uf", x[b], gate_up[e]), LIMIT)) @ down[e]
    np.testing.assert_allclose(experts(x, picks, weights, gate_up, down, limit=LIMIT, impl="ref"), want, atol=1e-5)


def _case(B, E, K, F, D, spread, seed):
    rng = np.random.RandomState(seed)
    if spread == "one":  # every token to the same K experts, so E - K of them are without any
        picks = np.tile(rng.permutation(E)[:K], (B, 1))
    elif spread == "last":
        picks = np.tile(np.arange(E - K, E), (B, 1))
    else:
        picks = np.stack([rng.permutation(E)[:K] for _ in range(B)])
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return normal(B, D), picks.astype(np.int32), normal(B, K) ** 2, normal(E, 2, D, F) / 2, normal(E, F, D) / 2


@functools.partial(jax.jit, static_argnames="impl")
def _value_and_gradients(x, picks, weights, gate_up, down, probe, impl):
    f = lambda *args: experts(args[0], picks, *args[1:], limit=LIMIT, impl=impl).astype(jnp.float32)
    out, pull = jax.vjp(f, x, weights, gate_up, down)
    return out, pull(probe)


@pytest.mark.parametrize("impl", FAST)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1, 4, 1), (2, 7, 7), (23, 4, 2), (150, 3, 2)]),
    spread=st.sampled_from(["random", "one", "last"]),
    seed=st.integers(0, 99),
)
def test_implementations_equal_the_reference(impl, shape, spread, seed):
    B, E, K = shape
    args = _case(B, E, K, 6, 10, spread, seed)
    probe = np.random.RandomState(seed + 1).standard_normal((B, 10)).astype(np.float32)
    want, got = (_value_and_gradients(*args, probe, impl=name) for name in ("ref", impl))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("spread", ["random", "last"])
def test_bfloat16_is_near_float32(impl, spread):
    """Storage in bf16, accumulation in float32: the error is that of rounding the inputs of the products."""
    args = _case(40, 6, 2, 16, 24, spread, 3)
    low = [jnp.asarray(a, jnp.bfloat16) if i in (0, 3, 4) else jnp.asarray(a) for i, a in enumerate(args)]
    wide = [a.astype(jnp.float32) if i in (0, 3, 4) else a for i, a in enumerate(low)]
    probe = np.random.RandomState(1).standard_normal((40, 24)).astype(np.float32)
    out, gradients = _value_and_gradients(*low, probe, impl=impl)
    want, wide_gradients = _value_and_gradients(*wide, probe, impl="ref")
    assert experts(*low, limit=LIMIT, impl=impl).dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for a, b in zip((out, *gradients), (want, *wide_gradients), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= 0.03 * np.abs(b).max()


def test_experts_without_tokens_get_no_gradient_and_no_nan():
    args = _case(9, 5, 2, 4, 6, "last", 0)
    for impl in FAST:
        out, (_, _, gate_up, down) = _value_and_gradients(*args, np.ones((9, 6), np.float32), impl=impl)
        assert np.isfinite(out).all() and not gate_up[:3].any() and not down[:3].any()
        assert gate_up[3:].any() and down[3:].any()


@given(rows=st.integers(1, 10**6), count=st.integers(1, 512))
def test_blocks_are_near_the_mean_load(rows, count):
    size, mean = block_rows(rows, count), max(1, rows // count)
    assert size in {1 << n for n in range(8)}
    assert size == 128 or mean <= size < 2 * mean + 1


def test_an_unknown_implementation_is_one_clear_line():
    with pytest.raises(UserError, match="unknown implementation 'fast'; one of ref, xla_blocked, xla_ragged_dot"):
        experts(*_case(2, 3, 1, 2, 4, "random", 0), limit=1.0, impl="fast")
