"""Hyper-connections: orientation of the mix, coefficients, the head's read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden import weights
from tests.nn import reference
from v4jax.nn.mhc import HyperConnection, HyperHead, hc_post, hc_pre

MODEL = weights.config(hidden_size=16)


call = jax.jit(lambda module, x: module(x))


def _load(module, w):
    for name, array in w.items():
        setattr(module, name, nnx.Param(jnp.asarray(array, jnp.float32)))
    return module


def test_the_mix_is_summed_over_its_first_index():
    """mix[0, 1] = 1 alone sends stream 0 to stream 1 (B^T X); the transposed reading would send 1 to 0."""
    x = jnp.arange(1.0, 9.0).reshape(1, 1, 4, 2)
    mix = jnp.zeros((4, 4, 1, 1)).at[0, 1].set(1.0)
    write = jnp.array([0.0, 10.0, 0.0, 1.0]).reshape(4, 1, 1)
    out = hc_post(x, jnp.array([[[0.5, 0.25]]]), write, mix)
    np.testing.assert_array_equal(out[0, 0], [[0, 0], [1 + 5, 2 + 2.5], [0, 0], [0.5, 0.25]])


def test_reading_is_a_weighted_sum_in_float32():
    x = jnp.asarray([[[[1.0, 2.0], [3.0, 5.0]]]], jnp.bfloat16)
    got = hc_pre(x, jnp.array([0.25, 0.5]).reshape(2, 1, 1))
    np.testing.assert_array_equal(np.asarray(got, np.float32), [[[1.75, 3.0]]])
    assert got.dtype == jnp.bfloat16


@pytest.mark.parametrize("streams", [2, 4])
def test_coefficients_are_the_specification(streams):
    """Read, write and mix around a sublayer that returns its input squared (spec 4.1, 4.2)."""
    model = dataclasses.replace(MODEL, mhc=dataclasses.replace(MODEL.mhc, hc_mult=streams, hc_eps=1e-3))
    rng = np.random.RandomState(0)
    coefficients = streams * streams + 2 * streams
    w = {
        "fn": rng.standard_normal((coefficients, streams, 16)),
        "base": rng.standard_normal(coefficients),
        "scale": np.array([0.7, -1.3, 2.0]),
    }
    x = rng.standard_normal((1, 5, streams, 16))
    read, write, mix = call(_load(HyperConnection(model, nnx.Rngs(0)), w), x.astype(np.float32))
    y = hc_pre(jnp.asarray(x, jnp.float32), read) ** 2
    got = hc_post(jnp.asarray(x, jnp.float32), y, write, mix)
    want = reference.hyper(model, w, x[0], lambda h: h**2)
    np.testing.assert_allclose(got[0], want, rtol=2e-5, atol=2e-5)
    assert read.min() > 0.001 and write.max() < 2  # eps on reads alone, the factor 2 on writes alone


def test_coefficients_do_not_see_the_size_of_the_streams():
    """The streams are normalized for the coefficients; without it, tenfold streams would move them."""
    module = HyperConnection(MODEL, nnx.Rngs(0))
    module.scale = nnx.Param(jnp.full(3, 5.0))
    x = jnp.asarray(np.random.RandomState(1).standard_normal((1, 3, 4, 16)), jnp.float32)
    for one, ten in zip(call(module, x), call(module, 10 * x), strict=True):
        np.testing.assert_allclose(one, ten, atol=1e-4)


def test_head_mix_is_the_specification():
    rng = np.random.RandomState(3)
    w = {"fn": rng.standard_normal((4, 4, 16)), "base": rng.standard_normal(4), "scale": np.array([1.7])}
    x = rng.standard_normal((1, 6, 4, 16))
    got = call(_load(HyperHead(MODEL, nnx.Rngs(0)), w), x.astype(np.float32))
    np.testing.assert_allclose(got[0], reference.head_mix(MODEL, w, x[0]), rtol=2e-5, atol=2e-5)


def test_a_new_connection_is_nearly_a_plain_residual():
    """Spec 4.5: it reads about the mean, writes with about 1, mixes with about the identity."""
    x = jnp.asarray(np.random.RandomState(2).standard_normal((2, 3, 4, 16)), jnp.float32)
    read, write, mix = call(HyperConnection(MODEL, nnx.Rngs(0)), x)
    np.testing.assert_allclose(read, 0.25, atol=0.05)
    np.testing.assert_allclose(write, 1.0, atol=0.1)
    np.testing.assert_allclose(mix[:, :, 0, 0], np.eye(4), atol=0.1)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_untrained_streams_are_read_as_their_mean(streams):
    """Up to the few per mille that `fn` and the 0.98 of a single stream leave."""
    model = dataclasses.replace(MODEL, mhc=dataclasses.replace(MODEL.mhc, hc_mult=streams))
    x = np.ones((1, 3, streams, 16), np.float32)
    read, write, mix = call(HyperConnection(model, nnx.Rngs(0)), x)
    np.testing.assert_allclose(read.sum(0), 1, atol=0.03)
    np.testing.assert_allclose(write, 1, atol=0.03)
    np.testing.assert_allclose(mix.sum(0), 1, atol=1e-3)
    assert np.isfinite(call(HyperHead(model, nnx.Rngs(0)), x)).all()
