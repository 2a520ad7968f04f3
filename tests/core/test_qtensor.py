"""Quantized tensors: the spec's golden values, every code, every rounding boundary, and any shape."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.core import qtensor
from v4jax.core.errors import UserError
from v4jax.core.qtensor import group_size

CODES = np.arange(256, dtype=np.uint8)
TYPES = {"fp8": ml_dtypes.float8_e4m3fn, "fp4": ml_dtypes.float4_e2m1fn}
MOST = {"fp8": 448.0, "fp4": 6.0}
IMPLS = ["bits", "cast"]
ONE = np.uint8(127)  # scale byte of 2^0

# Compiled: step by step, every operation would be a program of its own for every shape.
quantize = jax.jit(qtensor.quantize, static_argnums=(1, 2))
dequantize = jax.jit(qtensor.dequantize, static_argnames=("format", "dtype", "impl"))


def reference(x: np.ndarray, format: str, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale bytes and numbers by the text of spec 2.4 in float64: s = 2^ceil(log2(amax / most)), y = round(x / s) s."""
    floor = {"fp8": np.float32(1e-4), "fp4": 6 * 2.0**-126}[format]
    x = x.astype(np.float64).reshape(*x.shape[:-1], -1, group)
    mantissa, exponent = np.frexp(np.maximum(np.abs(x).max(-1, keepdims=True), floor) / MOST[format])
    exponent = exponent - (mantissa == 0.5)
    scale = 2.0**exponent
    y = np.clip(x / scale, -MOST[format], MOST[format]).astype(np.float32).astype(TYPES[format]).astype(np.float64)
    return (exponent[..., 0] + 127).astype(np.uint8), (y * scale).reshape(*x.shape[:-2], -1).astype(np.float32)


