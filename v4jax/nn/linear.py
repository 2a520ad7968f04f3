"""Parameters with logical axes, and einsum products in the compute dtype."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.kernels import fp8_dot

# Axis letters of matrices that are released in FP8 (spec 9.1) and multiplied in FP8 (spec 9.3, so without `wo_a`).
FP8_WEIGHT_AXES = {"DQ", "QNH", "DH", "GRD", "QJL", "DUF", "FD", "DO", "EUDF", "EFD"}


class Buffer(nnx.Variable):
    """A stored array that no optimizer touches: router biases (spec 3.3) and hash tables (spec 3.1)."""


def normal_param(rngs: nnx.Rngs, letters: str, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Return a float32 parameter drawn from N(0, std); `letters` of the axis alphabet name its axes."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), letters=letters)


def param(letters: str, value: jax.Array) -> nnx.Param:
    """Return a float32 parameter with the given initial value."""
    return nnx.Param(jnp.asarray(value, jnp.float32), letters=letters)


def einsum(spec: str, x: jax.Array, w: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """Return `einsum(spec, x, w)`, computed in `dtype`. Letters follow the axis alphabet, and w may hold a QTensor.

    A weight that `mark_low_precision` marked is multiplied in FP8, with float32 sums.
    """
    if is_fp8(w):
        return _project_fp8(spec, x, w[...]).astype(dtype)
    return jnp.einsum(spec, x.astype(dtype), w[...].astype(dtype))


def mark_low_precision(model: nnx.Module, matmul: str, expert_weights: str) -> None:
    """Mark the parameters that are multiplied in FP8 or rounded to MXFP4 (`config.Train`).

    The mark is metadata of the parameter, chosen by its axis letters, so that no layer needs a mode.
    """
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            letters = variable.get_metadata("letters")
            if matmul == "fp8" and letters in FP8_WEIGHT_AXES:
                variable.set_metadata(fp8=True)
            if expert_weights == "mxfp4" and letters in ("EUDF", "EFD"):
                variable.set_metadata(mxfp4=True)


def is_fp8(w: nnx.Param) -> bool:
    """Whether products with this weight are in FP8."""
    return w.get_metadata("fp8", False)


def is_mxfp4(w: nnx.Param) -> bool:
    """Whether this weight is rounded to MXFP4 before use."""
    return w.get_metadata("mxfp4", False)


def _project_fp8(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Compute the product of `einsum` as an FP8 product of [B, T, D] and [D, U, F].

    The axes of x from the second up to the contracted ones are merged into T. U counts matrices and stays separate from
    F, which may be split over devices.
    """
    left, right = spec.split("->")[0].split(",")
    inner = len([letter for letter in left if letter in right])
    U = w.shape[inner] if right[inner] == "U" else 1
    D = math.prod(w.shape[:inner])
    y_BTUF = fp8_dot.dot(x.reshape(x.shape[0], -1, D), w.reshape(D, U, -1))
    return y_BTUF.reshape(*x.shape[: x.ndim - inner], *w.shape[inner:])
