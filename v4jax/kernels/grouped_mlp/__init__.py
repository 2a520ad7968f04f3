"""Expert products: every token through its own experts and no others (spec 3.2)."""

from v4jax.kernels.grouped_mlp.api import experts, swiglu

__all__ = ["experts", "swiglu"]
