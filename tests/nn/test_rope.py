"""Rotary frequencies and rotation against golden values and complex arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.nn import reference
from v4jax.config import Rope
from v4jax.nn.rope import angles, frequencies, rotate

RELEASED = Rope(yarn_factor=16.0, yarn_original=65_536)


def test_yarn_golden_values():
    """Spec 2.3: 64 rotary channels, theta 160000, factor 16, original 65536."""
    freq = frequencies(RELEASED, 64, compressed=True)
    golden = {0: 1, 8: 5.000000e-2, 15: 3.635539e-3, 16: 2.265625e-3, 20: 2.969778e-4, 24: 1.953125e-5,
              25: 5.372313e-6, 31: 5.680529e-7}  # fmt: skip
    np.testing.assert_allclose(freq[list(golden)], list(golden.values()), rtol=2e-6)
    assert freq.shape == (32,) and freq.dtype == np.float32


@pytest.mark.parametrize("dim", [8, 64])
def test_window_layers_have_their_own_theta_and_no_yarn(dim):
    plain = 10_000.0 ** (-np.arange(0, dim, 2) / dim)
    np.testing.assert_allclose(frequencies(RELEASED, dim, compressed=False), plain, rtol=1e-6)
    compressed = 160_000.0 ** (-np.arange(0, dim, 2) / dim)
    np.testing.assert_allclose(frequencies(Rope(), dim, compressed=True), compressed, rtol=1e-6)


@pytest.mark.parametrize("factor, original", [(16.0, 65_536), (8.0, 64), (4.0, 4)])
def test_yarn_is_the_formula(factor, original):
    rope = Rope(yarn_factor=factor, yarn_original=original)
    for dim in (8, 16, 64):
        np.testing.assert_allclose(frequencies(rope, dim, True), reference.frequencies(rope, dim, True), rtol=1e-6)


def test_adjacent_pairs_of_the_last_channels_turn():
    """Two pairs by hand: a quarter and a half turn; channels before them stay."""
    x = jnp.array([9.0, 8.0, 1.0, 2.0, 3.0, 4.0])
    turned = rotate(x, (jnp.array([0.0, -1.0]), jnp.array([1.0, 0.0])))
    np.testing.assert_array_equal(turned, [9, 8, -2, 1, -3, -4])


def test_rotation_is_that_of_complex_numbers():
    freq = frequencies(RELEASED, 16, compressed=True)
    x = np.random.RandomState(0).standard_normal((3, 24)).astype(np.float32)
    positions = np.array([0, 77, 4095], np.int32)
    want = [reference.rotate(row, t, freq.astype(np.float64)) for row, t in zip(x, positions, strict=True)]
    np.testing.assert_allclose(rotate(x, angles(jnp.asarray(positions), freq)), want, atol=2e-4)


def test_inverse_turns_back_and_length_is_kept():
    cos_sin = angles(jnp.arange(50) * 1000, frequencies(RELEASED, 64, compressed=True))
    x = jnp.asarray(np.random.RandomState(1).standard_normal((50, 80)), jnp.float32)
    there = rotate(x, cos_sin)
    np.testing.assert_allclose(rotate(there, cos_sin, inverse=True), x, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(there, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert float(jnp.abs(there[1:] - x[1:]).max()) > 0.5


def test_products_depend_on_distance_alone():
    """The reason for it all: <R(s) a, R(t) b> is a function of t - s, also far out."""
    freq = frequencies(RELEASED, 16, compressed=True)
    a, b = np.random.RandomState(2).standard_normal((2, 16)).astype(np.float32)
    at = lambda x, t: np.asarray(rotate(x, angles(jnp.asarray(t), freq)))
    near, far = at(a, 3) @ at(b, 40), at(a, 8195) @ at(b, 8232)
    np.testing.assert_allclose(near, far, atol=2e-2)
    assert abs(at(a, 3) @ at(b, 41) - near) > 5e-2


def test_low_precision_values_turn_in_float32():
    x = jnp.asarray(np.random.RandomState(3).standard_normal((4, 16)), jnp.bfloat16)
    cos_sin = angles(jnp.array([1, 100, 10_000, 1_000_000]), frequencies(RELEASED, 16, compressed=True))
    want = rotate(x.astype(jnp.float32), cos_sin).astype(jnp.bfloat16)
    got = rotate(x, cos_sin)
    assert got.dtype == jnp.bfloat16 and cos_sin[0].dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
