"""Sinkhorn projection: golden values, the loop reference, double stochasticity and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels.sinkhorn import sinkhorn
from v4jax.kernels.sinkhorn.ref import sinkhorn as reference

run = jax.jit(sinkhorn, static_argnames=("iters", "eps"))
LOGITS = (3 * np.sin(0.37 * np.arange(16))).reshape(4, 4)
GOLDEN = [
    [0.0277660, 0.1284505, 0.3527344, 0.4910481],
    [0.2758025, 0.3886859, 0.2548828, 0.0806277],
    [0.5613617, 0.2910802, 0.1119600, 0.0355970],
    [0.1350687, 0.1917823, 0.2804218, 0.3927261],
]


def test_golden_values():
    """Spec 4.1."""
    np.testing.assert_allclose(reference(LOGITS, 20, 1e-6), GOLDEN, atol=1e-7)
    got = run(jnp.asarray(LOGITS)[:, :, None], iters=20, eps=1e-6)[..., 0]
    np.testing.assert_allclose(got, GOLDEN, atol=5e-7)
    np.testing.assert_allclose(got.sum(0), 0.9999990, atol=5e-7)
    np.testing.assert_allclose(got.sum(1), 0.9999990, atol=5e-7)


@pytest.mark.parametrize("n, iters, eps", [(4, 20, 1e-6), (4, 1, 1e-6), (2, 3, 1e-2), (3, 7, 1e-4)])
def test_many_matrices_equal_the_reference_one_by_one(n, iters, eps):
    logits = 4 * np.random.RandomState(n).standard_normal((n, n, 3, 5))
    got = run(jnp.asarray(logits, jnp.float32), iters=iters, eps=eps)
    assert got.shape == logits.shape and got.dtype == jnp.float32
    for b, t in np.ndindex(3, 5):
        np.testing.assert_allclose(got[:, :, b, t], reference(logits[:, :, b, t], iters, eps), rtol=2e-5, atol=2e-6)


def test_rows_come_first_and_columns_last():
    """With few iterations the columns are normalized, the rows are not: the order is visible."""
    got = np.asarray(run(jnp.asarray(LOGITS)[..., None], iters=2, eps=0.0)[..., 0])
    np.testing.assert_allclose(got.sum(0), 1, atol=1e-6)
    assert np.abs(got.sum(1) - 1).max() > 1e-3


@jax.jit
def _both(logits):
    out, pull = jax.vjp(lambda x: sinkhorn(x, iters=20, eps=1e-6), logits)
    return out, pull(out)[0]


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_extreme_logits_stay_finite(scale):
    logits = scale * jnp.asarray(np.random.RandomState(0).standard_normal((4, 4, 64)), jnp.float32)
    out, gradient = _both(logits)
    assert np.isfinite(out).all() and np.isfinite(gradient).all()
    np.testing.assert_allclose(out.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("iters, eps", [(20, 1e-6), (1, 1e-6), (2, 0.05), (6, 1e-2)])
def test_gradient_is_that_of_finite_differences(iters, eps):
    """Central differences of the float64 reference; the large eps makes its own terms in the gradient visible."""
    rng = np.random.RandomState(5)
    logits, weight = rng.standard_normal((2, 4, 4))
    value = lambda x: np.sum(weight * reference(x, iters, eps))
    want = np.zeros((4, 4))
    for place in np.ndindex(4, 4):
        step = np.zeros((4, 4))
        step[place] = 1e-5
        want[place] = (value(logits + step) - value(logits - step)) / 2e-5
    f = lambda x: jnp.sum(weight * sinkhorn(x[..., None], iters=iters, eps=eps)[..., 0])
    np.testing.assert_allclose(jax.jit(jax.grad(f))(logits.astype(np.float32)), want, atol=2e-5)


def test_the_program_does_not_grow_with_the_iterations():
    """Mistake 19: unrolled iterations."""
    program = lambda iters: str(jax.make_jaxpr(lambda x: sinkhorn(x, iters=iters, eps=1e-6))(jnp.zeros((4, 4, 2))))
    assert len(program(50).splitlines()) == len(program(5).splitlines())
