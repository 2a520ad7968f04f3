"""Numbers in 8 and 4 bits with a power-of-two scale per group of the last axis (spec 2.4).

"fp8" is e4m3, "fp4" is e2m1 packed two a byte, the even element in the low nibble. Both are uint8 arrays, and so are
the scales: e8m0 bytes, byte b stands for 2^(b - 127). The formats round exactly as the released models were trained.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.core.errors import UserError

# format -> (largest value, least amax of a group): spec 2.4. FP4's floor gives the least scale, 2^-126.
_RANGE = {"fp8": (448.0, 1e-4), "fp4": (6.0, 6 * 2.0**-126)}
_NAN = 255  # e8m0 byte of a group that holds an infinity or a NaN: all of it reads as NaN


def group_size(width: int, most: int) -> int:
    """Size of the fewest equal groups, of at most `most` numbers, that `width` numbers fall into."""
    return next(size for size in range(min(width, most), 0, -1) if width % size == 0)


def quantize(x: jax.Array, format: str, group: int) -> tuple[jax.Array, jax.Array]:
    """Values and scales of x [..., n] in groups of `group` along the last axis (spec 2.4).

    Returns uint8 [..., n] ("fp8") or [..., n / 2] ("fp4"), and uint8 [..., n / group]. The scale is the least power of
    two with which the group's largest magnitude fits; rounding is to nearest, ties to the even code. A group with an
    infinity or a NaN gets the scale NaN. Raises UserError if n is no multiple of the group, or odd with "fp4".
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
    """Numbers [..., n] in `dtype`, float32 or bfloat16 (both hold them exactly), of what `quantize` returned.

    The group size follows from the shapes. impl: "cast" converts by the compiler's own types, "bits" by integer
    operations, which XLA:CPU does up to five times faster; None takes "bits" on CPU and "cast" elsewhere.
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
    """A weight in e4m3: `values`, uint8 of the weight's shape, and `scales`, uint8 e8m0, one a block of the shape
    that the two shapes imply. It stands where an array stood, as far as products and picking an expert need."""

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index) -> QTensor:
        """Along leading axes that no block spans, such as experts."""
        return self if index is Ellipsis else QTensor(self.values[index], self.scales[index])

    def astype(self, dtype) -> jax.Array:
        """The numbers, exact in float32 and bfloat16."""
        bits = _impl() == "bits"
        x = _e4m3_by_bits(self.values) if bits else jax.lax.bitcast_convert_type(self.values, jnp.float8_e4m3fn)
        pairs = zip(self.scales.shape, self.shape, strict=True)
        split = [part for blocks, size in pairs for part in (blocks, size // blocks)]
        scales = jax.lax.bitcast_convert_type(self.scales, jnp.float8_e8m0fnu).astype(jnp.float32)
        x = x.astype(jnp.float32).reshape(split) * jnp.expand_dims(scales, range(1, 2 * scales.ndim, 2))
        x = x.reshape(self.shape)
        return _narrow(x) if bits and dtype == jnp.bfloat16 else x.astype(dtype)


def scaled_dot(x_BRL: jax.Array, rows_BCL: QTensor) -> jax.Array:
    """x times rows as they are stored, with a scale a group of the last axis: float32 [B, R, C].

    x is rounded to e4m3 in such groups, which changes nothing in what FP8 or FP4 held. Chips with block-scaled products
    (Blackwell, groups of 32) take the codes as they lie; elsewhere XLA widens them itself.
    """
    x_BRL = QTensor(*quantize(x_BRL, "fp8", rows_BCL.shape[-1] // rows_BCL.scales.shape[-1]))
    values = lambda a: jax.lax.bitcast_convert_type(a.values, jnp.float8_e4m3fn)
    scales = lambda a: jax.lax.bitcast_convert_type(a.scales, jnp.float8_e8m0fnu)
    return jax.lax.scaled_dot(
        values(x_BRL),
        values(rows_BCL),
        lhs_scale=scales(x_BRL),
        rhs_scale=scales(rows_BCL),
        dimension_numbers=(((2,), (2,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )


def quantize_blocks(x: jax.Array, axes: tuple[int, int], most: int = 128) -> QTensor:
    """A weight in e4m3 with a power-of-two scale a block of at most `most` x `most` along two axes (spec 8.4), the
    fewest equal blocks that there are. Numbers that such a block held once come back unchanged."""
    blocked = {axis % x.ndim for axis in axes}
    sizes = [group_size(n, most) if axis in blocked else 1 for axis, n in enumerate(x.shape)]
    split = [part for n, size in zip(x.shape, sizes, strict=True) for part in (n // size, size)]
    y, scales = _scaled(x.astype(jnp.float32).reshape(split), tuple(range(1, 2 * x.ndim, 2)), "fp8")
    return QTensor(_e4m3(y.reshape(x.shape)), scales.reshape(split[::2]))


def _impl() -> str:
    return "bits" if jax.default_backend() == "cpu" else "cast"


def _scaled(x: jax.Array, group: tuple[int, ...], format: str) -> tuple[jax.Array, jax.Array]:
    """float32 x over its groups' scales, clipped to the format's range; the scale bytes, axes `group` of size 1."""
    most, floor = _RANGE[format]
    scales = _scale_bytes(jnp.maximum(jnp.abs(x).max(group, keepdims=True), floor), most)
    # 2^-e, exact: e lies in -126..126, so the inverse is a normal float too.
    inverse = jax.lax.bitcast_convert_type((254 - scales.astype(jnp.int32)) << 23, jnp.float32)
    return jnp.clip(x * inverse, -most, most), scales


def _e4m3(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)


def _scale_bytes(amax: jax.Array, most: float) -> jax.Array:
    """e8m0 byte of the least 2^e with amax <= most * 2^e.

    Positive floats are ordered as their bits, and a step of e adds 2^23 to them: e is the difference of the bits over
    2^23, rounded up. No logarithm, which would be off by one now and then.
    """
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    exponent = (bits - int(np.float32(most).view(np.int32)) + 0x7FFFFF) >> 23
    return jnp.where(jnp.isfinite(amax), exponent + 127, _NAN).astype(jnp.uint8)


def _pack_e2m1(x: jax.Array) -> jax.Array:
    """float32 [..., n] of at most 6 in magnitude to packed e2m1: nearest of 0, .5, 1, 1.5, 2, 3, 4, 6."""
    a = jnp.abs(x)
    # At a midpoint the comparison is strict exactly where the code below is even.
    above = [a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0]
    code = sum(condition.astype(jnp.uint8) for condition in above) | jnp.signbit(x).astype(jnp.uint8) << 3
    return code[..., 0::2] | code[..., 1::2] << 4


# --- by integer operations ---------------------------------------------------------------------------------------
# Both go through float16, whose conversion knows subnormals: XLA:CPU flushes those of float32 to zero.


def _e4m3_by_bits(code: jax.Array) -> jax.Array:
    """float32 of e4m3 codes: exponent (bias 7) and mantissa moved to a float16's (bias 15), times 2^8."""
    wide = jax.lax.bitcast_convert_type(code, jnp.int8).astype(jnp.int16) << 7  # the sign comes along, twice
    half = jax.lax.bitcast_convert_type(wide & ~jnp.int16(1 << 14), jnp.float16)
    return jnp.where(code & 0x7F == 0x7F, jnp.nan, half.astype(jnp.float32) * 2.0**8)


def _e2m1_by_bits(packed: jax.Array) -> jax.Array:
    """float32 of packed e2m1 codes: exponent (bias 1) and mantissa moved to a float16's, times 2^14.

    Bytes are spread by fours where they can be: eight neighbours out of one word vectorise, two out of a byte do not.
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
    """bfloat16 of float32 numbers of at most four significant bits: the upper half, nothing to round."""
    return jax.lax.bitcast_convert_type(
        (jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16).astype(jnp.uint16), jnp.bfloat16
    )
