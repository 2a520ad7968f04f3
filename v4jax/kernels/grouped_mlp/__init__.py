"""Grouped expert MLP: each token passes through its K experts only (spec 3.2)."""

from v4jax.kernels.grouped_mlp.api import experts
from v4jax.kernels.grouped_mlp.swiglu import swiglu

__all__ = ["experts", "swiglu"]
