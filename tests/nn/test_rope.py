"""Rotary frequencies and rotation against golden values and complex arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.nn import reference
from v4jax.config import RoPE
from v4jax.nn.rope import angles, frequencies, rotate

RELEASED = RoPE(yarn_factor=16.0, yarn_original=65_536)


def test_yarn_golden_values():
    """Spec 2.3: 64 rotary channels, theta 160000, factor 16, original 65536."""
    freq = frequencies(RELEASED, 64, compressed=True)
    golden = {
        0: 1,
        8: 5.000000e-2,
        15: 3.635539e-3,
        16: 2.265625e-3,
        20: 2.969778e-4,
        24: 1.953125e-5,
        25: 5.372313e-6,
        31: 5.680529e-7,
    }
    np.testing.assert_allclose(freq[list(golden)], list(golden.values()), rtol=2e-6)
    assert freq.shape == (32,) and freq.dtype == np.float32


# Made by transformers 5.23 (`DeepseekV4RotaryEmbedding`) from the released V4-Flash config.
RELEASED_MAIN = """
1.0 0.7498942 0.56234133 0.4216965 0.31622776 0.23713736 0.17782794 0.13335215 0.1 0.074989416 0.05623413 0.04216965
0.03162278 0.023713736 0.017782794 0.013335215 0.01 0.0074989423 0.0056234132 0.004216965 0.0031622779 0.0023713738
0.0017782794 0.0013335214 0.001 0.0007498942 0.0005623413 0.0004216965 0.0003162278 0.00023713738 0.00017782794
0.00013335215"""
RELEASED_COMPRESS = """
1.0 0.68765604 0.4728708 0.32517245 0.2236068 0.15376456 0.10573712 0.072710775 0.05 0.0343828 0.02364354 0.016258623
0.01118034 0.007688228 0.0052868566 0.0036355385 0.002265625 0.0013968013 0.0008496897 0.000508082 0.00029697779
0.00016817998 9.086784e-05 4.544423e-05 1.9531253e-05 5.3723124e-06 3.6943034e-06 2.5404097e-06 1.7469282e-06
1.2012856e-06 8.260713e-07 5.6805294e-07"""


@pytest.mark.parametrize("compressed, released", [(False, RELEASED_MAIN), (True, RELEASED_COMPRESS)])
def test_frequencies_equal_the_released_ones_bit_for_bit(compressed, released):
    """A table of float64 powers, rounded once, differs in 19 of the 64 by 1 or 2 ulp."""
    want = np.array([float(value) for value in released.split()], np.float32)
    np.testing.assert_array_equal(frequencies(RELEASED, 64, compressed), want)


@pytest.mark.parametrize("dim", [8, 64])
def test_window_layers_have_their_own_theta_and_no_yarn(dim):
    plain = 10_000.0 ** (-np.arange(0, dim, 2) / dim)
    np.testing.assert_allclose(frequencies(RELEASED, dim, compressed=False), plain, rtol=1e-6)
    compressed = 160_000.0 ** (-np.arange(0, dim, 2) / dim)
    np.testing.assert_allclose(frequencies(RoPE(), dim, compressed=True), compressed, rtol=1e-6)


@pytest.mark.parametrize(
    "factor, original, fast, slow",
    [
        (16.0, 65_536, 32, 1),
        (8.0, 64, 32, 1),
        (4.0, 4, 32, 1),
        (4.0, 1, 32, 1),
        (0.5, 65_536, 32, 1),
        (4.0, 4096, 1, 32),
    ],
)
def test_yarn_is_the_formula(factor, original, fast, slow):
    rope = RoPE(yarn_factor=factor, yarn_original=original, yarn_beta_fast=fast, yarn_beta_slow=slow)
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
