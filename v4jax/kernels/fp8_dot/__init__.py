"""Products of FP8 numbers, forward and backward, as the family is trained (spec 8.4)."""

from v4jax.kernels.fp8_dot.api import dot
from v4jax.kernels.fp8_dot.quantize import gradient_rows, weights, with_rows

__all__ = ["dot", "gradient_rows", "weights", "with_rows"]
