"""FP8 matrix products, forward and backward, as in the training of the DeepSeek family (spec 8.4)."""

from v4jax.kernels.fp8_dot.api import dot
from v4jax.kernels.fp8_dot.quantize import gradient_rows, round_rows, round_weights, straight_through

__all__ = ["dot", "gradient_rows", "round_rows", "round_weights", "straight_through"]
