"""Number formats: safetensors dtype codes with their numpy dtypes and sizes, and packed 4-bit floats.

The safetensors format defines the codes. The OCP microscaling formats define FP4 (E2M1) and E8M0 (spec 9.1).
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from v4jax.core.errors import UserError

# code -> (numpy type, bits per element in a file). An F4 element takes 8 bits in memory and 4 bits in a file.
_TABLE = {
    "F64": (np.float64, 64),
    "F32": (np.float32, 32),
    "F16": (np.float16, 16),
    "BF16": (ml_dtypes.bfloat16, 16),
    "F8_E4M3": (ml_dtypes.float8_e4m3fn, 8),
    "F8_E5M2": (ml_dtypes.float8_e5m2, 8),
    "F8_E8M0": (ml_dtypes.float8_e8m0fnu, 8),
    "F4": (ml_dtypes.float4_e2m1fn, 4),
    "I64": (np.int64, 64),
    "I32": (np.int32, 32),
    "I16": (np.int16, 16),
    "I8": (np.int8, 8),
    "U64": (np.uint64, 64),
    "U32": (np.uint32, 32),
    "U16": (np.uint16, 16),
    "U8": (np.uint8, 8),
    "BOOL": (np.bool_, 8),
}
_CODES = {np.dtype(kind): code for code, (kind, _) in _TABLE.items()}
_WEIGHT_TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

CODES = tuple(_TABLE)


def numpy_dtype(code: str) -> np.dtype:
    """Return the numpy dtype of a safetensors code. Raises UserError for an unknown code."""
    if code not in _TABLE:
        raise UserError(f"safetensors type {code!r} is not supported; known: {', '.join(CODES)}")
    return np.dtype(_TABLE[code][0])


def code_of(dtype) -> str:
    """Return the safetensors code of a numpy or ml_dtypes type. Raises UserError if the type has no code."""
    dtype = np.dtype(dtype)
    if dtype not in _CODES:
        raise UserError(f"safetensors cannot store {dtype.name}; known: {', '.join(CODES)}")
    return _CODES[dtype]


def bytes_per_element(code: str) -> float:
    """Return the bytes per element in a file; 0.5 for F4."""
    numpy_dtype(code)
    return _TABLE[code][1] / 8


def nbytes(code: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor in a file, in bytes. Raises UserError for an odd number of 4-bit elements."""
    numpy_dtype(code)
    bits = math.prod(shape) * _TABLE[code][1]
    if bits % 8:
        raise UserError(f"a {code} tensor of shape {list(shape)} does not fill whole bytes; its size must be even")
    return bits // 8


def weight_dtype(name) -> np.dtype:
    """Return the numpy dtype of weights.

    Args:
        name: "float32", "bfloat16" or "float16", or such a dtype.

    Raises:
        UserError: `name` is anything else.
    """
    known = ", ".join(_WEIGHT_TYPES)
    if isinstance(name, str):
        if name not in _WEIGHT_TYPES:
            raise UserError(f"weights cannot be {name!r}; choose one of {known}")
        return np.dtype(_WEIGHT_TYPES[name])
    dtype = np.dtype(name)
    if dtype.name not in _WEIGHT_TYPES:
        raise UserError(f"weights cannot be {dtype.name}; choose one of {known}")
    return dtype


def unpack_f4(packed: np.ndarray) -> np.ndarray:
    """Unpack bytes [..., n] to float4_e2m1fn [..., 2n]. The low nibble is the even element (spec 9.1)."""
    codes = packed.view(np.uint8)
    out = np.empty((*codes.shape, 2), np.uint8)
    np.bitwise_and(codes, 15, out=out[..., 0])
    np.right_shift(codes, 4, out=out[..., 1])
    return out.reshape(*codes.shape[:-1], -1).view(ml_dtypes.float4_e2m1fn)


def pack_f4(values: np.ndarray) -> np.ndarray:
    """Pack float4_e2m1fn [..., 2n] to uint8 [..., n]. This is the inverse of `unpack_f4`."""
    codes = values.view(np.uint8) & 15
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
