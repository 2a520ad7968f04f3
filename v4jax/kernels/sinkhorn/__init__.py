"""Doubly stochastic matrices from logits (spec 4.1)."""

from v4jax.kernels.sinkhorn.api import sinkhorn

__all__ = ["sinkhorn"]