@pytest.mark.parametrize(
    "format, x, scale, want",
    [
        ("fp8", [0.1, -0.7, 3.3, 100, -449, 1e-3, 0, 17.3], 2.0, [0.1015625, -0.6875, 3.25, 96, -448, 0, 0, 18]),
        ("fp4", [0.26, -0.74, 0.25, 0.75, 1.3, -2.5, 5, 7.2], 2.0, [0, -1, 0, 1, 1, -2, 4, 8]),
    ],
)
def test_golden_values_of_the_spec(format, x, scale, want):
    values, scales = quantize(jnp.asarray(x), format, 8)
    assert values.dtype == scales.dtype == jnp.uint8
    assert scales.tolist() == [127 + np.log2(scale)]
    assert dequantize(values, scales, format).tolist() == want


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_e4m3_code(impl, dtype):
    want = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got = dequantize(CODES, ONE[None], "fp8", dtype, impl)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(jnp.float32), want)
    np.testing.assert_array_equal(np.signbit(got[:255]), np.signbit(want[:255]))  # the sign of a NaN means nothing


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4, 256])  # bytes of a row: spread by one or by four
def test_every_e2m1_pair(impl, dtype, size):
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    code = np.stack([CODES & 15, CODES >> 4], axis=-1)  # the low nibble is the even element
    want = np.where(code < 8, 1, -1).astype(np.float32) * grid[code & 7]
    got = dequantize(CODES.reshape(-1, size), np.full((256 // size, 1), ONE), "fp4", dtype, impl)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(jnp.float32), want.reshape(-1, 2 * size))


@pytest.mark.parametrize("impl", IMPLS)
def test_scales_are_exponents_not_numbers(impl):
    """Byte b is 2^(b - 127), and 255 no number; 2^-127 itself is a subnormal, which CPUs may take for zero."""
    one = np.full((256, 1), 0x38, np.uint8)  # e4m3 of 1
    got = np.asarray(dequantize(one, CODES[:, None], "fp8", impl=impl))[:, 0]
    np.testing.assert_array_equal(got[1:255], 2.0 ** np.arange(-126, 128, dtype=np.float64))
    assert np.isnan(got[255]) and got[0] in (0, 2.0**-127)


@pytest.mark.parametrize("format", TYPES)
def test_rounds_to_nearest_even_at_every_boundary(format):
    """Each code, each midpoint between two, and the floats next to a midpoint; the group's scale is pinned to 1."""
    codes = CODES[: 2 ** (8 if format == "fp8" else 4)].view(TYPES[format]).astype(np.float32)
    grid = np.unique(np.abs(codes[np.isfinite(codes)]))
    middle = (grid[1:] + grid[:-1]) / 2
    points = np.concatenate([grid, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))])
    x = np.concatenate([points, -points]).astype(np.float32)
    values, scales = quantize(x, format, x.size)
    assert scales.tolist() == [ONE]
    np.testing.assert_array_equal(dequantize(values, scales, format), x.astype(TYPES[format]).astype(np.float32))


@pytest.mark.parametrize("format", TYPES)
def test_scale_steps_exactly_at_powers_of_two(format):
    """amax = most * 2^e fits scale 2^e; the next float does not. Float logarithms get some of these wrong."""
    exponents = np.arange(-20, 119)
    edge = (MOST[format] * 2.0**exponents).astype(np.float32)
    for amax, step in ((edge, 0), (np.nextafter(edge, np.float32(np.inf)), 1), (np.nextafter(edge, np.float32(0)), 0)):
        _, scales = quantize(np.stack([amax, -amax / 3], axis=-1), format, 2)
        np.testing.assert_array_equal(scales[:, 0], 127 + exponents + step)


def test_floors_of_amax():
    zeros = np.zeros((1, 32), np.float32)
    assert quantize(zeros, "fp8", 32)[1].tolist() == [[127 - 22]]  # 2^ceil(log2(1e-4 / 448))
    assert quantize(zeros, "fp4", 32)[1].tolist() == [[1]]
    for format in TYPES:
        np.testing.assert_array_equal(dequantize(*quantize(zeros, format, 32), format), zeros)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", TYPES)
def test_what_is_no_number_spoils_its_group_alone(format, bad):
    x = np.ones((2, 8), np.float32)
    x[0, 5] = bad
    got = dequantize(*quantize(x, format, 4), format)
    assert np.isnan(got[0, 4:]).all() and np.array_equal(got[0, :4], x[0, :4]) and np.array_equal(got[1], x[1])


@pytest.mark.parametrize("format", TYPES)
@pytest.mark.parametrize("group", [6, 64])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), spread=st.integers(0, 18))
def test_any_tensor_is_rounded_as_the_spec_says(format, group, seed, spread):
    rng = np.random.RandomState(seed)
    x = rng.standard_normal((3, 192 // group, group)) * 2.0 ** rng.randint(-spread, spread + 1, (3, 192 // group, 1))
    x = x.reshape(3, 192).astype(np.float32)
    values, scales = quantize(x, format, group)
    want_scales, want = reference(x, format, group)
    np.testing.assert_array_equal(scales, want_scales)
    for impl in IMPLS:
        np.testing.assert_array_equal(dequantize(values, scales, format, impl=impl), want)
        narrow = dequantize(values, scales, format, jnp.bfloat16, impl)
        np.testing.assert_array_equal(narrow.astype(jnp.float32), want)
    again = quantize(want, format, group)
    np.testing.assert_array_equal(dequantize(*again, format), want)  # what is on the grid stays


def test_the_backend_chooses(monkeypatch):
    x = np.random.RandomState(0).standard_normal((4, 64)).astype(np.float32)
    stored = quantize(x, "fp8", 64)
    text = lambda: str(jax.make_jaxpr(lambda v, s: qtensor.dequantize(v, s, "fp8"))(*stored))
    assert "e4m3" not in text()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "e4m3" in text()


def test_bfloat16_input_is_taken_as_it_is():
    x = jnp.asarray(np.random.RandomState(1).standard_normal((2, 32)), jnp.bfloat16)
    for format in TYPES:
        for got, want in zip(quantize(x, format, 32), quantize(x.astype(jnp.float32), format, 32), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("width, format, group", [(10, "fp8", 4), (3, "fp4", 3)])
def test_a_group_that_does_not_divide_is_refused(width, format, group):
    with pytest.raises(UserError, match=f"{width} numbers do not fall into {format} groups of {group}"):
        qtensor.quantize(jnp.zeros((2, width)), format, group)


@pytest.mark.parametrize("width, most, want", [(448, 64, 64), (48, 64, 48), (112, 64, 56), (128, 32, 32), (97, 64, 1)])
def test_groups_are_the_fewest_equal_ones(width, most, want):
    assert group_size(width, most) == want
