"""Quantization to 8 and 4 bits with a power-of-two scale per group of the last axis (spec 2.4).

"fp8" is e4m3. "fp4" is e2m1 with two elements per byte, the even element in the low nibble. Values are stored as uint8
arrays. Scales are stored as uint8 arrays of e8m0 bytes: the byte b denotes 2^(b - 127). Rounding is exactly that with
which the released models were trained.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.core.errors import UserError

# format -> (largest value, lower bound of a group's amax), spec 2.4. The bound of FP4 gives the smallest scale, 2^-126.
_RANGE = {"fp8": (448.0, 1e-4), "fp4": (6.0, 6 * 2.0**-126)}
_NAN = 255  # e8m0 byte of a group that contains an infinity or a NaN; the full group dequantizes to NaN


def group_size(width: int, most: int) -> int:
    """Return the largest divisor of `width` that is at most `most`."""
    return next(size for size in range(min(width, most), 0, -1) if width % size == 0)


def quantize(x: jax.Array, format: str, group: int) -> tuple[jax.Array, jax.Array]:
    """Quantize an array in groups along its last axis (spec 2.4).

    The scale of a group is the smallest power of two with which the largest magnitude of the group is in range. Values
    round to nearest, ties to the even code. A group that contains an infinity or a NaN gets the scale NaN.

    Args:
        x: [..., n], any float dtype.
        format: "fp8" or "fp4".
        group: elements per scale.

    Returns:
        Values, uint8 [..., n] for "fp8" or [..., n / 2] for "fp4", and scales, uint8 [..., n / group].

    Raises:
        UserError: n is not a multiple of `group`, or n is odd and the format is "fp4".
    """
    width = x.shape[-1]
    if width % group or (format == "fp4" and width % 2):
        raise UserError(f"{width} numbers do not fall into {format} groups of {group}; take one that divides them")
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
    x, scales = _scaled(x, (-1,), format)
    x = x.reshape(*x.shape[:-2], width)
    return _e4m3(x) if format == "fp8" else _pack_e2m1(x), scales[..., 0]


def dequantize(
    values: jax.Array, scales: jax.Array, format: str, dtype=jnp.float32, impl: str | None = None
) -> jax.Array:
    """Invert `quantize`. The group size follows from the shapes.

    Args:
        values: values that `quantize` returned.
        scales: scales that `quantize` returned.
        format: "fp8" or "fp4".
        dtype: float32 or bfloat16; both represent the result exactly.
        impl: "cast" uses XLA's narrow float types. "bits" uses integer operations, which are faster on
            XLA:CPU. None selects "bits" on CPU and "cast" on other backends.

    Returns:
        `dtype` [..., n].
    """
    bits = (impl or _impl()) == "bits"
    if format == "fp8":
        x = _e4m3_by_bits(values) if bits else jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
    else:
        x = _e2m1_by_bits(values) if bits else jax.lax.bitcast_convert_type(values, jnp.float4_e2m1fn)
    x = x.astype(jnp.float32).reshape(*scales.shape, -1)
    x = x * jax.lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu).astype(jnp.float32)[..., None]
    x = _narrow(x) if bits and dtype == jnp.bfloat16 else x.astype(dtype)
    return x.reshape(*scales.shape[:-1], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A weight quantized to e4m3 with one scale per block. The two shapes imply the block shape.

    A QTensor replaces an array in a model. It supports only what matmuls and the selection of an expert need.

    Attributes:
        values: uint8 e4m3 codes, of the shape of the weight.
        scales: uint8 e8m0 codes, one per block.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index) -> QTensor:
        """Index leading axes along which blocks have size 1, such as experts."""
        return self if index is Ellipsis else QTensor(self.values[index], self.scales[index])

    def astype(self, dtype) -> jax.Array:
        """Dequantize to `dtype`, exactly for float32 and bfloat16."""
        bits = _impl() == "bits"
        x = _e4m3_by_bits(self.values) if bits else jax.lax.bitcast_convert_type(self.values, jnp.float8_e4m3fn)
        pairs = zip(self.scales.shape, self.shape, strict=True)
        split = [part for blocks, size in pairs for part in (blocks, size // blocks)]
        scales = jax.lax.bitcast_convert_type(self.scales, jnp.float8_e8m0fnu).astype(jnp.float32)
        x = x.astype(jnp.float32).reshape(split) * jnp.expand_dims(scales, range(1, 2 * scales.ndim, 2))
        x = x.reshape(self.shape)
        return _narrow(x) if bits and dtype == jnp.bfloat16 else x.astype(dtype)


def scaled_dot(x_BRL: jax.Array, rows_BCL: QTensor) -> jax.Array:
    """Multiply x with quantized rows by XLA's block-scaled matmul.

    x is first quantized to e4m3 in groups of the same size. This changes nothing if x was dequantized from FP8 or FP4.
    Chips with block-scaled matmuls (Blackwell, groups of 32) consume the codes directly. On other chips XLA widens the
    codes.

    Args:
        x_BRL: [B, R, L], any float dtype.
        rows_BCL: quantized rows [B, C, L] with one scale per group of the last axis.

    Returns:
        float32 [B, R, C].
    """
    codes_BRL = QTensor(*quantize(x_BRL, "fp8", rows_BCL.shape[-1] // rows_BCL.scales.shape[-1]))
    values = lambda a: jax.lax.bitcast_convert_type(a.values, jnp.float8_e4m3fn)
    scales = lambda a: jax.lax.bitcast_convert_type(a.scales, jnp.float8_e8m0fnu)
    return jax.lax.scaled_dot(
        values(codes_BRL),
        values(rows_BCL),
        lhs_scale=scales(codes_BRL),
        rhs_scale=scales(rows_BCL),
        dimension_numbers=(((2,), (2,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )


def quantize_blocks(x: jax.Array, axes: tuple[int, int], most: int = 128) -> QTensor:
    """Quantize a weight to e4m3 with a power-of-two scale per block along two axes (spec 8.4).

    Quantizing values that were dequantized from the same blocks returns them unchanged.

    Args:
        x: weight, any float dtype.
        axes: the two axes that blocks span.
        most: largest block size along each of the two axes; blocks are as large as equal sizes allow.
    """
    blocked = {axis % x.ndim for axis in axes}
    sizes = [group_size(n, most) if axis in blocked else 1 for axis, n in enumerate(x.shape)]
    split = [part for n, size in zip(x.shape, sizes, strict=True) for part in (n // size, size)]
    y, scales = _scaled(x.astype(jnp.float32).reshape(split), tuple(range(1, 2 * x.ndim, 2)), "fp8")
    return QTensor(_e4m3(y.reshape(x.shape)), scales.reshape(split[::2]))


def _impl() -> str:
    return "bits" if jax.default_backend() == "cpu" else "cast"


def _scaled(x: jax.Array, group: tuple[int, ...], format: str) -> tuple[jax.Array, jax.Array]:
    """Divide float32 x by the scales of its groups, and clip it to the range of the format.

    Args:
        x: float32.
        group: axes that a group spans.
        format: "fp8" or "fp4".

    Returns:
        The scaled x, float32, and the scale bytes, uint8, with size 1 along the axes `group`.
    """
    most, floor = _RANGE[format]
    scales = _scale_bytes(jnp.maximum(jnp.abs(x).max(group, keepdims=True), floor), most)
    # 2^-e is exact: e is in -126..126, so the inverse is a normal float too.
    inverse = jax.lax.bitcast_convert_type((254 - scales.astype(jnp.int32)) << 23, jnp.float32)
    return jnp.clip(x * inverse, -most, most), scales


def _e4m3(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)


def _scale_bytes(amax: jax.Array, most: float) -> jax.Array:
    """Return the e8m0 byte of the smallest 2^e with amax <= most * 2^e, for float32 amax.

    Positive floats are ordered like their bit patterns, and incrementing e adds 2^23 to the bit pattern. Therefore e is
    the difference of the bit patterns divided by 2^23, rounded up. A logarithm would sometimes be off by one.
    """
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    exponent = (bits - int(np.float32(most).view(np.int32)) + 0x7FFFFF) >> 23
    return jnp.where(jnp.isfinite(amax), exponent + 127, _NAN).astype(jnp.uint8)


def _pack_e2m1(x: jax.Array) -> jax.Array:
    """Round float32 [..., n] of magnitude at most 6 to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6; pack as e2m1 codes."""
    a = jnp.abs(x)
    # The comparison with a midpoint is strict exactly if the code below the midpoint is even (ties to even).
    above = [a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0]
    code = sum(condition.astype(jnp.uint8) for condition in above) | jnp.signbit(x).astype(jnp.uint8) << 3
    return code[..., 0::2] | code[..., 1::2] << 4


# --- dequantization by integer operations ------------------------------------------------------------------------
# Both functions go through float16, whose conversion handles subnormals. XLA:CPU flushes float32 subnormals to zero.


def _e4m3_by_bits(code: jax.Array) -> jax.Array:
    """Convert e4m3 codes to float32: move exponent (bias 7) and mantissa to a float16 (bias 15), times 2^8."""
    wide = jax.lax.bitcast_convert_type(code, jnp.int8).astype(jnp.int16) << 7  # sign extension copies the sign twice
    half = jax.lax.bitcast_convert_type(wide & ~jnp.int16(1 << 14), jnp.float16)
    return jnp.where(code & 0x7F == 0x7F, jnp.nan, half.astype(jnp.float32) * 2.0**8)


def _e2m1_by_bits(packed: jax.Array) -> jax.Array:
    """Convert packed e2m1 codes to float32: move exponent (bias 1) and mantissa to a float16, then multiply by 2^14.

    If possible, four bytes are unpacked together: XLA vectorizes eight codes per 32-bit word, but not two per byte.
    """
    *lead, count = packed.shape
    word = packed
    if count % 4 == 0:
        word = jax.lax.bitcast_convert_type(packed.reshape(*lead, -1, 4), jnp.uint32)
    shifts = jnp.arange(0, 8 * word.dtype.itemsize, 4, dtype=word.dtype)
    code = (word[..., None] >> shifts).astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type((code & 7) << 9 | (code & 8) << 12, jnp.float16)
    return half.astype(jnp.float32).reshape(*lead, 2 * count) * 2.0**14


def _narrow(x: jax.Array) -> jax.Array:
    """Convert float32 with at most four significant bits to bfloat16 exactly, by keeping the upper 16 bits."""
    return jax.lax.bitcast_convert_type(
        (jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16).astype(jnp.uint16), jnp.bfloat16
    )
