"""FP8 products against loops in float64, tile by tile, with sizes that leave edges."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from v4jax.kernels import fp8_dot
from v4jax.kernels.fp8_dot.quantize import block_floats, rows
from v4jax.kernels.grouped_mlp import experts

B, T, D, U, F = 2, 130, 150, 2, 129  # one whole tile or block on each axis, and the rest


def rounded(tile: np.ndarray) -> np.ndarray:
    """One tile or block as e4m3 with a power-of-two scale, in float64 (spec 2.4)."""
    scale = 2.0 ** np.ceil(np.log2(max(np.abs(tile).max(), 1e-4) / 448))
    return (tile / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def along(x: np.ndarray, axis: int) -> np.ndarray:
    """Tiles of 128 along one axis."""
    out = np.empty(x.shape)
    turned, target = np.moveaxis(x, axis, -1), np.moveaxis(out, axis, -1)
    for place in np.ndindex(turned.shape[:-1]):
        for start in range(0, turned.shape[-1], 128):
            target[place][start : start + 128] = rounded(turned[place][start : start + 128])
    return out


def in_blocks(w: np.ndarray) -> np.ndarray:
    out = np.empty(w.shape)
    for u in range(w.shape[1]):
        for d in range(0, w.shape[0], 128):
            for f in range(0, w.shape[2], 128):
                place = slice(d, d + 128), u, slice(f, f + 128)
                out[place] = rounded(w[place])
    return out


def with_gradients(function, dy, *arguments):
    y, pull = jax.vjp(function, *arguments)
    return y, *pull(dy)


@pytest.fixture(scope="module")
def arrays():
    """x, w and dy whose magnitudes span tiles, and what the loops make of them: y, dx, dw."""
    rng = np.random.default_rng(0)
    spread = lambda *shape: (rng.normal(size=shape) * np.exp(rng.normal(0, 2, shape))).astype(np.float32)
    x, w, dy = spread(B, T, D), spread(D, U, F), spread(B, T, U, F)
    y = np.einsum("BTD,DUF->BTUF", along(x, 2), in_blocks(w))
    dx = np.einsum("BTUF,DUF->BTD", along(dy, 3), in_blocks(w))
    dw = np.einsum("BTD,BTUF->DUF", along(along(x, 2), 1), along(dy, 1))
    return (x, w, dy), (y, dx, dw)


@pytest.mark.parametrize("impl", ["ref", "xla_tiled", None])
def test_the_three_products_are_those_of_the_loops(arrays, impl):
    (x, w, dy), wanted = arrays
    products = jax.jit(lambda x, w, dy: with_gradients(lambda x, w: fp8_dot.dot(x, w, impl), dy, x, w))
    for got, want in zip(products(x, w, dy), wanted, strict=True):
        assert got.shape == want.shape and got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_rounding_is_that_of_the_loops_bit_for_bit(arrays):
    (x, w, dy), _ = arrays
    twice = lambda x: fp8_dot.round_rows(rows(x).astype(jnp.bfloat16)).astype(jnp.float32)  # bfloat16 holds them too
    got = jax.jit(lambda x, w, dy: (block_floats(w), rows(x), twice(x), rows(dy, 1)))(x, w, dy)
    for one, other in zip(got, (in_blocks(w), along(x, 2), along(x, 2), along(dy, 1)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_products_of_short_axes_need_no_filling():
    x, w = jnp.ones((1, 3, 8)), jnp.full((8, 1, 5), 0.375)
    for y in jax.jit(lambda x, w: (fp8_dot.dot(x, w), fp8_dot.dot(x, w, "xla_tiled")))(x, w):
        np.testing.assert_array_equal(y, np.full((1, 3, 1, 5), 3.0))


def test_experts_round_what_meets_their_matrices():
    """All implementations agree with the reference, whose rounding is written in another place, and differ from
    plain products by what FP8 loses."""
    rng, E, K = np.random.default_rng(1), 3, 2
    drawn = (rng.normal(0, 0.1, (E, *shape)).astype(np.float32) for shape in ((40, 2, 24), (24, 1, 40)))
    gate_up, down = (jax.jit(jax.vmap(fp8_dot.round_weights))(w).swapaxes(1, 2) for w in drawn)
    x, dy = rng.normal(size=(2, 12, 40)).astype(np.float32)
    picks = jnp.array([rng.permutation(E)[:K] for _ in range(12)], jnp.int32)
    share = jnp.asarray(rng.uniform(0.2, 1, (12, K)), jnp.float32)

    def both(impl, narrow):
        function = lambda x, share, *w: experts(x, picks, share, *w, limit=10.0, fp8=narrow, impl=impl)
        return jax.jit(lambda *arguments: with_gradients(function, dy, *arguments))(x, share, gate_up, down[:, 0])

    wanted, plain = both("ref", True), both("ref", False)
    for impl in ("xla_blocked", "xla_ragged_dot"):
        for got, want in zip(both(impl, True), wanted, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())
    for got, want in zip(wanted, plain, strict=True):
        error = np.abs(got - want).max() / np.abs(want).max()
        assert 1e-3 < error < 0.1, error
